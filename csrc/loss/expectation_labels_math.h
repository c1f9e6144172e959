// What host, CPU targets and CUDA kernels of expectation_labels agree on. Free of torch.
//
// A class l of an image has the score f_l in a pixel, and a bias b_l >= 0. Its margin in a pixel is the least bias with
// which it beats the others there: the least t that makes f_l + t > best = max over the others of f_o + b_o, in the
// arithmetic of the labels. One of t = successor(best) - f_l, rounded, and the next number above it: t's error is at
// most half a step, and the next number makes the exact sum, hence the rounded one, reach successor(best). So l wins in
// as many pixels as have a margin <= b_l.
//
// A class that wins in fewer than its quota of k pixels gets the bias halfway between the k-th smallest margin v and
// the next larger one: it wins in k pixels then, and is tied in none. (With v itself the class that loses the last of
// these pixels is tied there, takes it back for one step more, and so on: rounds do not end.) Scores that are NaN count
// as +inf. Margins that are not finite cannot be won.
#pragma once

#include <cstdint>

#include "common/element.h"

#if defined(__CUDACC__)
#define PYSEG_EXPECTATION_INLINE static __host__ __device__ inline
#else
#define PYSEG_EXPECTATION_INLINE static inline
#endif

namespace pyseg::loss {

constexpr int64_t kMostExpectationClasses = 2048;  // a list of them fits into shared memory

struct ExpectationArgs {
  int64_t images, pixels;
  int classes;
  const void* logits;  // element (image, class, pixel) at the sum of the strides' multiples
  Element logits_type;
  int64_t image_stride, class_stride, pixel_stride;
  const uint8_t* present;  // [images, classes]
  const uint8_t* valid;    // [images, pixels] or null: all
  double background_bias, foreground_bias, background_share, foreground_share;
  bool exclude_absent;
  int64_t sweeps, ignore_index;
  int64_t* labels;  // [images, pixels]
  void* bias;       // [images, classes], of the type that is computed in
};

PYSEG_EXPECTATION_INLINE bool is_adaptive(const ExpectationArgs& a) {
  return a.sweeps > 0 && (a.background_share > 0 || a.foreground_share > 0);
}

// Pixels that the background and each foreground class of an image must win.
struct Quotas {
  int64_t background, foreground;
};

// Shares that add up to more than 1 are divided by their sum.
PYSEG_EXPECTATION_INLINE Quotas quotas_of(const ExpectationArgs& a, bool background, int64_t foreground,
                                          int64_t pixels) {
  double sum = background ? a.background_share : 0;
  for (int64_t i = 0; i < foreground; ++i) sum += a.foreground_share;  // no product, which could be fused with the sum
  if (sum < 1) sum = 1;
  return {int64_t(a.background_share * double(pixels) / sum), int64_t(a.foreground_share * double(pixels) / sum)};
}

// Halfway between a margin and the next larger one, infinity where there is none; below the latter.
template <typename A>
PYSEG_EXPECTATION_INLINE A bias_between(A margin, A next) {
  const A middle = margin + (next - margin) * A(0.5);
  return middle < next ? middle : margin;
}

}  // namespace pyseg::loss
