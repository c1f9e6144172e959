// lovasz_statistics for one CPU target (Berman, Triki, Blaschko 2018, algorithm 1).
//
// A plane is one class of an image, or of all images. Its errors m are sorted from the largest; with i and u the
// intersection and union of prediction and target if all elements before the k-th were wrong, the Lovasz extension's
// k-th slope is
//   1 / u for an element of the class (which then leaves the intersection),
//   i / (u (u + 1)) for another (which then joins the union),
// so that sums of slopes are the Jaccard losses 1 - i / u. Elements without error change nothing and are left out,
// which is all that lies beyond the margin for hinge errors. A class without elements has the slope 1 at its largest
// error.
//
// Elements with a smaller error than all of the class are left out as well: the intersection is empty by then, so their
// slopes are 0. Where a prediction is any good, that leaves few to sort.
//
// Errors are not negative, so their bits sort as integers: a radix sort, 11 bits at a time, from the least significant
// digit. It is stable: among equal errors the first pixel comes first.
#pragma once

#include "loss/cpu_probabilities.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr uint32_t kForeground = 1u << 31, kFalling = 1u << 30;  // the error falls as p grows
constexpr uint32_t kPixelMask = kFalling - 1;

template <typename A>
struct Record;
template <>
struct Record<float> {
  uint32_t pixel, key;  // the key's bits are inverted: the largest error comes first
  static constexpr int kPasses = 3;
  static Record of(float error, uint32_t pixel) { return {pixel, ~bits_of(error)}; }
  float error() const { return float_of(~key); }
};
template <>
struct Record<double> {
  uint64_t key;
  uint32_t pixel;
  static constexpr int kPasses = 6;
  static Record of(double error, uint32_t pixel) {
    uint64_t bits;
    memcpy(&bits, &error, 8);
    return {~bits, pixel};
  }
  double error() const {
    const uint64_t bits = ~key;
    double e;
    memcpy(&e, &bits, 8);
    return e;
  }
};

// Maps of what softmax needs to know of a pixel: its largest logit and 1 / the sum of exponentials. Computed once,
// since classes are then looked at one by one.
template <typename A>
class Normaliser : Probabilities<A> {
 public:
  Normaliser(const SegmentationInput& input, void* workspace) : Probabilities<A>(input, workspace) {}
  static int64_t workspace(const SegmentationInput& in) { return Normaliser(in, nullptr).arena_.used(); }
  using Probabilities<A>::error;

  void run(int64_t unit, A* most, A* scale) {
    this->each_block(unit, [&] {
      this->softmax();
      const int64_t at = this->stage_.image * this->in_.pixels + this->stage_.first;
      for (int64_t i = 0; i < this->stage_.count; ++i) {
        most[at + i] = this->most_[i];
        scale[at + i] = A(1) / this->total_[i];
      }
    });
  }
};

template <typename A>
class Lovasz {
 public:
  using V = Vec<A>;
  using Item = Record<A>;
  static constexpr int64_t kLane = kLanes<A>;

  Lovasz(const SegmentationInput& input, bool per_image, bool hinge, const A* most, const A* scale, void* workspace)
      : in_(input),
        images_(per_image ? 1 : input.images),
        hinge_(hinge),
        most_(most),
        scale_(scale),
        arena_(workspace),
        stage_(input, arena_),
        counts_(arena_.take<uint32_t>(Item::kPasses * kDigits)),
        items_(arena_.take<Item>(elements() + Stage<A>::kPad)),
        other_(arena_.take<Item>(elements() + Stage<A>::kPad)) {}

  static int64_t workspace(const SegmentationInput& in, bool per_image) {
    return Lovasz(in, per_image, false, nullptr, nullptr, nullptr).arena_.used();
  }
  const LabelError& error() const { return stage_.error; }

  // Class c of images first..first + images_.
  double run(int64_t first, int64_t c, void* to) {
    memset(counts_, 0, sizeof(uint32_t) * Item::kPasses * kDigits);
    foreground_ = 0;
    least_ = A(__builtin_inf());
    most_error_ = A(0);
    errors_ = reinterpret_cast<A*>(other_);  // two numbers an element fit into a record
    codes_ = errors_ + elements() + Stage<A>::kPad;
    for (int64_t image = 0; image < images_; ++image)
      for (int64_t i = 0; i < in_.pixels; i += stage_.step) {
        stage_.begin(first + image, i, smaller(stage_.step, in_.pixels - i));
        collect(image, c);
      }
    select();
    sort();
    A* plane = reinterpret_cast<A*>(other_);  // a record is at least as large
    const double loss = slopes(plane);
    for (int64_t image = 0; image < images_; ++image)
      stage_.write_plane(plane + image * in_.pixels, static_cast<A*>(to), first + image, c);
    return loss;
  }

