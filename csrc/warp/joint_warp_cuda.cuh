// joint_warp on CUDA devices: an image and its labels read at the same warped places, U-Net's augmentation (Ronneberger
// et al. 2015, section 3.1). Torch-free.
//
// A block takes a tile of kTileRows rows x kTileColumns columns of one image of the output; its threads first interpolate
// the grid of control points along all axes but the last for each of its rows, into shared memory. A thread then takes a
// pixel: its place, then 2^d elements of every channel, and the nearest label. Neighbouring threads read neighbouring
// elements and store neighbouring ones.
//
// Bytes at the least: image and labels read once and written once; no field, no grid of places. Compiled without fused
// multiply-adds: the same bits as on the CPU.
#pragma once

#include "common/divide_cuda.cuh"
#include "common/element_cuda.cuh"
#include "warp/joint_warp_math.h"

namespace pyseg {

// Beside those of other elements: in an inner namespace it would hide them.
__device__ __forceinline__ float widen(uint8_t x) { return float(x); }

namespace warp {

constexpr int kTileColumns = 32, kTileRows = 8;
constexpr int kTileThreads = kTileColumns * kTileRows;
static_assert(kTileColumns == 32, "a warp takes one row, so that its stores are side by side");

template <typename A, int kDims>
struct CudaGeometry {
  int64_t images;
  int64_t in[kDims], out[kDims];
  int64_t rows, row_tiles, column_tiles;  // of an image of the output
  GridAxis<A> grid[kDims];
  int64_t grid_points;
  const A* affine;        // [N, d, d + 1]
  const A* displacement;  // [N, d, *grid], or null
  A cubic;
};

template <typename A, int kDims>
struct CudaAxes {
  ImageAxis<A> axis[kDims];
  bool reflects, constant;
};

// Strides in elements.
template <typename T, typename Output, int kDims>
struct CudaMap {
  const T* input;  // [N, C, *in]
  int64_t channels, image_stride, channel_stride, stride[kDims];
  Output* output;  // [N, C, *out], dense in one of the two memory formats
  int64_t output_image_stride, output_channel_stride, output_step;
  CudaAxes<Accumulator<T>, kDims> axes;
  Accumulator<T> fill;
  const Accumulator<T>* gain;  // [N, C], or null
  const Accumulator<T>* bias;  // [N, C], or null
};

template <typename A, int kDims>
struct CudaLabels {
  int element_size;   // 0: no labels
  const void* input;  // [N, *in]
  int64_t image_stride, stride[kDims];
  void* output;  // [N, *out]
  CudaAxes<A, kDims> axes;
  int64_t ignore_index;
};

// The pixel of a thread.
struct TilePixel {
  int64_t image, row, column;
  bool inside;
};
template <typename A, int kDims>
__device__ __forceinline__ TilePixel tile_pixel(const CudaGeometry<A, kDims>& g) {
  int64_t row_tile, column_tile;
  const int64_t tile = divide(blockIdx.x, g.column_tiles, &column_tile);
  const int64_t image = divide(tile, g.row_tiles, &row_tile);
  const int64_t row = row_tile * kTileRows + threadIdx.x / kTileColumns;
  const int64_t column = column_tile * kTileColumns + threadIdx.x % kTileColumns;
  return {image, row, column, row < g.rows && column < g.out[kDims - 1]};
}

// The control points of each of the tile's rows: points[row in tile][d][grid's last]. For all threads of a block.
template <typename A, int kDims>
__device__ __forceinline__ void interpolate_points(const CudaGeometry<A, kDims>& g, int64_t image, int64_t first_row,
                                                   A* points) {
  const int width = g.grid[kDims - 1].count, plane = width * g.grid[kDims - 2].count;
  const int all = kTileRows * kDims * width;
  for (int i = int(threadIdx.x); i < all; i += kTileThreads) {
    const int x = i % width, c = i / width % kDims;
    const int64_t row = first_row + i / (width * kDims);
    if (row >= g.rows) continue;
    int64_t outer[kDims - 1];
    if constexpr (kDims == 3) {
      outer[0] = divide(row, g.out[1], &outer[1]);
    } else {
      outer[0] = row;
    }
    const A* const from = g.displacement + (image * kDims + c) * g.grid_points + x;
    const auto along = [&](const auto& point, int d) {
      const GridAxis<A> axis = g.grid[d];
      const int32_t cell = grid_cell(axis, outer[d]);
      const auto at = [&](int32_t k) { return point(grid_index(cell + k, axis.count)); };
      return cubic_at(cubic_between<A>(at(-1), at(0), at(1), at(2), g.cubic), grid_rest(axis, outer[d], cell));
    };
    const auto in_plane = [&](int64_t z) {
      return along([&](int32_t y) { return __ldg(from + z * plane + y * width); }, kDims - 2);
    };
    if constexpr (kDims == 3) {
      points[i] = along(in_plane, 0);
    } else {
      points[i] = in_plane(0);
    }
  }
  __syncthreads();
}

// The place that a pixel reads, in elements of the image. points: of the tile.
template <typename A, int kDims>
__device__ __forceinline__ void find_place(const CudaGeometry<A, kDims>& g, const TilePixel& pixel, const A* points,
                                           A (&at)[kDims]) {
  const A* const affine = g.affine + pixel.image * kDims * (kDims + 1);
  int64_t outer[2] = {pixel.row, 0};
  if constexpr (kDims == 3) outer[0] = divide(pixel.row, g.out[1], &outer[1]);
#pragma unroll
  for (int c = 0; c < kDims; ++c) {
    const A* const m = affine + c * (kDims + 1);
    A sum = __ldg(m) * A(outer[0]);
    if constexpr (kDims == 3) sum = sum + __ldg(m + 1) * A(outer[1]);
    at[c] = (sum + __ldg(m + kDims)) + __ldg(m + kDims - 1) * A(pixel.column);
  }
  if (g.displacement == nullptr) return;
  const GridAxis<A> axis = g.grid[kDims - 1];
  const int32_t cell = grid_cell(axis, pixel.column);
  const A rest = grid_rest(axis, pixel.column, cell);
  const A* const row = points + threadIdx.x / kTileColumns * kDims * axis.count;
#pragma unroll
  for (int c = 0; c < kDims; ++c) {
    const auto point = [&](int32_t i) { return row[c * axis.count + grid_index(cell + i, axis.count)]; };
    at[c] = at[c] + cubic_at(cubic_between<A>(point(-1), point(0), point(1), point(2), g.cubic), rest);
  }
}

template <typename A, int kDims>
__device__ __forceinline__ A folded(const CudaAxes<A, kDims>& axes, int d, A at) {
  return axes.reflects ? reflected(axes.axis[d], at) : clamped(axes.axis[d], at);
}

template <typename A>
__device__ __forceinline__ A blended(A low, A low_weight, A high, A high_weight) {
  return low_weight * (low_weight != A(0) ? low : A(0)) + high_weight * (high_weight != A(0) ? high : A(0));
}

// To bytes: to the nearest, of two as near the higher one.
template <typename Output, typename A>
__device__ __forceinline__ Output output_of(A value) {
  if constexpr (std::is_same_v<Output, uint8_t>) {
    value = value > A(0) ? value : A(0);
    value = value < A(255) ? value : A(255);
    return uint8_t(int32_t(value + A(0.5)));
  } else {
    return narrow<Output>(value);
  }
}

template <typename L, typename A, int kDims>
__device__ __forceinline__ void copy_label(const CudaLabels<A, kDims>& labels, int64_t image, int64_t to,
                                           int64_t index) {
  const L* const from = static_cast<const L*>(labels.input) + image * labels.image_stride;
  static_cast<L*>(labels.output)[to] = index >= 0 ? __ldg(from + index) : L(labels.ignore_index);
}

template <typename T, typename Output, int kDims>
__global__ void __launch_bounds__(kTileThreads, sizeof(Accumulator<T>) == 8 ? 2 : 4)
    joint_warp_forward(const __grid_constant__ CudaGeometry<Accumulator<T>, kDims> g,
                       const __grid_constant__ CudaMap<T, Output, kDims> map,
                       const __grid_constant__ CudaLabels<Accumulator<T>, kDims> labels) {
  using A = Accumulator<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* const points = reinterpret_cast<A*>(shared);
  const TilePixel pixel = tile_pixel(g);
  // 1. The field along the tile's rows.
  if (g.displacement != nullptr) interpolate_points(g, pixel.image, pixel.row - threadIdx.x / kTileColumns, points);
  if (!pixel.inside) return;
  // 2. The place.
  A at[kDims];
  find_place(g, pixel, points, at);
  const int64_t linear = pixel.row * g.out[kDims - 1] + pixel.column;
  // 3. The image.
  if (map.channels > 0) {
    A low[kDims], high[kDims];
    int64_t step[kDims], first = pixel.image * map.image_stride;
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      const A place = folded(map.axes, d, at[d]);
      const int32_t tap = first_tap(map.axes.axis[d], place);
      const A beyond = place - A(tap);
      low[d] = hat(beyond, A(1));
      high[d] = hat(beyond - A(1), map.axes.axis[d].reach);
      first += tap * map.stride[d];
      step[d] = g.in[d] > 1 ? map.stride[d] : 0;
    }
    A outside = A(0);
    if (map.axes.constant) {
      A covered = low[0] + high[0];
#pragma unroll
      for (int d = 1; d < kDims; ++d) covered = covered * (low[d] + high[d]);
      outside = A(1) - covered;
    }
    const T* from = map.input + first;
    Output* to = map.output + pixel.image * map.output_image_stride + linear * map.output_step;
    constexpr int kX = kDims - 1, kY = kDims - 2;
    for (int64_t c = 0; c < map.channels; ++c, from += map.channel_stride, to += map.output_channel_stride) {
      const auto row = [&](const T* p) {
        return blended<A>(A(widen(__ldg(p))), low[kX], A(widen(__ldg(p + step[kX]))), high[kX]);
      };
      const auto plane = [&](const T* p) { return blended<A>(row(p), low[kY], row(p + step[kY]), high[kY]); };
      A value = plane(from);
      if constexpr (kDims == 3) value = blended<A>(value, low[0], plane(from + step[0]), high[0]);
      if (outside != A(0)) value = value + outside * map.fill;
      const int64_t factor = pixel.image * map.channels + c;
      if (map.gain != nullptr) value = value * __ldg(map.gain + factor);
      if (map.bias != nullptr) value = value + __ldg(map.bias + factor);
      *to = output_of<Output>(value);
    }
  }
  // 4. The label.
  if (labels.element_size > 0) {
    int64_t index = 0;
    bool inside = true;
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      const A place = folded(labels.axes, d, at[d]);
      inside = inside && is_inside(labels.axes.axis[d], place);
      index += nearest_element(labels.axes.axis[d], place) * labels.stride[d];
    }
    const int64_t to = pixel.image * g.rows * g.out[kDims - 1] + linear, from = inside ? index : -1;
    switch (labels.element_size) {
      case 1: copy_label<uint8_t>(labels, pixel.image, to, from); break;
      case 2: copy_label<uint16_t>(labels, pixel.image, to, from); break;
      case 4: copy_label<uint32_t>(labels, pixel.image, to, from); break;
      default: copy_label<unsigned long long>(labels, pixel.image, to, from);
    }
  }
}

}  // namespace warp
}  // namespace pyseg
