// The sparse product between the vertices of a lattice that stands in for its blur: exp(-r^2 / (2 v)) for all pairs of
// an image's vertices with r <= cutoff.
//
// Squared distances are integers in units of the lattice, so weights come from a table. Two vertices within the cutoff
// differ by at most `reach_` in each coordinate: vertices are sorted into buckets of that width along the last coordinate
// and within a bucket along the last but one, so that those near one are a stretch of each of three buckets, which is
// compared a vector at a time.
#pragma once

#include <math.h>

#include "common/cpu_workers.h"
#include "common/simd.h"
#include "crf/cpu_lattice.h"
#include "crf/crf_cpu_kernel.h"
#include "crf/permutohedral_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

class VertexKernel {
 public:
  explicit VertexKernel(const VertexKernelArgs& a) : args_(a) {
    const double period = a.scale * (a.d + 1);
    unit_ = period * period * 2 / 3;  // one squared standard deviation
    limit_ = int32_t(a.cutoff * a.cutoff * unit_);
    variance_ = 1 - 1 / (4 * a.scale * a.scale);
    reach_ = int32_t(::sqrt(double(limit_) * a.d / (a.d + 1))) + 1;
  }

  // row[v + 1] - row[v]: the entries of v. False where there is no memory.
  bool count(int64_t* row, const Workers& workers) {
    if (!sort()) return false;
    row[0] = 0;
    each(workers, [&](int64_t v, int64_t image) {
      int64_t found = 0;
      scan(v, image, [&](int32_t, int32_t) { ++found; });
      row[v + 1] = found;
    });
    for (int64_t v = 0; v < args_.vertices; ++v) row[v + 1] += row[v];
    return true;
  }

  template <typename T>
  bool fill(const int64_t* row, int32_t* vertex, T* weight, const Workers& workers) {
    Buffer<T> table;
    if (!sort() || !table.grow(int64_t(limit_) + 1)) return false;
    for (int32_t square = 0; square <= limit_; ++square)
      table[square] = T(::exp(-double(square) / (2 * variance_ * unit_)));
    each(workers, [&](int64_t v, int64_t image) {
      int64_t at = row[v];
      scan(v, image, [&](int32_t other, int32_t square) {
        vertex[at] = other;
        weight[at++] = table[square];
      });
    });
    return true;
  }

 private:
  static constexpr int kLane = kLanes<float>;

  VertexKernelArgs args_;
  double unit_, variance_;
  int32_t limit_, reach_;
  // In sorted order: of each image on its own.
  Buffer<int32_t> vertex_, inner_;  // number of the vertex, its last coordinate but one
  Buffer<float> coordinate_;        // [d + 1, vertices + kLane]
  Buffer<int64_t> bucket_;          // of each image, where each bucket begins
  Buffer<int64_t> first_bucket_;    // [images + 1]: of an image in bucket_
  Buffer<int32_t> least_;           // [images]: last coordinate at which bucket 0 begins

  int32_t coordinate(int64_t v, int i) const {
    const int16_t* const key = args_.key + v * args_.d;
    if (i < args_.d) return key[i];
    int32_t sum = 0;
    for (int j = 0; j < args_.d; ++j) sum += key[j];
    return -sum;
  }

