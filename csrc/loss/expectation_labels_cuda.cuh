// The E-step of weakly supervised segmentation on CUDA devices (Papandreou et al. 2015, algorithm 1 and EM-Adapt):
// biases that give each present class its share of an image, and the best biased score in each pixel.
// expectation_labels_math.h derives margins and biases.
//
// Layouts: logits of any strides, labels [N, pixels], biases [N, C]. Two kernels:
// expectation_bias_kernel, a block an image: rounds over the classes that compete compute a class's margins
// (neighbouring threads take neighbouring pixels), keep them in device memory, and select the k-th smallest by
// histograms of 11 bits in shared memory: 3 passes for float, 6 for double, and one for the next larger margin.
// expectation_labels_kernel, all blocks: a thread takes two neighbouring pixels, 16 bytes of labels, where these are
// aligned, and reads the classes that compete only. Least bytes: their logits once in, labels once out.
// Deterministic although atomics add in shared memory: sums and minima of integers do not depend on the order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/element_cuda.cuh"
#include "loss/expectation_labels_math.h"

namespace pyseg::loss {

constexpr int kBiasThreads = 1024, kLabelThreads = 256;
constexpr int kBiasBlocks = 1, kLabelBlocks = 4;  // of a multiprocessor at least: 64 registers a thread
constexpr int kBiasUnroll = 4;                    // pixels of a thread whose loads are in flight together
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kBinsPerThread = kBins / kBiasThreads;
static_assert(kBinsPerThread == 2, "find_bin takes two bins a thread");
constexpr unsigned kWholeWarp = 0xffffffffu;

template <typename A>
using MarginBits = std::conditional_t<sizeof(A) == 8, unsigned long long, unsigned>;

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned long long bits_of(double x) { return __double_as_longlong(x); }
__device__ __forceinline__ float number_of(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double number_of(unsigned long long bits) { return __longlong_as_double(bits); }

// A score as it counts: NaN as +inf.
template <typename T>
__device__ __forceinline__ Accumulator<T> score_of(T logit) {
  const Accumulator<T> v = widen(logit);
  return v == v ? v : Accumulator<T>(INFINITY);
}

// The numbers c < classes for which chosen(c) holds, in order; their count. The first warp writes both.
template <typename Chosen>
__device__ __forceinline__ void list_classes(int classes, uint16_t* list, int* length, const Chosen& chosen) {
  if (threadIdx.x >= 32) return;
  int count = 0;
  for (int first = 0; first < classes; first += 32) {
    const int c = first + threadIdx.x;
    const bool in = c < classes && chosen(c);
    const unsigned lanes = __ballot_sync(kWholeWarp, in);
    if (in) list[count + __popc(lanes & ((1u << threadIdx.x) - 1))] = static_cast<uint16_t>(c);
    count += __popc(lanes);
  }
  if (threadIdx.x == 0) *length = count;
}

// --- Biases

// In shared memory; behind it the biases and the numbers of the classes that compete, [C] of each.
template <typename A>
struct BiasBlock {
  unsigned counts[kBins];
  unsigned warp_sums[kBiasThreads / 32];
  unsigned pixels, foreground;  // that count; classes that are present
  unsigned won;                 // pixels of the class at its present bias
  unsigned rank, digit;         // of the margin looked for, among those that agree so far; from 1 on
  MarginBits<A> next;           // the least margin above it
  int competing;
};

// *sum += each thread's number. The block meets afterwards.
__device__ inline void block_add(unsigned* sum, unsigned x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kWholeWarp, x, mask);
  if (threadIdx.x % 32 == 0 && x != 0) atomicAdd(sum, x);
  __syncthreads();
}

// Inclusive sum over the lanes up to this one.
__device__ __forceinline__ unsigned sum_of_lanes(unsigned x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned lower = __shfl_up_sync(kWholeWarp, x, step);
    if (threadIdx.x % 32 >= step) x += lower;
  }
  return x;
}

// Among the counted elements: the bin of that of rank s.rank, or of the last one, into s.digit, and its rank within that
// bin. Returns how many are counted. The block meets before the call and at the end.
template <typename A>
__device__ unsigned find_bin(BiasBlock<A>& s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned first = s.counts[2 * threadIdx.x], second = s.counts[2 * threadIdx.x + 1];
  const unsigned in_warp = sum_of_lanes(first + second);
  if (lane == 31) s.warp_sums[warp] = in_warp;
  const unsigned asked = s.rank;
  __syncthreads();
  const unsigned warps = sum_of_lanes(s.warp_sums[lane]);
  const unsigned lower = __shfl_sync(kWholeWarp, warps, warp == 0 ? 0 : warp - 1);
  const unsigned all = __shfl_sync(kWholeWarp, warps, 31);
  const unsigned before = in_warp - first - second + (warp == 0 ? 0 : lower);
  const unsigned wanted = asked < all ? asked : all;
  if (wanted > before && wanted <= before + first + second) {
    const unsigned rank = wanted - before;
    s.digit = 2 * threadIdx.x + (rank > first);
    s.rank = rank > first ? rank - first : rank;
  }
  __syncthreads();
  return all;
}

