// The CPU kernels of expectation_labels, once for each instruction set.
#pragma once

#include "common/workers.h"
#include "loss/expectation_labels_math.h"

namespace pyseg {

struct ExpectationKernels {
  // Bytes of one worker's scratch, where an image has at most so many classes that compete.
  int64_t (*worker_bytes)(const loss::ExpectationArgs&, int64_t competing);
  // workspace: aligned to 64 bytes, worker_bytes for each worker.
  void (*run)(const loss::ExpectationArgs&, int64_t competing, void* workspace, const Workers&);
};

namespace baseline {
extern const ExpectationKernels expectation_kernels;
}
namespace avx2 {
extern const ExpectationKernels expectation_kernels;
}
namespace avx512 {
extern const ExpectationKernels expectation_kernels;
}

}  // namespace pyseg
