// Launches of point_supervision_loss and of its backward pass.
#include "loss/point_supervision_cuda.cuh"
#include "loss/segmentation_launch_cuda.cuh"

namespace pyseg::loss {

cudaError_t launch_point_supervision(const SegmentationArgs& a, const PointSupervisionArgs& p, cudaStream_t stream) {
  const int units = static_cast<int>(units_of_image(a));
  const int64_t rows = (a.images * a.classes + kWarps - 1) / kWarps;
  if (rows >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const cudaError_t error = with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    const size_t extra = point_shared_bytes(a.classes, sizeof(Accumulator<T>));
    const cudaError_t first =
        launch_tiles_and<T>(extra, a, stream, point_supervision_kernel<T, true>, point_supervision_kernel<T, false>, p);
    if (first != cudaSuccess) return first;
    point_supervision_classes_kernel<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(a, p, units);
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  point_supervision_terms_kernel<<<static_cast<unsigned>(a.images), kThreads, 0, stream>>>(p, a.classes, units);
  return cudaGetLastError();
}

cudaError_t launch_point_supervision_backward(const SegmentationArgs& a, const PointSupervisionArgs& p,
                                              cudaStream_t stream) {
  return with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    return launch_tiles_and<T>(point_shared_bytes(a.classes, sizeof(Accumulator<T>)), a, stream,
                               point_supervision_backward_kernel<T, true>, point_supervision_backward_kernel<T, false>,
                               p);
  });
}

}  // namespace pyseg::loss
