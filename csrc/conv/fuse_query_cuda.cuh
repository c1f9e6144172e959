// What fuse_query does around its matrix products (1603.06180, section 3.3), all bound by memory. Torch-free.
//
// fuse_query_table: what the coordinates' weights add, as three numbers an output channel.
// fuse_query_add: output = relu?(scale * output + constant + column * u + row * v) in place, u and v the pixel's centre.
//   Contiguous: a thread takes 16 bytes of pixels of a plane. channels_last: 16 bytes of channels, whose numbers it
//   keeps, through kAddPixels pixels of its part.
// fuse_query_gate: the gradient before ReLU and scale, and its sums as it is and weighted by u and v. Contiguous: a warp
//   takes part of a plane. channels_last: a block takes 32 vectors of channels through part of an image.
// fuse_query_add_sums: the parts and images, in their order.
// fuse_query_scale, fuse_query_project: over the channels of a pixel. Contiguous: a block takes 32 pixels, whose channels
//   its warps share; there are few pixels, so a thread takes one. channels_last: a warp takes a pixel.
//
// Bytes at the least: each map once, twice the two that fuse_query_project reads. No atomics, the same bits for any order
// of blocks.
#pragma once

#include "common/divide_cuda.cuh"
#include "common/element_cuda.cuh"
#include "conv/atrous_conv2d_elements.cuh"
#include "conv/fuse_query_math.h"

namespace pyseg::fuse {

using atrous::Vector;

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocksOfProcessor = 8;  // leaves 64 registers, where the compiler's own choice is fewer and a spill
constexpr int kAddPixels = 64;         // channels_last: of a block of fuse_query_add
constexpr int kGatePixels = 128;       // channels_last: of a block of fuse_query_gate
constexpr int kPlanePart = 1024;       // pixels of a plane that a warp of fuse_query_gate sums up
constexpr int kDotWarps = 8;           // contiguous: of a block that sums up channels

// Elements of 16 bytes; float64 gets no kernels of its own for that.
template <typename T>
constexpr int kWide = std::is_same_v<T, double> ? 1 : atrous::kVectorBytes / int(sizeof(T));

struct FuseSizes {
  int64_t images, inputs, channels, pixels;
  int height, width;
  double inverse_height, inverse_width;
};

// [N + 2, K]: the constant of each image, then column and row of all.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    fuse_query_table(FuseSizes s, const A* offset /* [N, K] */, const A* coordinates /* [K, 8] */, A* table) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.images * s.channels) return;
  const int64_t k = i % s.channels;
  const Ramp<A> ramp = ramp_of(coordinates + k * kCoordinates, A(s.inverse_height), A(s.inverse_width));
  table[i] = offset[i] + ramp.constant;
  if (i >= s.channels) return;
  table[s.images * s.channels + i] = ramp.column;
  table[(s.images + 1) * s.channels + i] = ramp.row;
}

// A pixel, which moves on without a division; or how many rows and columns a number of pixels is.
struct Pixel {
  int row, column;
  __device__ __forceinline__ Pixel(const FuseSizes& s, int64_t pixel) {
    int64_t rest;
    row = int(divide(pixel, s.width, &rest));
    column = int(rest);
  }
  __device__ __forceinline__ Pixel(const FuseSizes& s, int pixels) : row(pixels / s.width), column(pixels % s.width) {}
  template <typename A>
  __device__ __forceinline__ A u(const FuseSizes& s) const {
    return centre_of(column, s.width, A(s.inverse_width));
  }
  template <typename A>
  __device__ __forceinline__ A v(const FuseSizes& s) const {
    return centre_of(row, s.height, A(s.inverse_height));
  }
  __device__ __forceinline__ void next(const FuseSizes& s) {
    if (++column < s.width) return;
    column = 0;
    ++row;
  }
  // By as many pixels as `step` is from the first.
  __device__ __forceinline__ void skip(const FuseSizes& s, const Pixel& step) {
    row += step.row;
    column += step.column;
    if (column < s.width) return;
    column -= s.width;
    ++row;
  }
};

