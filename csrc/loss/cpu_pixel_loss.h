// pixel_cross_entropy for one CPU target: the loss of every pixel (softmax) or element.
#pragma once

#include "loss/cpu_probabilities.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename A>
class PixelLoss : Probabilities<A> {
  using Base = Probabilities<A>;
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;
  static constexpr Element kType = sizeof(A) == 8 ? Element::kDouble : Element::kFloat;
  using Base::arena_;
  using Base::delta_;
  using Base::each_block;
  using Base::elementwise_row;
  using Base::in_;
  using Base::keep_log_sums;
  using Base::log_p_;
  using Base::log_rest_;
  using Base::most_;
  using Base::normalise;
  using Base::own_;
  using Base::p_;
  using Base::rest_;
  using Base::shared_;
  using Base::softmax;
  using Base::softmax_row;
  using Base::stage_;
  using Base::total_;

 public:
  PixelLoss(const SegmentationInput& input, void* workspace) : Base(input, workspace) {
    this->take(in_.classes + 1, of_pos_, of_neg_, of_nll_);
  }

  static int64_t workspace(const SegmentationInput& in) { return PixelLoss(in, nullptr).arena_.used(); }
  using Base::error;

  // factors: [classes, kStatistics], what the terms POS, NEG and NLL are multiplied with.
  void run(int64_t unit, const double* factors, void* to) {
    A total_of_nll = A(0);
    for (int64_t c = 0; c < in_.classes; ++c) {
      of_pos_[c] = A(factors[c * kStatistics + kPos]);
      of_neg_[c] = A(factors[c * kStatistics + kNeg]);
      of_nll_[c] = A(factors[c * kStatistics + kNll]);
      total_of_nll += of_nll_[c];
    }
    of_pos_[in_.classes] = A(0);
    each_block(unit, [&] {
      if (in_.activation != Activation::kSoftmax) return elementwise(to);
      if (in_.dense) {
        dense_softmax();
      } else {
        label_softmax(total_of_nll);
      }
      A* pixels = static_cast<A*>(to) + stage_.image * in_.pixels + stage_.first;
      for (int64_t i = 0; i < stage_.count; ++i) pixels[i] = delta_[i];
    });
  }

 private:
  A *of_pos_, *of_neg_, *of_nll_;

  void label_softmax(A total_of_nll) {
    if (in_.smoothing || !this->template softmax_of_labels<false>()) softmax();
    const V none = broadcast<A>(stage_.limit()), gamma = broadcast<A>(A(in_.gamma));
    for (int64_t i = 0; i < stage_.padded; ++i) rest_[i] = of_pos_[stage_.index[i]];
    with_gamma(in_.gamma, [&](auto tag) {
      for (int64_t i = 0; i < stage_.padded; i += kLane) {
        const V s = load(total_ + i), d = load(own_ + i) - load(most_ + i);
        const V log_s = log(s), log_p = log_s - d;
        store(shared_ + i, log_s);
        V loss = log_p;
        if constexpr (tag.value != Gamma::kZero) {
          const V p = exp_nonpositive(d) / s;
          loss = loss * power<tag.value, A>(one_minus<A>(p, log_p), gamma);
        }
        loss = loss * load(rest_ + i);
        if (in_.smoothing) loss += log_s * total_of_nll;
        store(delta_ + i, load(stage_.label + i) == none ? V{} : loss);
      }
    });
    keep_log_sums(shared_);
    if (!in_.smoothing) return;
    for (int64_t c = 0; c < in_.classes; ++c) {
      const A* d = stage_.logits + c * stage_.step;
      for (int64_t i = 0; i < stage_.padded; i += kLane) {
        const V loss = load(delta_ + i) - load(d + i) * of_nll_[c];
        store(delta_ + i, load(stage_.label + i) == none ? V{} : loss);
      }
    }
  }

  void dense_softmax() {
    softmax();
    normalise();
    const V out = broadcast<A>(kLeftOut<A>), gamma = broadcast<A>(A(in_.gamma));
    for (int64_t i = 0; i < stage_.padded; i += kLane) store(delta_ + i, V{});
    for (int64_t c = 0; c < in_.classes; ++c) {
      softmax_row(c);
      stage_.load_target(c);
      with_gamma(in_.gamma, [&](auto tag) {
        for (int64_t i = 0; i < stage_.padded; i += kLane) {
          const V g = load(stage_.g + i);
          const V share = g == out ? V{} : g * of_pos_[c];
          const V term = product<A>(share, power<tag.value, A>(load(rest_ + i), gamma) * load(log_p_ + i));
          store(delta_ + i, load(delta_ + i) + term);
        }
      });
    }
  }

  void elementwise(void* to) {
    if (in_.logits.channels_last) stage_.load_all_logits();
    const V out = broadcast<A>(kLeftOut<A>), gamma = broadcast<A>(A(in_.gamma));
    for (int64_t c = 0; c < in_.classes; ++c) {
      elementwise_row(c);
      stage_.load_target(c);
      A* row = stage_.row_of_result(to, kType, c, stage_.logits + c * stage_.step);
      with_gamma(in_.gamma, [&](auto tag) {
        for (int64_t i = 0; i < stage_.padded; i += kLane) {
          const V g = load(stage_.g + i);
          const V pos = product<A>(g * of_pos_[c], power<tag.value, A>(load(rest_ + i), gamma) * load(log_p_ + i));
          const V neg =
              product<A>((A(1) - g) * of_neg_[c], power<tag.value, A>(load(p_ + i), gamma) * load(log_rest_ + i));
          store(row + i, g == out ? V{} : pos + neg);
        }
      });
      stage_.write(row, to, kType, c);
    }
    stage_.write_all(stage_.logits, to, kType);
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
