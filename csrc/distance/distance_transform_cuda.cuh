// Exact Euclidean distance transforms, one axis at a time (Felzenszwalb and Huttenlocher 2012, equation 3):
//   d(y) = min over i of f(i) + (spacing * (y - i))^2,   f: squared distance that the passes before have found.
// Rows: a warp takes a row; ballots of the elements that are sources give every lane the nearest on both sides.
// Other axes: a block holds kColumns whole lines in shared memory, or reads them through the caches where they do not
// fit; a thread scans outwards from its element and ends where (spacing * k)^2 alone is no better. Where labels are
// compared, a side ends at the first element of another label, whose f counts as 0. int32 arithmetic for spacing 1.
//
// Bytes at the least: the input is read and the squares written once by the rows, squares read and written once by
// every other axis. No atomics, no communication between blocks: deterministic. Time: O(d) for an element of distance
// d.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "distance/distance_transform_cuda.h"

namespace pyseg::distance {

constexpr int kRowWarps = 8;
constexpr int kRowWords = 256;  // of 32 elements, that a warp looks at together
constexpr int kAxisThreads = 512;
constexpr int kWarp = 32;
static_assert(kRowWarps * kRowWords * 4 <= 48 * 1024, "static shared memory ends there");
static_assert(kAxisThreads % kWarp == 0, "whole warps");

template <typename T>
__device__ __forceinline__ T no_source() {
  if constexpr (T(0.5) == T(0)) return kNoneInt;
  return T(__longlong_as_double(0x7ff0000000000000));
}

template <typename T>
__device__ __forceinline__ T square(int64_t steps, double spacing) {
  if constexpr (T(0.5) == T(0)) return T(steps) * T(steps);
  const T distance = T(steps) * T(spacing);
  return distance * distance;
}

template <typename E>
__device__ __forceinline__ bool is_zero(E element, bool floating) {
  return E(element << int(floating)) == 0;
}

// Whether elements are on different sides.
template <typename E>
__device__ __forceinline__ bool differ(const RowPass& args, E a, E b) {
  return args.mode == Mode::kSigned ? is_zero(a, args.floating) != is_zero(b, args.floating) : a != b;
}

// E: unsigned integer with the bits of an element. Grid: a warp for each of the N * D * H rows.
template <typename E, typename T>
__global__ void __launch_bounds__(kRowWarps* kWarp) distance_rows(const __grid_constant__ RowPass args) {
  __shared__ unsigned shared_words[kRowWarps][kRowWords];
  const int lane = threadIdx.x % kWarp;
  unsigned* words = shared_words[threadIdx.x / kWarp];
  const int64_t row = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
  if (row >= args.n * args.d * args.h) return;
  const E* x = static_cast<const E*>(args.input) + row * args.w;
  const bool labels = args.edges != nullptr;

  // Sources are zeros; where labels are compared, a bit says that an element differs from the one before it.
  const auto word_at = [&](int64_t start) {
    const int64_t at = start + lane;
    bool bit = false;
    if (at < args.w) bit = labels ? at > 0 && differ(args, x[at], x[at - 1]) : is_zero(x[at], args.floating);
    return __ballot_sync(~0u, bit);
  };

  int64_t before = -1;  // the last bit of the words before
  for (int64_t segment = 0; segment < args.w; segment += kRowWords * kWarp) {
    // 1. The words of this segment, and the first bit behind it.
    const int64_t left = (args.w - segment + kWarp - 1) / kWarp;
    const int count = int(left < kRowWords ? left : kRowWords);
    __syncwarp();
    for (int i = 0; i < count; ++i) {
      const unsigned word = word_at(segment + int64_t(i) * kWarp);
      if (lane == 0) words[i] = word;
    }
    __syncwarp();
    int64_t after = -1;
    for (int64_t start = segment + int64_t(count) * kWarp; start < args.w && after < 0; start += kWarp) {
      const unsigned word = word_at(start);
      if (word) after = start + __ffs(word) - 1;
    }

    // 2. The nearest bits on both sides of every element. Of labels the next bit is meant, of zeros this one too.
    int next = 0;
    for (int i = 0; i < count; ++i) {
      const unsigned word = words[i];
      for (next = max(next, i + 1); next < count && !words[next];) ++next;
      const int64_t start = segment + int64_t(i) * kWarp, at = start + lane;
      const unsigned up_to = word & (~0u >> (kWarp - 1 - lane));
      const unsigned from = word & (labels ? ~1u << lane : ~0u << lane);
      int64_t low = up_to ? start + kWarp - 1 - __clz(up_to) : before;
      int64_t high = from           ? start + __ffs(from) - 1
                     : next < count ? segment + int64_t(next) * kWarp + __ffs(words[next]) - 1
                                    : after;
      if (labels && low >= 0) --low;  // the source is the element before
      const bool low_is_nearer = low >= 0 && (high < 0 || at - low <= high - at);
      const int64_t source = low_is_nearer ? low : high;
      if (at < args.w) {
        const int64_t to = row * args.w + at;
        static_cast<T*>(args.squares)[to] =
            source < 0 ? no_source<T>() : square<T>(low_is_nearer ? at - low : high - at, args.spacing);
        if (args.nearest) args.nearest[to] = source;
      }
      if (word) before = start + kWarp - 1 - __clz(word);
    }
  }

  // 3. What the other axes need to know of the labels.
  if (!args.edges) return;
  const int64_t plane = args.h * args.w;
  const bool has_above = row % args.h > 0, has_before = row / args.h % args.d > 0;
  for (int64_t at = lane; at < args.w; at += kWarp) {
    uint8_t edges = is_zero(x[at], args.floating) ? kZero : 0;
    if (has_above && differ(args, x[at], x[at - args.w])) edges |= kEdgeAbove;
    if (has_before && differ(args, x[at], x[at - plane])) edges |= kEdgeBefore;
    args.edges[row * args.w + at] = edges;
  }
}

// Writes the root, or the square itself, as the distances' type.
template <typename T>
__device__ __forceinline__ void write_distance(const AxisPass& args, void* result, int64_t to, T best, bool negative,
                                               bool zero) {
  const bool none = best >= no_source<T>();
  if (args.float64 || !args.exact_roots || sizeof(T) == 8) {
    double distance = none ? __longlong_as_double(0x7ff0000000000000) : double(best);
    if (!args.squared) distance = sqrt(distance);
    distance = zero ? 0 : negative ? -distance : distance;
    if (args.float64) {
      static_cast<double*>(result)[to] = distance;
    } else {
      static_cast<float*>(result)[to] = float(distance);
    }
  } else {
    float distance = none ? __int_as_float(0x7f800000) : float(best);
    if (!args.squared) distance = sqrtf(distance);
    static_cast<float*>(result)[to] = zero ? 0 : negative ? -distance : distance;
  }
}

// Grid: tiles of kColumns columns for each of the outer blocks. Shared memory: rows * kColumns of T, and as many bytes
// of edges if there are any.
template <typename T, int kColumns, bool kShared>
__global__ void __launch_bounds__(kAxisThreads) distance_along_axis(const __grid_constant__ AxisPass args) {
  static_assert(kAxisThreads % kColumns == 0, "whole rows of a tile");
  constexpr int kRowsAtOnce = kAxisThreads / kColumns;
  extern __shared__ __align__(16) char shared[];
  T* shared_squares = reinterpret_cast<T*>(shared);
  uint8_t* shared_edges = reinterpret_cast<uint8_t*>(shared + args.rows * kColumns * sizeof(T));

  const int64_t tiles = (args.columns + kColumns - 1) / kColumns;
  const int64_t outer = blockIdx.x / tiles;
  const int lane = threadIdx.x % kColumns, first_row = threadIdx.x / kColumns;
  const int64_t column = blockIdx.x % tiles * kColumns + lane;
  const int64_t base = outer * args.rows * args.columns + column;
  const bool exists = column < args.columns;
  const T* squares = static_cast<const T*>(args.squares) + base;
  const uint8_t* edges = args.edges ? args.edges + base : nullptr;

  // 1. The lines.
  if constexpr (kShared) {
    for (int64_t y = first_row; y < args.rows; y += kRowsAtOnce) {
      if (!exists) break;
      shared_squares[y * kColumns + lane] = squares[y * args.columns];
      if (edges) shared_edges[y * kColumns + lane] = edges[y * args.columns];
    }
    __syncthreads();
  }
  if (!exists) return;
  const auto square_at = [&](int64_t y) {
    return kShared ? shared_squares[y * kColumns + lane] : squares[y * args.columns];
  };
  const auto is_edge = [&](int64_t y) {  // between y - 1 and y
    if (!edges) return false;
    return ((kShared ? shared_edges[y * kColumns + lane] : edges[y * args.columns]) & args.edge) != 0;
  };

  for (int64_t y = first_row; y < args.rows; y += kRowsAtOnce) {
    // 2. The scan.
    T best = square_at(y);
    int64_t source = y;
    bool beyond_edge = false;
    bool up = true, down = true;
    for (int64_t k = 1; up || down; ++k) {
      const T cost = square<T>(k, args.spacing);
      if (!(cost < best)) break;
      const auto take = [&](int64_t i, bool edge) {
        const T candidate = edge ? cost : square_at(i) + cost;
        if (candidate < best) {
          best = candidate;
          source = i;
          beyond_edge = edge;
        }
      };
      up = up && y - k >= 0;
      if (up) {
        const bool edge = is_edge(y - k + 1);
        take(y - k, edge);
        up = !edge;
      }
      down = down && y + k < args.rows;
      if (down) {
        const bool edge = is_edge(y + k);
        take(y + k, edge);
        down = !edge;
      }
    }

    // 3. The result.
    const int64_t to = base + y * args.columns;
    int64_t nearest = -1;
    if (args.nearest && best < no_source<T>())
      nearest = source * args.columns + (beyond_edge ? column : args.nearest[base + source * args.columns]);
    if (!args.last) {
      static_cast<T*>(args.result)[to] = best;
      if (args.nearest) args.result_nearest[to] = nearest;
      continue;
    }
    const bool is_zero = edges && (edges[y * args.columns] & kZero);
    write_distance(args, args.result, to, best, is_zero && args.mode == Mode::kSigned,
                   is_zero && args.mode == Mode::kObjects);
    if (args.indices) {
      if (is_zero && args.mode == Mode::kObjects) nearest = y * args.columns + column;  // 0 from itself
      const int64_t size = args.rows * args.columns;
      int64_t* index = args.indices + outer * args.dims * size + y * args.columns + column;
      const int64_t in_plane = nearest < 0 ? -1 : nearest % args.columns;
      index[0] = nearest < 0 ? -1 : nearest / args.columns;
      if (args.dims == 3) index[size] = nearest < 0 ? -1 : in_plane / args.w;
      index[(args.dims - 1) * size] = nearest < 0 ? -1 : in_plane % args.w;
    }
  }
}

// ---- The two nearest objects: the same passes with two candidates, each with its label. A thread takes an element.

template <typename T>
struct TwoCandidates {
  T first = no_source<T>(), second = no_source<T>();
  int32_t first_label = 0, second_label = 0;

