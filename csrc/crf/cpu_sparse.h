// Sums over the links of pixels, whose values lie in planes or in rows. Few pixels have links, so that most of the time goes
// into writing results; every sum is in the order of a pixel's entries, whoever computes it.
#pragma once

#include <string.h>

#include "common/cpu_workers.h"
#include "common/simd.h"
#include "crf/cpu_rows.h"
#include "crf/sparse_pairwise_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// The entries of one pixel.
struct SparseRange {
  int64_t begin, end;
};

// Compressed rows that may hold nonsense: nothing outside of them is read.
class SparseRowsReader {
 public:
  explicit SparseRowsReader(const SparseArgs& a)
      : a_(a), pixels_(a.images * a.points), per_point_(a.points > 0 ? 1. / double(a.points) : 0) {}

  int64_t pixels() const { return pixels_; }

  // False where an entry is none that exists.
  bool range(int64_t pixel, SparseRange* r) const {
    *r = {a_.starts[pixel], a_.starts[pixel + 1]};
    if (r->begin == r->end && r->begin >= 0 && r->end <= a_.length) return true;
    if (r->begin < 0 || r->begin > r->end || r->end > a_.length) return false;
    bool good = true;
    for (int64_t k = r->begin; k < r->end; ++k) good &= uint32_t(a_.columns[k]) < uint64_t(pixels_);
    if (a_.entries != nullptr)
      for (int64_t k = r->begin; k < r->end; ++k) good &= uint32_t(a_.entries[k]) < uint64_t(a_.length);
    return good;
  }

  int64_t column(int64_t k) const { return a_.columns[k]; }
  int64_t weight(int64_t k) const { return a_.entries == nullptr ? k : a_.entries[k]; }

  // Where a pixel's first channel lies in planes. Its image by a product, which may be one off, instead of a division.
  int64_t plane_offset(int64_t pixel) const {
    if (a_.images == 1) return pixel;
    auto image = int64_t(double(pixel) * per_point_);
    const int64_t point = pixel - image * a_.points;
    image += int64_t(point >= a_.points) - int64_t(point < 0);
    return pixel + image * (a_.channels - 1) * a_.points;
  }

 private:
  SparseArgs a_;
  int64_t pixels_;
  double per_point_;
};

constexpr int64_t kSparseBlock = 256;  // pixels whose results, a few planes of them, stay in the first cache

// The pixels of a block that have links.
struct LinkedPixels {
  int32_t place[kSparseBlock];  // in the block
  SparseRange range[kSparseBlock];
  int count = 0;

  // False where an entry is none that exists.
  bool find(const SparseRowsReader& rows, int64_t first, int64_t pixels) {
    bool good = true;
    for (int64_t i = 0; i < pixels; ++i) {
      SparseRange& r = range[count];
      const bool exists = rows.range(first + i, &r);
      good &= exists;
      place[count] = int32_t(i);
      count += exists && r.begin < r.end;
    }
    return good;
  }
};

// Calls f(image, first point, points) for the blocks of a worker's share.
template <typename F>
inline void for_each_block(const SparseArgs& a, const Workers& workers, const F& f) {
  const int64_t blocks = (a.points + kSparseBlock - 1) / kSparseBlock;
  for_each_part(workers, a.images * blocks, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % blocks * kSparseBlock;
      f(block / blocks, first, smaller(kSparseBlock, a.points - first));
    }
  });
}

// Calls f(channel, integral constant n) for groups of n channels, the widest first.
template <int kWidest, typename F>
inline void for_each_channel_group(int64_t channels, int64_t first, const F& f) {
  for (; channels - first >= kWidest; first += kWidest) f(first, [] { return kWidest; });
  if constexpr (kWidest > 1) for_each_channel_group<kWidest / 2>(channels, first, f);
}

constexpr int kPlaneGroup = 8;  // planes that are read together, so that columns and weights are read once for them

