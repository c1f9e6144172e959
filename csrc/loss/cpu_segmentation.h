// segmentation_statistics and its backward pass for one CPU target.
//
// An image is cut into units of kUnitPixels, a unit into blocks that fit the cache (cpu_stage.h). Units do not depend on the
// number of threads; sums of a block are float vectors, those of a unit and of an image doubles, always in the same order.
//
// Softmax of a block: the maxima over the classes while the logits come in, exp(z - max) and its sum over the classes for a
// few pixels at a time, then one pass for each class. With labels only the label's class has anything but p and p^2 to add
// up: its terms are computed once for each pixel and added to that class.
#pragma once

#include "loss/cpu_focal.h"
#include "loss/cpu_stage.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kSumLanes = kLanes<double>;

// Sums of one unit: [classes + 1, kStatistics, kSumLanes]; the last class takes what pixels that are left out add.
class UnitSums {
 public:
  UnitSums(const SegmentationInput& in, Arena& arena)
      : classes_(in.classes), sums_(arena.take<double>((in.classes + 1) * kStatistics * kSumLanes)) {}

  void clear() { memset(sums_, 0, sizeof(double) * (classes_ + 1) * kStatistics * kSumLanes); }

  double* at(int64_t c, int column) { return sums_ + (c * kStatistics + column) * kSumLanes; }

  void add(int64_t c, int column, Vec<double> v) { store(at(c, column), load(at(c, column)) + v); }
  void add(int64_t c, int column, Vec<float> v) {
    typedef float HalfVec __attribute__((vector_size(kVectorBytes / 2)));
    HalfVec part[2];
    memcpy(part, &v, sizeof v);
    add(c, column, __builtin_convertvector(part[0], Vec<double>) + __builtin_convertvector(part[1], Vec<double>));
  }

  // partial: [classes, kStatistics]
  void finish(double* partial) const {
    for (int64_t i = 0; i < classes_ * kStatistics; ++i) {
      double total = 0;
      for (int64_t lane = 0; lane < kSumLanes; ++lane) total += sums_[i * kSumLanes + lane];
      partial[i] = total;
    }
  }

 private:
  int64_t classes_;
  double* sums_;
};

template <typename A>
class Segmentation {
 public:
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;

  Segmentation(const SegmentationInput& input, void* workspace)
      : in_(input), arena_(workspace), stage_(input, arena_), sums_(input, arena_) {
    const int64_t step = stage_.step;
    // Exponentials take the logits' place where nobody asks for the logarithms of all classes afterwards.
    exps_ = keeps_logits() ? arena_.take<A>((in_.classes + 1) * step) : stage_.logits;
    const auto take = [&](int64_t count, auto&... pieces) { ((pieces = arena_.take<A>(count)), ...); };
    take(step, most_, total_, own_, scale_, shared_, delta_, p_, rest_, log_p_, log_rest_);
    take(in_.classes + 1, of_p_, of_pp_, of_pg_, of_ppg_, of_pos_, of_neg_, of_nll_);
  }

  static int64_t workspace(const SegmentationInput& in) { return Segmentation(in, nullptr).arena_.used(); }
  const LabelError& error() const { return stage_.error; }

  // partial: [classes, kStatistics] of one unit.
  void statistics(int64_t unit, double* partial) {
    sums_.clear();
    each_block(unit, [&] {
      if (in_.activation != Activation::kSoftmax) {
        elementwise_statistics();
      } else if (in_.dense) {
        dense_softmax_statistics();
      } else {
        label_softmax_statistics();
      }
    });
    sums_.finish(partial);
    if (in_.activation == Activation::kSoftmax && !in_.dense)  // labels leave a pixel out of all classes or of none
      for (int64_t c = 1; c < in_.classes; ++c) partial[c * kStatistics + kW] = partial[kW];
  }

