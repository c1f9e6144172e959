// point_supervision_loss for one CPU target (formulas: point_supervision_math.h).
//
// Forward, a block of pixels: the maxima of the objects' and of the other classes' logits, the sums of their
// exponentials, the objectness terms, and every class's rank (point_supervision_math.h) against the largest so far: a
// class's row is looked through for the pixel only where some vector of it is larger. Backward: rows softmax(z) within
// each of the two sets of classes times a factor of the pixel, or zeros; then single pixels are added.
#pragma once

#include "common/cpu_math.h"
#include "loss/cpu_stage.h"
#include "loss/point_supervision_loss_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

inline double softplus(double x) { return x > 0 ? x + ::log1p(::exp(-x)) : ::log1p(::exp(x)); }
inline double logistic(double x) { return x > 0 ? 1 / (1 + ::exp(-x)) : ::exp(x) / (1 + ::exp(x)); }

// The classes' logits of one pixel, and their softmax without one of them.
template <typename A>
class PixelLogits {
 public:
  PixelLogits(int64_t classes, Arena& arena)
      : classes_(classes),
        padded_(round_up(classes, kLanes<A>)),
        logits_(arena.take<A>(padded_)),
        others_(arena.take<A>(padded_)) {}

  void read(const PixelMap& map, int64_t pixels, int64_t image, int64_t pixel) {
    with_types(map.type, [&]<typename T, typename>() {
      const T* from = static_cast<const T*>(map.data) +
                      (map.channels_last ? (image * pixels + pixel) * classes_ : image * classes_ * pixels + pixel);
      const int64_t step = map.channels_last ? 1 : pixels;
      for (int64_t c = 0; c < classes_; ++c) logits_[c] = A(widen(from[c * step]));
    });
    for (int64_t c = classes_; c < padded_; ++c) logits_[c] = A(-__builtin_inf());
  }

  // The log-odds of class c, z_c - log sum_{k != c} exp z_k. others(k): exp z_k / sum_{k != c} exp z_k, 0 for c.
  double log_odds(int64_t c) {
    const A own = logits_[c];
    logits_[c] = A(-__builtin_inf());
    Vec<A> most = load(logits_);
    for (int64_t k = kLanes<A>; k < padded_; k += kLanes<A>) {
      const Vec<A> z = load(logits_ + k);
      most = most < z ? z : most;
    }
    A largest = most[0];
    for (int lane = 1; lane < kLanes<A>; ++lane) largest = larger(largest, A(most[lane]));
    Vec<A> sums{};
    for (int64_t k = 0; k < padded_; k += kLanes<A>) {
      const Vec<A> e = exp_nonpositive(load(logits_ + k) - largest);
      store(others_ + k, e);
      sums += e;
    }
    double sum = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) sum += sums[lane];
    scale_ = A(1 / sum);
    most_ = largest;
    sum_ = sum;
    logits_[c] = own;
    return own < A(__builtin_inf()) ? double(own) - most_ - ::log(sum) : __builtin_nan("");
  }
  // Of the other classes: the largest logit, and the sum of exponentials after it has been subtracted.
  double most() const { return most_; }
  double sum() const { return sum_; }
  A others(int64_t k) const { return others_[k] * scale_; }

 private:
  const int64_t classes_, padded_;
  A *logits_, *others_;
  A scale_ = A(0);
  double most_ = 0, sum_ = 0;
};

template <typename A>
class PointSupervision {
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;

 public:
  PointSupervision(const PointSupervisionInput& input, void* workspace)
      : in_(input), maps_(input.maps), arena_(workspace), stage_(input.maps, arena_), pixel_(maps_.classes, arena_) {
    for (int set = 0; set < 2; ++set) {
      most_[set] = arena_.take<A>(stage_.step);
      sum_[set] = arena_.take<A>(stage_.step);
      rest_[set] = arena_.take<A>(stage_.step);
    }
    largest_ = arena_.take<A>(stage_.step);
    lost_ = arena_.take<A>(stage_.step);
    top_rank_ = arena_.take<A>(stage_.step);
    prior_ = arena_.take<A>(stage_.step);
    order_ = arena_.take<int32_t>(maps_.classes);
    here_ = arena_.take<int32_t>(maps_.classes);
    if (workspace == nullptr) return;
    int64_t placed = 0;
    for (int set = 0; set < 2; ++set) {
      first_[set] = placed;
      for (int64_t c = 0; c < maps_.classes; ++c)
        if (set_of(c) == set) order_[placed++] = int32_t(c);
    }
    first_[2] = placed;
  }

