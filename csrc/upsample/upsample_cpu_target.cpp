// The CPU kernels of this family for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "upsample/cpu_upsample_concat.h"
#include "upsample/cpu_upsample_depthwise.h"
#include "upsample/cpu_upsample_depthwise_backward.h"
#include "upsample/upsample_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

int64_t concat_scratch(const UpsampleArgs& a, int64_t workers) {
  return with_types(a.type, [&]<typename T, typename A>() { return UpsampleConcat<T, A>::scratch(a, workers); });
}

void concat(const UpsampleArgs& a, void* scratch, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { UpsampleConcat<T, A>(a, scratch).forward(workers); });
}

void concat_backward(const UpsampleArgs& a, void* scratch, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { UpsampleConcat<T, A>(a, scratch).backward(workers); });
}

int64_t depthwise_scratch(const UpsampleDepthwiseArgs& a, int64_t workers) {
  return with_types(a.upsample.type,
                    [&]<typename T, typename A>() { return UpsampleDepthwise<T, A>::scratch(a, workers); });
}

void depthwise(const UpsampleDepthwiseArgs& a, void* scratch, const Workers& workers) {
  with_types(a.upsample.type, [&]<typename T, typename A>() { UpsampleDepthwise<T, A>(a, scratch).run(workers); });
}

int64_t depthwise_backward_scratch(const UpsampleDepthwiseArgs& a, int64_t workers) {
  return with_types(a.upsample.type,
                    [&]<typename T, typename A>() { return UpsampleDepthwiseBackward<T, A>::scratch(a, workers); });
}

void depthwise_backward(const UpsampleDepthwiseArgs& a, void* scratch, const Workers& workers) {
  with_types(a.upsample.type,
             [&]<typename T, typename A>() { UpsampleDepthwiseBackward<T, A>(a, scratch).run(workers); });
}

}  // namespace

extern const UpsampleKernelTable upsample_kernels;
const UpsampleKernelTable upsample_kernels = {
    .concat_scratch = concat_scratch,
    .concat = concat,
    .concat_backward = concat_backward,
    .depthwise_scratch = depthwise_scratch,
    .depthwise = depthwise,
    .depthwise_backward_scratch = depthwise_backward_scratch,
    .depthwise_backward = depthwise_backward,
};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