  // A label is in one of the two places only, with its smaller distance.
  __device__ __forceinline__ void insert(T distance, int32_t label) {
    if (distance < first) {
      if (label != first_label) {
        second = first;
        second_label = first_label;
      }
      first = distance;
      first_label = label;
    } else if (label != first_label && distance < second) {
      second = distance;
      second_label = label;
    }
  }
};

constexpr int kTwoThreads = 256;

// labels [rows, W]. Grid: threads for rows * W elements.
template <typename T>
__global__ void __launch_bounds__(kTwoThreads)
    two_nearest_rows(const int32_t* labels, int64_t elements, int64_t w, double spacing, TwoNearest result) {
  const int64_t at = int64_t(blockIdx.x) * kTwoThreads + threadIdx.x;
  if (at >= elements) return;
  const int64_t x = at % w;
  const int32_t* row = labels + (at - x);
  TwoCandidates<T> best;
  if (row[x] != 0) best.insert(T(0), row[x]);
  const int64_t longest = max(x, w - 1 - x);
  for (int64_t k = 1; k <= longest && best.second_label == 0; ++k) {
    const T cost = square<T>(k, spacing);
    const int32_t low = x - k >= 0 ? row[x - k] : 0, high = x + k < w ? row[x + k] : 0;
    if (low != 0) best.insert(cost, low);
    if (high != 0) best.insert(cost, high);
  }
  static_cast<T*>(result.first)[at] = best.first;
  static_cast<T*>(result.second)[at] = best.second;
  result.first_label[at] = best.first_label;
  result.second_label[at] = best.second_label;
}

// Grid: threads for outer * rows * columns elements.
template <typename T>
__global__ void __launch_bounds__(kTwoThreads)
    two_nearest_along_axis(const __grid_constant__ AxisPass args, const __grid_constant__ TwoNearest from,
                           const __grid_constant__ TwoNearest result) {
  const int64_t at = int64_t(blockIdx.x) * kTwoThreads + threadIdx.x;
  if (at >= args.outer * args.rows * args.columns) return;
  const int64_t y = at / args.columns % args.rows;
  const T *first = static_cast<const T*>(from.first), *second = static_cast<const T*>(from.second);
  TwoCandidates<T> best{first[at], second[at], from.first_label[at], from.second_label[at]};
  const int64_t longest = max(y, args.rows - 1 - y);
  for (int64_t k = 1; k <= longest; ++k) {
    const T cost = square<T>(k, args.spacing);
    if (!(cost < best.second)) break;
#pragma unroll
    for (int side = -1; side <= 1; side += 2) {
      if (y + side * k < 0 || y + side * k >= args.rows) continue;
      const int64_t i = at + side * k * args.columns;
      const T candidate = first[i] + cost;
      if (!(candidate < best.second)) continue;
      best.insert(candidate, from.first_label[i]);
      best.insert(second[i] + cost, from.second_label[i]);
    }
  }
  if (args.last) {
    write_distance(args, result.first, at, best.first, false, false);
    write_distance(args, result.second, at, best.second, false, false);
  } else {
    static_cast<T*>(result.first)[at] = best.first;
    static_cast<T*>(result.second)[at] = best.second;
    result.first_label[at] = best.first_label;
    result.second_label[at] = best.second_label;
  }
}

}  // namespace pyseg::distance
