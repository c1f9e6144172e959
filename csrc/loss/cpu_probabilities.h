// The probabilities of a block of pixels for one CPU target: what forward and backward passes begin with.
//
// An image is cut into units of kUnitPixels, a unit into blocks that fit the cache (cpu_stage.h). Softmax of a block:
// the maxima over the classes while the logits come in, exp(z - max) and its sum over the classes for a few pixels at a
// time, then the users' passes, one for each class.
#pragma once

#include "loss/cpu_focal.h"
#include "loss/cpu_stage.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename A>
class Probabilities {
 public:
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;

  const LabelError& error() const { return stage_.error; }

 protected:
  const SegmentationInput& in_;
  Arena arena_;
  Stage<A> stage_;
  A* exps_;  // [classes + 1, step]
  // Rows of a block: the largest logit, the sum of exponentials, the label's logit, 1 / sum, log sum, ...
  A *most_, *total_, *own_, *scale_, *shared_, *delta_;
  A *p_, *rest_, *log_p_, *log_rest_;  // of one class: p, 1 - p, -log p, -log(1 - p)

  Probabilities(const SegmentationInput& input, void* workspace)
      : in_(input), arena_(workspace), stage_(input, arena_) {
    // Exponentials take the logits' place where nobody asks for the logarithms of all classes afterwards.
    exps_ = keeps_logits() ? arena_.take<A>((in_.classes + 1) * stage_.step) : stage_.logits;
    take(stage_.step, most_, total_, own_, scale_, shared_, delta_, p_, rest_, log_p_, log_rest_);
  }

  template <typename... Pieces>
  void take(int64_t count, Pieces&... pieces) {
    ((pieces = arena_.take<A>(count)), ...);
  }

  bool keeps_logits() const { return in_.activation == Activation::kSoftmax && (in_.smoothing || in_.dense); }

  template <typename F>
  void each_block(int64_t unit, const F& f) {
    stage_.each_block(unit, f);
  }

  // --- Softmax

  // Logits, their maxima and the labels' logits; then exp(z - max) and its sum. Kept logits become z - max.
  void softmax() {
    const int64_t padded = stage_.padded, step = stage_.step;
    if (in_.logits.channels_last) stage_.load_all_logits();
    const V least = broadcast<A>(A(-__builtin_inf()));
    for (int64_t i = 0; i < padded; i += kLane) store(most_ + i, least);
    for (int64_t c = 0; c < in_.classes; ++c) stage_.load_logits_and_most(c, most_);
    if (!in_.dense)
      for (int64_t i = 0; i < padded; ++i) own_[i] = stage_.logits[stage_.index[i] * step + i];
    if (keeps_logits()) {
      exponentials<true>();
    } else {
      exponentials<false>();
    }
  }

  template <bool kKeep>
  void exponentials() {
    const int64_t step = stage_.step;
    const bool masked = !in_.dense && !stage_.all_count();
    const V none = broadcast<A>(stage_.limit());
    for (int64_t i = 0; i < stage_.padded; i += 2 * kLane) {
      A* z = stage_.logits + i;
      A* e = exps_ + i;
      const V m0 = load(most_ + i), m1 = load(most_ + i + kLane);
      V s0{}, s1{};
      if (masked) {
        const auto out0 = load(stage_.label + i) == none, out1 = load(stage_.label + i + kLane) == none;
        for (int64_t c = 0; c < in_.classes; ++c, z += step, e += step) {
          const V d0 = load(z) - m0, d1 = load(z + kLane) - m1;
          const V e0 = out0 ? V{} : exp_nonpositive(d0), e1 = out1 ? V{} : exp_nonpositive(d1);
          if constexpr (kKeep) store(z, d0), store(z + kLane, d1);
          store(e, e0), store(e + kLane, e1);
          s0 += e0, s1 += e1;
        }
      } else {
        for (int64_t c = 0; c < in_.classes; ++c, z += step, e += step) {
          const V d0 = load(z) - m0, d1 = load(z + kLane) - m1;
          const V e0 = exp_nonpositive(d0), e1 = exp_nonpositive(d1);
          if constexpr (kKeep) store(z, d0), store(z + kLane, d1);
          store(e, e0), store(e + kLane, e1);
          s0 += e0, s1 += e1;
        }
      }
      store(total_ + i, s0), store(total_ + i + kLane, s1);
    }
  }

  // Keeps the logarithms of the sums for the backward pass; log_s: those after the maxima have been taken out.
  void keep_log_sums(const A* log_s) {
    if (in_.log_sum == nullptr) return;
    const V none = broadcast<A>(stage_.limit());
    for (int64_t i = 0; i < stage_.padded; i += kLane)
      store(own_ + i, load(stage_.label + i) == none ? V{} : load(most_ + i) + load(log_s + i));
    stage_.keep_log_sums(own_);
  }

