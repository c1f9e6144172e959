// The permutohedral lattice on CUDA devices (Adams, Baek, Davis 2010, sections 3 and 4.1): which vertices surround each
// point, with which weights, and which vertices are next to each other.
//
// Every corner of a point's simplex is an entry with a packed key. A stable radix sort (CUB) of the keys brings the
// entries of a vertex together, in ascending order: these are the compressed rows; a prefix sum of the places where the
// key changes numbers the vertices. Neighbours are looked up by binary search among the vertices' keys.
// A thread takes a point, an entry or a vertex. What a point's threads write for d + 1 corners goes through shared
// memory, so that stores are coalesced. No atomics: deterministic. The number of vertices never leaves the device here.
// Bytes at the least for each entry: weight, key and entry written, read and written by each pass of 8 bits of the
// sort, and read once more; vertex written.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "crf/permutohedral_lattice_cuda.h"
#include "crf/permutohedral_math.h"

namespace pyseg::crf {

constexpr int kSimplexThreads = 128;
constexpr int kEntryThreads = 256;

template <typename T>
struct FeatureScales {
  T of[kMostFeatures];
};

typedef unsigned __int128 PackedKey;

// Constants, not functions of the host, in kernels.
template <int kD>
constexpr int kQuotientBits = quotient_bits(kD);
template <int kD>
constexpr int kRemainderBits = remainder_bits(kD);
template <int kD>
constexpr int kVertexBits = vertex_bits(kD);

__host__ __device__ __forceinline__ PackedKey join(uint64_t high, uint64_t low) { return PackedKey(high) << 64 | low; }

__device__ __forceinline__ PackedKey load_key(const Keys& keys, int64_t at) {
  return join(keys.high == nullptr ? 0 : keys.high[at], keys.low[at]);
}

// coordinate: the first kD.
template <int kD>
__device__ __forceinline__ PackedKey pack(PackedKey image, const int* coordinate) {
  constexpr unsigned kPeriod = kD + 1;
  PackedKey key = image;
#pragma unroll
  for (int i = 0; i < kD; ++i) key = key << kQuotientBits<kD> | unsigned(coordinate[i] + kCoordinates / 2) / kPeriod;
  return key << kRemainderBits<kD> | unsigned(coordinate[0] + kCoordinates / 2) % kPeriod;
}

template <int kD>
__device__ __forceinline__ void unpack(PackedKey key, int* coordinate) {
  const int remainder = int(unsigned(key) & ((1u << kRemainderBits<kD>)-1));
  key >>= kRemainderBits<kD>;
#pragma unroll
  for (int i = kD - 1; i >= 0; --i) {
    const int quotient = int(unsigned(key) & ((1u << kQuotientBits<kD>)-1));
    coordinate[i] = quotient * (kD + 1) + remainder - kCoordinates / 2;
    key >>= kQuotientBits<kD>;
  }
}

// What kCorners elements of each thread lie at in shared memory, and those of a block's points in global memory.
template <int kCorners>
struct Stage {
  static constexpr int kSize = kSimplexThreads * kCorners;
  static constexpr int kBytes = (kSize + kSize / 32 + 1) * int(sizeof(uint64_t));

  // Shifted by one element every 32: d + 1 is a power of two at times.
  static __device__ __forceinline__ int place(int i) { return i + i / 32; }

  // Every thread's values [kCorners] -> to, of which `count` elements are the block's. Whole blocks call this.
  template <typename E>
  static __device__ __forceinline__ void write(char* shared, const E* values, E* to, int count) {
    E* staged = reinterpret_cast<E*>(shared);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kCorners; ++r) staged[place(threadIdx.x * kCorners + r)] = values[r];
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kSimplexThreads) to[i] = staged[place(i)];
  }

  template <typename E>
  static __device__ __forceinline__ void read(char* shared, const E* from, int count, E* values) {
    E* staged = reinterpret_cast<E*>(shared);
    for (int i = threadIdx.x; i < count; i += kSimplexThreads) staged[place(i)] = from[i];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kCorners; ++r) {
      const int at = threadIdx.x * kCorners + r;
      values[r] = at < count ? staged[place(at)] : E(0);
    }
  }
};

template <int kD, typename T>
__device__ __forceinline__ void enclose(const LatticePoints& p, const FeatureScales<T>& scales, int64_t image,
                                        int64_t point, T* elevated, T* base, T* rank) {
  const T* from = static_cast<const T*>(p.features) + image * kD * p.points + point;
  T scaled[kD];
#pragma unroll
  for (int i = 0; i < kD; ++i) scaled[i] = from[i * p.points] * scales.of[i];
  embed<kD, T>(scaled, elevated);
  enclosing_simplex<kD, T>(elevated, base, rank);
}

