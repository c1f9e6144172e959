// The passes along the other axes: for the elements y of every column,
//   d(y) = min over i of f(i) + (spacing * (y - i))^2,      f: squared distance of what the passes before have found.
// Where neighbours are compared by label, f(i) counts as 0 from the first element of another value on: going on beyond
// it finds nothing nearer. Neighbouring columns are neighbours in memory and lie in the lanes of a vector.
//
// Near: all candidates outwards from y, until no lane can improve; 16-bit sums. Most maps need nothing else.
// Far (rows that are not done within kNearReach, other arithmetic, indices): the same scan, but the best i never
// decreases with y within a run of one label, so halving intervals bounds it from both sides: O(rows log rows) for
// smooth columns.
#pragma once

#include <type_traits>

#include "distance/cpu_row_pass.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kStrip = 64;  // columns that are treated together
constexpr int kNearReach = 64;
constexpr int kNearNone =
    247;  // distances before this pass that count as this one; with a candidate's k^2 it fits 16 bits
static_assert(kNearNone > kNearReach, "what is far stays far");
static_assert(kNearNone * kNearNone + kNearReach * kNearReach <= UINT16_MAX, "sums do not overflow");

template <typename T>
constexpr T none() {
  if constexpr (sizeof(T) == 4 && T(0.5) == T(0)) return distance::kNoneInt;
  return static_cast<T>(__builtin_huge_val());
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// Whether float32 holds all squared distances exactly.
inline bool fits_float(int64_t d, int64_t h, int64_t w) { return d * d + h * h + w * w < int64_t{1} << 24; }

template <typename T, typename Wide, typename Out>
inline void convert_squares_as(const T* squares, int64_t count, bool squared, Out* out) {
  const Wide infinity = static_cast<Wide>(__builtin_huge_val());
  if (squared) {
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<Out>(squares[i] >= none<T>() ? infinity : static_cast<Wide>(squares[i]));
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i] = static_cast<Out>(root(squares[i] >= none<T>() ? infinity : static_cast<Wide>(squares[i])));
  }
}

// The results of `count` lanes, rounded once: integers that float32 cannot hold take the way over double.
template <typename T, typename Out>
inline void convert_squares(Lanes<T> lanes, int64_t count, bool squared, bool exact, Out* out) {
  alignas(kVectorBytes) T squares[kLaneCount<T>];
  store_lanes(squares, lanes);
  if constexpr (!std::is_same_v<T, int32_t>) {
    convert_squares_as<T, T>(squares, count, squared, out);
  } else if (exact) {
    convert_squares_as<T, Out>(squares, count, squared, out);
  } else {
    convert_squares_as<T, double>(squares, count, squared, out);
  }
}

// A view of the elements of one pass: `rows` along its axis, at every row `columns` neighbours in memory.
struct AxisView {
  int64_t rows, columns;
  int64_t source_stride, stride;  // from row to row of the source; of input and result
  int64_t first;                  // number of the first element in input and result
  double spacing;                 // along the axis
  bool last;                      // the result is distances, not yet the next pass's squares
  // indices
  int64_t first_index, component_stride;  // of the element `first` in component 0 of the indices
};

// T: arithmetic; Source: G of the row pass or T of the pass before; Out: the distances' type.
template <typename T, typename Source, typename Out>
class AxisPass {
  static constexpr bool kFromRows = !std::is_same_v<Source, T>;
  static constexpr bool kInteger = std::is_same_v<T, int32_t>;
  static constexpr int kLanesT = kLaneCount<T>;
  static constexpr int kLanes16 = kLaneCount<uint16_t>;
  using V = Lanes<T>;
  using V16 = Lanes<uint16_t>;

 public:
  static int64_t workspace(int64_t rows, bool labels, bool indices) {
    Scratch scratch;
    return static_cast<int64_t>(scratch.carve(0, rows, labels, indices));
  }

  AxisPass(const DistanceArgs& a, const AxisView& view, const Source* source, void* result, void* workspace)
      : a_(a),
        v_(view),
        source_(source),
        result_(result),
        labels_(distance::compares_labels(a.mode)),
        exact_(fits_float(a.d, a.h, a.w)) {
    s_.carve(reinterpret_cast<uintptr_t>(workspace), v_.rows, labels_, a.indices != nullptr);
  }

  // Columns column .. column + kStrip - 1.
  void run(int64_t column) {
    const int64_t count = smaller(kStrip, v_.columns - column);
    if (kInteger && a_.indices == nullptr) {
      near(column, count);
    } else {
      for (int64_t c = 0; c < count; c += kLanesT) far(column + c, smaller(int64_t{kLanesT}, count - c));
    }
    if (v_.last)
      for (int64_t y = 0; y < v_.rows; ++y) {
        const int64_t at = v_.first + y * v_.stride + column;
        finish_row(a_, at, count, static_cast<Out*>(result_) + at);
      }
  }

