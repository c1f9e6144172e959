// The sparse product between the vertices of a lattice on CUDA devices: exp(-r^2 / (2 v)) for all pairs of an image's
// vertices with r <= cutoff.
//
// Brute force over tiles: the bounding box of each tile of kTileVertices vertices first; then a block takes the
// vertices of one tile and goes through all tiles whose box is near enough to its own, ascending. Vertices in the order
// of their keys, as permutohedral_lattice numbers them on CUDA, make small boxes. A warp looks at 32 others of a vertex
// at a time; ballots count what is near and say where it is written, so rows ascend and stores are coalesced. Twice:
// once to count, once to fill. No atomics: deterministic. Time: O(M^2 / 32) at the worst. Bytes at the least: the
// kernel written once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "crf/permutohedral_vertex_kernel_cuda.h"

namespace pyseg::crf {

constexpr int kVertexThreads = 256;
constexpr int kTileVertices = 128;
constexpr int kVertexWarps = kVertexThreads / 32;
constexpr int kVerticesOfWarp = kTileVertices / kVertexWarps;
static_assert(kTileVertices % 32 == 0 && kTileVertices % kVertexWarps == 0, "whole steps of a warp");

// All coordinates, and the image.
template <int kD>
struct VertexPlace {
  int32_t coordinate[kD + 1];
  int32_t image;
};

__device__ __forceinline__ int64_t vertex_count(const VertexKernelTask& t) {
  const int64_t all = t.offset[t.images];
  return all < t.vertices ? all : t.vertices;
}

template <int kD>
__device__ __forceinline__ VertexPlace<kD> place_of(const VertexKernelTask& t, int64_t v) {
  VertexPlace<kD> place;
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kD; ++i) sum += place.coordinate[i] = t.key[v * kD + i];
  place.coordinate[kD] = -sum;
  int64_t first = 0;  // the image is the last one that begins at v or before
  for (int64_t last = t.images; last - first > 1;) {
    const int64_t middle = (first + last) / 2;
    (t.offset[middle] <= v ? first : last) = middle;
  }
  place.image = int32_t(first);
  return place;
}

// box [tiles, 2, kD + 2]: least and most of coordinates and image. Grid: a warp for each tile.
template <int kD>
__global__ void __launch_bounds__(kVertexThreads) vertex_boxes_kernel(const __grid_constant__ VertexKernelTask t) {
  constexpr int kSize = kD + 2;
  const int64_t tile = int64_t{blockIdx.x} * kVertexWarps + threadIdx.x / 32;
  const int64_t count = vertex_count(t), begin = tile * kTileVertices;
  if (begin >= count) return;
  int32_t least[kSize], most[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) least[i] = INT32_MAX, most[i] = INT32_MIN;
  for (int64_t v = begin + threadIdx.x % 32; v < begin + kTileVertices && v < count; v += 32) {
    const VertexPlace<kD> place = place_of<kD>(t, v);
#pragma unroll
    for (int i = 0; i <= kD; ++i) {
      least[i] = min(least[i], place.coordinate[i]);
      most[i] = max(most[i], place.coordinate[i]);
    }
    least[kD + 1] = min(least[kD + 1], place.image);
    most[kD + 1] = max(most[kD + 1], place.image);
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    for (int step = 16; step > 0; step /= 2) {
      least[i] = min(least[i], __shfl_xor_sync(~0u, least[i], step));
      most[i] = max(most[i], __shfl_xor_sync(~0u, most[i], step));
    }
    if (threadIdx.x % 32 == 0) {
      t.box[tile * 2 * kSize + i] = least[i];
      t.box[tile * 2 * kSize + kSize + i] = most[i];
    }
  }
}

// Whether vertices of two tiles may be near each other.
template <int kD>
__device__ __forceinline__ bool boxes_near(const int32_t* a, const int32_t* b, int64_t limit) {
  constexpr int kSize = kD + 2;
  if (a[kD + 1] > b[kSize + kD + 1] || b[kD + 1] > a[kSize + kD + 1]) return false;
  int64_t square = 0;
#pragma unroll
  for (int i = 0; i <= kD; ++i) {
    const int64_t gap = max(0, max(a[i] - b[kSize + i], b[i] - a[kSize + i]));
    square += gap * gap;
  }
  return square <= limit;
}

// kFill: writes what lies at row[v].., else row[v + 1] = how many there are. Grid: a block for each tile.
template <int kD, typename T, bool kFill>
__global__ void __launch_bounds__(kVertexThreads)
    vertex_kernel_kernel(const __grid_constant__ VertexKernelTask t, int64_t* row, int32_t* vertex, T* weight) {
  constexpr int kBox = 2 * (kD + 2);
  __shared__ int32_t others[kD + 2][kTileVertices];  // coordinates and image
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t count = vertex_count(t), begin = int64_t{blockIdx.x} * kTileVertices;
  const int64_t tiles = (count + kTileVertices - 1) / kTileVertices;
  const int64_t own = begin + warp * kVerticesOfWarp;
  // Lane i keeps the place of the warp's vertex i; what was found so far of it, too.
  static_assert(kVerticesOfWarp <= 32, "a lane for each vertex of a warp");
  const bool keeps = lane < kVerticesOfWarp && own + lane < count;
  VertexPlace<kD> place{};
  int64_t found = 0;
  if (keeps) place = place_of<kD>(t, own + lane);
  if (keeps && kFill) found = row[own + lane];

  for (int64_t tile = 0; begin < count && tile < tiles; ++tile) {
    if (!boxes_near<kD>(t.box + blockIdx.x * int64_t{kBox}, t.box + tile * kBox, t.limit)) continue;
    // 1. The others.
    const int64_t first = tile * kTileVertices;
    __syncthreads();
    if (threadIdx.x < kTileVertices && first + threadIdx.x < count) {
      const VertexPlace<kD> other = place_of<kD>(t, first + threadIdx.x);
#pragma unroll
      for (int i = 0; i <= kD; ++i) others[i][threadIdx.x] = other.coordinate[i];
      others[kD + 1][threadIdx.x] = other.image;
    }
    __syncthreads();

    // 2. Each vertex of the warp with 32 of them at a time.
    const int in_tile = int(count - first < kTileVertices ? count - first : kTileVertices);
    for (int i = 0; i < kVerticesOfWarp && own + i < count; ++i) {
      int32_t mine[kD + 1];
#pragma unroll
      for (int k = 0; k <= kD; ++k) mine[k] = __shfl_sync(~0u, place.coordinate[k], i);
      const int32_t image = __shfl_sync(~0u, place.image, i);
      int64_t at = __shfl_sync(~0u, found, i);
      for (int k = lane; k - lane < in_tile; k += 32) {
        int64_t square = 0;
        bool near = k < in_tile;
        if (near) {
#pragma unroll
          for (int c = 0; c <= kD; ++c) {
            const int64_t step = others[c][k] - mine[c];
            square += step * step;
          }
          near = square <= t.limit && others[kD + 1][k] == image;
        }
        const unsigned all = __ballot_sync(~0u, near);
        if (kFill && near) {
          const int64_t to = at + __popc(all & ((1u << lane) - 1));
          vertex[to] = int32_t(first + k);
          weight[to] = T(exp(double(square) * t.exponent));
        }
        at += __popc(all);
      }
      if (lane == i) found = at;
    }
  }
  if (kFill) return;
  // Blocks of padding count nothing.
  if (lane < kVerticesOfWarp && own + lane < t.vertices) row[own + lane + 1] = found;
  if (begin == 0 && threadIdx.x == 0) row[0] = 0;
}

}  // namespace pyseg::crf
