// The sparse product between the vertices of a lattice that stands in for its blur: exp(-r^2 / (2 v)) for all pairs of
// an image's vertices with r <= cutoff.
//
// Squared distances are integers in units of the lattice, so weights come from a table. Vertices are projected onto the
// two directions in which they are spread the most (colours of a photograph mostly differ in brightness); vertices within
// the cutoff differ by at most `reach_` in each projection. They are sorted into buckets of that width along the second
// direction and within a bucket along the first, so that those near one are a stretch of each of three buckets, which is
// compared a vector at a time. Rows are made in that order too: the next one's stretches are in the cache. Of what is
// compared one in five or ten is near; it is moved together, since a branch for each would mostly be mispredicted, into a
// buffer of the worker, and from there to its place.
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
    reach_ = int32_t(::sqrt(double(limit_))) + 1;
  }

  // row[v + 1] - row[v]: the entries of v. False where there is no memory.
  bool count(int64_t* row, const Workers& workers) {
    if (!sort()) return false;
    row[0] = 0;
    for_each_part(workers, args_.vertices, [&](int64_t, int64_t begin, int64_t end) {
      each(begin, end, [&](int64_t v, int64_t image) {
        int64_t found = 0;
        scan(v, image, [&](int64_t, uint32_t near, Vec<float>) { found += __builtin_popcount(near); });
        row[v + 1] = found;
      });
    });
    for (int64_t v = 0; v < args_.vertices; ++v) row[v + 1] += row[v];
    return true;
  }

  template <typename T>
  bool fill(const int64_t* row, int32_t* vertex, T* weight, const Workers& workers) {
    Buffer<T> table;
    if (!sort() || !table.grow(int64_t(limit_) + 1)) return false;
    for (int32_t square = 0; square <= limit_; ++square)
      table[square] = T(::exp(-double(square) / (2 * args_.variance * unit_)));
    int64_t longest = 0;
    for (int64_t v = 0; v < args_.vertices; ++v) longest = larger(longest, row[v + 1] - row[v]);
    const int64_t room = longest + kLane;  // vectors are stored whole
    Buffer<int32_t> others;
    Buffer<float> squares;
    if (!others.grow(workers.count * room) || !squares.grow(workers.count * room)) return false;
    for_each_part(workers, args_.vertices, [&](int64_t worker, int64_t begin, int64_t end) {
      int32_t* const other = others.data() + worker * room;
      float* const square = squares.data() + worker * room;
      each(begin, end, [&](int64_t v, int64_t image) {
        int64_t found = 0;
        scan(v, image, [&](int64_t at, uint32_t near, Vec<float> from_here) {
          if (near != 0) found += compress(near, vertex_.data() + at, from_here, other + found, square + found);
        });
        memcpy(vertex + row[v], other, size_t(found) * sizeof(int32_t));
        T* const to = weight + row[v];
        for (int64_t i = 0; i < found; ++i) to[i] = table[int32_t(square[i])];
      });
    });
    return true;
  }

 private:
  static constexpr int kLane = kLanes<float>;

  VertexKernelArgs args_;
  double unit_;
  int32_t limit_, reach_;
  // In sorted order: of each image on its own.
  Buffer<int32_t> vertex_, inner_;  // number of the vertex, its projection onto the first direction
  Buffer<float> coordinate_;        // [d + 1, vertices + kLane]
  Buffer<int64_t> bucket_;          // of each image, where each bucket begins
  Buffer<int64_t> first_bucket_;    // [images + 1]: of an image in bucket_
  Buffer<int32_t> projection_[2];   // of each vertex, by its number: onto both directions, rounded down
  Buffer<int32_t> least_;           // [images]: second projection at which bucket 0 begins

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

  // The projections of an image's vertices. Any directions of length one will do; these come from power iterations on the
  // vertices' covariance.
  void project(int64_t first, int64_t count) {
    constexpr int kMost = crf::kMostFeatures + 1, kIterations = 30;
    const int n = args_.d + 1;
    double mean[kMost] = {}, covariance[kMost][kMost] = {}, direction[2][kMost] = {};
    for (int64_t v = first; v < first + count; ++v)
      for (int i = 0; i < n; ++i) mean[i] += double(coordinate(v, i)) / double(count);
    for (int64_t v = first; v < first + count; ++v)
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) covariance[i][j] += (coordinate(v, i) - mean[i]) * (coordinate(v, j) - mean[j]);
    for (int axis = 0; axis < 2; ++axis) {
      double* const u = direction[axis];
      for (int i = 0; i < n; ++i) u[i] = i == axis;
      for (int iteration = 0; iteration < kIterations; ++iteration) {
        double next[kMost] = {}, along = 0, length = 0;
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < n; ++j) next[i] += covariance[i][j] * u[j];
        for (int i = 0; i < n && axis == 1; ++i) along += next[i] * direction[0][i];
        for (int i = 0; i < n; ++i) next[i] -= along * direction[0][i];
        for (int i = 0; i < n; ++i) length += next[i] * next[i];
        if (!(length > 1e-9)) break;  // no spread: u stays as it is
        for (int i = 0; i < n; ++i) u[i] = next[i] / ::sqrt(length);
      }
      for (int64_t v = first; v < first + count; ++v) {
        double sum = 0;
        for (int i = 0; i < n; ++i) sum += u[i] * coordinate(v, i);
        projection_[axis][v] = int32_t(::floor(sum));
      }
    }
  }

  bool sort() {
    const VertexKernelArgs& a = args_;
    const int64_t room = a.vertices + kLane;
    Buffer<int32_t> scratch;
    if (!vertex_.grow(room) || !inner_.grow(room) || !coordinate_.grow((a.d + 1) * room) || !scratch.grow(room) ||
        !projection_[0].grow(room) || !projection_[1].grow(room) || !first_bucket_.grow(a.images + 1) ||
        !least_.grow(a.images + 1))
      return false;
    memset(coordinate_.data(), 0, size_t((a.d + 1) * room) * sizeof(float));
    first_bucket_[0] = 0;
    for (int64_t image = 0; image < a.images; ++image) {
      const int64_t first = a.offset[image], count = a.offset[image + 1] - first;
      project(first, count);
      int32_t low[2] = {INT32_MAX, INT32_MAX}, high[2] = {INT32_MIN, INT32_MIN};
      for (int64_t v = first; v < first + count; ++v)
        for (int i = 0; i < 2; ++i) {
          low[i] = smaller(low[i], projection_[i][v]);
          high[i] = larger(high[i], projection_[i][v]);
        }
      const int64_t buckets = count == 0 ? 0 : (int64_t(high[1]) - low[1]) / reach_ + 1;
      least_[image] = low[1];
      first_bucket_[image + 1] = first_bucket_[image] + buckets + 1;
      if (!bucket_.grow(first_bucket_[image + 1])) return false;
      for (int64_t i = 0; i < count; ++i) vertex_[first + i] = int32_t(first + i);
      const auto bucket_of = [&](int32_t v) { return (projection_[1][v] - low[1]) / reach_; };
      if (count > 0 && (!counting_sort(vertex_.data() + first, scratch.data(), count, int64_t(high[0]) - low[0] + 1,
                                       [&](int32_t v) { return projection_[0][v] - low[0]; }) ||
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
        inner_[i] = projection_[0][vertex_[i]];
      }
    }
    return true;
  }

  // Calls f(v, image) for the vertices in places begin..end - 1.
  template <typename F>
  void each(int64_t begin, int64_t end, const F& f) const {
    int64_t image = 0;
    for (int64_t at = begin; at < end; ++at) {
      while (at >= args_.offset[image + 1]) ++image;
      f(vertex_[at], image);
    }
  }

  // The first place from begin to end whose first projection is not below `value`.
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

  // Calls f(at, near, squares) for vectors of vertices: those in places at + lane, for the bits of `near`, are in reach.
  template <typename F>
  void scan(int64_t v, int64_t image, const F& f) const {
    const int d = args_.d;
    const int64_t room = args_.vertices + kLane;
    float own[crf::kMostFeatures + 1];
    for (int j = 0; j <= d; ++j) own[j] = float(coordinate(v, j));
    const int64_t* const begin = bucket_.data() + first_bucket_[image];
    const int64_t buckets = first_bucket_[image + 1] - first_bucket_[image] - 1;
    const int64_t bucket = (projection_[1][v] - least_[image]) / reach_;
    const int32_t inner = projection_[0][v];
    const float limit = float(limit_);
    for (int64_t b = larger<int64_t>(0, bucket - 1); b < smaller(buckets, bucket + 2); ++b) {
      const int64_t last = lower_bound(begin[b], begin[b + 1], inner + reach_ + 1);
      for (int64_t at = lower_bound(begin[b], last, inner - reach_); at < last; at += kLane) {
        Vec<float> square{};
        for (int j = 0; j <= d; ++j) {
          const Vec<float> step = load(coordinate_.data() + j * room + at) - own[j];
          square += step * step;
        }
        uint32_t near = lane_bits<float>(square <= limit);
        if (last - at < kLane) near &= (1u << (last - at)) - 1;
        f(at, near, square);
      }
    }
  }

  // Moves the lanes of `near` together, and stores them with what may follow; how many there are.
  static int64_t compress(uint32_t near, const int32_t* other, Vec<float> square, int32_t* other_to, float* square_to) {
#if defined(__AVX512F__)
    _mm512_storeu_si512(other_to, _mm512_maskz_compress_epi32(__mmask16(near), _mm512_loadu_si512(other)));
    _mm512_storeu_ps(square_to, _mm512_maskz_compress_ps(__mmask16(near), (__m512)square));
    return __builtin_popcount(near);
#else
    float squares[kLane];
    store(squares, square);
    int64_t count = 0;
    for (int lane = 0; lane < kLane; ++lane) {
      other_to[count] = other[lane];
      square_to[count] = squares[lane];
      count += near >> lane & 1;
    }
    return count;
#endif
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