  static int64_t workspace(const PointSupervisionInput& in) { return PointSupervision(in, nullptr).arena_.used(); }
  const LabelError& error() const { return stage_.error; }

  // --- Forward

  // The partial results of a unit: [classes, kBest] of each class, then the sums of kRest.
  enum { kValue, kPixel, kPoints, kBest };
  enum { kObjectnessSum, kPointSum, kPointsOfAll, kRest };
  static int64_t partial_size(const PointSupervisionInput& in) { return in.maps.classes * kBest + kRest; }

  void run_forward(int64_t unit, double* partial) {
    double* rest = partial + maps_.classes * kBest;
    for (int64_t c = 0; c < maps_.classes; ++c) {
      partial[c * kBest + kValue] = -__builtin_inf();
      partial[c * kBest + kPixel] = double(unit % units_of_image(maps_) * kUnitPixels);
      partial[c * kBest + kPoints] = 0;
    }
    for (int i = 0; i < kRest; ++i) rest[i] = 0;
    stage_.each_block(unit, [&] {
      sums<false>();
      rest[kObjectnessSum] += normalise();
      for (int64_t i = first_point(0); i < stage_.count; i = first_point(i + 1)) {
        const int64_t c = stage_.index[i];
        read_pixel(stage_.first + i);
        rest[kPointSum] += double(stage_.weight[i]) * softplus(-pixel_.log_odds(c));
        rest[kPointsOfAll] += 1;
        partial[c * kBest + kPoints] += 1;
      }
      for (int64_t c = 0; c < maps_.classes; ++c) best_pixel(c, partial + c * kBest);
    });
  }

  // What becomes of the units of an image and class: its row of kept, and its points.
  void finish_class(int64_t image, int64_t c, const double* partial, double* kept) {
    const int64_t units = units_of_image(maps_), size = partial_size(in_);
    const double* from = partial + image * units * size;
    double value = -__builtin_inf(), best = from[c * kBest + kPixel], points = 0, points_of_all = 0;
    for (int64_t unit = 0; unit < units; ++unit, from += size) {
      const double* of_class = from + c * kBest;
      // As the maximum of torch, NaN is the largest of all.
      if (of_class[kValue] > value || (of_class[kValue] != of_class[kValue] && value == value)) {
        value = of_class[kValue];
        best = of_class[kPixel];
      }
      points += of_class[kPoints];
      points_of_all += from[maps_.classes * kBest + kPointsOfAll];
    }
    double presence = points > 0 || !in_.is_object[c];
    if (points_of_all == 0) presence = -1;
    if (in_.image_labels) {
      const int64_t label = in_.image_labels[image * maps_.classes + c];
      presence = label > 0 ? 1 : label == 0 ? 0 : -1;
    }
    pixel_.read(maps_.logits, maps_.pixels, image, int64_t(best));
    kept[kBestPixel] = best;
    kept[kPresence] = presence;
    kept[kLogOdds] = pixel_.log_odds(c);
    kept[kMostOther] = pixel_.most();
    kept[kSumOther] = pixel_.sum();
  }

  // --- Backward