 private:
  const SegmentationInput& in_;
  const int64_t images_;
  const bool hinge_;
  const A *most_, *scale_;
  Arena arena_;
  Stage<A> stage_;
  uint32_t* counts_;  // [passes, kDigits]
  Item *items_, *other_;
  A *errors_ = nullptr,
    *codes_ = nullptr;                  // of the plane; a code is 1 for an element of the class, plus 2 where falling
  A least_ = A(0), most_error_ = A(0);  // the smallest error of the class, the largest of all
  int64_t used_ = 0, foreground_ = 0;

  int64_t elements() const { return images_ * in_.pixels; }

  void collect(int64_t image, int64_t c) {
    const A* z = stage_.load_class(c);
    stage_.load_target(c);
    const int64_t at = stage_.image * in_.pixels + stage_.first;
    const V out = broadcast<A>(kLeftOut<A>), half = broadcast<A>(A(0.5)), one = broadcast<A>(A(1));
    const V two = broadcast<A>(A(2)), infinity = broadcast<A>(A(__builtin_inf()));
    const bool softmax = in_.activation == Activation::kSoftmax, sigmoid = in_.activation == Activation::kSigmoid;
    A* errors = errors_ + image * in_.pixels + stage_.first;
    A* codes = codes_ + image * in_.pixels + stage_.first;
    V least = infinity, most{}, number{};
    for (int64_t i = 0; i < stage_.padded; i += kLane) {
      const V gi = load(stage_.g + i), x = load(z + i);
      const auto counts = gi != out, own = (gi >= half) & counts;
      const V g = own ? one : V{};
      V e, falling;
      if (hinge_) {
        e = one - x * (g + g - one);
        e = e <= V{} ? V{} : e;
        falling = own ? two : V{};
      } else {
        V p = x;
        if (softmax) p = exp_nonpositive(x - load(most_ + at + i)) * load(scale_ + at + i);
        if (sigmoid) p = sigmoid_of<A>(x).p;
        e = p < g ? g - p : p - g;
        falling = p < g ? two : V{};
      }
      e = counts ? e : V{};
      store(errors + i, e);
      store(codes + i, g + falling);
      const V of_class = own ? e : infinity;
      least = of_class < least ? of_class : least;
      most = most < e ? e : most;
      number += g;
    }
    for (int64_t lane = 0; lane < kLane; ++lane) {
      if (least[lane] < least_) least_ = least[lane];
      if (most_error_ < most[lane]) most_error_ = most[lane];
      foreground_ += int64_t(number[lane]);
    }
  }

  // The records of the elements whose slopes can be other than 0, and how often they have which digits.
  void select() {
    used_ = 0;
    const A least = foreground_ > 0 ? least_ : most_error_;
    const V bound = broadcast<A>(least);
    const int64_t n = elements();
    for (int64_t i = 0; i < n; i += kLane) {
      const V e = load(errors_ + i);
      // Not "at least": NaNs, which come first, stay.
      uint32_t lanes = lane_bits<A>(~(e < bound) & (e != V{}));
      if (n - i < kLane) lanes &= (1u << (n - i)) - 1;
      for (; lanes != 0; lanes &= lanes - 1) {
        const int64_t at = i + __builtin_ctz(lanes);
        const int code = int(codes_[at]);
        const Item item = Item::of(__builtin_fabs(errors_[at]),
                                   uint32_t(at) | (code & 1 ? kForeground : 0) | (code & 2 ? kFalling : 0));
        items_[used_++] = item;
        for (int pass = 0; pass < Item::kPasses; ++pass) ++counts_[pass * kDigits + digit(item, pass)];
      }
    }
  }

  static uint32_t digit(const Item& item, int pass) { return uint32_t(item.key >> (pass * kDigitBits)) % kDigits; }

  void sort() {
    for (int pass = 0; pass < Item::kPasses; ++pass) {
      uint32_t* place = counts_ + pass * kDigits;
      if (used_ > 0 && place[digit(items_[0], pass)] == used_) continue;  // all have this digit
      uint32_t total = 0;
      for (int d = 0; d < kDigits; ++d) {
        const uint32_t count = place[d];
        place[d] = total;
        total += count;
      }
      for (int64_t i = 0; i < used_; ++i) other_[place[digit(items_[i], pass)]++] = items_[i];
      Item* sorted = other_;
      other_ = items_;
      items_ = sorted;
    }
  }

  double slopes(A* plane) const {
    memset(plane, 0, sizeof(A) * images_ * in_.pixels);
    double loss = 0;
    int64_t within = foreground_, joined = foreground_;  // intersection and union
    for (int64_t k = 0; k < used_; ++k) {
      const Item item = items_[k];
      const bool yes = item.pixel & kForeground;
      const A u = A(joined);
      const A slope = yes ? A(1) / u : joined > 0 ? A(within) / (u * (u + A(1))) : A(1);
      within -= yes;
      joined += !yes;
      loss += double(item.error()) * double(slope);
      plane[item.pixel & kPixelMask] = item.pixel & kFalling ? -slope : slope;
    }
    return loss;
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
