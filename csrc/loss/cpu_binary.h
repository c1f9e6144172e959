// segmentation_statistics and its backward pass where one channel has labels 0 and 1, for one CPU target: the usual
// binary problem, in which a pixel is so little work that passes over a block in the scratch would cost more than it.
//
// A pixel goes from its logit and label to the sums, or to its gradient, in registers: every tensor is read or written
// once. int64 labels are read as they are; those of other dtypes, and what is left behind the last whole vector, become
// codes in the scratch first. Blocks, units and the order of sums are those of cpu_statistics.h.
#pragma once

#include "loss/cpu_statistics.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

inline bool has_binary_labels(const SegmentationInput& in) {
  return in.classes == 1 && in.activation == Activation::kSigmoid && !in.dense && !in.smoothing &&
         in.weight.data == nullptr && in.target_scale == 1 && in.target_shift == 0;
}

// What vectors of A compare to: a pixel's code is its label, or kOut where it is left out.
template <typename A>
using Code = decltype(Vec<A>{} < Vec<A>{});
constexpr int kOut = 2;

template <bool kIs>
struct BoolTag {
  static constexpr bool value = kIs;
};

typedef int64_t WideLabels __attribute__((vector_size(kVectorBytes)));

inline WideLabels load_labels(const int64_t* from) {
  WideLabels labels;
  memcpy(&labels, from, sizeof labels);
  return labels;
}

// The low words of one vector after those of the other.
inline VecInt low_words(WideLabels first, WideLabels second) {
  VecInt even;
  for (int i = 0; i < kLanes<float>; ++i) even[i] = 2 * i;
  return __builtin_shuffle((VecInt)first, (VecInt)second, even);
}

template <typename A>
class BinaryPixels {
 public:
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;
  const LabelError& error() const { return error_; }

 protected:
  using C = Code<A>;
  using Int = __typeof__(C{}[0] + 0);

  const SegmentationInput& in_;
  Arena arena_;
  A* scratch_;  // [kMostPixels]: logits of another dtype, gradients of such

  BinaryPixels(const SegmentationInput& input, void* workspace)
      : in_(input),
        arena_(workspace),
        scratch_(arena_.take<A>(kMostPixels)),
        codes_(arena_.take<Int>(kMostPixels + kLane)) {}

  // Calls block(image, first, count) for the blocks of a unit.
  template <typename F>
  void each_block(int64_t unit, const F& block) {
    const int64_t units = units_of_image(in_), image = unit / units;
    const int64_t begin = unit % units * kUnitPixels, end = smaller(begin + kUnitPixels, in_.pixels);
    unknown_ = WideLabels{};
    for (int64_t first = begin; first < end; first += kMostPixels)
      block(image, first, smaller(kMostPixels, end - first));
    bool any = false;
    for (int lane = 0; lane < kLanes<double>; ++lane) any |= unknown_[lane] != 0;
    if (!any) return;
    const int64_t* labels = static_cast<const int64_t*>(in_.target.data) + image * in_.pixels;
    for (int64_t i = begin; i < end; ++i) code_of(labels[i]);
  }

  // Calls f(masked, i, n, logits, codes) for the block's vectors: n pixels from its i-th; none is left out where the
  // tag `masked` is false.
  template <typename F>
  void each_vector(int64_t image, int64_t first, int64_t count, const F& f) {
    const int64_t at = image * in_.pixels + first;
    const A* z = logits(at, count);
    int64_t i = 0;
    if (in_.target.type == Element::kInt64) {
      const int64_t* labels = static_cast<const int64_t*>(in_.target.data) + at;
      if (in_.has_ignore) {
        for (; i + kLane <= count; i += kLane) {
          prefetch(z + i, labels + i);
          f(BoolTag<true>{}, i, kLane, load(z + i), codes<true>(labels + i));
        }
      } else {
        for (; i + kLane <= count; i += kLane) {
          prefetch(z + i, labels + i);
          f(BoolTag<false>{}, i, kLane, load(z + i), codes<false>(labels + i));
        }
      }
    }
    if (i == count) return;
    with_type(in_.target.type, [&](auto from) {
      using T = typename Pointee<decltype(from)>::Type;
      if constexpr (!kIsFloat<T>) {  // labels of other dtypes have been refused
        const T* labels = static_cast<const T*>(in_.target.data) + at;
        for (int64_t k = i; k < count; ++k) codes_[k] = code_of(labels[k]);
      }
    });
    for (int64_t k = count; k < count + kLane; ++k) codes_[k] = kOut;
    for (; i < count; i += kLane) {
      const int64_t n = smaller(kLane, count - i);
      V x{};
      memcpy(&x, z + i, n * sizeof(A));
      C code;
      memcpy(&code, codes_ + i, sizeof code);
      f(BoolTag<true>{}, i, n, x, code);
    }
  }

