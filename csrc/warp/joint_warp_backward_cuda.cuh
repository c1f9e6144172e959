// The gradient of joint_warp's image on CUDA devices, without atomics. Torch-free.
//
// 1. joint_warp_cells: a thread a pixel of the output finds the cell of the image (the element before its place on every
//    axis) that it reads, as a key, and keeps the place. 2. CUB sorts the pixels by cell; the sort is stable, so those
//    of a cell stay in their order. 3. joint_warp_starts: a thread a cell finds its first pixel by bisection.
//    4. joint_warp_gather: a thread takes an element of the image and kGatherChannels channels, and adds up the pixels of
//    the 2^d cells around it, in their order.
//
// Bytes at the least: the gradients, once each, and for each pixel of the output key, number (both twice) and place.
#pragma once

#include "warp/joint_warp_cuda.cuh"

namespace pyseg::warp {

constexpr int kGatherThreads = 128;
constexpr int kGatherChannels = 4;

// A part of the images: those from `first` on. Pixels and cells are counted within it.
template <typename A, int kDims>
struct CudaBackward {
  CudaGeometry<A, kDims> geometry;  // images: of the part; affine and displacement point at its first
  CudaAxes<A, kDims> axes;
  int64_t in_pixels, out_pixels;  // of an image
  A* places;                      // [d, images * out_pixels]
  uint32_t* keys;                 // [images * out_pixels]
  uint32_t* pixels;               // the same
  const uint32_t* sorted_keys;
  const uint32_t* sorted_pixels;
  uint32_t* starts;  // [images * in_pixels + 1]
  int64_t channels, channel_groups;
  const void* grad;  // [N, C, *out], dense in one of the two memory formats
  int64_t grad_image_stride, grad_channel_stride, grad_step;
  void* grad_image;  // [N, C, *in], dense in one of the two memory formats
  int64_t image_stride, channel_stride, step;
  const A* gain;  // [N, C], or null
};

template <typename A, int kDims>
__global__ void __launch_bounds__(kTileThreads) joint_warp_cells(const __grid_constant__ CudaBackward<A, kDims> a) {
  extern __shared__ __align__(16) unsigned char shared[];
  A* const points = reinterpret_cast<A*>(shared);
  const CudaGeometry<A, kDims>& g = a.geometry;
  const TilePixel pixel = tile_pixel(g);
  if (g.displacement != nullptr) interpolate_points(g, pixel.image, pixel.row - threadIdx.x / kTileColumns, points);
  if (!pixel.inside) return;
  A at[kDims];
  find_place(g, pixel, points, at);
  const int64_t number = pixel.image * a.out_pixels + pixel.row * g.out[kDims - 1] + pixel.column;
  int64_t cell = pixel.image;
  bool read = true;
#pragma unroll
  for (int d = 0; d < kDims; ++d) {
    const A place = folded(a.axes, d, at[d]);
    const int32_t tap = first_tap(a.axes.axis[d], place);
    const A beyond = place - A(tap);
    read = read && (hat(beyond, A(1)) != A(0) || hat(beyond - A(1), a.axes.axis[d].reach) != A(0));
    cell = cell * g.in[d] + tap;
    a.places[d * g.images * a.out_pixels + number] = place;
  }
  // Pixels that read nothing come last.
  a.keys[number] = uint32_t(read ? cell : g.images * a.in_pixels);
  a.pixels[number] = uint32_t(number);
}

// starts[i]: of the sorted pixels, the first whose cell is not before i.
template <typename A, int kDims>
__global__ void __launch_bounds__(kGatherThreads) joint_warp_starts(const __grid_constant__ CudaBackward<A, kDims> a) {
  const int64_t cell = int64_t(blockIdx.x) * kGatherThreads + threadIdx.x;
  if (cell > a.geometry.images * a.in_pixels) return;
  int64_t low = 0, high = a.geometry.images * a.out_pixels;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(__ldg(a.sorted_keys + middle)) < cell) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  a.starts[cell] = uint32_t(low);
}

template <typename T, int kDims>
__global__ void __launch_bounds__(kGatherThreads)
    joint_warp_gather(const __grid_constant__ CudaBackward<Accumulator<T>, kDims> a) {
  using A = Accumulator<T>;
  const CudaGeometry<A, kDims>& g = a.geometry;
  // Elements of an image side by side, then groups of channels, then images.
  int64_t element, group;
  const int64_t image_group = divide(int64_t(blockIdx.x) * kGatherThreads + threadIdx.x, a.in_pixels, &element);
  const int64_t image = divide(image_group, a.channel_groups, &group);
  if (image >= g.images) return;
  int64_t index[kDims];
  int64_t rest = element;
#pragma unroll
  for (int d = kDims - 1; d > 0; --d) rest = divide(rest, g.in[d], &index[d]);
  index[0] = rest;
  const int64_t c0 = group * kGatherChannels, all = g.images * a.out_pixels;
  const int channels = int(a.channels - c0 < kGatherChannels ? a.channels - c0 : kGatherChannels);
  const T* const grad = static_cast<const T*>(a.grad) + image * a.grad_image_stride + c0 * a.grad_channel_stride;

  A sum[kGatherChannels] = {};
  for (int corner = 0; corner < 1 << kDims; ++corner) {
    // The cell whose corner this element is: bit d set where it is the second element on axis d.
    int64_t cell = image;
    bool exists = true;
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      const int64_t first = index[d] - (corner >> d & 1);
      exists = exists && first >= 0 && first <= a.axes.axis[d].last_tap;
      cell = cell * g.in[d] + first;
    }
    if (!exists) continue;
    for (uint32_t i = __ldg(a.starts + cell); i < __ldg(a.starts + cell + 1); ++i) {
      const int64_t pixel = __ldg(a.sorted_pixels + i);
      A weight = A(1);
#pragma unroll
      for (int d = 0; d < kDims; ++d) {
        const int second = corner >> d & 1;
        const A beyond = __ldg(a.places + d * all + pixel) - A(index[d] - second);
        weight = weight * hat(beyond - A(second), second ? a.axes.axis[d].reach : A(1));
      }
      const T* const from = grad + (pixel - image * a.out_pixels) * a.grad_step;
#pragma unroll
      for (int c = 0; c < kGatherChannels; ++c)
        if (c < channels) sum[c] = sum[c] + weight * A(widen(__ldg(from + c * a.grad_channel_stride)));
    }
  }
  T* const to = static_cast<T*>(a.grad_image) + image * a.image_stride + c0 * a.channel_stride + element * a.step;
#pragma unroll
  for (int c = 0; c < kGatherChannels; ++c)
    if (c < channels) {
      const A gain = a.gain != nullptr ? __ldg(a.gain + image * a.channels + c0 + c) : A(1);
      to[c * a.channel_stride] = narrow<T>(sum[c] * gain);
    }
}

}  // namespace pyseg::warp
