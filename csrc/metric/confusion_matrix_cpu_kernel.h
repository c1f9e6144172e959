// The CPU kernel of confusion_matrix, once for each instruction set.
#pragma once

#include "common/workers.h"
#include "metric/confusion_matrix_math.h"

namespace pyseg {

struct ConfusionKernelTable {
  int64_t (*workspace)(const metric::ConfusionArgs&, int64_t workers);  // int64 elements
  // Returns the first pixel (image * pixels + pixel) that is not ignored and whose label is out of range, or -1; the
  // matrix is incomplete then.
  int64_t (*run)(const metric::ConfusionArgs&, int64_t* workspace, const Workers&);
};

namespace baseline {
extern const ConfusionKernelTable confusion_kernels;
}
namespace avx2 {
extern const ConfusionKernelTable confusion_kernels;
}
namespace avx512 {
extern const ConfusionKernelTable confusion_kernels;
}

}  // namespace pyseg
