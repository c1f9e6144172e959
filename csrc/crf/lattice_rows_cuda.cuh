// Filtering on a permutohedral lattice on CUDA devices (Adams, Baek, Davis 2010, section 4): splat, blur, slice, as
// gathers of rows in units of 16 bytes, neighbouring threads on neighbouring units.
//
// Splat: the entries, sorted by vertex, are cut into segments of kSegment; the threads of a row add up a segment's
// weight * row and write a vertex's sum where it ends. A vertex that reaches over segments leaves sums for each, which
// a warp adds up in a second kernel. So the work of a thread does not depend on how points crowd.
// Blur: one kernel for each direction, from table to table. Or the sparse product: a gather over the row of a vertex.
// Slice: a block takes 32 points; results go through shared memory to their planes.
// Indices that a corrupt lattice may hold are compared with sizes before use. Bytes at the least: each entry's row
// once for the splat and once for the slice, each vertex's row three times and written once for each direction.
// No atomics, sums in a fixed order: deterministic.
#pragma once

#include "crf/units_cuda.cuh"

namespace pyseg::crf {

constexpr int kRowThreads = 256;
constexpr int kSplatThreads = 128;
constexpr int kTilePoints = 32;  // whose planes a warp writes
constexpr int kTilePitch = kTilePoints + 1;
constexpr int kSplatBatch = 8;  // rows that a thread has on their way
constexpr int kWarpLanes = 32;
constexpr uint32_t kHead = 1u << 31;
constexpr unsigned kWholeWarp = ~0u;
static_assert(kSegment % kSplatBatch == 0, "segments are whole batches");

// ---- Planes and rows. Grid: tiles of kTilePoints points of an image, chunks of units. Tile: [channels, kTilePitch].

template <typename T>
__device__ __forceinline__ T* point_tile() {
  __shared__ T tile[kMostUnits * Unit<T>::kLanes * kTilePitch];
  return tile;
}

// Where a block's tile lies.
template <typename T>
struct TilePlace {
  int64_t image, point;  // the first one
  int64_t channel;       // the first one
  int points, units, channels;
  __device__ TilePlace(const RowLanes& lanes, int64_t all_points, int64_t all_channels) {
    const auto tiles = uint32_t((all_points + kTilePoints - 1) / kTilePoints);  // all blocks are fewer than 2^31
    image = blockIdx.x / tiles;
    point = int64_t{blockIdx.x % tiles} * kTilePoints;
    const int64_t left = all_points - point;
    points = int(left < kTilePoints ? left : kTilePoints);
    const int first = int(blockIdx.y) * lanes.per_row;
    units = lanes.units - first < lanes.per_row ? lanes.units - first : lanes.per_row;
    channel = int64_t{first} * Unit<T>::kLanes;
    const int64_t channels_left = all_channels - channel;
    channels = int(channels_left < units * Unit<T>::kLanes ? channels_left : units * Unit<T>::kLanes);
  }
};

template <typename T>
__device__ __forceinline__ void write_planes(const TilePlace<T>& place, const T* tile, int64_t all_points,
                                             int64_t all_channels, T* planes) {
  const int lane = threadIdx.x % kWarpLanes;
  if (lane >= place.points) return;
  for (int c = threadIdx.x / kWarpLanes; c < place.channels; c += kRowThreads / kWarpLanes)
    planes[(place.image * all_channels + place.channel + c) * all_points + place.point + lane] =
        tile[c * kTilePitch + lane];
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    crf_pack_kernel(const __grid_constant__ RowLanes lanes, const T* planes, int64_t points, int64_t channels, T factor,
                    T pad, T* rows) {
  T* tile = point_tile<T>();
  const TilePlace<T> place(lanes, points, channels);
  const int lane = threadIdx.x % kWarpLanes;
  if (lane < place.points)
    for (int c = threadIdx.x / kWarpLanes; c < place.units * Unit<T>::kLanes; c += kRowThreads / kWarpLanes)
      tile[c * kTilePitch + lane] =
          c < place.channels
              ? planes[(place.image * channels + place.channel + c) * points + place.point + lane] * factor
              : pad;
  __syncthreads();
  const int64_t first = place.image * points + place.point, stride = int64_t{lanes.units} * Unit<T>::kLanes;
  for (int i = threadIdx.x; i < place.points * place.units; i += kRowThreads) {
    const int p = i / place.units, u = i - p * place.units;
    Unit<T> unit;
#pragma unroll
    for (int k = 0; k < Unit<T>::kLanes; ++k) unit.v[k] = tile[(u * Unit<T>::kLanes + k) * kTilePitch + p];
    store_unit(rows + (first + p) * stride + place.channel + u * Unit<T>::kLanes, unit);
  }
}

template <typename T>
__device__ __forceinline__ void unit_to_tile(const Unit<T>& unit, int u, int p, T* tile) {
#pragma unroll
  for (int k = 0; k < Unit<T>::kLanes; ++k) tile[(u * Unit<T>::kLanes + k) * kTilePitch + p] = unit.v[k];
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) crf_unpack_kernel(const __grid_constant__ RowLanes lanes, const T* rows,
                                                                 int64_t points, int64_t channels, T* planes) {
  T* tile = point_tile<T>();
  const TilePlace<T> place(lanes, points, channels);
  const int64_t first = place.image * points + place.point, stride = int64_t{lanes.units} * Unit<T>::kLanes;
  for (int i = threadIdx.x; i < place.points * place.units; i += kRowThreads) {
    const int p = i / place.units, u = i - p * place.units;
    unit_to_tile(load_unit(rows + (first + p) * stride + place.channel + u * Unit<T>::kLanes), u, p, tile);
  }
  __syncthreads();
  write_planes(place, tile, points, channels, planes);
}

// ---- Splat.

// Grid: threads for all entries.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    lattice_items_kernel(const __grid_constant__ LatticeView l, const __grid_constant__ PointScale scale,
                         const __grid_constant__ SplatItems items) {
  const int64_t k = int64_t{blockIdx.x} * kRowThreads + threadIdx.x, entries = l.entries;
  if (k >= entries) return;
  auto entry = uint32_t(l.entry[k]);
  const bool exists = entry < entries;
  if (!exists) entry = 0;
  const int32_t v = l.vertex[entry];
  const uint32_t point = entry / uint32_t(l.corners);
  T w = static_cast<const T*>(l.weight)[entry];
  if (scale.data != nullptr) {
    const int64_t image = point / uint32_t(l.points);
    w *= static_cast<const T*>(scale.data)[image * scale.image_stride + point - image * l.points];
  }
  const bool begins = k == 0 || (uint32_t(v) < uint64_t(l.vertices) && l.row[v] == k);
  items.point[k] = point | (begins ? kHead : 0);
  static_cast<T*>(items.weight)[k] = exists ? w : T(0);
  if (k % kSegment == 0) items.vertex[k / kSegment] = exists ? v : -1;
}

// Where the first entry lies that belongs to no vertex.
__device__ __forceinline__ int64_t used_entries(const LatticeView& l) {
  const int64_t used = l.row[l.vertices];
  return used < l.entries ? used : l.entries;
}

// Grid: rows of lanes for all segments, chunks.
template <typename T>
__global__ void __launch_bounds__(kSplatThreads)
    lattice_splat_kernel(const __grid_constant__ LatticeView l, const __grid_constant__ RowLanes lanes,
                         const __grid_constant__ SplatItems items, const T* rows,
                         const __grid_constant__ SplatCarry carry, T* table) {
  const int r = threadIdx.x / lanes.per_row, u = int(blockIdx.y) * lanes.per_row + threadIdx.x % lanes.per_row;
  const int64_t s = int64_t{blockIdx.x} * lanes.rows + r, first = s * kSegment, used = used_entries(l);
  if (r >= lanes.rows || u >= lanes.units || first >= l.entries) return;
  const int64_t stride = int64_t{lanes.units} * Unit<T>::kLanes, last = min(first + kSegment, used);
  const T* weights = static_cast<const T*>(items.weight);
  rows += u * Unit<T>::kLanes;
  table += u * Unit<T>::kLanes;
  T* const sums = static_cast<T*>(carry.sums) + 2 * s * stride + u * Unit<T>::kLanes;

  int32_t v = items.vertex[s];
  bool own = false;  // whether the vertex began in this segment
  Unit<T> sum = Unit<T>::all(T(0));
  for (int64_t batch = first; batch < last; batch += kSplatBatch) {
    __align__(16) uint32_t point[kSplatBatch];
    T weight[kSplatBatch];
    Unit<T> row[kSplatBatch];
#pragma unroll
    for (int i = 0; i < kSplatBatch; i += 4)
      *reinterpret_cast<uint4*>(point + i) = *reinterpret_cast<const uint4*>(items.point + batch + i);
#pragma unroll
    for (int i = 0; i < kSplatBatch; i += Unit<T>::kLanes) {
      const Unit<T> some = load_unit(weights + batch + i);
#pragma unroll
      for (int k = 0; k < Unit<T>::kLanes; ++k) weight[i + k] = some.v[k];
    }
#pragma unroll
    for (int i = 0; i < kSplatBatch; ++i)
      if (batch + i < last) row[i] = load_unit(rows + int64_t(point[i] & ~kHead) * stride);
#pragma unroll
    for (int i = 0; i < kSplatBatch; ++i) {
      if (batch + i >= last) break;
      if (point[i] & kHead) {
        if (batch + i > first) {
          if (!own)
            store_unit(sums, sum);
          else if (uint32_t(v) < uint64_t(l.vertices))
            store_unit(table + v * stride, sum);
          sum = Unit<T>::all(T(0));
          ++v;
        }
        own = true;
      }
      sum.add(row[i], weight[i]);
    }
  }
  const bool goes_on = last < used && !(items.point[last] & kHead);
  if (!own)
    store_unit(sums, sum);
  else if (goes_on)
    store_unit(sums + stride, sum);
  else if (first < last && uint32_t(v) < uint64_t(l.vertices))
    store_unit(table + v * stride, sum);
  if (u == 0) carry.open[s] = own && goes_on ? v : -1;
}

// Grid: a warp for each segment, chunks.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    lattice_carry_kernel(const __grid_constant__ LatticeView l, const __grid_constant__ RowLanes lanes,
                         int64_t segments, const __grid_constant__ SplatCarry carry, T* table) {
  const int64_t s = int64_t{blockIdx.x} * (kRowThreads / kWarpLanes) + threadIdx.x / kWarpLanes;
  if (s >= segments) return;
  const int32_t v = carry.open[s];
  if (uint32_t(v) >= uint64_t(l.vertices)) return;
  const int64_t stride = int64_t{lanes.units} * Unit<T>::kLanes;
  const int64_t last = min((int64_t{l.row[v + 1]} - 1) / kSegment, segments - 1);
  const int lane = threadIdx.x % kWarpLanes, shares = kWarpLanes / lanes.per_row;
  const int share = lane / lanes.per_row, u = int(blockIdx.y) * lanes.per_row + lane % lanes.per_row;
  const bool takes_part = share < shares && u < lanes.units;
  const T* sums = static_cast<const T*>(carry.sums) + u * Unit<T>::kLanes;
  Unit<T> sum = Unit<T>::all(T(0));
  if (takes_part) {
    if (share == 0) sum = load_unit(sums + (2 * s + 1) * stride);
#pragma unroll 8
    for (int64_t i = s + 1 + share; i <= last; i += shares) sum.add(load_unit(sums + 2 * i * stride));
  }
  Unit<T> total = sum;
  for (int i = 1; i < shares; ++i) {
    Unit<T> other;
#pragma unroll
    for (int k = 0; k < Unit<T>::kLanes; ++k)
      other.v[k] = __shfl_sync(kWholeWarp, sum.v[k], (lane + i * lanes.per_row) % kWarpLanes);
    total.add(other);
  }
  if (takes_part && share == 0) store_unit(table + v * stride + u * Unit<T>::kLanes, total);
}

