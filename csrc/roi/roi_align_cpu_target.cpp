// The CPU kernels of RoIAlign for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "roi/cpu_crop_masks.h"
#include "roi/cpu_roi_backward.h"
#include "roi/cpu_roi_forward.h"
#include "roi/roi_align_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

void forward(const RoiArgs& a, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { RoiForward<T, A>(a, workers).run(); });
}

void backward(const RoiArgs& a, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { RoiBackward<T, A>(a, workers).run(); });
}

void crop(const RoiArgs& a, const Workers& workers) { crop_masks(a, workers); }

}  // namespace

extern const RoiKernelTable roi_kernels;
const RoiKernelTable roi_kernels = {.forward = forward, .backward = backward, .crop = crop};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