  // grad: [kPointTerms], kept: [classes, kPointKept] of the unit's image.
  void run_backward(int64_t unit, const double* grad, const double* kept, void* to) {
    const bool dense = has_objectness();
    if (!dense) clear_unit(unit, to);
    const int64_t unit_first = unit % units_of_image(maps_) * kUnitPixels;
    int64_t best_here = 0;
    for (int64_t c = 0; c < maps_.classes; ++c) {
      const double at = kept[c * kPointKept + kBestPixel] - double(unit_first);
      if (at >= 0 && at < double(kUnitPixels) && kept[c * kPointKept + kPresence] >= 0) here_[best_here++] = int32_t(c);
    }
    stage_.each_block(unit, [&] {
      const auto offset = [&](int64_t c) { return int64_t(kept[c * kPointKept + kBestPixel]) - stage_.first; };
      bool single = first_point(0) < stage_.count;
      for (int64_t j = 0; j < best_here; ++j) single |= offset(here_[j]) >= 0 && offset(here_[j]) < stage_.count;
      if (dense) {
        sums<true>();
        fill_dense(A(grad[kObjectnessTerm]), to);
      } else if (single) {
        for (int64_t c = 0; c < maps_.classes; ++c)
          stage_.fill_row(to, type(), c, stage_.logits + c * stage_.step, [](int64_t) { return V{}; });
      } else {
        return;
      }
      if (single) stream_fence();
      for (int64_t i = first_point(0); i < stage_.count; i = first_point(i + 1))
        add_single(i, stage_.index[i], true, double(stage_.weight[i]) * grad[kPointTerm], to);
      for (int64_t j = 0; j < best_here; ++j) {
        const int64_t i = offset(here_[j]);
        const bool present = kept[here_[j] * kPointKept + kPresence] > 0;
        if (i >= 0 && i < stage_.count)
          add_single(i, here_[j], present, grad[present ? kPresentTerm : kAbsentTerm], to);
      }
      for (int64_t c = 0; c < maps_.classes; ++c) stage_.write(row_of(to, c), to, type(), c);
      stage_.write_all(stage_.logits, to, type());
    });
  }

 private:
  const PointSupervisionInput& in_;
  const SegmentationInput& maps_;
  Arena arena_;
  Stage<A> stage_;
  PixelLogits<A> pixel_;
  A *most_[2], *sum_[2];  // of the pixels of a block: the largest logit of each set of classes, sums of exponentials
  A* rest_[2];            // the latter without one of the largest
  A *largest_, *lost_, *top_rank_;  // of all classes: the largest logit, -log of its S, its rank
  A* prior_;
  int32_t* order_;  // [classes], those of set 0 first
  int32_t* here_;   // [classes], those whose best pixel is in the unit
  int64_t first_[3];

  Element type() const { return maps_.logits.type; }
  bool has_objectness() const { return in_.objectness.data != nullptr; }
  // Set 1: the objects. Without objectness all classes are one set.
  int set_of(int64_t c) const { return has_objectness() ? in_.is_object[c] : 0; }

  void read_pixel(int64_t pixel) { pixel_.read(maps_.logits, maps_.pixels, stage_.image, pixel); }

  // The first pixel of the block from i on that has a label; `count` or more: none has.
  int64_t first_point(int64_t i) const {
    const V none = broadcast<A>(stage_.limit());
    for (; i < stage_.padded; i = (i / kLane + 1) * kLane) {
      const V l = load(stage_.label + i / kLane * kLane);
      const uint32_t labelled = lane_bits<A>(l < none) >> i % kLane;
      if (labelled) return i + __builtin_ctz(labelled);
    }
    return stage_.padded;
  }