// Class `own` of the list: its margins to memory, those up to `limit` to s.won, the first digits of larger ones counted.
// Every thread looks at its own margins only, here and later.
template <typename T, typename A>
__device__ void find_margins(const ExpectationArgs& a, const T* logits, const uint8_t* valid, BiasBlock<A>& s,
                             const A* bias, const uint16_t* classes, int own, A limit, A* margins) {
  constexpr int kShift = 8 * sizeof(A) - 1 - kDigitBits;
  unsigned won = 0;
  for (int64_t first = threadIdx.x; first < a.pixels; first += kBiasUnroll * kBiasThreads) {
    A best[kBiasUnroll], score[kBiasUnroll];
#pragma unroll
    for (int u = 0; u < kBiasUnroll; ++u) best[u] = A(-INFINITY);
    for (int o = 0; o < s.competing; ++o) {
      const T* row = logits + classes[o] * a.class_stride + first * a.pixel_stride;
      const A b = bias[o];
#pragma unroll
      for (int u = 0; u < kBiasUnroll; ++u) {
        if (first + u * kBiasThreads >= a.pixels) break;
        const A v = score_of(__ldg(row + u * kBiasThreads * a.pixel_stride));
        if (o == own) {
          score[u] = v;
        } else {
          best[u] = best[u] < v + b ? v + b : best[u];
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kBiasUnroll; ++u) {
      const int64_t p = first + u * kBiasThreads;
      if (p >= a.pixels) break;
      const MarginBits<A> best_bits = bits_of(best[u] + A(0));  // -0 becomes 0, whose successor is the next integer
      const A least = number_of(best_bits >> (8 * sizeof(A) - 1) ? best_bits - 1 : best_bits + 1);
      A margin = least - score[u];
      // Where it is <= 0 the pixel is won as it is, and the next of the integers would be smaller.
      if (margin > A(0) && score[u] + margin < least) margin = number_of(bits_of(margin) + 1);
      if (valid != nullptr && !valid[p]) margin = A(INFINITY);
      margins[p] = margin;
      won += margin <= limit;
      if (margin > limit && margin < A(INFINITY)) atomicAdd(s.counts + (bits_of(margin) >> kShift), 1u);
    }
  }
  block_add(&s.won, won);
}

// The bias with which the class wins in `missing` more pixels than with `limit`, or in all that there are. The first
// digits of the margins have been counted.
template <typename A>
__device__ A raised_bias(const ExpectationArgs& a, BiasBlock<A>& s, A limit, unsigned missing, const A* margins) {
  using U = MarginBits<A>;
  if (threadIdx.x == 0) {
    s.rank = missing;
    s.next = bits_of(A(INFINITY));
  }
  __syncthreads();
  if (find_bin(s) == 0) return limit;
  U prefix = s.digit;
  for (int shift = 8 * sizeof(A) - 1 - kDigitBits; shift > 0;) {
    const int digit = shift < kDigitBits ? shift : kDigitBits;
    shift -= digit;
    for (int i = threadIdx.x; i < kBins; i += kBiasThreads) s.counts[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int64_t p = threadIdx.x; p < a.pixels; p += kBiasThreads) {
      const A margin = margins[p];
      const U bits = bits_of(margin);
      if ((bits >> (shift + digit)) == prefix && margin > limit)
        atomicAdd(s.counts + static_cast<unsigned>(bits >> shift & ((U(1) << digit) - 1)), 1u);
    }
    __syncthreads();
    find_bin(s);
    prefix = prefix << digit | s.digit;
  }
  const A found = number_of(prefix);
  A next = A(INFINITY);
#pragma unroll 4
  for (int64_t p = threadIdx.x; p < a.pixels; p += kBiasThreads) {
    const A margin = margins[p];
    if (margin > found && margin < next) next = margin;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const A other = __shfl_xor_sync(kWholeWarp, next, mask);
    next = other < next ? other : next;
  }
  if (threadIdx.x % 32 == 0) atomicMin(&s.next, bits_of(next));
  __syncthreads();
  return bias_between(found, number_of(s.next));
}

// Grid: images.
template <typename T>
__global__ void __launch_bounds__(kBiasThreads, kBiasBlocks)
    expectation_bias_kernel(const __grid_constant__ ExpectationArgs a,
                            Accumulator<T>* __restrict__ margins) {  // [images, pixels]; unused without shares
  using A = Accumulator<T>;
  extern __shared__ __align__(16) unsigned char expectation_shared[];
  BiasBlock<A>& s = *reinterpret_cast<BiasBlock<A>*>(expectation_shared);
  A* const bias = reinterpret_cast<A*>(&s + 1);                             // [C]
  uint16_t* const classes = reinterpret_cast<uint16_t*>(bias + a.classes);  // [C]
  const int64_t image = blockIdx.x;
  const uint8_t* present = a.present + image * a.classes;
  const uint8_t* valid = a.valid == nullptr ? nullptr : a.valid + image * a.pixels;
  const T* logits = static_cast<const T*>(a.logits) + image * a.image_stride;
  A* const to = static_cast<A*>(a.bias) + image * a.classes;

  // 1. The classes that compete.
  list_classes(a.classes, classes, &s.competing, [&](int c) { return !a.exclude_absent || present[c]; });
  for (int c = threadIdx.x; c < a.classes; c += kBiasThreads) to[c] = A(-INFINITY);
  if (threadIdx.x == 0) s.pixels = s.foreground = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < s.competing; i += kBiasThreads)
    bias[i] = !present[classes[i]] ? A(0) : A(classes[i] == 0 ? a.background_bias : a.foreground_bias);

  // 2. Rounds over them.
  if (is_adaptive(a) && s.competing > 1) {
    unsigned foreground = 0, pixels = 0;
    for (int c = 1 + threadIdx.x; c < a.classes; c += kBiasThreads) foreground += present[c] != 0;
    if (valid != nullptr)
      for (int64_t p = threadIdx.x; p < a.pixels; p += kBiasThreads) pixels += valid[p] != 0;
    block_add(&s.foreground, foreground);
    block_add(&s.pixels, pixels);
    const Quotas quotas = quotas_of(a, present[0] != 0, s.foreground, valid == nullptr ? a.pixels : int64_t{s.pixels});
    bool changed = true;
    for (int64_t sweep = 0; sweep < a.sweeps && changed; ++sweep) {
      changed = false;
      for (int i = 0; i < s.competing; ++i) {
        const int c = classes[i];
        const int64_t quota = !present[c] ? 0 : c == 0 ? quotas.background : quotas.foreground;
        if (quota == 0) continue;
        __syncthreads();  // nobody looks at the last class's results any more
        const A limit = bias[i];
        for (int b = threadIdx.x; b < kBins; b += kBiasThreads) s.counts[b] = 0;
        if (threadIdx.x == 0) s.won = 0;
        __syncthreads();
        find_margins(a, logits, valid, s, bias, classes, i, limit, margins + image * a.pixels);
        const int64_t missing = quota - int64_t{s.won};
        if (missing <= 0) continue;
        const A raised = raised_bias(a, s, limit, static_cast<unsigned>(missing), margins + image * a.pixels);
        changed |= raised > limit;
        if (threadIdx.x == 0) bias[i] = raised;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < s.competing; i += kBiasThreads) to[classes[i]] = bias[i];
}

// --- Labels

template <typename T, int kPixels>
struct alignas(kPixels * sizeof(T)) Pixels {
  T value[kPixels];
};

// Grid: blocks of an image x images. kPixels neighbouring pixels a thread, 1 or 2: whole sectors of labels are written.
template <typename T, int kPixels>
__global__ void __launch_bounds__(kLabelThreads, kLabelBlocks)
    expectation_labels_kernel(const __grid_constant__ ExpectationArgs a) {
  using A = Accumulator<T>;
  extern __shared__ __align__(16) unsigned char expectation_shared[];
  A* const bias = reinterpret_cast<A*>(expectation_shared);                 // [C]
  uint16_t* const classes = reinterpret_cast<uint16_t*>(bias + a.classes);  // [C]
  __shared__ int competing;
  for (int64_t image = blockIdx.y; image < a.images; image += gridDim.y) {
    const A* from = static_cast<const A*>(a.bias) + image * a.classes;
    list_classes(a.classes, classes, &competing, [&](int c) { return from[c] > A(-INFINITY); });
    __syncthreads();
    for (int i = threadIdx.x; i < competing; i += kLabelThreads) bias[i] = from[classes[i]];
    __syncthreads();
    const T* logits = static_cast<const T*>(a.logits) + image * a.image_stride;
    const int64_t step = int64_t{gridDim.x} * kLabelThreads * kPixels;
    for (int64_t p = (int64_t{blockIdx.x} * kLabelThreads + threadIdx.x) * kPixels; p < a.pixels; p += step) {
      A best[kPixels];
      int label[kPixels];
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        best[k] = A(-INFINITY);
        label[k] = competing == 0 ? -1 : classes[0];
      }
#pragma unroll 4
      for (int i = 0; i < competing; ++i) {
        const int c = classes[i];
        const T* at = logits + c * a.class_stride + p * a.pixel_stride;
        const Pixels<T, kPixels> x = *reinterpret_cast<const Pixels<T, kPixels>*>(at);
#pragma unroll
        for (int k = 0; k < kPixels; ++k) {
          const A score = score_of(x.value[k]) + bias[i];
          if (score > best[k]) {
            best[k] = score;
            label[k] = c;
          }
        }
      }
      const int64_t first = image * a.pixels + p;
      const auto result = [&](int k) {
        const bool ignored = label[k] < 0 || (a.valid != nullptr && !a.valid[first + k]);
        return ignored ? a.ignore_index : int64_t{label[k]};
      };
      if constexpr (kPixels == 2) {
        // A plain store would be split.
        __stwb(reinterpret_cast<longlong2*>(a.labels + first), make_longlong2(result(0), result(1)));
      } else {
        a.labels[first] = result(0);
      }
    }
    __syncthreads();  // before the next image's list
  }
}

}  // namespace pyseg::loss