 private:
  struct Scratch {
    uint16_t* near_f;     // [rows, kStrip]
    uint16_t* near_same;  // [rows, kStrip]
    Source* saved;        // [rows, kStrip]
    uint8_t* unfinished;  // [kStrip / kLanes16, rows rounded up]
    T* f;                 // [rows, kLanesT], like the next three
    T* arg;
    T* before;
    T* after;
    int64_t* least_arg;  // [rows]
    int64_t* most_arg;   // [rows]
    uint8_t* flags;      // [kStrip]
    int32_t* old;        // [2, rows, kLanesT]

    // Returns the end of what starts at address `at`.
    uintptr_t carve(uintptr_t at, int64_t rows, bool labels, bool indices) {
      const auto take = [&](auto*& pointer, int64_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
        at += static_cast<uintptr_t>(row_stride(count * static_cast<int64_t>(sizeof(*pointer))));
      };
      take(near_f, rows * kStrip);
      take(near_same, labels ? rows * kStrip : 0);
      take(saved, kFromRows ? 0 : rows * kStrip);
      take(unfinished, row_stride(rows) * (kStrip / kLanes16));
      take(f, rows * kLanesT);
      take(arg, rows * kLanesT);
      take(before, labels ? rows * kLanesT : 0);
      take(after, labels ? rows * kLanesT : 0);
      take(least_arg, rows);
      take(most_arg, rows);
      take(flags, kStrip);
      take(old, indices ? 2 * rows * kLanesT : 0);
      return at;
    }
  };

  // ---- near

  void near(int64_t column, int64_t count) {
    if constexpr (kInteger) {
      load_near(column, count);
      if (labels_) {
        scan_near<true>(column, count);
      } else {
        scan_near<false>(column, count);
      }
      for (int64_t c = 0; c < count; c += kLanes16) far_where_unfinished(column, c, smaller(c + kLanes16, count));
    }
  }

  void load_near(int64_t column, int64_t count) {
    any_unfinished_ = false;
    for (int64_t y = 0; y < v_.rows; ++y) {
      const Source* from = source_ + y * v_.source_stride + column;
      uint16_t* to = s_.near_f + y * kStrip;
      if (count == kStrip) {
        for (int64_t i = 0; i < kStrip; ++i) to[i] = near_square(from[i]);
      } else {
        for (int64_t i = 0; i < kStrip; ++i) to[i] = 0;  // columns that do not exist are done at once
        for (int64_t i = 0; i < count; ++i) to[i] = near_square(from[i]);
      }
      if constexpr (!kFromRows)  // what is near may be stored where these are, before what is far has been read
        for (int64_t i = 0; i < count; ++i) s_.saved[y * kStrip + i] = from[i];
      if (labels_) load_same(column, count, y);
    }
  }

  static uint16_t near_square(Source s) {
    if constexpr (kFromRows) {
      const uint16_t g = static_cast<uint16_t>(smaller(s, static_cast<Source>(kNearNone)));
      return static_cast<uint16_t>(g * g);
    } else {
      return static_cast<uint16_t>(smaller(s, static_cast<Source>(kNearNone * kNearNone)));
    }
  }

  // All bits where the elements of rows y - 1 and y have the same label.
  void load_same(int64_t column, int64_t count, int64_t y) {
    uint16_t* same = s_.near_same + y * kStrip;
    if (y == 0 || count < kStrip)
      for (int64_t i = 0; i < kStrip; ++i) same[i] = UINT16_MAX;
    if (y == 0) return;
    const int64_t at = v_.first + y * v_.stride + column;
    if (count == kStrip) {
      compare_rows<uint16_t>(a_, at, at - v_.stride, kStrip, 1, same);
    } else {
      compare_rows<uint16_t>(a_, at, at - v_.stride, count, 1, same);
    }
  }