template <typename T>
class SparseProduct {
 public:
  SparseProduct(const SparseProductArgs& a, const Workers& workers)
      : a_(a),
        workers_(workers),
        rows_(a.sparse),
        weights_(static_cast<const T*>(a.weights)),
        values_(static_cast<const T*>(a.values)),
        base_(static_cast<const T*>(a.base)),
        factor_(static_cast<const T*>(a.factor)),
        output_(static_cast<T*>(a.output)) {}

  bool run() {
    if (!a_.sparse.rows) {
      for_each_block(a_.sparse, workers_,
                     [&](int64_t image, int64_t first, int64_t points) { planes(image, first, points); });
    } else {
      for_each_part(workers_, rows_.pixels(), [&](int64_t, int64_t begin, int64_t end) { rows(begin, end); });
    }
    return !bad_;
  }

 private:
  SparseProductArgs a_;
  Workers workers_;
  SparseRowsReader rows_;
  const T *weights_, *values_, *base_, *factor_;
  T* output_;
  bool bad_ = false;  // set by any worker

  void note(bool good) {
    if (!good) __atomic_store_n(&bad_, true, __ATOMIC_RELAXED);
  }
  T factor(int64_t channel) const { return factor_ == nullptr ? T(1) : factor_[channel]; }

  void planes(int64_t image, int64_t first, int64_t points) {
    const int64_t channels = a_.sparse.channels, plane = a_.sparse.points;
    LinkedPixels linked;
    note(linked.find(rows_, image * plane + first, points));
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = (image * channels + c) * plane + first;
      if (base_ == nullptr)
        memset(output_ + at, 0, size_t(points) * sizeof(T));
      else
        memcpy(output_ + at, base_ + at, size_t(points) * sizeof(T));
    }
    if (linked.count == 0) return;
    for_each_channel_group<kPlaneGroup>(channels, 0, [&](int64_t c, auto width) {
      constexpr int kChannels = width();
      const T* const from = values_ + c * plane;
      T* const to = output_ + (image * channels + c) * plane + first;
      T factors[kChannels];
      for (int u = 0; u < kChannels; ++u) factors[u] = factor(c + u);
      for (int i = 0; i < linked.count; ++i) {
        T sum[kChannels] = {};
        for (int64_t k = linked.range[i].begin; k < linked.range[i].end; ++k) {
          const T weight = weights_[rows_.weight(k)];
          const T* const value = from + rows_.plane_offset(rows_.column(k));
          for (int u = 0; u < kChannels; ++u) sum[u] += value[u * plane] * weight;
        }
        for (int u = 0; u < kChannels; ++u) to[u * plane + linked.place[i]] += sum[u] * factors[u];
      }
    });
  }

  // Chunks of kLane channels; the last one overlaps the one before where channels are no multiple.
  template <int kLane>
  void row(int64_t pixel, SparseRange r) const {
    const int64_t channels = a_.sparse.channels;
    for (int64_t first = 0; first < channels; first += kLane) {
      const int64_t c = smaller(first, channels - kLane);
      typename Lanes<kLane>::V sum{};
      for (int64_t k = r.begin; k < r.end; ++k)
        sum += Lanes<kLane>::load(values_ + rows_.column(k) * channels + c) * weights_[rows_.weight(k)];
      if (factor_ != nullptr) sum *= Lanes<kLane>::load(factor_ + c);
      const int64_t at = pixel * channels + c;
      if (base_ != nullptr) sum += Lanes<kLane>::load(base_ + at);
      Lanes<kLane>::store(output_ + at, sum);
    }
  }

  template <int kLane>
  void rows_of(int64_t begin, int64_t end) {
    bool good = true;
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      SparseRange r;
      if (rows_.range(pixel, &r))
        row<kLane>(pixel, r);
      else
        good = false;
    }
    note(good);
  }

  void rows(int64_t begin, int64_t end) {
    constexpr int kWidest = kLanes<T>;  // of one register
    const int64_t channels = a_.sparse.channels;
    if (sizeof(T) == 4 && kWidest >= 16 && channels >= 16) return rows_of<kWidest >= 16 ? 16 : 1>(begin, end);
    if (kWidest >= 8 && sizeof(T) == 4 && channels >= 8)
      return rows_of < kWidest >= 8 && sizeof(T) == 4 ? 8 : 1 > (begin, end);
    if (kWidest >= 4 && channels >= 4) return rows_of<kWidest >= 4 ? 4 : 1>(begin, end);
    if (sizeof(T) == 8 && channels >= 2) return rows_of<sizeof(T) == 8 ? 2 : 1>(begin, end);
    rows_of<1>(begin, end);
  }

  template <int kLane, typename = void>
  struct Lanes {
    using V = typename RowVecTypes<T, kLane>::Vec;
    using Unaligned = typename RowVecTypes<T, kLane>::Unaligned;
    static V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
    static void store(T* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
  };
  template <typename Dummy>
  struct Lanes<1, Dummy> {
    using V = T;
    static V load(const T* p) { return *p; }
    static void store(T* p, V v) { *p = v; }
  };
};

