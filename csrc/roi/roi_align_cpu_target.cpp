// The CPU kernels of RoIAlign for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "roi/cpu_crop_masks.h"
#include "roi/cpu_roi_backward.h"
#include "roi/cpu_roi_forward.h"
#include "roi/roi_align_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// Calls f.template operator()<T, A>() with the types of the elements and of the arithmetic.
template <typename F>
inline void with_types(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f.template operator()<float, float>();
    case Element::kDouble: return f.template operator()<double, double>();
    case Element::kHalf: return f.template operator()<Half, float>();
    default: return f.template operator()<BFloat16, float>();
  }
}

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
