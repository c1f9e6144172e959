// The interface between paste_masks_cpu.cpp and the CPU kernels of mask pasting, which are compiled once per
// instruction set: plain data and a table of functions, torch-free.
#pragma once

#include <cstdint>

#include "common/element.h"
#include "common/workers.h"
#include "roi/paste_masks_math.h"

namespace pyseg {

struct PasteArgs {
  Element type;  // of the masks and of values
  int64_t count, mask_height, mask_width, padding, height, width;
  const void* masks;                     // [count, mask_height, mask_width]
  const roi::PasteAxis *rows, *columns;  // [count]
  double threshold;
  roi::PasteOutput output;
};

// The run lengths of one mask, in memory of malloc.
struct PasteRuns {
  uint8_t* data;
  int64_t size, capacity;
  bool failed;  // out of memory
};

struct PasteKernelTable {
  int64_t (*workspace)(const PasteArgs&, int64_t workers);  // bytes
  // out: [count, height, width] of the masks' type or bool, or [count, height, (width + 7) / 8]
  void (*paste)(const PasteArgs&, void* out, void* workspace, const Workers&);
  // grad: [count, height, width]; a.masks is not read; grad_masks: [count, mask_height, mask_width]
  void (*backward)(const PasteArgs&, const void* grad, void* grad_masks, void* workspace, const Workers&);
  void (*run_lengths)(const PasteArgs&, PasteRuns* runs, void* workspace, const Workers&);
};

namespace baseline {
extern const PasteKernelTable paste_kernels;
}
namespace avx2 {
extern const PasteKernelTable paste_kernels;
}
namespace avx512 {
extern const PasteKernelTable paste_kernels;
}

}  // namespace pyseg
