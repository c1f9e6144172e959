// The CPU kernels of valve_conv2d and region_gate, once for each instruction set; torch-free.
#pragma once

#include "common/element.h"
#include "common/workers.h"
#include "conv/valve_conv2d_math.h"

namespace pyseg {

struct ValveKernelTable {
  int64_t (*scratch)(Element, const valve::Maps&, bool backward, int64_t workers);  // bytes
  void (*forward)(Element, const valve::Maps&, void* scratch, const Workers&);
  // Leaves the sums over all parts in the first.
  void (*backward)(Element, const valve::Maps&, void* scratch, const Workers&);
  // region_grad [N, R, H_r, W_r], dense, from `scattered` with one group.
  void (*gather)(Element, const valve::Maps&, void* region_grad, void* scratch, const Workers&);
};

namespace baseline {
extern const ValveKernelTable valve_kernels;
}
namespace avx2 {
extern const ValveKernelTable valve_kernels;
}
namespace avx512 {
extern const ValveKernelTable valve_kernels;
}

}  // namespace pyseg
