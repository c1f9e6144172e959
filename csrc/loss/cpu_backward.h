// The backward pass of segmentation_statistics, of pixel_cross_entropy (a weight for every pixel, the same gradient of
// POS, NEG and NLL for all images) and of activations (the gradient of PG, with any number for a target), for one CPU
// target.
#pragma once

#include "loss/cpu_probabilities.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename A>
class Backward : Probabilities<A> {
  using Base = Probabilities<A>;
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;
  using Base::delta_;
  using Base::each_block;
  using Base::elementwise_row;
  using Base::exps_;
  using Base::in_;
  using Base::log_p_;
  using Base::log_rest_;
  using Base::most_;
  using Base::normalise;
  using Base::own_;
  using Base::p_;
  using Base::rest_;
  using Base::scale_;
  using Base::shared_;
  using Base::softmax;
  using Base::softmax_row;
  using Base::stage_;
  using Base::total_;

 public:
  Backward(const SegmentationInput& input, void* workspace) : Base(input, workspace) {
    this->take(in_.classes + 1, of_p_, of_pp_, of_pg_, of_ppg_, of_pos_, of_neg_, of_nll_);
  }

  static int64_t workspace(const SegmentationInput& in) { return Backward(in, nullptr).arena_.used(); }
  using Base::error;

  // grad: [classes, kStatistics] of the unit's image.
  void run(int64_t unit, const double* grad, void* to) {
    total_of_nll_ = A(0);
    for (int64_t c = 0; c < in_.classes; ++c) {
      const double* g = grad + c * kStatistics;
      of_p_[c] = A(g[kP]);
      of_pp_[c] = A(2 * g[kPP]);
      of_pg_[c] = A(g[kPG]);
      of_ppg_[c] = A(2 * g[kPPG]);
      of_pos_[c] = A(g[kPos]);
      of_neg_[c] = A(g[kNeg]);
      of_nll_[c] = A(g[kNll]);
      total_of_nll_ += of_nll_[c];
    }
    of_pg_[in_.classes] = of_ppg_[in_.classes] = of_pos_[in_.classes] = A(0);  // for pixels that are left out
    each_block(unit, [&] {
      if (in_.activation != Activation::kSoftmax) {
        elementwise_backward(to);
      } else if (in_.dense) {
        dense_softmax_backward(to);
      } else {
        label_softmax_backward(to);
      }
    });
  }

 private:
  // The gradient's columns, [classes + 1] each; those of the squares are doubled.
  A *of_p_, *of_pp_, *of_pg_, *of_ppg_, *of_pos_, *of_neg_, *of_nll_;
  A total_of_nll_ = A(0);

  // Row c of the gradient (Stage::fill_row).
  template <typename F>
  void write_row(void* to, int64_t c, A* scratch, const F& value) {
    stage_.write(stage_.fill_row(to, in_.logits.type, c, scratch, value), to, in_.logits.type, c);
  }

