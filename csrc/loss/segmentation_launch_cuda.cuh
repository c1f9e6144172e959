// How the kernels on tiles of segmentation maps are launched: how large a tile is, vectors or single elements.
#pragma once

#include "loss/segmentation_cuda.cuh"

namespace pyseg::loss {

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Rows, or images, begin at multiples of 16 bytes of the logits and of what is written.
template <typename T>
bool vectors_fit(const SegmentationArgs& a) {
  const int64_t run = a.channels_last ? a.pixels * a.classes : a.pixels;
  return run % (16 / int64_t{sizeof(T)}) == 0 && is_aligned(a.logits) && is_aligned(a.to);
}

template <typename T>
Tiling tiling_for(const SegmentationArgs& a, bool* tiles) {
  using A = Accumulator<T>;
  Tiling t = {};
  t.vectors = vectors_fit<T>(a);
  // Small enough for many blocks if possible, else as large as allowed.
  for (const int most : {kMostShared / 2, kMostShared}) {
    for (t.pixels = kThreads; t.pixels >= 32; t.pixels /= 2) {
      // Rows are shifted against each other, so that lanes that look at neighbouring classes find other banks.
      t.stride = a.channels_last ? t.pixels + 1 : t.pixels + (t.pixels == kThreads ? 0 : t.pixels / 4);
      *tiles = shared_elements(a, t, true) * sizeof(A) <= size_t(most);
      if (*tiles) return t;
    }
  }
  t.pixels = t.stride = kThreads;
  return t;
}

// Launches one of two kernels, which takes tiles or does not, with `extra` bytes of shared memory behind those of a Block
// and with more arguments.
template <typename T, typename Tiled, typename Untiled, typename... More>
cudaError_t launch_tiles_and(size_t extra, const SegmentationArgs& a, cudaStream_t stream, Tiled tiled, Untiled untiled,
                             const More&... more) {
  bool tiles = false;
  const Tiling t = tiling_for<T>(a, &tiles);
  const int64_t blocks = a.images * units_of_image(a);
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const size_t shared = shared_elements(a, t, tiles) * sizeof(Accumulator<T>) + extra;
  if (tiles) {
    tiled<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(a, t, more...);
  } else {
    untiled<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(a, t, more...);
  }
  return cudaGetLastError();
}

template <typename T, typename Tiled, typename Untiled>
cudaError_t launch_tiles(const SegmentationArgs& a, cudaStream_t stream, Tiled tiled, Untiled untiled) {
  return launch_tiles_and<T>(0, a, stream, tiled, untiled);
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

}  // namespace pyseg::loss