  template <bool kLabels>
  void scan_near(int64_t column, int64_t count) {
    constexpr int64_t kFewestSkipped = 8;  // rows below an unfinished one are not even tried, more and more of them
    constexpr int kVectors = kStrip / kLanes16;
    int64_t skip_to[kVectors] = {}, skip[kVectors];
    for (int64_t& rows : skip) rows = kFewestSkipped;
    alignas(kVectorBytes) uint16_t best[kStrip] = {};
    const int64_t stride = row_stride(v_.rows);
    for (int64_t y = 0; y < v_.rows; ++y) {
      for (int v = 0; v < kVectors; ++v) {
        uint8_t& unfinished = s_.unfinished[v * stride + y];
        unfinished = y < skip_to[v];
        if (unfinished) continue;
        if (v * kLanes16 >= count) break;
        const V16 found = scan_near_row<kLabels>(s_.near_f + v * kLanes16, s_.near_same + v * kLanes16, y);
        if (any_above(found, kNearReach * kNearReach)) {
          unfinished = 1;
          skip_to[v] = y + skip[v];
          skip[v] *= 2;
          any_unfinished_ = true;
        } else {
          skip[v] = kFewestSkipped;
        }
        store_lanes(best + v * kLanes16, found);
      }
      store_near(best, v_.first + y * v_.stride + column, count);
    }
  }

  // The smallest candidates of row y; above kNearReach^2 where it had to stop too early.
  template <bool kLabels>
  V16 scan_near_row(const uint16_t* f, const uint16_t* same, int64_t y) const {
    const uint16_t *up = f + y * kStrip, *down = up;
    V16 best = load_lanes(up), alive_up = ~V16{}, alive_down = ~V16{};
    const uint16_t* const top = f;
    const uint16_t* const bottom = f + (v_.rows - 1) * kStrip;
    [[maybe_unused]] const uint16_t *same_up = same + y * kStrip, *same_down = same_up;
    for (int k = 1; k <= kNearReach && any_above(best, static_cast<uint16_t>(k * k)); ++k) {
      // At the ends the outermost row is a candidate again, further away than it is: it changes nothing.
      if constexpr (kLabels) {
        alive_up &= load_lanes(same_up);
        same_up = up > top ? same_up - kStrip : same_up;
        same_down = down < bottom ? same_down + kStrip : same_down;
        alive_down &= load_lanes(same_down);
      }
      up = up > top ? up - kStrip : up;
      down = down < bottom ? down + kStrip : down;
      V16 above = load_lanes(up), below = load_lanes(down);
      if constexpr (kLabels) {
        above &= alive_up;
        below &= alive_down;
      }
      best = lanes_min(best, lanes_min(above, below) + static_cast<uint16_t>(k * k));
    }
    return best;
  }

  void store_near(const uint16_t* best, int64_t at, int64_t count) {
    if (!v_.last) {
      T* to = static_cast<T*>(result_) + at;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(best[i]);
      return;
    }
    Out* to = static_cast<Out*>(result_) + at;
    if (count == kStrip) {
      convert_near(best, kStrip, to);
    } else {
      convert_near(best, count, to);
    }
  }