template <typename T>
class SparseDots {
 public:
  SparseDots(const SparseDotsArgs& a, const Workers& workers)
      : a_(a),
        workers_(workers),
        rows_(a.sparse),
        left_(static_cast<const T*>(a.left)),
        right_(static_cast<const T*>(a.right)),
        output_(static_cast<T*>(a.output)) {}

  bool run() {
    for_each_block(a_.sparse, workers_, [&](int64_t image, int64_t first, int64_t points) {
      LinkedPixels linked;
      if (!linked.find(rows_, image * a_.sparse.points + first, points)) {
        __atomic_store_n(&bad_, true, __ATOMIC_RELAXED);
        return;
      }
      if (a_.sparse.rows)
        rows(linked, image * a_.sparse.points + first);
      else
        planes(linked, image, first);
    });
    return !bad_;
  }

 private:
  SparseDotsArgs a_;
  Workers workers_;
  SparseRowsReader rows_;
  const T *left_, *right_;
  T* output_;
  bool bad_ = false;  // set by any worker

  void planes(const LinkedPixels& linked, int64_t image, int64_t first) const {
    const int64_t channels = a_.sparse.channels, plane = a_.sparse.points;
    for (int i = 0; i < linked.count; ++i)
      for (int64_t k = linked.range[i].begin; k < linked.range[i].end; ++k) output_[k] = T(0);
    for_each_channel_group<kPlaneGroup>(channels, 0, [&](int64_t c, auto width) {
      constexpr int kChannels = width();
      const T* const left = left_ + (image * channels + c) * plane + first;
      const T* const right = right_ + c * plane;
      for (int i = 0; i < linked.count; ++i) {
        T own[kChannels];
        for (int u = 0; u < kChannels; ++u) own[u] = left[u * plane + linked.place[i]];
        for (int64_t k = linked.range[i].begin; k < linked.range[i].end; ++k) {
          const T* const other = right + rows_.plane_offset(rows_.column(k));
          T sum = T(0);
          for (int u = 0; u < kChannels; ++u) sum += own[u] * other[u * plane];
          output_[k] += sum;
        }
      }
    });
  }

  void rows(const LinkedPixels& linked, int64_t first) const {
    constexpr int kLane = kLanes<T>;
    const int64_t channels = a_.sparse.channels;
    for (int i = 0; i < linked.count; ++i) {
      const T* const own = left_ + (first + linked.place[i]) * channels;
      for (int64_t k = linked.range[i].begin; k < linked.range[i].end; ++k) {
        const T* const other = right_ + rows_.column(k) * channels;
        Vec<T> sums{};
        int64_t c = 0;
        for (; c + kLane <= channels; c += kLane) sums += load(own + c) * load(other + c);
        T sum = T(0);
        for (; c < channels; ++c) sum += own[c] * other[c];
        for (int lane = 0; lane < kLane; ++lane) sum += sums[lane];
        output_[k] = sum;
      }
    }
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
