// Reading an image at a run of places, and the transpose of that, for one CPU target.
//
// The loads of neighbours dominate: the two elements along the last axis lie side by side in planar images, so that one
// load of both serves where the instruction set can (gathers of pairs; of bytes, of words that hold the pair). An
// element of weight 0 counts as 0 whatever it is: places that are whole copy, NaN and infinity beside them or not.
#pragma once

#include "warp/cpu_warp_places.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// The extent of a plane that pairs may be loaded from: elements from its first to its last.
struct PairSource {
  int64_t step;    // from an element to its neighbour along the last axis
  int64_t extent;  // from the first element to the last, which may be read, and one more
};

// left[l] = from[index[l]], right[l] = from[index[l] + step] for the lanes of a vector.
template <typename T, typename A, typename Index>
inline void load_pairs_singly(const T* from, const Index* index, int64_t step, Vec<A>& left, Vec<A>& right) {
  for (int l = 0; l < kLanes<A>; ++l) {
    const T* const p = from + index[l];
    left[l] = A(widen(p[0]));
    right[l] = A(widen(p[step]));
  }
}

#if defined(__AVX2__)
typedef int32_t VecInt __attribute__((vector_size(kVectorBytes)));

inline void gather_pairs(const float* from, const int32_t* index, Vec<float>& left, Vec<float>& right) {
#if defined(__AVX512F__)
  // The forms with a mask, of all lanes: the others warn of uninitialised values in GCC's own header.
  const __m256i near = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(index));
  const __m256i far = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(index + 8));
  const auto a = (Vec<float>)_mm512_mask_i32gather_epi64(__m512i{}, 0xff, near, from, 4);
  const auto b = (Vec<float>)_mm512_mask_i32gather_epi64(__m512i{}, 0xff, far, from, 4);
  constexpr VecInt kEven{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  left = __builtin_shuffle(a, b, kEven);
  right = __builtin_shuffle(a, b, kEven + 1);
#else
  // In an order that the shuffles below, which stay within halves, put right.
  const __m256i at = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(index)), 0xd8);
  const auto* const pairs = reinterpret_cast<const long long*>(from);
  const auto a = (__m256)_mm256_i32gather_epi64(pairs, _mm256_castsi256_si128(at), 4);
  const auto b = (__m256)_mm256_i32gather_epi64(pairs, _mm256_extracti128_si256(at, 1), 4);
  left = (Vec<float>)_mm256_shuffle_ps(a, b, 0x88);
  right = (Vec<float>)_mm256_shuffle_ps(a, b, 0xdd);
#endif
}

// In words of four bytes, none of which reaches beyond the extent: the last ones begin earlier and are shifted down.
inline void gather_pairs(const uint8_t* from, int64_t extent, const int32_t* index, Vec<float>& left,
                         Vec<float>& right) {
  VecInt at;
  memcpy(&at, index, sizeof(at));
  const int32_t last = int32_t(extent - 4);
  const VecInt begin = at < last ? at : last - VecInt{};
#if defined(__AVX512F__)
  const auto word = (VecInt)_mm512_mask_i32gather_epi32(__m512i{}, 0xffff, (__m512i)begin, from, 1);
#else
  const auto word = (VecInt)_mm256_i32gather_epi32(reinterpret_cast<const int*>(from), (__m256i)begin, 1);
#endif
  const VecInt pair = word >> ((at - begin) << 3);
  left = __builtin_convertvector(pair & 255, Vec<float>);
  right = __builtin_convertvector(pair >> 8 & 255, Vec<float>);
}
#endif

template <typename T, typename A, typename Index>
inline void load_pairs(const T* from, const PairSource& source, const Index* index, Vec<A>& left, Vec<A>& right) {
#if defined(__AVX2__)
  if constexpr (kSame<Index, int32_t> && kSame<A, float>) {
    if constexpr (kSame<T, float>) {
      if (source.step == 1) return gather_pairs(from, index, left, right);
    } else if constexpr (kSame<T, uint8_t>) {
      if (source.step == 1 && source.extent >= 4) return gather_pairs(from, source.extent, index, left, right);
    }
  }
#endif
  load_pairs_singly<T, A>(from, index, source.step, left, right);
}