  void convert_near(const uint16_t* best, int64_t count, Out* to) const {
    if (a_.squared) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Out>(static_cast<int32_t>(best[i]));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = root(static_cast<Out>(static_cast<int32_t>(best[i])));
    }
  }

  // ---- far

  void far_where_unfinished(int64_t column, int64_t c, int64_t end) {
    if (!any_unfinished_) return;
    const uint8_t* unfinished = s_.unfinished + c / kLanes16 * row_stride(v_.rows);
    int64_t y = 0;
    while (y < v_.rows && !unfinished[y]) ++y;
    if (y == v_.rows) return;
    for (; c < end; c += kLanesT) {
      const int64_t lanes = smaller(int64_t{kLanesT}, end - c);
      if constexpr (kFromRows) {
        load_far(column + c, lanes, source_ + column + c, v_.source_stride);
      } else {
        load_far(column + c, lanes, s_.saved + c, kStrip);
      }
      for (int64_t first = y; first < v_.rows;) {
        int64_t last = first;
        while (last < v_.rows && unfinished[last]) ++last;
        between(first - 1, last, false, false);
        first = last;
        while (first < v_.rows && !unfinished[first]) ++first;
      }
    }
  }

  void far(int64_t column, int64_t count) {
    load_far(column, count, source_ + column, v_.source_stride);
    between(-1, v_.rows, false, false);
    if (a_.indices) write_indices(column, count);
  }

  // Reads `from` [rows, stride], whose first column is `column`.
  void load_far(int64_t column, int64_t count, const Source* from, int64_t stride) {
    far_column_ = column;
    far_count_ = count;
    const T before = static_cast<T>(a_.spacing[2]);
    for (int64_t y = 0; y < v_.rows; ++y) {
      T* to = s_.f + y * kLanesT;
      for (int64_t i = 0; i < kLanesT; ++i) {
        const Source s = from[y * stride + smaller(i, count - 1)];  // lanes that do not exist repeat the last one
        if constexpr (kFromRows) {
          const T g = static_cast<T>(s) * before;
          to[i] = s == kNoSource<Source> ? none<T>() : g * g;
        } else {
          to[i] = s;
        }
      }
    }
    if (labels_) load_runs(column, count);
  }

  // s_.before, s_.after: the nearest rows of another value on both sides, -1 and the number of rows where there is
  // none.
  void load_runs(int64_t column, int64_t count) {
    V nearest = all_lanes<T>(T(-1));
    for (int64_t y = 0; y < v_.rows; ++y) {
      if (y > 0) nearest = differs_from_row_above(column, count, y) ? with_flags(nearest, T(y - 1)) : nearest;
      store_lanes(s_.before + y * kLanesT, nearest);
    }
    nearest = all_lanes<T>(T(v_.rows));
    for (int64_t y = v_.rows - 1; y >= 0; --y) {
      store_lanes(s_.after + y * kLanesT, nearest);
      if (y > 0) nearest = differs_from_row_above(column, count, y) ? with_flags(nearest, T(y)) : nearest;
    }
  }

  bool differs_from_row_above(int64_t column, int64_t count, int64_t y) {
    const int64_t at = v_.first + y * v_.stride + column;
    compare_rows<uint8_t>(a_, at, at - v_.stride, count, 0, s_.flags);
    uint8_t any = 0;
    for (int64_t i = 0; i < count; ++i) any |= s_.flags[i];
    for (int64_t i = count; i < kLanesT; ++i) s_.flags[i] = s_.flags[count - 1];
    return any;
  }

  V with_flags(V v, T value) const {
    for (int i = 0; i < kLanesT; ++i)
      if (s_.flags[i]) v[i] = value;
    return v;
  }

  T cost(int64_t k) const {
    if constexpr (kInteger) return static_cast<T>(k * k);
    const T step = static_cast<T>(k) * static_cast<T>(v_.spacing);
    return step * step;
  }

  // Rows a + 1 .. b - 1; rows a and b bound them, where they are known.
  void between(int64_t a, int64_t b, bool known_a, bool known_b) {
    if (b - a < 2) return;
    const int64_t m = a + (b - a) / 2;
    int64_t least = 0, most = v_.rows - 1;
    if (labels_) {
      const V x = load_lanes(s_.before + m * kLanesT), y = load_lanes(s_.after + m * kLanesT);
      V low = x, high = y;
      if (known_a) low = all_lanes<T>(T(a)) > x ? load_lanes(s_.arg + a * kLanesT) : low;
      if (known_b) high = all_lanes<T>(T(b)) < y ? load_lanes(s_.arg + b * kLanesT) : high;
      alignas(kVectorBytes) T bounds[2][kLanesT];
      store_lanes(bounds[0], low);
      store_lanes(bounds[1], high);
      least = larger(least, least_lane(bounds[0]));
      most = smaller(most, most_lane(bounds[1]));
    } else {
      if (known_a) least = s_.least_arg[a];
      if (known_b) most = s_.most_arg[b];
    }
    if (labels_) {
      solve<true>(m, least, most);
    } else {
      solve<false>(m, least, most);
    }
    between(a, m, known_a, true);
    between(m, b, true, known_b);
  }

  // Of lanes in memory: a vector whose lanes are asked for one by one would live there all the time.
  static int64_t least_lane(const T* v) {
    T least = v[0];
    for (int i = 1; i < kLanesT; ++i) least = smaller(least, v[i]);
    return static_cast<int64_t>(least);
  }
  static int64_t most_lane(const T* v) {
    T most = v[0];
    for (int i = 1; i < kLanesT; ++i) most = larger(most, v[i]);
    return static_cast<int64_t>(most);
  }

  // Row m, whose best candidates lie in least..most.
  template <bool kLabels>
  void solve(int64_t m, int64_t least, int64_t most) {
    V best = load_lanes(s_.f + m * kLanesT), arg = all_lanes<T>(T(m));
    V first{}, end{};
    if constexpr (kLabels) {
      first = load_lanes(s_.before + m * kLanesT);
      end = load_lanes(s_.after + m * kLanesT);
    }
    const int64_t from = larger(int64_t{1}, larger(least - m, m - most)), to = larger(m - least, most - m);
    for (int64_t k = from; k <= to; ++k) {
      const T far = cost(k);
      if (!any_above<T>(best, far)) break;
      for (const int64_t i : {m - k, m + k}) {
        if (i < least || i > most) continue;
        V f = load_lanes(s_.f + i * kLanesT);
        const V at = all_lanes<T>(T(i));
        if constexpr (kLabels) f = (at > first) & (at < end) ? f : V{};
        const V candidate = f + far;
        arg = candidate < best ? at : arg;
        best = lanes_min(best, candidate);
      }
    }
    store_lanes(s_.arg + m * kLanesT, arg);
    if constexpr (!kLabels) {
      s_.least_arg[m] = least_lane(s_.arg + m * kLanesT);
      s_.most_arg[m] = most_lane(s_.arg + m * kLanesT);
    }
    store_far(best, m);
  }

  void store_far(V best, int64_t y) {
    const int64_t at = v_.first + y * v_.stride + far_column_;
    if (!v_.last) {
      T* to = static_cast<T*>(result_) + at;
      for (int64_t i = 0; i < far_count_; ++i) to[i] = best[i];
      return;
    }
    Out* to = static_cast<Out*>(result_) + at;
    if (far_count_ == kLanesT) {
      convert_squares<T>(best, kLanesT, a_.squared, exact_, to);
    } else {
      convert_squares<T>(best, far_count_, a_.squared, exact_, to);
    }
  }

  // ---- indices

  void write_indices(int64_t column, int64_t count) {
    if constexpr (kFromRows) {
      write_indices_from_rows(column, count);
    } else {
      write_indices_from_indices(column, count);
    }
  }

  int64_t* index_at(int64_t y, int64_t column) const { return a_.indices + v_.first_index + y * v_.stride + column; }

  // The second to last axis: its own component, and that of the row.
  void write_indices_from_rows(int64_t column, int64_t count) {
    for (int64_t y = 0; y < v_.rows; ++y)
      for (int64_t i = 0; i < count; ++i) {
        int64_t* to = index_at(y, column + i) + (a_.dims - 2) * v_.component_stride;
        const int64_t x = column + i, source_y = static_cast<int64_t>(s_.arg[y * kLanesT + i]);
        const int64_t self = v_.first + y * v_.stride + x, row = v_.first + source_y * v_.stride;
        int64_t source_x = -1;
        if (s_.f[source_y * kLanesT + i] < none<T>()) {
          source_x = in_row(self, row, source_y, x);
        } else if (source_y != y) {  // a row without a source that is one itself: all of another value
          source_x = x;
        }
        const bool own = is_own_source(self);
        to[0] = own ? y : source_x < 0 ? -1 : source_y;
        to[v_.component_stride] = own ? x : source_x;
      }
  }

  // Background among objects is 0 from itself.
  bool is_own_source(int64_t self) const { return v_.last && a_.mode == Mode::kObjects && zero_at(a_, self); }

  int64_t in_row(int64_t self, int64_t row, int64_t source_y, int64_t x) const {
    if (labels_ && differ_at(a_, self, row + x)) return x;
    const int64_t g = static_cast<int64_t>((source_ + source_y * v_.source_stride)[x]);
    const auto is_source = [&](int64_t at) { return labels_ ? differ_at(a_, self, at) : zero_at(a_, at); };
    return x - g >= 0 && is_source(row + x - g) ? x - g : x + g;
  }

  // The first of three axes: its own component; the others are those of the row that it comes from.
  void write_indices_from_indices(int64_t column, int64_t count) {
    const int64_t n = v_.rows * kLanesT;
    for (int64_t y = 0; y < v_.rows; ++y)
      for (int64_t i = 0; i < count; ++i)
        for (int c = 0; c < 2; ++c)
          s_.old[c * n + y * kLanesT + i] =
              static_cast<int32_t>(index_at(y, column + i)[(c + 1) * v_.component_stride]);
    for (int64_t y = 0; y < v_.rows; ++y)
      for (int64_t i = 0; i < count; ++i) {
        int64_t* to = index_at(y, column + i);
        const int64_t source = static_cast<int64_t>(s_.arg[y * kLanesT + i]), p = column + i;
        int64_t of_row[2] = {s_.old[source * kLanesT + i], s_.old[n + source * kLanesT + i]};
        if (labels_ && differ_at(a_, v_.first + y * v_.stride + p, v_.first + source * v_.stride + p)) {
          of_row[0] = p / a_.w;
          of_row[1] = p % a_.w;
        }
        const bool own = is_own_source(v_.first + y * v_.stride + p);
        to[0] = own ? y : of_row[0] < 0 ? -1 : source;
        to[v_.component_stride] = own ? p / a_.w : of_row[0];
        to[2 * v_.component_stride] = own ? p % a_.w : of_row[1];
      }
  }

  const DistanceArgs& a_;
  const AxisView v_;
  const Source* source_;
  void* result_;
  const bool labels_, exact_;
  bool any_unfinished_ = false;
  int64_t far_column_ = 0, far_count_ = 0;
  Scratch s_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
