// Launches of the kernels on segmentation maps: how large a tile is, vectors or single elements.
#include "loss/segmentation_cuda.cuh"

namespace pyseg::loss {
namespace {

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Rows, or images, begin at multiples of 16 bytes of the logits and of what is written.
template <typename T>
bool vectors_fit(const SegmentationArgs& a) {
  constexpr int kVector = 16 / sizeof(T);
  const bool whole = a.channels_last ? a.images == 1 && a.pixels % kUnitPixels == 0 : false;
  const int64_t run = a.channels_last ? a.pixels * a.classes : a.pixels;
  return (whole || run % kVector == 0) && is_aligned(a.logits) && is_aligned(a.to);
}

template <typename T>
Tiling tiling_for(const SegmentationArgs& a, bool* tiles) {
  using A = Compute<T>;
  // Small enough for many blocks if possible, else as large as allowed.
  Tiling t = {};
  t.vectors = vectors_fit<T>(a);
  for (const int most : {kMostShared / 2, kMostShared}) {
    for (t.pixels = kThreads; t.pixels >= 32; t.pixels /= 2) {
      // Rows are shifted against each other, so that lanes that look at neighbouring classes find other banks.
      t.stride = a.channels_last ? t.pixels + 1 : t.pixels + (t.pixels == kThreads ? 0 : t.pixels / 4);
      *tiles = shared_elements<A>(a, t, true) * sizeof(A) <= size_t(most);
      if (*tiles) return t;
    }
  }
  t.pixels = t.stride = kThreads;
  return t;
}

template <typename T, typename Tiled, typename Untiled>
cudaError_t launch(const SegmentationArgs& a, cudaStream_t stream, Tiled tiled, Untiled untiled) {
  using A = Compute<T>;
  bool tiles = false;
  const Tiling t = tiling_for<T>(a, &tiles);
  const int64_t blocks = a.images * units_of_image(a);
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const size_t shared = shared_elements<A>(a, t, tiles) * sizeof(A);
  if (tiles) {
    tiled<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(a, t);
  } else {
    untiled<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(a, t);
  }
  return cudaGetLastError();
}

template <typename F>
cudaError_t with_logits(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f(float{});
    case Element::kDouble: return f(double{});
    case Element::kHalf: return f(__half{});
    case Element::kBFloat16: return f(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_statistics(const SegmentationArgs& a, cudaStream_t stream) {
  const cudaError_t error = with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    return launch<T>(a, stream, segmentation_statistics_kernel<T, true>, segmentation_statistics_kernel<T, false>);
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
    return launch<T>(a, stream, segmentation_backward_kernel<T, true>, segmentation_backward_kernel<T, false>);
  });
}

cudaError_t launch_pixel_loss(const SegmentationArgs& a, cudaStream_t stream) {
  return with_logits(a.logits_type, [&](auto element) {
    using T = decltype(element);
    return launch<T>(a, stream, segmentation_pixel_loss_kernel<T, true>, segmentation_pixel_loss_kernel<T, false>);
  });
}

}  // namespace pyseg::loss
