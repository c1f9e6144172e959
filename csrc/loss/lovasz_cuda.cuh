// lovasz_statistics on CUDA devices (Berman, Triki, Blaschko 2018, algorithm 1), one plane (class of an image or of
// all) at a time: errors and pixels, a radix sort (CUB), a prefix sum of the foreground (CUB), the slopes of the
// Jaccard index (formulas: cpu_lovasz.h) scattered to the plane of the gradient, the loss as sums of blocks added in
// order.
//
// Errors are not negative, so their bits sort as integers. An element that does not count, or has no error, has the key
// 0: it comes last and changes nothing. A label out of range makes the error NaN, which comes first and makes the loss
// NaN. Of a plane two keys, two pixels and a count are held for each element. The sort is stable: deterministic, no
// atomics of ours.
#pragma once

#include "loss/lovasz_cuda.h"
#include "loss/segmentation_cuda.cuh"

namespace pyseg::loss {

constexpr uint32_t kForeground = 1u << 31, kFalling = 1u << 30;  // the error falls as p grows
constexpr uint32_t kPixelMask = kFalling - 1;

template <typename A>
using Key = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

// A thread for each pixel of all images.
template <typename T>
__global__ void __launch_bounds__(kLovaszThreads)
    lovasz_normalise_kernel(const __grid_constant__ SegmentationArgs a, Accumulator<T>* most, Accumulator<T>* scale) {
  using A = Accumulator<T>;
  const int64_t at = int64_t{blockIdx.x} * kLovaszThreads + threadIdx.x;
  if (at >= a.images * a.pixels) return;
  const int64_t image = at / a.pixels, pixel = at - image * a.pixels;
  const int64_t step = a.channels_last ? 1 : a.pixels;
  const T* from =
      static_cast<const T*>(a.logits) + (a.channels_last ? at * a.classes : image * a.classes * a.pixels + pixel);
  A largest = A(-INFINITY), sum = A(0);
  for (int c = 0; c < a.classes; ++c) {
    const A z = widen(from[c * step]);
    largest = largest < z ? z : largest;  // a NaN shows in the sum
  }
  for (int c = 0; c < a.classes; ++c) sum += exponential(widen(from[c * step]) - largest);
  most[at] = largest;
  scale[at] = A(1) / sum;
}

// A thread for each element of the plane.
template <typename T>
__global__ void __launch_bounds__(kLovaszThreads)
    lovasz_keys_kernel(const __grid_constant__ SegmentationArgs a, const __grid_constant__ LovaszPlane plane) {
  using A = Accumulator<T>;
  const int64_t i = int64_t{blockIdx.x} * kLovaszThreads + threadIdx.x;
  if (i >= plane.images * a.pixels) return;
  const int64_t image = plane.first + i / a.pixels, pixel = i % a.pixels, at = image * a.pixels + pixel;
  const int64_t index = a.channels_last ? at * a.classes + plane.c : (image * a.classes + plane.c) * a.pixels + pixel;

  // 1. The target.
  bool counts, yes, known = true;
  if (a.dense) {
    const A g = load_number<A>(a.target, a.target_type, index);
    const bool whole = a.target_type > Element::kBFloat16;
    counts = !whole || !a.has_ignore || g != A(a.ignore);
    known = !counts || !whole || g == A(0) || g == A(1);
    yes = g >= A(0.5);
  } else {
    const int64_t label = load_integer(a.target, a.target_type, at);
    const bool binary = a.classes == 1 && a.activation != Activation::kSoftmax;
    counts = !a.has_ignore || label != a.ignore;
    known = !counts || (label >= 0 && label < (binary ? 2 : a.classes));
    yes = label == (binary ? 1 : plane.c);
  }

  // 2. The error.
  const A z = widen(static_cast<const T*>(a.logits)[index]);
  const A g = A(yes);
  A error;
  bool falling;
  if (plane.hinge) {
    error = A(1) - z * (g + g - A(1));
    if (error <= A(0)) error = A(0);
    falling = yes;
  } else {
    A p = z;
    if (a.activation == Activation::kSoftmax) {
      p = exponential(z - static_cast<const A*>(plane.most)[at]) * static_cast<const A*>(plane.scale)[at];
    } else if (a.activation == Activation::kSigmoid) {
      p = sigmoid_of(z).p;
    }
    falling = p < g;
    error = falling ? g - p : p - g;
  }
  if (!counts) error = A(0);
  if (!known) error = A(NAN);

  Key<A> key;
  error = error < A(0) ? -error : error;
  __builtin_memcpy(&key, &error, sizeof key);
  static_cast<Key<A>*>(plane.keys[0])[i] = key & (~Key<A>(0) >> 1);  // without the sign that a NaN may have
  plane.pixels[0][i] = static_cast<uint32_t>(i) | (counts && yes ? kForeground : 0) | (falling ? kFalling : 0);
}

template <typename T>
__global__ void __launch_bounds__(kLovaszThreads)
    lovasz_slopes_kernel(const __grid_constant__ SegmentationArgs a, const __grid_constant__ LovaszPlane plane) {
  using A = Accumulator<T>;
  __shared__ double sums[kLovaszThreads / 32];
  const int64_t elements = plane.images * a.pixels;
  const int64_t k = int64_t{blockIdx.x} * kLovaszThreads + threadIdx.x;
  double loss = 0;
  if (k < elements) {
    const uint32_t item = plane.pixels[plane.sorted][k];
    const Key<A> key = static_cast<const Key<A>*>(plane.keys[plane.sorted])[k];
    const bool yes = item & kForeground;
    const int64_t total = plane.before[elements - 1], before = int64_t{plane.before[k]} - yes;
    const int64_t within = total - before, joined = total + (k - before);
    const A u = A(joined);
    A slope = yes ? A(1) / u : joined > 0 ? A(within) / (u * (u + A(1))) : A(1);
    if (key == 0) slope = A(0);
    A error;
    __builtin_memcpy(&error, &key, sizeof error);
    loss = double(error) * double(slope);
    const int64_t i = item & kPixelMask, image = plane.first + i / a.pixels, pixel = i % a.pixels;
    const int64_t index = a.channels_last ? (image * a.pixels + pixel) * a.classes + plane.c
                                          : (image * a.classes + plane.c) * a.pixels + pixel;
    static_cast<A*>(a.to)[index] = item & kFalling ? -slope : slope;
  }
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (double sum : sums) total += sum;
    plane.partial[blockIdx.x] = total;
  }
}

// A block for each plane.
__global__ void __launch_bounds__(kLovaszThreads)
    lovasz_loss_kernel(const double* partial, double* loss, int64_t blocks) {
  __shared__ double sums[kLovaszThreads / 32];
  const double* from = partial + int64_t{blockIdx.x} * blocks;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kLovaszThreads) sum += from[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (double s : sums) total += s;
    loss[blockIdx.x] = total;
  }
}

}  // namespace pyseg::loss