// ---- Blur. Grid: rows of lanes for all vertices that there is room for, chunks.

// The row of a vertex that a block's thread takes, or -1.
__device__ __forceinline__ int64_t own_vertex(const LatticeView& l, const RowLanes& lanes, int* u) {
  const int r = threadIdx.x / lanes.per_row;
  *u = int(blockIdx.y) * lanes.per_row + threadIdx.x % lanes.per_row;
  const int64_t v = int64_t{blockIdx.x} * lanes.rows + r;
  return r < lanes.rows && *u < lanes.units && v < l.vertices && v < l.offset[l.images] ? v : -1;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    lattice_blur_kernel(const __grid_constant__ LatticeView l, const __grid_constant__ RowLanes lanes, int direction,
                        const T* from, T* to) {
  int u;
  const int64_t v = own_vertex(l, lanes, &u);
  if (v < 0) return;
  const int64_t stride = int64_t{lanes.units} * Unit<T>::kLanes;
  from += u * Unit<T>::kLanes;
  const int2 near = reinterpret_cast<const int2*>(l.neighbour)[direction * l.vertices + v];
  Unit<T> sum = load_unit(from + v * stride);
  if (uint32_t(near.x) < uint64_t(l.vertices)) sum.add(load_unit(from + near.x * stride), T(0.5));
  if (uint32_t(near.y) < uint64_t(l.vertices)) sum.add(load_unit(from + near.y * stride), T(0.5));
  store_unit(to + v * stride + u * Unit<T>::kLanes, sum);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    lattice_product_kernel(const __grid_constant__ LatticeView l, const __grid_constant__ RowLanes lanes, const T* from,
                           T* to) {
  int u;
  const int64_t v = own_vertex(l, lanes, &u);
  if (v < 0) return;
  const int64_t stride = int64_t{lanes.units} * Unit<T>::kLanes;
  from += u * Unit<T>::kLanes;
  const T* weight = static_cast<const T*>(l.kernel_weight);
  const int64_t last = min(l.kernel_row[v + 1], l.kernel_entries);
  Unit<T> sum = Unit<T>::all(T(0));
#pragma unroll 4
  for (int64_t at = max(l.kernel_row[v], int64_t{0}); at < last; ++at) {
    const int32_t other = l.kernel_vertex[at];
    if (uint32_t(other) < uint64_t(l.vertices)) sum.add(load_unit(from + other * stride), weight[at]);
  }
  store_unit(to + v * stride + u * Unit<T>::kLanes, sum);
}

// ---- Slice.

// factor * sum of weight * table[vertex] over the corners of a point; NaN for one that is left out, as its weights are.
template <typename T>
__device__ __forceinline__ Unit<T> slice_unit(const int32_t* vertex, const T* weight, int corners, int64_t vertices,
                                              const T* table, int64_t stride, T factor) {
  Unit<T> sum = Unit<T>::all(T(0));
#pragma unroll 3
  for (int c = 0; c < corners; ++c) {
    const int32_t v = vertex[c];
    Unit<T> row = Unit<T>::all(T(0));
    if (uint32_t(v) < uint64_t(vertices)) row = load_unit(table + v * stride);
    sum.add(row, weight[c] * factor);
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    lattice_slice_kernel(const __grid_constant__ LatticeView l, const __grid_constant__ RowLanes lanes, const T* table,
                         T factor, int64_t channels, T* planes) {
  T* tile = point_tile<T>();
  const TilePlace<T> place(lanes, l.points, channels);
  const int64_t first = place.image * l.points + place.point, stride = int64_t{lanes.units} * Unit<T>::kLanes;
  for (int i = threadIdx.x; i < place.points * place.units; i += kRowThreads) {
    const int p = i / place.units, u = i - p * place.units;
    const int64_t at = (first + p) * l.corners;
    unit_to_tile(slice_unit(l.vertex + at, static_cast<const T*>(l.weight) + at, l.corners, l.vertices,
                            table + place.channel + u * Unit<T>::kLanes, stride, factor),
                 u, p, tile);
  }
  __syncthreads();
  write_planes(place, tile, l.points, channels, planes);
}

// Grid: groups of threads, a power of two, for all points.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    lattice_weight_gradient_kernel(const __grid_constant__ LatticeView l, int units, int group, const T* values,
                                   const T* grad, const T* of_values, const T* of_grad, T factor, T* grad_weight) {
  constexpr int kMostCorners = 9;
  const int64_t at = int64_t{blockIdx.x} * (kRowThreads / group) + threadIdx.x / group;
  const bool exists = at < l.images * l.points;
  const int lane = threadIdx.x % group;
  const int64_t stride = int64_t{units} * Unit<T>::kLanes;
  T sum[kMostCorners];
  int32_t vertex[kMostCorners];
#pragma unroll
  for (int c = 0; c < kMostCorners; ++c) {
    sum[c] = T(0);
    vertex[c] = exists && c < l.corners ? l.vertex[at * l.corners + c] : -1;
  }
  if (exists)
    for (int u = lane; u < units; u += group) {
      const int64_t channel = u * Unit<T>::kLanes;
      const Unit<T> x = load_unit(values + at * stride + channel), g = load_unit(grad + at * stride + channel);
#pragma unroll
      for (int c = 0; c < kMostCorners; ++c) {
        if (uint32_t(vertex[c]) >= uint64_t(l.vertices)) continue;
        const Unit<T> a = load_unit(of_values + vertex[c] * stride + channel);
        const Unit<T> b = load_unit(of_grad + vertex[c] * stride + channel);
#pragma unroll
        for (int k = 0; k < Unit<T>::kLanes; ++k) sum[c] += g.v[k] * a.v[k] + x.v[k] * b.v[k];
      }
    }
#pragma unroll
  for (int c = 0; c < kMostCorners; ++c) {
    for (int step = group / 2; step > 0; step /= 2) sum[c] += __shfl_xor_sync(kWholeWarp, sum[c], step);
    if (exists && c < l.corners && c % group == lane) grad_weight[at * l.corners + c] = sum[c] * factor;
  }
}

}  // namespace pyseg::crf
