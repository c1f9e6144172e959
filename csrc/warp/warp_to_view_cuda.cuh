// warp_to_view and its gradient (1703.08866, section III). Torch-free.
//
// view_projections: a thread a view puts its matrices into one projection. view_warp_planes (NCHW): a thread takes a pixel
// of a keyframe and 16 channels, walks the views, and reads the four elements of each plane; neighbours in a warp read
// neighbouring elements. view_warp_pixels (channels_last): kChunk / kVec threads share as many pixels, each finds one
// pixel's place, shuffles tell the others, and together they read the pixels' channels, 16 bytes a thread.
// The gradient: view_cells finds each pixel's place and the cell of four elements that it lies in; CUB sorts the pixels by
// cell, stably; view_rows marks where each cell's begin and end; view_gather_*: a thread takes an element of the view and
// channels, and adds up what the pixels of the four cells around it contribute, in the keyframe's order.
//
// Geometry is in double precision, once for a pixel, view and 16 channels. Bytes at the least: scores that are seen and the
// output once; the gradients once. No atomics; deterministic, the same bits for any grid.
#pragma once

#include "common/divide_cuda.cuh"
#include "common/element_cuda.cuh"
#include "upsample/upsample_concat_cuda.cuh"
#include "warp/warp_to_view_math.h"

namespace pyseg::view {

using upsample::kVectorBytes;
using upsample::load_elements;
using upsample::store_elements;

constexpr int kThreads = 128;
constexpr int kChunk = 16;  // channels whose sums a thread, or a group of threads, keeps
static_assert(32 % kChunk == 0, "a group of threads lies in one warp");

struct CudaDepth {
  const void* data;  // [images, height, width], each image dense
  int64_t image_stride;
  bool wide;  // double, not float
};
// A camera's matrices, of double or float.
struct Matrices {
  const void* data;
  bool wide;
};
struct CudaViews {
  int64_t keys, views, channels;
  int64_t key_width, key_pixels;
  Visibility visibility;
  CudaDepth depth, source_depth;
  const Projection* projection;                                     // [keys * views]
  int64_t image_stride, channel_stride, row_stride, column_stride;  // of scores
};
// Blocks of pixels, chunks of channels, images, one after the other.
struct ViewGrid {
  unsigned blocks, chunks;
};
struct ViewPlace {
  int64_t pixel, channel, image;
};

__device__ __forceinline__ ViewPlace place_in(const ViewGrid& grid) {
  unsigned rest = blockIdx.x;
  const unsigned block = rest % grid.blocks;
  rest /= grid.blocks;
  return {int64_t{block} * kThreads + threadIdx.x, int64_t{rest % grid.chunks} * kChunk, rest / grid.chunks};
}

// ---- Geometry.

struct MatrixRow {
  Matrices matrices;
  int64_t first;
  __device__ double operator[](int i) const {
    return matrices.wide ? static_cast<const double*>(matrices.data)[first + i]
                         : static_cast<const float*>(matrices.data)[first + i];
  }
};

static __global__ void __launch_bounds__(kThreads)
    view_projections(Matrices key, Matrices source, Matrices pose, int64_t images, int64_t views, Projection* to) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < images)
    to[n] = projection_of(MatrixRow{key, n / views * 9}, MatrixRow{source, n * 9}, MatrixRow{pose, n * 16});
}

__device__ __forceinline__ double depth_at(const CudaDepth& depth, int64_t image, int64_t pixel) {
  const int64_t at = image * depth.image_stride + pixel;
  return depth.wide ? __ldg(static_cast<const double*>(depth.data) + at)
                    : double(__ldg(static_cast<const float*>(depth.data) + at));
}

// The upper left of the four elements of the view between which a pixel lies.
template <typename A>
struct Located {
  bool seen;
  int32_t y, x;
  A y_weight, x_weight;
};
template <typename A>
__device__ __forceinline__ Located<A> locate(const CudaViews& a, int64_t n, int64_t key, int64_t pixel) {
  const double z = depth_at(a.depth, key, pixel);
  const uint32_t row = uint32_t(pixel) / uint32_t(a.key_width), column = uint32_t(pixel) - row * uint32_t(a.key_width);
  const ViewPoint p = project(a.projection[n], double(column), double(row), z);
  const Visibility& v = a.visibility;
  if (!is_inside(p, z, v.height, v.width)) return {false, 0, 0, A(0), A(0)};
  const Between y = between(p.y, v.height), x = between(p.x, v.width);
  const bool seen = !v.tested || is_seen(p.depth, depth_at(a.source_depth, n, int64_t{y.near} * v.width + x.near),
                                         v.absolute, v.relative);
  return {seen, y.low, x.low, A(y.weight), A(x.weight)};
}

// ---- Forward.

