// Launches of the statistics, of their backward pass and of the loss of single pixels.
#include "loss/segmentation_launch_cuda.cuh"

namespace pyseg::loss {

cudaError_t launch_statistics(const SegmentationArgs& a, cudaStream_t stream) {
  const cudaError_t error = with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    return launch_tiles<T>(a, stream, segmentation_statistics_kernel<T, true>,
                           segmentation_statistics_kernel<T, false>);
  });
  if (error != cudaSuccess) return error;
  const int row = a.classes * kStatistics;
  const int64_t blocks = (a.images * row + kThreads - 1) / kThreads;
  segmentation_statistics_reduce<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      a.partial, a.statistics, a.images, static_cast<int>(units_of_image(a)), row);
  return cudaGetLastError();
}

cudaError_t launch_backward(const SegmentationArgs& a, cudaStream_t stream) {
  return with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    return launch_tiles<T>(a, stream, segmentation_backward_kernel<T, true>, segmentation_backward_kernel<T, false>);
  });
}

cudaError_t launch_pixel_loss(const SegmentationArgs& a, cudaStream_t stream) {
  return with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    return launch_tiles<T>(a, stream, segmentation_pixel_loss_kernel<T, true>,
                           segmentation_pixel_loss_kernel<T, false>);
  });
}

}  // namespace pyseg::loss