// Grid: threads for images * points. weight, keys, entry: [images, points, kD + 1].
template <int kD, typename T>
__global__ void __launch_bounds__(kSimplexThreads)
    lattice_simplices_kernel(const __grid_constant__ LatticePoints p, const __grid_constant__ FeatureScales<T> scales,
                             T* weight, const __grid_constant__ Keys keys, int32_t* entry) {
  constexpr int kCorners = kD + 1;
  using Staging = Stage<kCorners>;
  __shared__ __align__(16) char shared[Staging::kBytes];
  const int64_t block = int64_t{blockIdx.x} * kSimplexThreads;
  const int64_t last = p.images * p.points - 1, own = block + threadIdx.x;
  const int64_t at = own < last ? own : last;               // all threads of a block stay for its barriers
  const int64_t image = uint32_t(at) / uint32_t(p.points);  // entries are fewer than 2^31

  // 1. The simplex and the weights.
  T elevated[kCorners], base[kCorners], rank[kCorners], w[kCorners];
  enclose<kD>(p, scales, image, at - image * p.points, elevated, base, rank);
  barycentric_weights<kD, T>(elevated, base, rank, w);
  bool good = true;  // NaN is not
#pragma unroll
  for (int i = 0; i < kD; ++i) good = good && fabs(elevated[i]) <= T(most_coordinate(kD));
#pragma unroll
  for (int r = 0; r < kCorners; ++r) w[r] = good ? w[r] : T(NAN);

  // 2. The keys of its vertices.
  uint64_t low[kCorners], high[kCorners];
#pragma unroll
  for (int r = 0; r < kCorners; ++r) {
    int coordinate[kD];
#pragma unroll
    for (int i = 0; i < kD; ++i) coordinate[i] = good ? int(corner_coordinate<kD, T>(base[i], rank[i], r)) : 0;
    const PackedKey key = good ? pack<kD>(image, coordinate) : PackedKey(p.images) << kVertexBits<kD>;
    low[r] = uint64_t(key);
    high[r] = uint64_t(key >> 64);
  }

  // 3. Coalesced stores.
  const int64_t first = block * kCorners, left = p.images * p.points - block;
  const int count = int(left < kSimplexThreads ? left : kSimplexThreads) * kCorners;
  Staging::write(shared, w, weight + first, count);
  Staging::write(shared, low, keys.low + first, count);
  if (keys.high != nullptr) Staging::write(shared, high, keys.high + first, count);
  for (int i = threadIdx.x; i < count; i += kSimplexThreads) entry[first + i] = int32_t(first + i);
}

// Grid: threads for all entries.
static __global__ void __launch_bounds__(kEntryThreads)
    lattice_gather_kernel(const uint64_t* from, const int32_t* entry, uint64_t* to, int64_t entries) {
  const int64_t k = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x;
  if (k < entries) to[k] = from[entry[k]];
}

// Whether a vertex begins at k. Grid: threads for all entries.
static __global__ void __launch_bounds__(kEntryThreads)
    lattice_heads_kernel(const __grid_constant__ Keys keys, int64_t images, int bits, int64_t entries,
                         int32_t* is_head) {
  const int64_t k = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x;
  if (k >= entries) return;
  const PackedKey key = load_key(keys, k);
  is_head[k] = int64_t(key >> bits) < images && (k == 0 || load_key(keys, k - 1) != key);
}

// Grid: threads for all entries.
template <int kD, typename T>
__global__ void __launch_bounds__(kEntryThreads)
    lattice_number_kernel(int64_t images, int64_t entries, const __grid_constant__ SortedEntries sorted,
                          const __grid_constant__ LatticeResult result) {
  const int64_t k = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x;
  if (k >= entries) return;
  const PackedKey key = load_key(sorted.keys, k);
  const int64_t image = int64_t(key >> kVertexBits<kD>);
  const int32_t entry = sorted.entry[k];
  if (image >= images) {
    result.vertex[entry] = -1;
    if (k > 0) return;  // no point counts
    result.row[0] = 0;
    for (int64_t n = 0; n <= images; ++n) result.offset[n] = 0;
    return;
  }

  // 1. The entry's vertex.
  const int32_t v = sorted.count[k] - 1;
  const bool kept = v < result.vertices;
  result.vertex[entry] = kept ? v : -1;
  if (!kept) static_cast<T*>(result.weight)[entry] = T(NAN);

  // 2. The first entry of a vertex.
  if (k == 0 || sorted.count[k - 1] != v + 1) {
    if (v <= result.vertices) result.row[v] = int32_t(k);
    if (kept) {
      result.keys.low[v] = uint64_t(key);
      if (result.keys.high != nullptr) result.keys.high[v] = uint64_t(key >> 64);
      int coordinate[kD];
      unpack<kD>(key, coordinate);
#pragma unroll
      for (int i = 0; i < kD; ++i) result.key[int64_t{v} * kD + i] = int16_t(coordinate[i]);
    }
    const int64_t before = k == 0 ? -1 : int64_t(load_key(sorted.keys, k - 1) >> kVertexBits<kD>);
    for (int64_t n = before + 1; n <= image; ++n) result.offset[n] = v;
  }

  // 3. The last entry.
  if (k + 1 == entries || int64_t(load_key(sorted.keys, k + 1) >> kVertexBits<kD>) >= images) {
    if (v < result.vertices) result.row[v + 1] = int32_t(k + 1);
    for (int64_t n = image + 1; n <= images; ++n) result.offset[n] = v + 1;
  }
}