template <typename T>
__global__ void __launch_bounds__(kThreads)
    view_warp_planes(const __grid_constant__ CudaViews a, ViewGrid grid, const T* scores /* [keys * views, C, H, W] */,
                     T* output /* [keys, C, H', W'] */, uint8_t* count /* [keys, H', W'] */) {
  using A = Accumulator<T>;
  const ViewPlace at = place_in(grid);
  if (at.pixel >= a.key_pixels) return;
  const int64_t right = a.visibility.width > 1 ? a.column_stride : 0;
  const int64_t below = a.visibility.height > 1 ? a.row_stride : 0;
  A sum[kChunk] = {};
  int seen = 0;
  for (int64_t n = at.image * a.views; n < (at.image + 1) * a.views; ++n) {
    const Located<A> to = locate<A>(a, n, at.image, at.pixel);
    if (!to.seen) continue;
    ++seen;
    const T* p =
        scores + n * a.image_stride + at.channel * a.channel_stride + to.y * a.row_stride + to.x * a.column_stride;
    const A y = to.y_weight, x = to.x_weight;
    const A w00 = (A(1) - y) * (A(1) - x), w01 = (A(1) - y) * x, w10 = y * (A(1) - x), w11 = y * x;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      if (at.channel + c >= a.channels) break;
      sum[c] += (w00 * widen(__ldg(p)) + w01 * widen(__ldg(p + right))) +
                (w10 * widen(__ldg(p + below)) + w11 * widen(__ldg(p + below + right)));
      p += a.channel_stride;
    }
  }
  if (at.channel == 0) count[at.image * a.key_pixels + at.pixel] = uint8_t(seen);
  T* const to = output + (at.image * a.channels + at.channel) * a.key_pixels + at.pixel;
#pragma unroll
  for (int c = 0; c < kChunk; ++c)
    if (at.channel + c < a.channels) to[c * a.key_pixels] = narrow<T>(sum[c]);
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4)
    view_warp_pixels(const __grid_constant__ CudaViews a, ViewGrid grid, const T* scores /* [keys * views, C, H, W] */,
                     T* output /* [keys, C, H', W'] */, uint8_t* count /* [keys, H', W'] */) {
  using A = Accumulator<T>;
  constexpr int kGroup = kChunk / kVec;  // threads, and their pixels
  const ViewPlace at = place_in(grid);
  const int lane = int(threadIdx.x) % kGroup;
  const int64_t channel = at.channel + lane * kVec, first_pixel = at.pixel - lane;
  const int64_t right = a.visibility.width > 1 ? a.column_stride : 0;
  const int64_t below = a.visibility.height > 1 ? a.row_stride : 0;
  A sum[kGroup][kVec] = {};
  int seen = 0;
  for (int64_t n = at.image * a.views; n < (at.image + 1) * a.views; ++n) {
    Located<A> own{false, 0, 0, A(0), A(0)};
    if (at.pixel < a.key_pixels) own = locate<A>(a, n, at.image, at.pixel);
    seen += own.seen;
    const int32_t own_y = own.seen ? own.y : -1;
    const T* const image = scores + n * a.image_stride + channel;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int32_t row = __shfl_sync(0xffffffffu, own_y, i, kGroup);
      const int32_t column = __shfl_sync(0xffffffffu, own.x, i, kGroup);
      const A y = __shfl_sync(0xffffffffu, own.y_weight, i, kGroup);
      const A x = __shfl_sync(0xffffffffu, own.x_weight, i, kGroup);
      if (row < 0 || channel >= a.channels) continue;
      const T* const p = image + row * a.row_stride + column * a.column_stride;
      A v00[kVec], v01[kVec], v10[kVec], v11[kVec];
      load_elements<kVec>(p, v00);
      load_elements<kVec>(p + right, v01);
      load_elements<kVec>(p + below, v10);
      load_elements<kVec>(p + below + right, v11);
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        sum[i][v] +=
            ((A(1) - y) * (A(1) - x) * v00[v] + (A(1) - y) * x * v01[v]) + (y * (A(1) - x) * v10[v] + y * x * v11[v]);
    }
  }
  if (at.channel == 0 && at.pixel < a.key_pixels) count[at.image * a.key_pixels + at.pixel] = uint8_t(seen);
  if (channel >= a.channels) return;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (first_pixel + i < a.key_pixels)
      store_elements<kVec>(sum[i], output + (at.image * a.key_pixels + first_pixel + i) * a.channels + channel);
}

// ---- The gradient.

template <typename A>
struct alignas(2 * sizeof(A)) Weights {
  A y, x;
};
// The keyframes' pixels, of all views one after the other.
template <typename A>
struct CellTable {
  uint32_t *cell, *sorted_cell;    // of the pixel: of all views' elements, or their number where it is not seen
  uint32_t *pixel, *sorted_pixel;  // its number
  Weights<A>* weights;             // not sorted
  uint32_t *first, *last;          // of each element: from where to where the sorted pixels of its cell are
  uint32_t pixels, elements;
};

