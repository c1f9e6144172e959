// RoIAlign's gradients: of the maps and of the boxes.
//
// roi_align_grad_maps gathers: a block owns a tile of 8 x 8 elements of one image of one level and 64 channels, a
// thread each, with their sums in shared memory. It walks the boxes in their order, 64 at a time: each thread looks
// whether one's reach meets the tile, ballots make the list. For a box that does, every thread walks the bins' points
// and adds those corners that lie in the tile to its channel's sums; mode "max" finds a bin's best point first. The
// tile is then written once, zeros too: nothing is cleared, no atomics, sums in the order of boxes, bins and points.
// roi_align_grad_boxes: a block takes a box; its threads take channels of bins and add up what each point contributes
// to the box's row; the threads' rows are added up in a fixed order.
//
// Bytes at the least: the gradients of the maps and of the outputs once. Each tile reads the boxes' plans, and
// gradients of the bins that meet it. Deterministic.
#pragma once

#include "roi/roi_align_cuda.cuh"

namespace pyseg::roi {

constexpr int kTile = 8;           // rows and columns
constexpr int kTileChannels = 64;  // a thread each
constexpr int kBoxThreads = 128;
// Blocks of a multiprocessor at the least, so that registers suffice: three axes and double precision need more.
template <typename T, BoxKind kKind>
constexpr int kBoxBlocks = sizeof(T) == 8 && kKind == BoxKind::kAligned3d ? 3 : 4;
template <typename T, BoxKind kKind>
constexpr int kTileBlocks = sizeof(T) == 8                 ? 4
                            : kKind == BoxKind::kAligned3d ? 6
                                                           : 8;
static_assert(kTile * kTile * (kTileChannels + 1) * 8 <= 48 * 1024, "static shared memory ends there");
static_assert(kTileChannels == 64, "the list of boxes is two words of ballots");

// The number of the point of a bin that has the largest value, as the forward kernel finds it; -1: off the map.
template <BoxKind kKind, typename T, typename A>
__device__ __forceinline__ int64_t best_point(const CudaPlan<A>& plan, const CudaLevel& level, const T* from, int64_t z,
                                              int64_t y, int64_t x) {
  A best = 0;
  int64_t which = -1, number = 0, on_map = 0;
  each_point<kKind>(
      plan.box, z, y, x, [&](const Point<A>& pz, const Point<A>& py, const Point<A>& px, int64_t, int64_t, int64_t) {
        if (pz.inside && py.inside && px.inside) {
          A v = 0;
          each_corner<kKind>(pz, py, px, level.stride + 2,
                             [&](int64_t offset, A weight) { v += weight * widen(__ldg(from + offset)); });
          if (on_map++ == 0 || v > best || (v != v && best == best)) best = v, which = number;
        }
        ++number;
      });
  return A(on_map) != samples_of(plan.box) && best < A(0) ? -1 : which;
}

template <typename A>
__device__ __forceinline__ bool meets(const CudaPlan<A>& plan, int level, int64_t image, int64_t z, int64_t y,
                                      int64_t x) {
  return plan.level == level && plan.image == image && plan.first[kZ] <= z && plan.last[kZ] >= z &&
         plan.first[kY] < y + kTile && plan.last[kY] >= y && plan.first[kX] < x + kTile && plan.last[kX] >= x;
}

// The bins whose points can lie next to elements `from` .. `to` of an axis: those of boxes along the map's axes.
template <typename A>
__device__ __forceinline__ void bins_of(const Axis<A>& axis, int64_t from, int64_t to, int64_t* first, int64_t* last) {
  *first = 0;
  *last = axis.bins;
  const double bin = double(axis.bin);
  if (bin == 0) return;
  const double a = (double(from) - 2 - double(axis.start)) / bin, b = (double(to) + 2 - double(axis.start)) / bin;
  const double slack = 1 + 1e-6 * double(axis.bins), low = (a < b ? a : b) - slack, high = (a < b ? b : a) + slack;
  const double most = double(axis.bins);
  *first = int64_t(low > 0 ? (low < most ? low : most) : 0);
  *last = int64_t(high > 0 ? (high < most ? high + 1 : most) : 0);
  if (*last > axis.bins) *last = axis.bins;
}

// Grid: tiles of all levels and images x channels / 64.
template <typename T, BoxKind kKind>
__global__ void __launch_bounds__(kTileChannels, kTileBlocks<T, kKind>)
    roi_align_grad_maps(const __grid_constant__ CudaRoiArgs a) {
  using A = Accumulator<T>;
  constexpr bool kRotated = kKind == BoxKind::kRotated;
  __shared__ A sums[kTile * kTile][kTileChannels + 1];  // read across too
  __shared__ unsigned hits[2];
  const int t = threadIdx.x;
  // 1. The tile: of a level, an image, a plane, and its first row and column.
  int number = 0;
  while (number + 1 < a.levels && int64_t(blockIdx.x) >= a.level[number + 1].first_tile) ++number;
  const CudaLevel& level = a.level[number];
  const int64_t rows = level.size[kY], columns = level.size[kX];
  int64_t tile_x, tile_y, z;
  const int64_t row_tile = divide(blockIdx.x - level.first_tile, (columns + kTile - 1) / kTile, &tile_x);
  const int64_t plane = divide(row_tile, (rows + kTile - 1) / kTile, &tile_y);
  const int64_t image = divide(plane, level.size[kZ], &z), y0 = tile_y * kTile, x0 = tile_x * kTile;
  const int64_t c0 = int64_t(blockIdx.y) * kTileChannels, c = c0 + t;
  const bool own = c < a.channels;
  const int64_t nz = a.sampling.bins[kZ], ny = a.sampling.bins[kY], nx = a.sampling.bins[kX], bins = nz * ny * nx;
  const T* const input =
      own && level.input ? static_cast<const T*>(level.input) + image * level.stride[0] + c * level.stride[1] : nullptr;
  for (int i = 0; i < kTile * kTile; ++i) sums[i][t] = A(0);

  // 2. The boxes that meet it, in their order.
  const auto* plans = static_cast<const CudaPlan<A>*>(a.plans);
  for (int64_t first = 0; first < a.boxes; first += kTileChannels) {
    const bool hit = first + t < a.boxes && meets(plans[first + t], number, image, z, y0, x0);
    const unsigned ballot = __ballot_sync(~0u, hit);
    __syncthreads();
    if (t % 32 == 0) hits[t / 32] = ballot;
    __syncthreads();
    if (!own) continue;
    for (uint64_t left = uint64_t(hits[1]) << 32 | hits[0]; left != 0; left &= left - 1) {
      const int64_t k = first + __ffsll(int64_t(left)) - 1;
      const CudaPlan<A>& plan = plans[k];
      const T* const grad = static_cast<const T*>(a.grad_output) + k * a.channels * bins;
      const A samples = samples_of(plan.box), part = a.maximum || samples == A(0) ? A(1) : A(1) / samples;
      int64_t first_y = 0, last_y = ny, first_x = 0, last_x = nx;
      if constexpr (!kRotated) {
        bins_of(plan.box.axis[kY], y0, y0 + kTile - 1, &first_y, &last_y);
        bins_of(plan.box.axis[kX], x0, x0 + kTile - 1, &first_x, &last_x);
      }
      for (int64_t bz = 0; bz < nz; ++bz)
        for (int64_t by = first_y; by < last_y; ++by)
          for (int64_t bx = first_x; bx < last_x; ++bx) {
            const int64_t bin = (bz * ny + by) * nx + bx;
            const int64_t which = a.maximum ? best_point<kKind>(plan, level, input, bz, by, bx) : 0;
            if (which < 0) continue;
            const A g = part * widen(__ldg(grad + (a.last ? bin * a.channels + c : c * bins + bin)));
            int64_t point = 0;
            each_point<kKind>(
                plan.box, bz, by, bx,
                [&](const Point<A>& pz, const Point<A>& py, const Point<A>& px, int64_t, int64_t, int64_t) {
                  const bool taken = !a.maximum || point == which;
                  ++point;
                  if (!taken || !(pz.inside && py.inside && px.inside)) return;
                  A weight_z = A(1);
                  if constexpr (kKind == BoxKind::kAligned3d)
                    weight_z = (pz.low == z ? pz.w_low : A(0)) + (pz.high == z ? pz.w_high : A(0));
                  const auto add = [&](int64_t y, int64_t x, A weight) {
                    const int64_t i = y - y0, j = x - x0;
                    if (uint64_t(i) < uint64_t(kTile) && uint64_t(j) < uint64_t(kTile))
                      sums[i * kTile + j][t] += weight * g;
                  };
                  if (weight_z == A(0)) return;
                  add(py.low, px.low, weight_z * (py.w_low * px.w_low));
                  add(py.low, px.high, weight_z * (py.w_low * px.w_high));
                  add(py.high, px.low, weight_z * (py.w_high * px.w_low));
                  add(py.high, px.high, weight_z * (py.w_high * px.w_high));
                });
          }
    }
  }

  // 3. The tile: lanes are channels, or neighbouring elements.
  __syncthreads();
  T* const to = static_cast<T*>(level.grad) + image * a.channels * level.size[kZ] * rows * columns;
  const int64_t n = a.channels - c0 < kTileChannels ? a.channels - c0 : kTileChannels;
  if (level.grad_last) {
    if (!own) return;
    for (int i = 0; i < kTile * kTile; ++i) {
      const int64_t y = y0 + i / kTile, x = x0 + i % kTile;
      if (y < rows && x < columns) to[((z * rows + y) * columns + x) * a.channels + c] = narrow<T>(sums[i][t]);
    }
  } else {
    const int64_t y = y0 + t / kTile, x = x0 + t % kTile;
    if (y >= rows || x >= columns) return;
    for (int64_t i = 0; i < n; ++i)
      to[(((c0 + i) * level.size[kZ] + z) * rows + y) * columns + x] = narrow<T>(sums[t][i]);
  }
}

// Adds what a point contributes to the row of its box: add_box_gradient with a constant kind.
template <BoxKind kKind, typename A>
__device__ __forceinline__ void add_to_row(const Box<A>& box, A gz, A gy, A gx, A share_z, A share_y, A share_x,
                                           A (&row)[kMostColumns]) {
  if constexpr (kKind == BoxKind::kRotated) {
    share_x -= A(0.5);
    share_y -= A(0.5);
    const A x = share_x * box.axis[kX].bin * A(box.axis[kX].bins);
    const A y = share_y * box.axis[kY].bin * A(box.axis[kY].bins);
    row[1] += gx * box.scale;
    row[2] += gy * box.scale;
    if (!box.axis[kX].clamped) row[3] += share_x * box.scale * (gx * box.cosine - gy * box.sine);
    if (!box.axis[kY].clamped) row[4] += share_y * box.scale * (gx * box.sine + gy * box.cosine);
    row[5] +=
        A(3.14159265358979323846 / 180) * (gx * (y * box.cosine - x * box.sine) - gy * (y * box.sine + x * box.cosine));
  } else {
    constexpr int kDims = kKind == BoxKind::kAligned3d ? 3 : 2;
    const auto add = [&](int i, A g, A share, bool clamped) {
      if (clamped) share = A(0);
      row[1 + i] += g * box.scale * (A(1) - share);
      row[1 + i + kDims] += g * box.scale * share;
    };
    add(0, gx, share_x, box.axis[kX].clamped);
    add(1, gy, share_y, box.axis[kY].clamped);
    if constexpr (kDims == 3) add(2, gz, share_z, box.axis[kZ].clamped);
  }
}

// Grid: boxes.
template <typename T, BoxKind kKind>
__global__ void __launch_bounds__(kBoxThreads, kBoxBlocks<T, kKind>)
    roi_align_grad_boxes(const __grid_constant__ CudaRoiArgs a) {
  using A = Accumulator<T>;
  __shared__ A rows[kMostColumns][kBoxThreads];
  const int64_t k = blockIdx.x;
  const CudaPlan<A>& plan = static_cast<const CudaPlan<A>*>(a.plans)[k];
  A* const to = static_cast<A*>(a.grad_boxes) + k * a.columns;
  A row[kMostColumns] = {};
  if (plan.level >= 0) {
    const CudaLevel& level = a.level[plan.level];
    const int64_t nz = a.sampling.bins[kZ], ny = a.sampling.bins[kY], nx = a.sampling.bins[kX], bins = nz * ny * nx;
    const Box<A>& box = plan.box;
    const A samples = samples_of(box), part = a.maximum || samples == A(0) ? A(1) : A(1) / samples;
    const T* const grad = static_cast<const T*>(a.grad_output) + k * a.channels * bins;
    for (int64_t item = threadIdx.x; item < bins * a.channels; item += kBoxThreads) {
      int64_t bin, c, x, y;
      if (a.last) {
        bin = divide(item, a.channels, &c);
      } else {
        c = divide(item, bins, &bin);
      }
      const int64_t bin_row = divide(bin, nx, &x), z = divide(bin_row, ny, &y);
      const T* const from = static_cast<const T*>(level.input) + plan.image * level.stride[0] + c * level.stride[1];
      const int64_t which = a.maximum ? best_point<kKind>(plan, level, from, z, y, x) : 0;
      if (which < 0) continue;
      const A g = part * widen(__ldg(grad + item));
      int64_t point = 0;
      each_point<kKind>(
          box, z, y, x,
          [&](const Point<A>& pz, const Point<A>& py, const Point<A>& px, int64_t i, int64_t j, int64_t l) {
            const bool taken = !a.maximum || point == which;
            ++point;
            if (!taken || !(pz.inside && py.inside && px.inside)) return;
            A gz = 0, gy = 0, gx = 0;
            const auto plane = [&](int64_t at, A weight, A slope) {
              const int64_t *s = level.stride + 2, low = at + py.low * s[kY], high = at + py.high * s[kY];
              const A v00 = widen(__ldg(from + low + px.low * s[kX])), v01 = widen(__ldg(from + low + px.high * s[kX]));
              const A v10 = widen(__ldg(from + high + px.low * s[kX])),
                      v11 = widen(__ldg(from + high + px.high * s[kX]));
              const A top = px.w_low * v00 + px.w_high * v01, bottom = px.w_low * v10 + px.w_high * v11;
              gx += weight * px.slope * (py.w_low * (v01 - v00) + py.w_high * (v11 - v10));
              gy += weight * py.slope * (bottom - top);
              gz += slope * (py.w_low * top + py.w_high * bottom);
            };
            A share_z = A(0);
            if constexpr (kKind == BoxKind::kAligned3d) {
              plane(pz.low * level.stride[2], pz.w_low, -pz.slope);
              plane(pz.high * level.stride[2], pz.w_high, pz.slope);
              share_z = share(box.axis[kZ], z, i);
            } else {
              plane(0, A(1), A(0));
            }
            add_to_row<kKind>(box, g * gz, g * gy, g * gx, share_z, share(box.axis[kY], y, j),
                              share(box.axis[kX], x, l), row);
          });
    }
  }
#pragma unroll
  for (int i = 0; i < kMostColumns; ++i) rows[i][threadIdx.x] = row[i];
  for (int half = kBoxThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half)
      for (int i = 0; i < kMostColumns; ++i) rows[i][threadIdx.x] += rows[i][threadIdx.x + half];
  }
  __syncthreads();
  if (threadIdx.x < a.columns) to[threadIdx.x] = rows[threadIdx.x][0];
}

}  // namespace pyseg::roi