template <typename A>
__device__ __forceinline__ A relu_of(A x, bool relu) {
  return relu && x < A(0) ? A(0) : x;  // a NaN stays
}

// Those of kVec pixels side by side, which are 1 where there are none.
template <int kVec, typename A>
__device__ __forceinline__ void load_scales(const A* from, A (&to)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = A(1);
  if (from == nullptr) return;
  if constexpr (kVec == 1) {
    to[0] = __ldg(from);
  } else {
    static_assert(sizeof(A) == 4 && kVec % 4 == 0, "float64 has no vectors");
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const float4 part = __ldg(reinterpret_cast<const float4*>(from + i));  // a plain load would be split
      to[i] = part.x;
      to[i + 1] = part.y;
      to[i + 2] = part.z;
      to[i + 3] = part.w;
    }
  }
}

// Grid: chunks of planes x planes. kVec divides the pixels of a plane.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    fuse_query_add_planes(FuseSizes s, unsigned chunks, const Accumulator<T>* table /* [N + 2, K] */,
                          const Accumulator<T>* scale /* [N, P] or null */, bool relu, T* output /* [N, K, P] */) {
  using A = Accumulator<T>;
  const int64_t plane = blockIdx.x / chunks;
  const int64_t pixel = (int64_t(blockIdx.x % chunks) * blockDim.x + threadIdx.x) * kVec;
  if (pixel >= s.pixels) return;
  int64_t k;
  const int64_t image = divide(plane, s.channels, &k);
  const A constant = table[plane], column = table[s.images * s.channels + k],
          row = table[(s.images + 1) * s.channels + k];
  T* const at = output + plane * s.pixels + pixel;
  Vector<T, kVec> values = Vector<T, kVec>::load(at);
  A factors[kVec];
  load_scales(scale != nullptr ? scale + image * s.pixels + pixel : nullptr, factors);
  Pixel at_pixel(s, pixel);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const A z = widen(values.at[i]) * factors[i];
    values.at[i] = narrow<T>(relu_of(z + constant + column * at_pixel.u<A>(s) + row * at_pixel.v<A>(s), relu));
    at_pixel.next(s);
  }
  values.store(at);
}

// Where a block of channels_last kernels is. Grid: groups of 32 vectors of channels x parts of pixels x images.
template <int kVec>
struct PixelBlock {
  int64_t channel, first, last, image, part;
  __device__ __forceinline__ PixelBlock(const FuseSizes& s, unsigned groups, unsigned parts, int pixels) {
    unsigned rest = blockIdx.x;
    channel = (int64_t(rest % groups) * kWarp + threadIdx.x) * kVec;
    rest /= groups;
    part = rest % parts;
    image = rest / parts;
    first = part * pixels;
    last = first + pixels < s.pixels ? first + pixels : s.pixels;
  }
};

// Block: 32 x kWarps. kVec divides the channels.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    fuse_query_add_pixels(FuseSizes s, unsigned groups, unsigned parts, const Accumulator<T>* table /* [N + 2, K] */,
                          const Accumulator<T>* scale /* [N, P] or null */, bool relu, T* output /* [N, P, K] */) {
  using A = Accumulator<T>;
  const PixelBlock<kVec> at(s, groups, parts, kAddPixels);
  if (at.channel >= s.channels) return;
  A constant[kVec], column[kVec], row[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    constant[i] = table[at.image * s.channels + at.channel + i];
    column[i] = table[s.images * s.channels + at.channel + i];
    row[i] = table[(s.images + 1) * s.channels + at.channel + i];
  }
  const Pixel step(s, kWarps);
  Pixel pixel(s, at.first + threadIdx.y);
  for (int64_t p = at.first + threadIdx.y; p < at.last; p += kWarps, pixel.skip(s, step)) {
    const A u = pixel.u<A>(s), v = pixel.v<A>(s), factor = scale != nullptr ? scale[at.image * s.pixels + p] : A(1);
    T* const to = output + (at.image * s.pixels + p) * s.channels + at.channel;
    Vector<T, kVec> values = Vector<T, kVec>::load(to);
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      values.at[i] = narrow<T>(relu_of(widen(values.at[i]) * factor + constant[i] + column[i] * u + row[i] * v, relu));
    values.store(to);
  }
}

