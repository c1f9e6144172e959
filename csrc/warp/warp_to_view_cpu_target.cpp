// The CPU kernels of warp_to_view for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "warp/cpu_view_backward.h"
#include "warp/cpu_view_forward.h"
#include "warp/warp_to_view_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

int64_t forward_scratch(const ViewWarpArgs& a, int64_t workers) {
  return with_types(a.type, [&]<typename T, typename A>() { return ViewForward<T, A>(a, nullptr).scratch(workers); });
}

void forward(const ViewWarpArgs& a, void* scratch, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { ViewForward<T, A>(a, scratch).run(workers); });
}

int64_t backward_scratch(const ViewWarpArgs& a, int64_t workers) {
  return with_types(a.type, [&]<typename T, typename A>() { return ViewBackward<T, A>(a, nullptr).scratch(workers); });
}

void backward(const ViewWarpArgs& a, void* scratch, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { ViewBackward<T, A>(a, scratch).run(workers); });
}

}  // namespace

extern const ViewWarpKernelTable view_warp_kernels;
const ViewWarpKernelTable view_warp_kernels = {
    .forward_scratch = forward_scratch,
    .forward = forward,
    .backward_scratch = backward_scratch,
    .backward = backward,
};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