  // Rows of most_ and sum_. The exponentials take the logits' place if they are kept; if not, also rows of rest_.
  template <bool kKeep>
  void sums() {
    const int64_t step = stage_.step, padded = stage_.padded;
    if (maps_.logits.channels_last) stage_.load_all_logits();
    const V least = broadcast<A>(A(-__builtin_inf()));
    for (int64_t i = 0; i < padded; i += kLane) store(most_[0] + i, least), store(most_[1] + i, least);
    for (int64_t c = 0; c < maps_.classes; ++c) stage_.load_logits_and_most(c, most_[set_of(c)]);
    for (int set = 0; set < 2; ++set) {
      const int32_t *first = order_ + first_[set], *last = order_ + first_[set + 1];
      for (int64_t i = 0; i < padded; i += 2 * kLane) {
        const V m0 = load(most_[set] + i), m1 = load(most_[set] + i + kLane);
        V s0{}, s1{}, count0{}, count1{};  // the largest are counted: beside a 1 small ones would be lost
        for (const int32_t* c = first; c < last; ++c) {
          A* z = stage_.logits + *c * step + i;
          const V z0 = load(z), z1 = load(z + kLane);
          const V e0 = exp_nonpositive(z0 - m0), e1 = exp_nonpositive(z1 - m1);
          if constexpr (kKeep) {
            store(z, e0), store(z + kLane, e1);
            s0 += e0, s1 += e1;
          } else {
            s0 += z0 == m0 ? V{} : e0, s1 += z1 == m1 ? V{} : e1;
            count0 += z0 == m0 ? V{} + A(1) : V{}, count1 += z1 == m1 ? V{} + A(1) : V{};
          }
        }
        store(sum_[set] + i, s0 + count0), store(sum_[set] + i + kLane, s1 + count1);
        if constexpr (kKeep) continue;
        store(rest_[set] + i, s0 + (count0 - A(1))), store(rest_[set] + i + kLane, s1 + (count1 - A(1)));
      }
    }
  }

  // u, the log-odds of the objects together.
  V object_log_odds(int64_t i) const {
    return (load(most_[1] + i) - load(most_[0] + i)) + (log(load(sum_[1] + i)) - log(load(sum_[0] + i)));
  }

  // log(1 + e) for 0 <= e <= 1, exact though the sum is rounded.
  static V log_1p(V e) {
    const V w = A(1) + e;
    return log(w) + (e - (w - A(1))) / w;
  }

  // The log-odds of the largest logits `most` where the exponentials of all others after subtraction of it vanish.
  V odds_beyond_range(int64_t i, V most) const {
    V second = broadcast<A>(A(-__builtin_inf())), sum{};
    const A* z = stage_.logits + i;
    for (int64_t c = 0; c < maps_.classes; ++c, z += stage_.step) {
      const V other = load(z);
      second = (other < most) & (second < other) ? other : second;
    }
    z = stage_.logits + i;
    for (int64_t c = 0; c < maps_.classes; ++c, z += stage_.step)
      sum += load(z) == most ? V{} : exp_nonpositive(load(z) - second);
    return (most - second) - log(sum);
  }

  // Rows of largest_, lost_ and top_rank_ for the vector of pixels from i on.
  void rank_largest(int64_t i) {
    constexpr A kLost = sizeof(A) == 8 ? A(0x1p-960) : A(0x1p-100);  // exponentials beside it may have vanished
    V most = load(most_[0] + i), rest = load(rest_[0] + i);
    if (has_objectness()) {
      const V of_objects = load(most_[1] + i), distance = of_objects - most;
      const V e = exp_nonpositive(distance < V{} ? distance : -distance);
      rest = distance > V{} ? load(rest_[1] + i) + load(sum_[0] + i) * e : rest + load(sum_[1] + i) * e;
      most = distance > V{} ? of_objects : most;
    }
    rest += most - most;  // NaN for infinity
    V x = -log(rest);
    if (lane_bits<A>(rest < broadcast<A>(kLost))) x = rest < broadcast<A>(kLost) ? odds_beyond_range(i, most) : x;
    const V l = log_1p(rest < A(1) ? rest : A(1) / rest), lost = relu<A>(-x) + l;
    store(largest_ + i, most);
    store(lost_ + i, lost);
    store(top_rank_ + i, x < V{} ? -lost : x + (l - A(kLog4)));
  }

