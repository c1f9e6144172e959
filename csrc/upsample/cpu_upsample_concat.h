// bilinear_upsample, upsample_concat and their gradient for one CPU target: each map straight into its channels.
//
// Two fused multiply-adds and one store an element, and as much for the interpolation along x of each source row: bound
// by the stores. Threads take blocks of channels of an image, cut into bands of rows where those are few; what bands
// share is computed by each.
#pragma once

#include "upsample/cpu_interpolation.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kSlotBytes = 128 << 10;  // channels_last: of an interpolated source row, two of which stay in L2
constexpr int64_t kStreamBytes = 4 << 20;  // larger outputs are stored past the caches
constexpr int64_t kUnitsOfWorker = 4;      // so that shares of unequal units come out even

// Channels of a block.
template <typename A>
inline int64_t concat_block(const UpsampleArgs& a) {
  if (!a.last) return 1;
  int64_t most = 0;
  for (int64_t l = 0; l < a.maps; ++l) most = larger(most, a.map[l].channels);
  const int64_t fitting = kSlotBytes / (larger<int64_t>(1, a.width) * int64_t(sizeof(A))) / kCacheLine * kCacheLine;
  return smaller(most, larger(kCacheLine, fitting));
}

// Bands of `rows` rows for each of `units`.
inline int64_t bands_of(int64_t units, int64_t rows, int64_t least_rows, int64_t workers) {
  if (workers == 1 || units >= kUnitsOfWorker * workers) return 1;
  const int64_t wanted = (kUnitsOfWorker * workers + units - 1) / larger<int64_t>(1, units);
  return larger<int64_t>(1, smaller(wanted, rows / least_rows));
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

template <typename T, typename A>
class UpsampleConcat {
 public:
  static int64_t scratch(const UpsampleArgs& a, int64_t workers) {
    return workers * scratch_of_worker(a) * int64_t(sizeof(A));
  }

  UpsampleConcat(const UpsampleArgs& a, void* scratch) : a_(a), scratch_(static_cast<A*>(scratch)) {}

  void forward(const Workers& workers) {
    const UpsampleUnits units(a_, concat_block<A>(a_));
    const int64_t bands = bands_of(units.count(), a_.height, kLeastRows, workers.count);
    const bool streams = streams_output();
    for_each_part(workers, units.count() * bands, [&](int64_t worker, int64_t first, int64_t last) {
      A* const scratch = scratch_ + worker * scratch_of_worker(a_);
      RowInterpolator<T, A> rows(a_, concat_block<A>(a_), scratch);
      A* const stage = scratch + RowInterpolator<T, A>::scratch(a_, concat_block<A>(a_));
      for (int64_t i = first; i < last; ++i) {
        const UpsampleUnit unit = units[i / bands];
        const int64_t begin = a_.height * (i % bands) / bands, end = a_.height * (i % bands + 1) / bands;
        rows.start(unit);
        T* const to = static_cast<T*>(a_.output) + offset(unit);
        for (int64_t y = begin; y < end; ++y) write_row(rows, y, unit.n, to + y * a_.width * step(), stage, streams);
      }
      stream_fence();
    });
  }

  void backward(const Workers& workers) {
    const UpsampleUnits units(a_, concat_block<A>(a_));
    int64_t least = 0;
    for (int64_t l = 0; l < a_.maps; ++l) least = larger(least, a_.map[l].height);
    const int64_t bands = bands_of(units.count(), least, kLeastRows, workers.count);
    for_each_part(workers, units.count() * bands, [&](int64_t worker, int64_t first, int64_t last) {
      A* const scratch = scratch_ + worker * scratch_of_worker(a_);
      RowGradient<T, A> rows(a_, concat_block<A>(a_), scratch);
      A* const stage = scratch + RowGradient<T, A>::scratch(a_, concat_block<A>(a_));
      for (int64_t i = first; i < last; ++i) {
        const UpsampleUnit unit = units[i / bands];
        const UpsampleMap& map = a_.map[unit.map];
        const int64_t begin = map.height * (i % bands) / bands, end = map.height * (i % bands + 1) / bands;
        if (begin == end || map.grad == nullptr) continue;
        rows.start(unit, begin, end);
        const T* const from = static_cast<const T*>(a_.grad) + offset(unit);
        for (int64_t y = 0; y < a_.height; ++y)
          if (map.rows[y].high >= begin && map.rows[y].low < end)
            rows.add(y, read_row(from + y * a_.width * step(), unit.n, stage));
        rows.finish();
      }
    });
  }

 private:
  static constexpr int64_t kLeastRows = 8;  // of a band

  static int64_t scratch_of_worker(const UpsampleArgs& a) {
    const int64_t block = concat_block<A>(a);
    return RowInterpolator<T, A>::scratch(a, block) + rounded_up(a.width * block, kCacheLine);
  }

  int64_t step() const { return a_.last ? a_.channels : 1; }
  int64_t offset(const UpsampleUnit& unit) const {
    const int64_t c = a_.map[unit.map].first_channel + unit.c0, pixels = a_.height * a_.width;
    return unit.image * a_.channels * pixels + (a_.last ? c : c * pixels);
  }

  bool streams_output() const {
    if (!kSame<T, A> || a_.images * a_.channels * a_.height * a_.width * int64_t(sizeof(T)) <= kStreamBytes)
      return false;
    bool whole = a_.last || a_.width % kLanes<A> == 0;
    for (int64_t l = 0; l < a_.maps && a_.last; ++l) whole = whole && a_.map[l].channels % kLanes<A> == 0;
    return whole && is_aligned(a_.output);
  }

  void write_row(RowInterpolator<T, A>& rows, int64_t y, int64_t n, T* to, A* stage, bool streams) {
    if constexpr (kSame<T, A>) {
      if (streams) {
        rows.template row<true>(y, n, to, step());
      } else {
        rows.template row<false>(y, n, to, step());
      }
    } else {
      rows.template row<false>(y, n, stage, n);
      each_run(step() == n, a_.width, n, [&](int64_t x, int64_t m) { narrow_run(stage + x * n, to + x * step(), m); });
    }
  }

  RowView<A> read_row(const T* from, int64_t n, A* stage) {
    if constexpr (kSame<T, A>) {
      return {from, step()};
    } else {
      each_run(step() == n, a_.width, n,
               [&](int64_t x, int64_t m) { convert_run(from + x * step(), stage + x * n, m); });
      return {stage, n};
    }
  }

  const UpsampleArgs& a_;
  A* const scratch_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