  // With p_t, h = p_t (of_pg + of_ppg p_t) of the label's class and k = w of_pos q + w sum(of_nll):
  //   dz_c = p_c (of_p + of_pp p_c - D) - w of_nll + [c = t] (h - w of_pos q),
  //   D = sum_c p_c (of_p + of_pp p_c) + h - k.
  void label_softmax_backward(void* to) {
    if (in_.pixel && !in_.region && stage_.load_log_sums(most_)) return pixel_backward(to);
    A* dots = p_;  // per pixel: sum_c p_c (of_p + of_pp p_c), where probabilities were recalled
    const bool recalled = in_.region && this->recall(of_p_, of_pp_, dots);
    if (!recalled && (in_.smoothing || !this->template softmax_of_labels<true>())) softmax();
    const int64_t padded = stage_.padded, step = stage_.step;
    const V none = broadcast<A>(stage_.limit());
    const V gamma = broadcast<A>(A(in_.gamma)), of_all_nll = broadcast<A>(total_of_nll_);
    A* slope = log_p_;  // per pixel: of_pos of its label
    A* of_pg = rest_;
    A* of_ppg = log_rest_;
    if (in_.pixel)
      for (int64_t i = 0; i < padded; ++i) slope[i] = of_pos_[stage_.index[i]];
    if (in_.region)
      for (int64_t i = 0; i < padded; ++i) {
        of_pg[i] = of_pg_[stage_.index[i]];
        of_ppg[i] = of_ppg_[stage_.index[i]];
      }
    with_gamma(in_.gamma, [&](auto tag) {
      for (int64_t i = 0; i < padded; i += kLane) {
        const V s = load(total_ + i), d = load(own_ + i) - load(most_ + i);
        const auto out = load(stage_.label + i) == none;
        const V r = out ? V{} : A(1) / s;
        V minus_d{}, delta{};
        V p{};
        if (in_.region || tag.value != Gamma::kZero) p = exp_nonpositive(d) * r;
        if (in_.pixel) {
          V k = load(stage_.weight + i) * load(slope + i);
          if constexpr (tag.value != Gamma::kZero) {
            const V log_p = log(s) - d;
            k = k * focal_slope<tag.value, A>(p, one_minus<A>(p, log_p), log_p, gamma);
          }
          minus_d = k;
          delta = -k;
        }
        if (in_.smoothing) minus_d += load(stage_.weight + i) * of_all_nll;
        if (in_.region) {
          const V h = p * (load(of_pg + i) + load(of_ppg + i) * p);
          minus_d -= h;
          delta += h;
        }
        store(scale_ + i, r);
        store(shared_ + i, out ? V{} : minus_d);
        store(delta_ + i, out ? V{} : delta);
      }
    });
    if (in_.region && recalled) {
      for (int64_t i = 0; i < padded; i += kLane) store(shared_ + i, load(shared_ + i) - load(dots + i));
    } else if (in_.region) {
      for (int64_t i = 0; i < padded; i += 2 * kLane) {
        A* e = exps_ + i;
        const V r0 = load(scale_ + i), r1 = load(scale_ + i + kLane);
        V d0{}, d1{};
        for (int64_t c = 0; c < in_.classes; ++c, e += step) {
          const V a = broadcast<A>(of_p_[c]), b = broadcast<A>(of_pp_[c]);
          const V p0 = load(e) * r0, p1 = load(e + kLane) * r1;
          store(e, p0), store(e + kLane, p1);
          d0 += p0 * (a + b * p0), d1 += p1 * (a + b * p1);
        }
        store(shared_ + i, load(shared_ + i) - d0);
        store(shared_ + i + kLane, load(shared_ + i + kLane) - d1);
      }
    } else {
      for (int64_t i = 0; i < padded; i += kLane) store(shared_ + i, load(shared_ + i) * load(scale_ + i));
    }
    for (int64_t c = 0; c < in_.classes; ++c) {
      A* e = exps_ + c * step;
      const V own = broadcast<A>(A(c)), a = broadcast<A>(of_p_[c]), b = broadcast<A>(of_pp_[c]);
      const V n = broadcast<A>(of_nll_[c]);
      write_row(to, c, e, [&](int64_t i) {
        const V p = load(e + i);
        V factor = load(shared_ + i);
        if (in_.region) factor += a + b * p;
        V dz = p * factor + (load(stage_.label + i) == own ? load(delta_ + i) : V{});
        if (in_.smoothing) dz -= load(stage_.weight + i) * n;
        return dz;
      });
    }
    stage_.write_all(exps_, to, in_.logits.type);
  }

  // Without region columns, from the logarithms of the sums in most_, in one pass: dz_c = p_c (k + w sum(of_nll)) - w of_nll -
  // [c = t] k, k = w of_pos q.
  void pixel_backward(void* to) {
    const int64_t padded = stage_.padded, step = stage_.step;
    const auto z = stage_.logits_where_they_lie();
    const V none = broadcast<A>(stage_.limit()), of_all_nll = broadcast<A>(total_of_nll_);
    const V gamma = broadcast<A>(A(in_.gamma));
    const A *most = most_, *own_logit = own_;
    A* slope = log_p_;
    for (int64_t i = 0; i < padded; ++i) slope[i] = of_pos_[stage_.index[i]];
    if (in_.gamma != 0) {
      this->own_of(z);
      this->bound_own();
    }
    with_gamma(in_.gamma, [&](auto tag) {
      for (int64_t i = 0; i < padded; i += kLane) {
        const auto out = load(stage_.label + i) == none;
        const V w = load(stage_.weight + i);
        V k = w * load(slope + i);
        if constexpr (tag.value != Gamma::kZero) {
          const V log_p = load(most + i) - load(own_logit + i), p = exp_nonpositive(-log_p);
          k = k * focal_slope<tag.value, A>(p, one_minus<A>(p, log_p), log_p, gamma);
        }
        store(delta_ + i, out ? V{} : k);
        store(shared_ + i, out ? V{} : in_.smoothing ? k + w * of_all_nll : k);
      }
    });
    for (int64_t c = 0; c < in_.classes; ++c) {
      const A* from = z.first + c * z.step;
      const V own = broadcast<A>(A(c)), n = broadcast<A>(of_nll_[c]);
      write_row(to, c, exps_ + c * step, [&](int64_t i) {
        __builtin_prefetch(from + step + i, 0, 3);
        const V factor = load(shared_ + i), p = exp_nonpositive(load(from + i) - load(most_ + i));
        V dz = p * factor - (load(stage_.label + i) == own ? load(delta_ + i) : V{});
        if (in_.smoothing) dz -= load(stage_.weight + i) * n;
        return load(stage_.label + i) == none ? V{} : dz;
      });
    }
    stage_.write_all(exps_, to, in_.logits.type);
  }