// Grid: threads for all pixels.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    view_cells(const __grid_constant__ CudaViews a, const __grid_constant__ CellTable<A> table) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= table.pixels) return;
  const uint32_t n = i / uint32_t(a.key_pixels), size = uint32_t(a.visibility.height) * uint32_t(a.visibility.width);
  const Located<A> at = locate<A>(a, n, n / uint32_t(a.views), i - n * uint32_t(a.key_pixels));
  table.cell[i] = at.seen ? n * size + uint32_t(at.y) * uint32_t(a.visibility.width) + uint32_t(at.x) : table.elements;
  table.pixel[i] = i;
  table.weights[i] = {at.y_weight, at.x_weight};
}

// Grid: threads for all pixels.
template <typename A>
__global__ void __launch_bounds__(kThreads) view_rows(const __grid_constant__ CellTable<A> table) {
  const uint32_t k = blockIdx.x * kThreads + threadIdx.x;
  if (k >= table.pixels) return;
  const uint32_t cell = table.sorted_cell[k];
  if (cell == table.elements) return;
  if (k == 0 || table.sorted_cell[k - 1] != cell) table.first[cell] = k;
  if (k + 1 == table.pixels || table.sorted_cell[k + 1] != cell) table.last[cell] = k + 1;
}

// f(pixel of all views, weight) for the pixels that read an element of view n.
template <typename A, typename F>
__device__ __forceinline__ void each_reader(const CudaViews& a, const CellTable<A>& table, int64_t n, int64_t element,
                                            const F& f) {
  const int32_t width = a.visibility.width;
  const uint32_t y = uint32_t(element) / uint32_t(width), x = uint32_t(element) - y * uint32_t(width);
  const int64_t own = n * a.visibility.height * width + element;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const uint32_t down = corner / 2, across = corner % 2;
    if (y < down || x < across) continue;
    const int64_t cell = own - int64_t{down} * width - across;
    for (uint32_t k = table.first[cell]; k < table.last[cell]; ++k) {
      const uint32_t pixel = table.sorted_pixel[k];
      const Weights<A> w = table.weights[pixel];
      f(pixel, (down ? w.y : A(1) - w.y) * (across ? w.x : A(1) - w.x));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    view_gather_planes(const __grid_constant__ CudaViews a, ViewGrid grid,
                       const __grid_constant__ CellTable<Accumulator<T>> table, const T* grad /* [keys, C, H', W'] */,
                       T* grad_scores /* [keys * views, C, H, W] */) {
  using A = Accumulator<T>;
  const ViewPlace at = place_in(grid);
  const int64_t size = int64_t{a.visibility.height} * a.visibility.width;
  if (at.pixel >= size) return;
  const T* const image = grad + (at.image / a.views * a.channels + at.channel) * a.key_pixels - at.image * a.key_pixels;
  A sum[kChunk] = {};
  each_reader(a, table, at.image, at.pixel, [&](uint32_t pixel, A weight) {
    const T* p = image + pixel;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      if (at.channel + c >= a.channels) break;
      sum[c] += weight * widen(__ldg(p));
      p += a.key_pixels;
    }
  });
  T* const to = grad_scores + (at.image * a.channels + at.channel) * size + at.pixel;
#pragma unroll
  for (int c = 0; c < kChunk; ++c)
    if (at.channel + c < a.channels) to[c * size] = narrow<T>(sum[c]);
}

// Grid: threads for all vectors of channels of a view, views.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    view_gather_pixels(const __grid_constant__ CudaViews a, ViewGrid grid,
                       const __grid_constant__ CellTable<Accumulator<T>> table, const T* grad /* [keys, C, H', W'] */,
                       T* grad_scores /* [keys * views, C, H, W] */) {
  using A = Accumulator<T>;
  const ViewPlace at = place_in(grid);
  const int64_t vectors = a.channels / kVec, size = int64_t{a.visibility.height} * a.visibility.width;
  int64_t vector;
  const int64_t element = divide(at.pixel, vectors, &vector);
  if (element >= size) return;
  const T* const image = grad + (at.image / a.views - at.image) * a.key_pixels * a.channels + vector * kVec;
  A sum[kVec] = {};
  each_reader(a, table, at.image, element, [&](uint32_t pixel, A weight) {
    A g[kVec];
    load_elements<kVec>(image + pixel * a.channels, g);
#pragma unroll
    for (int v = 0; v < kVec; ++v) sum[v] += weight * g[v];
  });
  store_elements<kVec>(sum, grad_scores + (at.image * size + element) * a.channels + vector * kVec);
}

}  // namespace pyseg::view