// The vertex with this key among the first `count`, else -1.
__device__ __forceinline__ int32_t find_vertex(const Keys& keys, int32_t count, PackedKey key) {
  int32_t first = 0;
  for (int32_t left = count; left > 0;) {
    const int32_t half = left / 2;
    const bool less = load_key(keys, first + half) < key;
    first = less ? first + half + 1 : first;
    left = less ? left - half - 1 : half;
  }
  return first < count && load_key(keys, first) == key ? first : -1;
}

// Grid: threads for all vertices that there is room for.
template <int kD>
__global__ void __launch_bounds__(kEntryThreads)
    lattice_neighbours_kernel(int64_t images, const __grid_constant__ LatticeResult result) {
  const int64_t v = int64_t{blockIdx.x} * kEntryThreads + threadIdx.x;
  if (v >= result.vertices) return;
  const int64_t all = result.offset[images];
  const int32_t count = int32_t(all < result.vertices ? all : result.vertices);
  if (v >= count) {  // padding
    result.row[v + 1] = result.row[count];
#pragma unroll
    for (int i = 0; i < kD; ++i) result.key[v * kD + i] = 0;
    return;
  }
  const PackedKey key = load_key(result.keys, v);
  int coordinate[kD];
  unpack<kD>(key, coordinate);
#pragma unroll
  for (int j = 0; j <= kD; ++j) {
    // One up in every coordinate but j, d down in that one. It alone has this vertex one step down.
    int up[kD];
#pragma unroll
    for (int i = 0; i < kD; ++i) up[i] = coordinate[i] + (i == j ? -kD : 1);
    const int32_t other = find_vertex(result.keys, count, pack<kD>(key >> kVertexBits<kD>, up));
    if (other < 0) continue;
    result.neighbour[2 * (j * result.vertices + v)] = other;
    result.neighbour[2 * (j * result.vertices + other) + 1] = int32_t(v);
  }
}

// grad_features = E^T D^T grad_weight for each point, with the weights' derivatives D within the simplex.
// Grid: threads for images * points.
template <int kD, typename T>
__global__ void __launch_bounds__(kSimplexThreads)
    lattice_backward_kernel(const __grid_constant__ LatticePoints p, const __grid_constant__ FeatureScales<T> scales,
                            const T* grad_weight, T* grad_features) {
  constexpr int kCorners = kD + 1;
  using Staging = Stage<kCorners>;
  __shared__ __align__(16) char shared[Staging::kBytes];
  const int64_t block = int64_t{blockIdx.x} * kSimplexThreads, at = block + threadIdx.x;
  const int64_t left = p.images * p.points - block;
  const int count = int(left < kSimplexThreads ? left : kSimplexThreads) * kCorners;
  T grad[kCorners], grad_elevated[kCorners], grad_scaled[kD];
  Staging::read(shared, grad_weight + block * kCorners, count, grad);
  if (at >= p.images * p.points) return;
  const int64_t image = uint32_t(at) / uint32_t(p.points), point = at - image * p.points;
  T elevated[kCorners], base[kCorners], rank[kCorners];
  enclose<kD>(p, scales, image, point, elevated, base, rank);
  barycentric_weights_vjp<kD, T>(grad, rank, grad_elevated);
  embed_transpose<kD, T>(grad_elevated, grad_scaled);
  T* to = grad_features + image * kD * p.points + point;
#pragma unroll
  for (int i = 0; i < kD; ++i) to[i * p.points] = grad_scaled[i] * scales.of[i];
}

}  // namespace pyseg::crf