  // dp = of_p + of_pp p + g (of_pg + of_ppg p) of element i in class c's rows.
  V region_slope(int64_t c, V p, V g) const { return of_p_[c] + of_pp_[c] * p + g * (of_pg_[c] + of_ppg_[c] * p); }

  // With u = w g of_pos q and n = w of_nll: dz_c = x_c - p_c sum(x), x_c = p_c dp_c - u_c - n_c.
  void dense_softmax_backward(void* to) {
    softmax();
    normalise();
    const int64_t padded = stage_.padded, step = stage_.step;
    const V out = broadcast<A>(kLeftOut<A>), gamma = broadcast<A>(A(in_.gamma));
    A* common = total_;  // -sum(x): the sums of exponentials are no longer needed
    for (int64_t i = 0; i < padded; i += kLane) store(common + i, V{});
    A* terms = stage_.logits;  // x_c takes the place of the kept logits of its class
    for (int64_t c = 0; c < in_.classes; ++c) {
      softmax_row(c);
      stage_.load_target(c);
      stage_.load_weight(c);
      A* term = terms + c * step;
      with_gamma(in_.gamma, [&](auto tag) {
        for (int64_t i = 0; i < padded; i += kLane) {
          const V gi = load(stage_.g + i), p = load(p_ + i);
          V x{};
          if (in_.region) x += p * region_slope(c, p, gi);
          if (in_.pixel) {
            const V q = focal_slope<tag.value, A>(p, load(rest_ + i), load(log_p_ + i), gamma);
            x -= product<A>(load(stage_.weight + i) * gi * of_pos_[c], q);
          }
          if (in_.smoothing) x -= load(stage_.weight + i) * of_nll_[c];
          x = gi == out ? V{} : x;
          store(term + i, x);
          store(common + i, load(common + i) - x);
        }
      });
    }
    for (int64_t c = 0; c < in_.classes; ++c) {
      const A* e = exps_ + c * step;
      A* term = terms + c * step;
      write_row(to, c, term,
                [&](int64_t i) { return load(term + i) + load(e + i) * load(scale_ + i) * load(common + i); });
    }
    stage_.write_all(terms, to, in_.logits.type);
  }

  void elementwise_backward(void* to) {
    if (in_.logits.channels_last) stage_.load_all_logits();
    const V out = broadcast<A>(kLeftOut<A>), gamma = broadcast<A>(A(in_.gamma));
    const V least = broadcast<A>(A(kLeastDenominator));
    const bool sigmoid = in_.activation == Activation::kSigmoid;
    for (int64_t c = 0; c < in_.classes; ++c) {
      elementwise_row(c);
      stage_.load_target(c);
      stage_.load_weight(c);
      A* row = stage_.row_of_result(to, in_.logits.type, c, stage_.logits + c * stage_.step);
      const A of_pos = of_pos_[c], of_neg = of_neg_[c], of_nll = of_nll_[c];
      with_gamma(in_.gamma, [&](auto tag) {
        for (int64_t i = 0; i < stage_.padded; i += kLane) {
          const V gi = load(stage_.g + i), p = load(p_ + i), rest = load(rest_ + i);
          const V log_p = load(log_p_ + i), log_rest = load(log_rest_ + i), w = load(stage_.weight + i);
          V x{};
          if (in_.region) {
            x = region_slope(c, p, gi);
            if (sigmoid) x = x * (p * rest);
          }
          if (in_.pixel) {
            V pos, neg;  // minus the slope of a positive's term, the slope of a negative's
            if (sigmoid) {
              pos = power<tag.value, A>(rest, gamma) * (rest + gamma * product<A>(p, log_p));
              neg = power<tag.value, A>(p, gamma) * (p + gamma * product<A>(rest, log_rest));
            } else {
              pos = focal_slope<tag.value, A>(p, rest, log_p, gamma) / (p < least ? least : p);
              neg = focal_slope<tag.value, A>(rest, p, log_rest, gamma) / (rest < least ? least : rest);
            }
            x += w * (of_neg * (A(1) - gi) * neg - of_pos * gi * pos);
          }
          if (in_.smoothing) x -= w * of_nll * (sigmoid ? rest : A(1) / (p < least ? least : p));
          store(row + i, gi == out ? V{} : x);
        }
      });
      stage_.write(row, to, in_.logits.type, c);
    }
    stage_.write_all(stage_.logits, to, in_.logits.type);
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