  // Ranks the largest logits; returns the objectness terms.
  double normalise() {
    if (has_objectness()) stage_.load_plane(in_.objectness, prior_);
    double total = 0;
    V terms{};
    for (int64_t i = 0; i < stage_.padded; i += kLane) {
      rank_largest(i);
      if (!has_objectness()) continue;
      const V u = object_log_odds(i), prior = load(prior_ + i);
      const V l = log_1p(exp_nonpositive(u < V{} ? u : -u)), up = relu<A>(u) + l, down = relu<A>(-u) + l;
      const V one = broadcast<A>(A(1)), rest = one - prior;
      // 0 * inf = 0
      const V term = (prior == V{} ? V{} : prior * down) + (rest == V{} ? V{} : rest * up);
      if (i + kLane <= stage_.count) {
        terms += term;
      } else {
        for (int64_t lane = 0; lane < stage_.count - i; ++lane) total += term[lane];
      }
    }
    for (int64_t i = stage_.count; i < stage_.padded; ++i) largest_[i] = A(__builtin_inf()), lost_[i] = A(0);
    for (int lane = 0; lane < kLane; ++lane) total += terms[lane];
    return total;
  }

  // Of the block's pixels the first of the largest rank of the class, if that is above best[kValue]; the first that is
  // NaN, if any.
  void best_pixel(int64_t c, double* best) {
    const A* z = stage_.logits + c * stage_.step;
    A value = A(best[kValue]);
    if (value != value) return;
    const V least = broadcast<A>(value);
    decltype(least < least) found{};
    for (int64_t i = 0; i < stage_.padded; i += kLane) {
      const V distance = load(z + i) - load(largest_ + i);
      const V rank = distance == V{} ? load(top_rank_ + i) : distance - load(lost_ + i);
      found |= (rank > least) | (rank != rank);
    }
    if (!lane_bits<A>(found)) return;
    for (int64_t i = 0; i < stage_.count; ++i) {
      const A distance = z[i] - largest_[i], rank = distance == A(0) ? top_rank_[i] : distance - lost_[i];
      if (rank <= value) continue;
      value = rank;
      best[kValue] = double(rank);
      best[kPixel] = double(stage_.first + i);
      if (rank != rank) return;
    }
  }

  void clear_unit(int64_t unit, void* to) const {
    const int64_t units = units_of_image(maps_), image = unit / units, first = unit % units * kUnitPixels;
    const int64_t count = smaller(kUnitPixels, maps_.pixels - first);
    with_types(type(), [&]<typename T, typename>() {
      T* from = static_cast<T*>(to) + image * maps_.classes * maps_.pixels;
      if (maps_.logits.channels_last) {
        memset(static_cast<void*>(from + first * maps_.classes), 0, count * maps_.classes * sizeof(T));
      } else {
        for (int64_t c = 0; c < maps_.classes; ++c)
          memset(static_cast<void*>(from + c * maps_.pixels + first), 0, count * sizeof(T));
      }
    });
  }

  A* row_of(void* to, int64_t c) const { return stage_.row_of_result(to, type(), c, stage_.logits + c * stage_.step); }

  // The gradient of the objectness terms, times `grad`, from exponentials in the logits' place.
  void fill_dense(A grad, void* to) {
    stage_.load_plane(in_.objectness, prior_);
    for (int64_t i = 0; i < stage_.padded; i += kLane) {
      const V u = object_log_odds(i);
      const V e = exp_nonpositive(u < V{} ? u : -u), r = A(1) / (A(1) + e);
      const V slope = ((u < V{} ? e * r : r) - load(prior_ + i)) * grad;
      store(most_[1] + i, slope / load(sum_[1] + i));
      store(most_[0] + i, -slope / load(sum_[0] + i));
    }
    for (int64_t c = 0; c < maps_.classes; ++c) {
      A* e = stage_.logits + c * stage_.step;
      const A* factor = most_[set_of(c)];
      stage_.fill_row(to, type(), c, e, [&](int64_t i) { return load(e + i) * load(factor + i); });
    }
  }

  // Adds the gradient of -log S_c (present) or -log(1 - S_c) at pixel i of the block, times `grad`.
  void add_single(int64_t i, int64_t c, bool present, double grad, void* to) {
    read_pixel(stage_.first + i);
    const double x = pixel_.log_odds(c);
    const A slope = A(grad * (present ? -logistic(-x) : logistic(x)));
    for (int64_t k = 0; k < maps_.classes; ++k) row_of(to, k)[i] += k == c ? slope : -slope * pixel_.others(k);
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
