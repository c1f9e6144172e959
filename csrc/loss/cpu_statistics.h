// segmentation_statistics for one CPU target. Sums of a block are vectors of what is computed in, those of a unit and
// of an image doubles, always in the same order. With labels only the label's class has anything but p and p^2 to add
// up: its terms are computed once for each pixel and added to that class.
#pragma once

#include "loss/cpu_probabilities.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kSumLanes = kLanes<double>;
constexpr int64_t kComparedClasses = 32;  // up to which labels are compared with every class

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
class Statistics : Probabilities<A> {
  using Base = Probabilities<A>;
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;
  using Base::arena_;
  using Base::delta_;
  using Base::each_block;
  using Base::elementwise_row;
  using Base::exps_;
  using Base::in_;
  using Base::keep_log_sums;
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
  Statistics(const SegmentationInput& input, void* workspace) : Base(input, workspace), sums_(input, arena_) {}

  static int64_t workspace(const SegmentationInput& in) { return Statistics(in, nullptr).arena_.used(); }
  using Base::error;

  // partial: [classes, kStatistics] of one unit.
  void run(int64_t unit, double* partial) {
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

 private:
  UnitSums sums_;

  void label_softmax_statistics() {
    const bool done = !in_.smoothing && (in_.region ? this->template softmax_of_labels<true>()
                                                    : this->template softmax_of_labels<false>());
    if (!done) softmax();
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
    keep_log_sums(shared_);
    if (in_.classes <= kComparedClasses) {
      if (in_.region && in_.pixel) compare_labels<true, true>();
      if (in_.region && !in_.pixel) compare_labels<true, false>();
      if (!in_.region && in_.pixel) compare_labels<false, true>();
    } else {
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
      }
    }
    if (in_.pixel) sums_.add(0, kW, weights);
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

  // What the label's class adds up, for few classes: a comparison for each class costs less than a step for each pixel.
  template <bool kRegion, bool kPixel>
  void compare_labels() {
    const V one = broadcast<A>(A(1));
    for (int64_t c = 0; c < in_.classes; ++c) {
      const A* e = exps_ + c * stage_.step;
      const V class_ = broadcast<A>(A(c));
      V sum{}, square{}, own_sum{}, own_square{}, number{}, pos{}, weights{};
      for (int64_t i = 0; i < stage_.padded; i += kLane) {
        const auto own = load(stage_.label + i) == class_;
        if constexpr (kRegion) {
          const V p = load(e + i) * load(scale_ + i), own_p = own ? p : V{};
          sum += p;
          square += p * p;
          own_sum += own_p;
          own_square += own_p * own_p;
          number += own ? one : V{};
        }
        if constexpr (kPixel) {
          pos += own ? load(delta_ + i) : V{};
          weights += own ? load(stage_.weight + i) : V{};
        }
      }
      if constexpr (kRegion) {
        sums_.add(c, kP, sum);
        sums_.add(c, kPP, square);
        sums_.add(c, kPG, own_sum);
        sums_.add(c, kPPG, own_square);
        sums_.add(c, kG, number);
        sums_.add(c, kGG, number);
      }
      if constexpr (kPixel) {
        sums_.add(c, kPos, pos);
        sums_.add(c, kWG, weights);
      }
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
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