 private:
  Int* codes_;            // [kMostPixels + kLane]
  WideLabels unknown_{};  // not zero where a label is neither in its range nor ignored
  LabelError error_{};

  const A* logits(int64_t at, int64_t count) {
    constexpr Element kOwn = sizeof(A) == 8 ? Element::kDouble : Element::kFloat;
    if (in_.logits.type == kOwn) return static_cast<const A*>(in_.logits.data) + at;
    with_type(in_.logits.type,
              [&](auto from) { convert_run(static_cast<decltype(from)>(in_.logits.data) + at, scratch_, count); });
    return scratch_;
  }

  // The processor's own prefetchers start anew on every page. 2048 pixels measured better than 256 to 1024.
  void prefetch(const A* z, const int64_t* labels) const {
    constexpr int64_t kAhead = 2048;
    __builtin_prefetch(z + kAhead, 0, 3);
    for (int64_t i = 0; i < kLane; i += kCacheLine / 8) __builtin_prefetch(labels + kAhead + i, 0, 3);
  }

  Int code_of(int64_t label) {
    if (in_.has_ignore && label == in_.ignore) return kOut;
    if (label == 0 || label == 1) return Int(label);
    if (!error_.found) error_ = {true, label};
    return kOut;
  }

  template <bool kIgnore>
  WideLabels known(WideLabels labels) {
    WideLabels unknown = labels & ~(WideLabels{} + 1);
    if constexpr (kIgnore) {
      const WideLabels ignored = labels == in_.ignore;
      unknown &= ~ignored;
      labels = ignored ? WideLabels{} + kOut : labels;
    }
    unknown_ |= unknown;
    return labels;
  }
  template <bool kIgnore>
  C codes(const int64_t* from) {
    if constexpr (sizeof(A) == 8) {
      return (C)known<kIgnore>(load_labels(from));
    } else {
      return low_words(known<kIgnore>(load_labels(from)), known<kIgnore>(load_labels(from + kLane / 2)));
    }
  }
};

// sigmoid(z), with logarithms where they are asked for.
template <bool kLogs, typename A>
inline Probability<A> binary_probability(Vec<A> z) {
  if constexpr (kLogs) return sigmoid_of<A>(z);
  return sigmoid_without_logs<A>(z);
}

template <typename A>
class BinaryStatistics : BinaryPixels<A> {
  using Base = BinaryPixels<A>;
  using V = Vec<A>;
  using C = Code<A>;
  using Base::arena_;
  using Base::each_block;
  using Base::each_vector;
  using Base::in_;

 public:
  BinaryStatistics(const SegmentationInput& input, void* workspace) : Base(input, workspace), sums_(input, arena_) {}
  static int64_t workspace(const SegmentationInput& in) { return BinaryStatistics(in, nullptr).arena_.used(); }
  using Base::error;

  // partial: [kStatistics] of one unit.
  void run(int64_t unit, double* partial) {
    sums_.clear();
    if (in_.pixel) {
      with_gamma(in_.gamma, [&](auto tag) {
        if (in_.region) {
          add_unit<true, true, tag.value>(unit);
        } else {
          add_unit<false, true, tag.value>(unit);
        }
      });
    } else if (in_.region) {
      add_unit<true, false, Gamma::kZero>(unit);
    }
    sums_.finish(partial);
  }

 private:
  UnitSums sums_;

  template <bool kRegion, bool kPixel, Gamma kGamma>
  void add_unit(int64_t unit) {
    const V one = broadcast<A>(A(1)), gamma = broadcast<A>(A(in_.gamma));
    each_block(unit, [&](int64_t image, int64_t first, int64_t count) {
      V pg{}, p{}, g{}, pp{}, ppg{}, pos{}, neg{}, w{};
      each_vector(image, first, count, [&](auto masked, int64_t, int64_t, V z, C code) {
        const Probability<A> x = binary_probability<kPixel, A>(z);
        const C yes = code == 1, out = code == kOut;
        g += yes ? one : V{};
        if constexpr (kRegion) {
          const V q = masked.value ? (out ? V{} : x.p) : x.p, own = yes ? q : V{};
          p += q;
          pp += q * q;
          pg += own;
          ppg += own * own;
        }
        if constexpr (kPixel) {
          const V base = yes ? x.rest : x.p, minus_log = yes ? x.log_p : x.log_rest;
          const V term = power<kGamma, A>(base, gamma) * minus_log;
          pos += yes ? term : V{};
          neg += code == 0 ? term : V{};
          w += out ? V{} : one;
        }
      });
      if constexpr (kRegion) {
        sums_.add(0, kPG, pg);
        sums_.add(0, kP, p);
        sums_.add(0, kG, g);
        sums_.add(0, kPP, pp);
        sums_.add(0, kGG, g);
        sums_.add(0, kPPG, ppg);
      }
      if constexpr (kPixel) {
        sums_.add(0, kPos, pos);
        sums_.add(0, kNeg, neg);
        sums_.add(0, kWG, g);
        sums_.add(0, kW, w);
      }
    });
  }
};