  // Stable: to = from in the order of digit(v), which is below `digits`.
  template <typename Digit>
  static bool counting_sort(const int32_t* from, int32_t* to, int64_t count, int64_t digits, const Digit& digit) {
    Buffer<int64_t> place;
    if (!place.grow(digits + 1)) return false;
    memset(place.data(), 0, size_t(digits + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < count; ++i) ++place[digit(from[i]) + 1];
    for (int64_t i = 0; i < digits; ++i) place[i + 1] += place[i];
    for (int64_t i = 0; i < count; ++i) to[place[digit(from[i])]++] = from[i];
    return true;
  }

  bool sort() {
    const VertexKernelArgs& a = args_;
    const int64_t room = a.vertices + kLane;
    Buffer<int32_t> scratch;
    if (!vertex_.grow(room) || !inner_.grow(room) || !coordinate_.grow((a.d + 1) * room) || !scratch.grow(room) ||
        !first_bucket_.grow(a.images + 1) || !least_.grow(a.images + 1))
      return false;
    memset(coordinate_.data(), 0, size_t((a.d + 1) * room) * sizeof(float));
    first_bucket_[0] = 0;
    for (int64_t image = 0; image < a.images; ++image) {
      const int64_t first = a.offset[image], count = a.offset[image + 1] - first;
      int32_t low[2] = {INT32_MAX, INT32_MAX}, high[2] = {INT32_MIN, INT32_MIN};
      for (int64_t v = first; v < first + count; ++v)
        for (int i = 0; i < 2; ++i) {
          low[i] = smaller(low[i], coordinate(v, a.d - i));
          high[i] = larger(high[i], coordinate(v, a.d - i));
        }
      const int64_t buckets = count == 0 ? 0 : (int64_t(high[0]) - low[0]) / reach_ + 1;
      least_[image] = low[0];
      first_bucket_[image + 1] = first_bucket_[image] + buckets + 1;
      if (!bucket_.grow(first_bucket_[image + 1])) return false;
      for (int64_t i = 0; i < count; ++i) vertex_[first + i] = int32_t(first + i);
      const auto bucket_of = [&](int32_t v) { return (coordinate(v, a.d) - low[0]) / reach_; };
      if (count > 0 && (!counting_sort(vertex_.data() + first, scratch.data(), count, int64_t(high[1]) - low[1] + 1,
                                       [&](int32_t v) { return coordinate(v, a.d - 1) - low[1]; }) ||
                        !counting_sort(scratch.data(), vertex_.data() + first, count, buckets, bucket_of)))
        return false;
      int64_t* const begin = bucket_.data() + first_bucket_[image];
      int64_t at = first;
      for (int64_t bucket = 0; bucket < buckets; ++bucket) {
        begin[bucket] = at;
        while (at < first + count && bucket_of(vertex_[at]) == bucket) ++at;
      }
      begin[buckets] = at;
      for (int64_t i = first; i < first + count; ++i) {
        for (int j = 0; j <= a.d; ++j) coordinate_[j * room + i] = float(coordinate(vertex_[i], j));
        inner_[i] = coordinate(vertex_[i], a.d - 1);
      }
    }
    return true;
  }

  template <typename F>
  void each(const Workers& workers, const F& f) const {
    for_each_part(workers, args_.vertices, [&](int64_t, int64_t begin, int64_t end) {
      int64_t image = 0;
      for (int64_t v = begin; v < end; ++v) {
        while (v >= args_.offset[image + 1]) ++image;
        f(v, image);
      }
    });
  }

  // The first place from begin to end whose inner coordinate is not below `value`.
  int64_t lower_bound(int64_t begin, int64_t end, int32_t value) const {
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (inner_[middle] < value)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }

  // Calls f(other, squared distance) for all vertices within the cutoff.
  template <typename F>
  void scan(int64_t v, int64_t image, const F& f) const {
    const int d = args_.d;
    const int64_t room = args_.vertices + kLane;
    float own[crf::kMostFeatures + 1];
    for (int j = 0; j <= d; ++j) own[j] = float(coordinate(v, j));
    const int64_t* const begin = bucket_.data() + first_bucket_[image];
    const int64_t buckets = first_bucket_[image + 1] - first_bucket_[image] - 1;
    const int64_t bucket = (coordinate(v, d) - least_[image]) / reach_;
    const int32_t inner = coordinate(v, d - 1);
    const float limit = float(limit_);
    for (int64_t b = larger<int64_t>(0, bucket - 1); b < smaller(buckets, bucket + 2); ++b) {
      const int64_t last = lower_bound(begin[b], begin[b + 1], inner + reach_ + 1);
      for (int64_t at = lower_bound(begin[b], last, inner - reach_); at < last; at += kLane) {
        Vec<float> square{};
        for (int j = 0; j <= d; ++j) {
          const Vec<float> step = load(coordinate_.data() + j * room + at) - own[j];
          square += step * step;
        }
        uint32_t near = lanes_not_above(square, limit);
        if (last - at < kLane) near &= (1u << (last - at)) - 1;
        float squares[kLane];
        store(squares, square);
        for (; near != 0; near &= near - 1) {
          const int lane = __builtin_ctz(near);
          f(vertex_[at + lane], int32_t(squares[lane]));
        }
      }
    }
  }

  static uint32_t lanes_not_above(Vec<float> v, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_LE_OQ);
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_LE_OQ)));
#elif defined(__SSE2__)
    return uint32_t(_mm_movemask_ps(_mm_cmple_ps((__m128)v, _mm_set1_ps(limit))));
#else
    uint32_t lanes = 0;
    for (int lane = 0; lane < kLane; ++lane) lanes |= uint32_t(v[lane] <= limit) << lane;
    return lanes;
#endif
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