// value where the weight is not 0, else 0.
template <typename A>
inline Vec<A> counted(Vec<A> value, Vec<A> weight) {
  return weight != Vec<A>{} ? value : Vec<A>{};
}

template <typename A>
inline Vec<A> blended(Vec<A> low, Vec<A> low_weight, Vec<A> high, Vec<A> high_weight) {
  return low_weight * counted<A>(low, low_weight) + high_weight * counted<A>(high, high_weight);
}

// to[i]: the plane that begins at `from`, interpolated, i < n rounded up to whole vectors.
template <typename T, typename A, typename Index, int kDims>
void sample(const T* from, int64_t extent, const WarpTaps<A, Index, kDims>& taps, int n, A* to) {
  constexpr int kX = kDims - 1, kY = kDims - 2;
  for (int i = 0; i < n; i += kLanes<A>) {
    const Vec<A> low = load(taps.low[kX] + i), high = load(taps.high[kX] + i);
    const auto row = [&](int64_t offset) {
      Vec<A> left, right;
      load_pairs<T, A>(from + offset, {taps.step[kX], extent - offset}, taps.index + i, left, right);
      return blended<A>(left, low, right, high);
    };
    const auto plane = [&](int64_t offset) {
      return blended<A>(row(offset), load(taps.low[kY] + i), row(offset + taps.step[kY]), load(taps.high[kY] + i));
    };
    Vec<A> value = plane(0);
    if constexpr (kDims == 3)
      value = blended<A>(value, load(taps.low[0] + i), plane(taps.step[0]), load(taps.high[0] + i));
    store(to + i, value);
  }
}

// value * gain + bias with what lies outside the image filled in: there alone, whatever `fill` is.
template <typename A>
void finish(const A* outside, A fill, A gain, A bias, int n, A* value) {
  if (outside != nullptr)
    for (int i = 0; i < n; ++i) value[i] = outside[i] != A(0) ? value[i] + outside[i] * fill : value[i];
  if (gain != A(1) || bias != A(0))
    for (int i = 0; i < n; ++i) value[i] = value[i] * gain + bias;
}

// To bytes: to the nearest, of two as near the higher one; beyond 0 and 255 these.
template <typename T, typename A>
void write_run(const A* value, int n, T* to, int64_t step) {
  if constexpr (kSame<T, uint8_t>) {
    uint8_t bytes[kRun];
    for (int i = 0; i < n; ++i) {
      A v = value[i] > A(0) ? value[i] : A(0);
      v = v < A(255) ? v : A(255);
      bytes[i] = uint8_t(int32_t(v + A(0.5)));
    }
    for (int i = 0; i < n; ++i) to[i * step] = bytes[i];
  } else if (step == 1) {
    narrow_run(value, to, n);
  } else {
    for (int i = 0; i < n; ++i) to[i * step] = narrowed<T>(value[i]);
  }
}

// The transpose of `sample`, in the order of the pixels: plane += weights * grad.
template <typename A, typename Index, int kDims>
void scatter(const A* grad, const WarpTaps<A, Index, kDims>& taps, int n, A* plane) {
  constexpr int kX = kDims - 1, kY = kDims - 2;
  const auto add_row = [&](A* row, A g, int i) {
    row[0] += taps.low[kX][i] * g;
    row[taps.step[kX]] += taps.high[kX][i] * g;
  };
  const auto add_plane = [&](A* at, A g, int i) {
    add_row(at, taps.low[kY][i] * g, i);
    add_row(at + taps.step[kY], taps.high[kY][i] * g, i);
  };
  for (int i = 0; i < n; ++i) {
    A* const at = plane + taps.index[i];
    if constexpr (kDims == 3) {
      add_plane(at, taps.low[0][i] * grad[i], i);
      add_plane(at + taps.step[0], taps.high[0][i] * grad[i], i);
    } else {
      add_plane(at, grad[i], i);
    }
  }
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
