// Launches of lovasz_statistics' kernels, CUB's sort and prefix sum among them.
#include <thrust/iterator/transform_iterator.h>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "loss/lovasz_cuda.cuh"
#include "loss/segmentation_launch_cuda.cuh"

namespace pyseg::loss {
namespace {

struct IsForeground {
  __host__ __device__ uint32_t operator()(uint32_t item) const { return item >> 31; }
};

template <typename K>
cudaError_t sort_and_count(LovaszPlane& plane, void* temporary, size_t& bytes, int64_t elements, cudaStream_t stream) {
  cub::DoubleBuffer<K> keys(static_cast<K*>(plane.keys[0]), static_cast<K*>(plane.keys[1]));
  cub::DoubleBuffer<uint32_t> pixels(plane.pixels[0], plane.pixels[1]);
  constexpr int kBits = 8 * sizeof(K) - 1;  // no sign
  const int n = static_cast<int>(elements);
  size_t sort_bytes = bytes, scan_bytes = bytes;
  cudaError_t error =
      cub::DeviceRadixSort::SortPairsDescending(temporary, sort_bytes, keys, pixels, n, 0, kBits, stream);
  if (error != cudaSuccess) return error;
  plane.sorted = pixels.selector;
  const auto foreground = thrust::make_transform_iterator(plane.pixels[plane.sorted], IsForeground{});
  error = cub::DeviceScan::InclusiveSum(temporary, scan_bytes, foreground, plane.before, n, stream);
  if (temporary == nullptr) bytes = sort_bytes > scan_bytes ? sort_bytes : scan_bytes;
  return error;
}

}  // namespace

cudaError_t launch_normalise(const SegmentationArgs& a, void* most, void* scale, cudaStream_t stream) {
  return with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = lovasz_blocks(a.images * a.pixels);
    lovasz_normalise_kernel<T><<<static_cast<unsigned>(blocks), kLovaszThreads, 0, stream>>>(
        a, static_cast<Accumulator<T>*>(most), static_cast<Accumulator<T>*>(scale));
    return cudaGetLastError();
  });
}

cudaError_t launch_keys(const SegmentationArgs& a, const LovaszPlane& plane, cudaStream_t stream) {
  return with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = lovasz_blocks(plane.images * a.pixels);
    lovasz_keys_kernel<T><<<static_cast<unsigned>(blocks), kLovaszThreads, 0, stream>>>(a, plane);
    return cudaGetLastError();
  });
}

cudaError_t launch_sort(LovaszPlane& plane, bool wide, void* temporary, size_t& bytes, int64_t elements,
                        cudaStream_t stream) {
  return wide ? sort_and_count<uint64_t>(plane, temporary, bytes, elements, stream)
              : sort_and_count<uint32_t>(plane, temporary, bytes, elements, stream);
}

cudaError_t launch_slopes(const SegmentationArgs& a, const LovaszPlane& plane, cudaStream_t stream) {
  return with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = lovasz_blocks(plane.images * a.pixels);
    lovasz_slopes_kernel<T><<<static_cast<unsigned>(blocks), kLovaszThreads, 0, stream>>>(a, plane);
    return cudaGetLastError();
  });
}

cudaError_t launch_loss(const double* partial, double* loss, int64_t planes, int64_t blocks, cudaStream_t stream) {
  if (planes >= int64_t{1} << 31) return cudaErrorInvalidValue;
  lovasz_loss_kernel<<<static_cast<unsigned>(planes), kLovaszThreads, 0, stream>>>(partial, loss, blocks);
  return cudaGetLastError();
}

}  // namespace pyseg::loss