template <typename A>
class BinaryBackward : BinaryPixels<A> {
  using Base = BinaryPixels<A>;
  using V = Vec<A>;
  using C = Code<A>;
  static constexpr int64_t kLane = kLanes<A>;
  using Base::arena_;
  using Base::each_block;
  using Base::each_vector;
  using Base::in_;
  using Base::scratch_;

 public:
  BinaryBackward(const SegmentationInput& input, void* workspace) : Base(input, workspace) {}
  static int64_t workspace(const SegmentationInput& in) { return BinaryBackward(in, nullptr).arena_.used(); }
  using Base::error;

  // grad: [kStatistics] of the unit's image.
  void run(int64_t unit, const double* grad, void* to) {
    if (!in_.pixel) return write_unit<false, Gamma::kZero>(unit, grad, to);
    with_gamma(in_.gamma, [&](auto tag) { write_unit<true, tag.value>(unit, grad, to); });
  }

 private:
  template <bool kPixel, Gamma kGamma>
  void write_unit(int64_t unit, const double* grad, void* to) {
    constexpr Element kOwn = sizeof(A) == 8 ? Element::kDouble : Element::kFloat;
    constexpr int64_t kLargestCached = int64_t{4} << 20;
    const bool in_place = in_.logits.type == kOwn;
    each_block(unit, [&](int64_t image, int64_t first, int64_t count) {
      const int64_t at = image * in_.pixels + first;
      A* const row = in_place ? static_cast<A*>(to) + at : scratch_;
      const bool past_caches = in_place && reinterpret_cast<uintptr_t>(row) % kVectorBytes == 0 &&
                               in_.images * in_.pixels * int64_t(sizeof(A)) > kLargestCached;
      if (past_caches) {
        write_block<kPixel, kGamma>(image, first, count, grad, row, [](A* p, V dz) { stream(p, dz); });
      } else {
        write_block<kPixel, kGamma>(image, first, count, grad, row, [](A* p, V dz) { store(p, dz); });
      }
      if (in_place) return;
      with_type(in_.logits.type, [&](auto pointer) {
        using T = typename Pointee<decltype(pointer)>::Type;
        narrow_run(row, static_cast<T*>(to) + at, count);
      });
    });
  }

  template <bool kPixel, Gamma kGamma, typename Put>
  void write_block(int64_t image, int64_t first, int64_t count, const double* grad, A* row, const Put& put) {
    const bool region = in_.region;
    // dp = a + b p of a pixel of the background and of the foreground.
    const V a0 = broadcast<A>(region ? A(grad[kP]) : A(0)), b0 = broadcast<A>(region ? A(2 * grad[kPP]) : A(0));
    const V a1 = broadcast<A>(region ? A(grad[kP]) + A(grad[kPG]) : A(0));
    const V b1 = broadcast<A>(region ? A(2 * grad[kPP]) + A(2 * grad[kPPG]) : A(0));
    const V minus_pos = broadcast<A>(-A(grad[kPos])), of_neg = broadcast<A>(A(grad[kNeg]));
    const V gamma = broadcast<A>(A(in_.gamma));
    each_vector(image, first, count, [&](auto masked, int64_t i, int64_t n, V z, C code) {
      const Probability<A> x = binary_probability < kPixel && kGamma != Gamma::kZero, A > (z);
      const C yes = code == 1, out = code == kOut;
      V dz = ((yes ? a1 : a0) + (yes ? b1 : b0) * x.p) * (x.p * x.rest);
      if constexpr (kPixel) {
        const V base = yes ? x.rest : x.p;
        V slope = base;
        if constexpr (kGamma != Gamma::kZero) {
          const V other = yes ? x.p : x.rest, minus_log = yes ? x.log_p : x.log_rest;
          slope = power<kGamma, A>(base, gamma) * (base + gamma * product<A>(other, minus_log));
        }
        dz += (yes ? minus_pos : of_neg) * slope;
      }
      if constexpr (masked.value) dz = out ? V{} : dz;
      if (n == kLane) return put(row + i, dz);
      memcpy(row + i, &dz, n * sizeof(A));
    });
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