  // grad: [classes, kStatistics] of the unit's image.
  void backward(int64_t unit, const double* grad, void* to) {
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
    for_pixels_left_out(of_pg_, of_ppg_, of_pos_);
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
  const SegmentationInput& in_;
  Arena arena_;
  Stage<A> stage_;
  UnitSums sums_;
  A* exps_;  // [classes + 1, step]
  // Rows of a block: the largest logit, the sum of exponentials, the label's logit, ...
  A *most_, *total_, *own_, *scale_, *shared_, *delta_, *p_, *rest_, *log_p_, *log_rest_;
  // The gradient's columns, [classes + 1] each; those of the squares are doubled.
  A *of_p_, *of_pp_, *of_pg_, *of_ppg_, *of_pos_, *of_neg_, *of_nll_;
  A total_of_nll_ = A(0);

  bool keeps_logits() const { return in_.activation == Activation::kSoftmax && (in_.smoothing || in_.dense); }

  template <typename... Columns>
  void for_pixels_left_out(Columns... columns) const {
    ((columns[in_.classes] = A(0)), ...);
  }

  template <typename F>
  void each_block(int64_t unit, const F& f) {
    const int64_t units = units_of_image(in_), image = unit / units;
    const int64_t first = unit % units * kUnitPixels, last = smaller(first + kUnitPixels, in_.pixels);
    for (int64_t i = first; i < last; i += stage_.step) {
      stage_.begin(image, i, smaller(stage_.step, last - i));
      f();
    }
  }

  // --- Softmax

  // Logits, their maxima and the labels' logits; then exp(z - max) and its sum. Kept logits become z - max.
  void softmax() {
    const int64_t padded = stage_.padded, step = stage_.step;
    if (in_.logits.channels_last) stage_.load_all_logits();
    const V least = broadcast<A>(A(-__builtin_inf()));
    for (int64_t i = 0; i < padded; i += kLane) store(most_ + i, least);
    for (int64_t c = 0; c < in_.classes; ++c) {
      const A* row = in_.logits.channels_last ? stage_.logits + c * step : stage_.load_logits(c);
      for (int64_t i = 0; i < padded; i += kLane) {
        const V z = load(row + i), m = load(most_ + i);
        store(most_ + i, m < z ? z : m);
      }
    }
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

  void label_softmax_statistics() {
    softmax();
    const int64_t padded = stage_.padded, count = stage_.count, step = stage_.step;
    const V none = broadcast<A>(stage_.limit());
    const V gamma = broadcast<A>(A(in_.gamma));
    V weights{};
    with_gamma(in_.gamma, [&](auto tag) {
      for (int64_t i = 0; i < padded; i += kLane) {
        const V s = load(total_ + i), d = load(own_ + i) - load(most_ + i);
        const auto out = load(stage_.label + i) == none;
        const V r = out ? V{} : A(1) / s, p = exp_nonpositive(d) * r, log_s = log(s), log_p = log_s - d;
        store(scale_ + i, r);
        store(p_ + i, p);
        store(shared_ + i, log_s);
        if (!in_.pixel) continue;
        const V w = load(stage_.weight + i);
        store(delta_ + i, w * power<tag.value, A>(one_minus<A>(p, log_p), gamma) * log_p);
        weights += w;
      }
    });
    if (in_.region) {
      for (int64_t i = 0; i < count; ++i) {
        double* sum = sums_.at(stage_.index[i], 0) + i % kSumLanes;
        const double p = p_[i];
        sum[kPG * kSumLanes] += p;
        sum[kG * kSumLanes] += 1;
        sum[kGG * kSumLanes] += 1;
        sum[kPPG * kSumLanes] += p * p;
      }
      for (int64_t c = 0; c < in_.classes; ++c) {
        const A* e = exps_ + c * step;
        V sum0{}, sum1{}, square0{}, square1{};
        for (int64_t i = 0; i < padded; i += 2 * kLane) {
          const V p0 = load(e + i) * load(scale_ + i), p1 = load(e + i + kLane) * load(scale_ + i + kLane);
          sum0 += p0, sum1 += p1;
          square0 += p0 * p0, square1 += p1 * p1;
        }
        sums_.add(c, kP, sum0 + sum1);
        sums_.add(c, kPP, square0 + square1);
      }
    }
    if (in_.pixel) {
      for (int64_t i = 0; i < count; ++i) {
        double* sum = sums_.at(stage_.index[i], 0) + i % kSumLanes;
        sum[kPos * kSumLanes] += delta_[i];
        sum[kWG * kSumLanes] += stage_.weight[i];
      }
      sums_.add(0, kW, weights);
    }
    if (in_.smoothing) {
      for (int64_t c = 0; c < in_.classes; ++c) {
        const A* d = stage_.logits + c * step;
        V sum{};
        for (int64_t i = 0; i < padded; i += kLane) {
          const auto out = load(stage_.label + i) == none;
          const V term = load(stage_.weight + i) * (load(shared_ + i) - load(d + i));
          sum += out ? V{} : term;
        }
        sums_.add(c, kNll, sum);
      }
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

  void dense_softmax_statistics() {
    softmax();
    normalise();
    for (int64_t c = 0; c < in_.classes; ++c) {
      softmax_row(c);
      stage_.load_target(c);
      stage_.load_weight(c);
      add_row(c);
    }
  }

  // --- Sigmoid and none: every element by itself

  void elementwise_row(int64_t c) {
    const A* z = in_.logits.channels_last ? stage_.logits + c * stage_.step : stage_.load_logits(c);
    const auto each = [&](const auto& activation) {
      for (int64_t i = 0; i < stage_.padded; i += kLane) {
        const Probability<A> p = activation(load(z + i));
        store(p_ + i, p.p);
        store(rest_ + i, p.rest);
        store(log_p_ + i, p.log_p);
        store(log_rest_ + i, p.log_rest);
      }
    };
    if (in_.activation == Activation::kSigmoid) {
      each([](V v) { return sigmoid_of<A>(v); });
    } else if (in_.pixel || in_.smoothing) {
      each([](V v) { return probability_of<A>(v); });
    } else {
      each([](V v) { return Probability<A>{v, v, v, v}; });
    }
  }

  void elementwise_statistics() {
    if (in_.logits.channels_last) stage_.load_all_logits();
    for (int64_t c = 0; c < in_.classes; ++c) {
      elementwise_row(c);
      stage_.load_target(c);
      stage_.load_weight(c);
      add_row(c);
    }
  }

  // The rows of class c to its sums.
  void add_row(int64_t c) {
    const V out = broadcast<A>(kLeftOut<A>);
    const int64_t padded = stage_.padded;
    if (in_.region) {
      V pg{}, p{}, g{}, pp{}, gg{}, ppg{};
      for (int64_t i = 0; i < padded; i += kLane) {
        const V gi = load(stage_.g + i);
        const auto left_out = gi == out;
        const V t = left_out ? V{} : gi, q = left_out ? V{} : load(p_ + i);
        pg += q * t;
        p += q;
        g += t;
        pp += q * q;
        gg += t * t;
        ppg += q * q * t;
      }
      const V sums[] = {pg, p, g, pp, gg, ppg};
      for (int column = kPG; column <= kPPG; ++column) sums_.add(c, column, sums[column]);
    }
    if (in_.pixel) {
      const V gamma = broadcast<A>(A(in_.gamma));
      const bool negatives = in_.activation != Activation::kSoftmax;
      V pos{}, neg{}, wg{}, w{};
      with_gamma(in_.gamma, [&](auto tag) {
        for (int64_t i = 0; i < padded; i += kLane) {
          const V gi = load(stage_.g + i), p = load(p_ + i), rest = load(rest_ + i);
          const auto left_out = gi == out;
          const V t = left_out ? V{} : gi, wi = left_out ? V{} : load(stage_.weight + i);
          const V no = left_out ? V{} : A(1) - gi;
          pos += product<A>(wi * t, power<tag.value, A>(rest, gamma) * load(log_p_ + i));
          if (negatives) neg += product<A>(wi * no, power<tag.value, A>(p, gamma) * load(log_rest_ + i));
          wg += wi * t;
          w += wi;
        }
      });
      sums_.add(c, kPos, pos);
      sums_.add(c, kNeg, neg);
      sums_.add(c, kWG, wg);
      sums_.add(c, kW, w);
    }
    if (in_.smoothing) {
      V nll{};
      for (int64_t i = 0; i < padded; i += kLane) {
        const V term = load(stage_.weight + i) * load(log_p_ + i);
        nll += load(stage_.g + i) == out ? V{} : term;
      }
      sums_.add(c, kNll, nll);
    }
  }

  // --- Backward

  // With p_t, h = p_t (of_pg + of_ppg p_t) of the label's class and k = w of_pos q + w sum(of_nll):
  //   dz_c = p_c (of_p + of_pp p_c - D) - w of_nll + [c = t] (h - w of_pos q),  D = sum_c p_c (of_p + of_pp p_c) + h - k.
  void label_softmax_backward(void* to) {
    softmax();
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
    if (in_.region) {
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
      const A* e = exps_ + c * step;
      A* row = stage_.row_of_result(to, c, exps_ + c * step);
      const V own = broadcast<A>(A(c)), a = broadcast<A>(of_p_[c]), b = broadcast<A>(of_pp_[c]);
      const V n = broadcast<A>(of_nll_[c]);
      for (int64_t i = 0; i < padded; i += kLane) {
        const V p = load(e + i);
        V factor = load(shared_ + i);
        if (in_.region) factor += a + b * p;
        V dz = p * factor + (load(stage_.label + i) == own ? load(delta_ + i) : V{});
        if (in_.smoothing) dz -= load(stage_.weight + i) * n;
        store(row + i, dz);
      }
      stage_.write(row, to, c);
    }
    stage_.write_all(exps_, to);
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
      const A* term = terms + c * step;
      A* row = stage_.row_of_result(to, c, terms + c * step);
      for (int64_t i = 0; i < padded; i += kLane)
        store(row + i, load(term + i) + load(e + i) * load(scale_ + i) * load(common + i));
      stage_.write(row, to, c);
    }
    stage_.write_all(terms, to);
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
      A* row = stage_.row_of_result(to, c, stage_.logits + c * stage_.step);
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
      stage_.write(row, to, c);
    }
    stage_.write_all(stage_.logits, to);
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