// ---- the gradient ----

template <typename T>
struct GateMaps {
  const T* grad;                // [N, K, P] or [N, P, K], as all maps
  const T* output;              // or null: no ReLU
  const Accumulator<T>* scale;  // [N, P] or null
  T* gated;                     // or null: it would be grad
};

// The gradients of kVec elements from `at` on, which pass where the output is not 0 (or a NaN); stored times `scale`,
// of their pixels or of the one.
template <int kVec, bool kOnePixel, typename T, typename A>
__device__ __forceinline__ void gate_elements(const GateMaps<T>& maps, int64_t at, int64_t pixel, A (&g)[kVec]) {
  const Vector<T, kVec> grad = Vector<T, kVec>::load(maps.grad + at);
#pragma unroll
  for (int i = 0; i < kVec; ++i) g[i] = widen(grad.at[i]);
  if (maps.output != nullptr) {
    const Vector<T, kVec> y = Vector<T, kVec>::load(maps.output + at);
#pragma unroll
    for (int i = 0; i < kVec; ++i) g[i] = widen(y.at[i]) <= A(0) ? A(0) : g[i];
  }
  if (maps.gated == nullptr) return;
  A factors[kOnePixel ? 1 : kVec];
  load_scales(maps.scale != nullptr ? maps.scale + pixel : nullptr, factors);
  Vector<T, kVec> stored;
#pragma unroll
  for (int i = 0; i < kVec; ++i) stored.at[i] = narrow<T>(g[i] * factors[kOnePixel ? 0 : i]);
  if constexpr (kVec == 1) {
    maps.gated[at] = stored.at[0];
  } else {
    uint4 bits;
    static_assert(sizeof(bits) == sizeof(stored), "vectors are of 16 bytes");
    __builtin_memcpy(&bits, stored.at, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(maps.gated + at), bits);  // a plain store would be split
  }
}

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// A warp takes kPlanePart pixels of a plane. sums: [N, parts, 3, K].
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, kBlocksOfProcessor)
    fuse_query_gate_planes(FuseSizes s, unsigned parts, GateMaps<T> maps, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (unit >= s.images * s.channels * parts) return;
  const int lane = threadIdx.x % kWarp;
  int64_t part, k;
  const int64_t plane = divide(unit, parts, &part), image = divide(plane, s.channels, &k);
  const int64_t begin = part * kPlanePart;
  const int64_t end = begin + kPlanePart < s.pixels ? begin + kPlanePart : s.pixels;
  A constant = 0, column = 0, row = 0;
  const Pixel step(s, kWarp * kVec);
  Pixel pixel(s, begin + lane * kVec);
  for (int64_t p = begin + lane * kVec; p < end; p += kWarp * kVec, pixel.skip(s, step)) {
    A g[kVec];
    gate_elements<kVec, false>(maps, plane * s.pixels + p, image * s.pixels + p, g);
    Pixel of = pixel;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      constant += g[i];
      column += g[i] * of.u<A>(s);
      row += g[i] * of.v<A>(s);
      of.next(s);
    }
  }
  constant = warp_sum(constant);
  column = warp_sum(column);
  row = warp_sum(row);
  if (lane >= 3) return;
  sums[((image * parts + part) * 3 + lane) * s.channels + k] = lane == 0 ? constant : lane == 1 ? column : row;
}