  // What softmax() leaves, in one pass: `most_` are the labels' logits instead of the maxima. Exponentials are kept only
  // where asked for. false, and nothing done: a logit is so far above the label's that its exponential leaves the range.
  template <bool kKeep>
  bool softmax_of_labels() {
    constexpr int kMost = 64;
    const int64_t padded = stage_.padded, step = stage_.step;
    const auto z = stage_.logits_where_they_lie();
    own_of(z);
    for (int64_t i = 0; i < padded; i += kLane) store(total_ + i, V{});
    V worst{};
    for (int64_t c = 0; c < in_.classes; ++c) {
      const A* from = z.first + c * z.step;
      A* e = exps_ + c * step;
      const auto each = [&](const auto& counted) {
        for (int64_t i = 0; i < padded; i += kLane) {
          __builtin_prefetch(from + step + i, 0, 3);
          const V d = load(from + i) - load(own_ + i);
          worst = worst < d ? d : worst;
          const V v = counted(i, exp_nonpositive(d));
          if constexpr (kKeep) store(e + i, v);
          store(total_ + i, load(total_ + i) + v);
        }
      };
      each_counted(each);
    }
    for (int64_t lane = 0; lane < kLane; ++lane)
      if (worst[lane] > kMost) return false;
    for (int64_t i = 0; i < padded; i += kLane) store(most_ + i, load(own_ + i));
    return true;
  }

  // What softmax() leaves, from what the forward pass has kept: probabilities for exponentials, `most_` the logarithms of
  // the sums, the sums 1. Also sum_c p_c (of_p + of_pp p_c) into `dots`, while the probabilities are in registers.
  // false: nothing that serves was kept.
  bool recall(const A* of_p, const A* of_pp, A* dots) {
    if (!stage_.load_log_sums(most_)) return false;
    const int64_t padded = stage_.padded, step = stage_.step;
    const auto z = stage_.logits_where_they_lie();
    own_of(z);
    bound_own();
    const V one = broadcast<A>(A(1));
    for (int64_t i = 0; i < padded; i += kLane) store(dots + i, V{});
    for (int64_t c = 0; c < in_.classes; ++c) {
      const A* from = z.first + c * z.step;
      A* e = exps_ + c * step;
      const V a = broadcast<A>(of_p[c]), b = broadcast<A>(of_pp[c]);
      const auto each = [&](const auto& counted) {
        for (int64_t i = 0; i < padded; i += kLane) {
          __builtin_prefetch(from + step + i, 0, 3);
          const V p = counted(i, exp_nonpositive(load(from + i) - load(most_ + i)));
          store(e + i, p);
          store(dots + i, load(dots + i) + p * (a + b * p));
        }
      };
      each_counted(each);
    }
    for (int64_t i = 0; i < padded; i += kLane) store(total_ + i, one);
    return true;
  }

  // Calls loop(counted): counted(i, v) is v where the pixels at i count, else 0.
  template <typename F>
  void each_counted(const F& loop) {
    if (stage_.all_count()) return loop([](int64_t, V v) { return v; });
    const V none = broadcast<A>(stage_.limit());
    loop([&](int64_t i, V v) { return load(stage_.label + i) == none ? V{} : v; });
  }

  // The labels' logits; any number for pixels that are left out.
  void own_of(const typename Stage<A>::Rows& z) {
    for (int64_t i = 0; i < stage_.padded; ++i) {
      const int64_t c = stage_.index[i] < in_.classes ? stage_.index[i] : 0;
      own_[i] = z.first[c * z.step + i];
    }
  }

  // Rounding could put the labels' logits above the logarithms of the sums in most_.
  void bound_own() {
    for (int64_t i = 0; i < stage_.padded; i += kLane) {
      const V own = load(own_ + i), most = load(most_ + i);
      store(own_ + i, most < own ? most : own);
    }
  }

  // p, 1 - p and logarithms of class c into the rows; row: its exponentials and logits - max.
  void softmax_row(int64_t c) {
    const A* e = exps_ + c * stage_.step;
    const A* d = stage_.logits + c * stage_.step;
    const bool logs = in_.pixel || in_.smoothing;
    for (int64_t i = 0; i < stage_.padded; i += kLane) {
      const V p = load(e + i) * load(scale_ + i);
      store(p_ + i, p);
      if (!logs) continue;
      const V log_p = load(shared_ + i) - load(d + i);
      store(rest_ + i, one_minus<A>(p, log_p));
      store(log_p_ + i, log_p);
    }
  }

  // After softmax(): 1 / sum and log sum of every pixel.
  void normalise() {
    for (int64_t i = 0; i < stage_.padded; i += kLane) {
      const V s = load(total_ + i);
      store(scale_ + i, A(1) / s);
      store(shared_ + i, log(s));
    }
  }

  // --- Sigmoid and none: every element by itself

  void elementwise_row(int64_t c) {
    const A* z = in_.logits.channels_last ? stage_.logits + c * stage_.step : stage_.load_logits(c);
    const auto each = [&](const auto& activation, bool logs) {
      for (int64_t i = 0; i < stage_.padded; i += kLane) {
        const Probability<A> p = activation(load(z + i));
        store(p_ + i, p.p);
        store(rest_ + i, p.rest);
        if (!logs) continue;
        store(log_p_ + i, p.log_p);
        store(log_rest_ + i, p.log_rest);
      }
    };
    const bool logs = in_.pixel || in_.smoothing, sigmoid = in_.activation == Activation::kSigmoid;
    if (sigmoid && logs) return each([](V v) { return sigmoid_of<A>(v); }, true);
    if (sigmoid) return each([](V v) { return sigmoid_without_logs<A>(v); }, false);
    if (logs) return each([](V v) { return probability_of<A>(v); }, true);
    each([](V v) { return Probability<A>{v, v, v, v}; }, false);
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