// Block: 32 x kWarps. sums: [N, parts, 3, K].
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    fuse_query_gate_pixels(FuseSizes s, unsigned groups, unsigned parts, GateMaps<T> maps, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  constexpr int kSums = 3 * kVec;
  __shared__ A partial[kWarps][kSums][kWarp];
  const PixelBlock<kVec> at(s, groups, parts, kGatePixels);
  A sum[kSums] = {};
  if (at.channel < s.channels) {
    const Pixel step(s, kWarps);
    Pixel pixel(s, at.first + threadIdx.y);
    for (int64_t p = at.first + threadIdx.y; p < at.last; p += kWarps, pixel.skip(s, step)) {
      const int64_t index = at.image * s.pixels + p;
      A g[kVec];
      gate_elements<kVec, true>(maps, index * s.channels + at.channel, index, g);
      const A u = pixel.u<A>(s), v = pixel.v<A>(s);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sum[i] += g[i];
        sum[kVec + i] += g[i] * u;
        sum[2 * kVec + i] += g[i] * v;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) partial[threadIdx.y][i][threadIdx.x] = sum[i];
  __syncthreads();
  if (at.channel >= s.channels) return;
  for (int i = threadIdx.y; i < kSums; i += kWarps) {
    A total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += partial[w][i][threadIdx.x];
    sums[((at.image * parts + at.part) * 3 + i / kVec) * s.channels + at.channel + i % kVec] = total;
  }
}

// Block: 32 channels x kWarps, which share the images.
template <typename A>
__global__ void __launch_bounds__(kThreads, kBlocksOfProcessor)
    fuse_query_add_sums(FuseSizes s, int64_t parts, const A* sums /* [N, parts, 3, K] */, A* grad_offset /* [N, K] */,
                        A* grad_coordinates /* [K, 8] */) {
  __shared__ A partial[kWarps][3][kWarp];
  const int64_t k = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  A total[3] = {};
  if (k < s.channels) {
    for (int64_t n = threadIdx.y; n < s.images; n += kWarps) {
      A sum[3] = {};
      for (int64_t part = 0; part < parts; ++part)
#pragma unroll
        for (int j = 0; j < 3; ++j) sum[j] += sums[((n * parts + part) * 3 + j) * s.channels + k];
      grad_offset[n * s.channels + k] = sum[0];
#pragma unroll
      for (int j = 0; j < 3; ++j) total[j] += sum[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 3; ++j) partial[threadIdx.y][j][threadIdx.x] = total[j];
  __syncthreads();
  if (threadIdx.y > 0 || k >= s.channels) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w)
#pragma unroll
    for (int j = 0; j < 3; ++j) total[j] += partial[w][j][threadIdx.x];
  coordinates_gradient(Ramp<A>{total[0], total[1], total[2]}, A(s.inverse_height), A(s.inverse_width),
                       grad_coordinates + k * kCoordinates);
}

// ---- the norm of a pixel ----

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

template <typename A>
__device__ __forceinline__ A scale_of(A square) {
  const A norm = root(square), least = A(kLeastNorm);
  return A(1) / (norm < least ? least : norm);
}
// A norm below the least is taken for that, and has no gradient.
template <typename A>
__device__ __forceinline__ A factor_of(A dot, A scale) {
  return scale < A(1) / A(kLeastNorm) ? dot * scale * scale : A(0);
}

// The sum over the channels of x * y at a pixel, to the block's 32 x kDotWarps threads by pixel; 0 beyond the last.
template <typename T>
__device__ __forceinline__ Accumulator<T> plane_dot(const FuseSizes& s, const T* x, const T* y, bool inside,
                                                    Accumulator<T> (&partial)[kDotWarps][kWarp]) {
  using A = Accumulator<T>;
  A sum = 0;
  if (inside)
    for (int64_t c = threadIdx.y; c < s.inputs; c += kDotWarps) sum += widen(x[c * s.pixels]) * widen(y[c * s.pixels]);
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  A total = 0;
#pragma unroll
  for (int w = 0; w < kDotWarps; ++w) total += partial[w][threadIdx.x];
  return total;
}

// Block: 32 pixels x kDotWarps. Grid: groups of pixels x images.
template <typename T>
__global__ void __launch_bounds__(kDotWarps* kWarp)
    fuse_query_scale_planes(FuseSizes s, unsigned groups, const T* input /* [N, C, P] */,
                            Accumulator<T>* scale /* [N, P] */) {
  __shared__ Accumulator<T> partial[kDotWarps][kWarp];
  const int64_t pixel = int64_t(blockIdx.x % groups) * kWarp + threadIdx.x, image = blockIdx.x / groups;
  const T* const x = input + image * s.inputs * s.pixels + pixel;
  const bool inside = pixel < s.pixels;
  const Accumulator<T> square = plane_dot(s, x, x, inside, partial);
  if (inside && threadIdx.y == 0) scale[image * s.pixels + pixel] = scale_of(square);
}

template <typename T>
__global__ void __launch_bounds__(kDotWarps* kWarp)
    fuse_query_project_planes(FuseSizes s, unsigned groups, const T* input /* [N, C, P] */,
                              const Accumulator<T>* scale /* [N, P] */, T* grad /* [N, C, P] */) {
  using A = Accumulator<T>;
  __shared__ A partial[kDotWarps][kWarp];
  const int64_t pixel = int64_t(blockIdx.x % groups) * kWarp + threadIdx.x, image = blockIdx.x / groups;
  const int64_t at = image * s.inputs * s.pixels + pixel;
  const bool inside = pixel < s.pixels;
  const A dot = plane_dot(s, input + at, grad + at, inside, partial);
  if (!inside) return;
  const A factor = factor_of(dot, scale[image * s.pixels + pixel]);
  for (int64_t c = threadIdx.y; c < s.inputs; c += kDotWarps) {
    const int64_t i = at + c * s.pixels;
    grad[i] = narrow<T>(widen(grad[i]) - widen(input[i]) * factor);
  }
}

// x * y of a pixel's channels, to all lanes of a warp. kVec divides the channels.
template <int kVec, typename T>
__device__ __forceinline__ Accumulator<T> pixel_dot(const FuseSizes& s, const T* x, const T* y) {
  Accumulator<T> sum = 0;
  for (int64_t c = int64_t(threadIdx.x) * kVec; c < s.inputs; c += kWarp * kVec) {
    const Vector<T, kVec> left = Vector<T, kVec>::load(x + c), right = Vector<T, kVec>::load(y + c);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += widen(left.at[i]) * widen(right.at[i]);
  }
  return warp_sum(sum);
}

// Block: 32 x kWarps, a warp a pixel of any image.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    fuse_query_scale_pixels(FuseSizes s, const T* input /* [N, P, C] */, Accumulator<T>* scale /* [N, P] */) {
  const int64_t pixel = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (pixel >= s.images * s.pixels) return;
  const Accumulator<T> square = pixel_dot<kVec>(s, input + pixel * s.inputs, input + pixel * s.inputs);
  if (threadIdx.x == 0) scale[pixel] = scale_of(square);
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    fuse_query_project_pixels(FuseSizes s, const T* input /* [N, P, C] */, const Accumulator<T>* scale /* [N, P] */,
                              T* grad /* [N, P, C] */) {
  using A = Accumulator<T>;
  const int64_t pixel = int64_t(blockIdx.x) * kWarps + threadIdx.y;
  if (pixel >= s.images * s.pixels) return;
  const T* const x = input + pixel * s.inputs;
  T* const h = grad + pixel * s.inputs;
  const A factor = factor_of(pixel_dot<kVec>(s, x, h), scale[pixel]);
  for (int64_t c = int64_t(threadIdx.x) * kVec; c < s.inputs; c += kWarp * kVec) {
    const Vector<T, kVec> value = Vector<T, kVec>::load(x + c);
    Vector<T, kVec> gradient = Vector<T, kVec>::load(h + c);
#pragma unroll
    for (int i = 0; i < kVec; ++i) gradient.at[i] = narrow<T>(widen(gradient.at[i]) - widen(value.at[i]) * factor);
    gradient.store(h + c);
  }
}

}  // namespace pyseg::fuse
