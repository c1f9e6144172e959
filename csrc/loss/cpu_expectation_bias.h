// The biases of one image that give each class its share, for one CPU target: margins and their selection
// (expectation_labels_math.h says what they are).
//
// A class whose bias may have to rise: (1) its margins go to a row of scratch, and those up to its present bias are
// counted; where they are enough, that is all. (2) Margins that are larger, and so positive, compare as the integers of
// their bits: the k-th smallest is found digit by digit, the first one by a histogram of all of them, the others among
// the few that agree so far, most vectors of which are passed over by one comparison. (3) The next larger margin.
#pragma once

#include "common/cpu_convert.h"
#include "loss/cpu_stage.h"
#include "loss/expectation_labels_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename A>
struct Bits;
template <>
struct Bits<float> {
  using Integer = int32_t;
};
template <>
struct Bits<double> {
  using Integer = int64_t;
};
template <typename A>
using Integer = typename Bits<A>::Integer;
template <typename A>
using IntegerVec = decltype(Vec<A>{} < Vec<A>{});

template <typename A>
inline A infinity() {
  return A(__builtin_inf());
}

constexpr int kDigitBits = 11;
constexpr int64_t kBins = 1 << kDigitBits, kNoBin = kBins;  // and where margins go that do not take part
template <typename A>
constexpr int kLeadingShift = 8 * int(sizeof(A)) - 1 - kDigitBits;  // of the first digit, below the sign
constexpr int64_t kCopies = 4;      // histograms that take turns: neighbours mostly have the same digit
constexpr int64_t kBinBlock = 512;  // margins whose digits are found before they are counted

template <typename A>
struct BiasScratch {
  int64_t step;      // from one row to the next
  A* scores;         // [competing, step]: NaN is +inf here; pixels that do not count, and padding, are -inf
  A* margins;        // [step]
  uint32_t* counts;  // [kCopies, kBins + 1]
  Integer<A>* bins;  // [kBinBlock]

  BiasScratch(int64_t competing, int64_t pixels, Arena& arena)
      : step(round_up(pixels, 2 * kLanes<A>)),
        scores(arena.take<A>(competing * step)),
        margins(arena.take<A>(step)),
        counts(arena.take<uint32_t>(pixels > 0 ? kCopies * (kBins + 1) : 0)),
        bins(arena.take<Integer<A>>(pixels > 0 ? kBinBlock : 0)) {}
  A* row(int64_t i) const { return scores + i * step; }
};

template <typename A, typename T>
void fill_row(const BiasScratch<A>& s, int64_t i, const T* from, int64_t pixel_stride, const uint8_t* valid,
              int64_t pixels) {
  A* row = s.row(i);
  if (pixel_stride == 1) {
    convert_run(from, row, pixels);
  } else {
    for (int64_t p = 0; p < pixels; ++p) row[p] = A(widen(from[p * pixel_stride]));
  }
  for (int64_t p = pixels; p < s.step; ++p) row[p] = -infinity<A>();
  for (int64_t p = 0; p < pixels; ++p) row[p] = row[p] == row[p] ? row[p] : infinity<A>();
  if (valid)
    for (int64_t p = 0; p < pixels; ++p) row[p] = valid[p] ? row[p] : -infinity<A>();
}

// Row `own`'s margins against the other rows; how many are up to its bias.
template <typename A>
int64_t find_margins(const BiasScratch<A>& s, int64_t count, int64_t own, const A* bias) {
  using Int = IntegerVec<A>;
  const Vec<A> limit = broadcast(bias[own]);
  Int won{};
  for (int64_t i = 0; i < s.step; i += kLanes<A>) {
    Vec<A> best = broadcast(-infinity<A>());
    for (int64_t o = 0; o < count; ++o) {
      if (o == own) continue;
      const Vec<A> score = load(s.row(o) + i) + bias[o];
      best = best < score ? score : best;
    }
    const Vec<A> f = load(s.row(own) + i);
    const Int bits = (Int)(best + A(0));  // -0 becomes 0, whose successor is the next of the integers
    const Vec<A> least = (Vec<A>)(bits + (bits >= 0 ? Int{} + 1 : Int{} - 1));
    const Vec<A> t = least - f;
    // Where t <= 0 the pixel is won as it is, whatever the rounding, and the next of the integers would be smaller.
    const Vec<A> margin = (Vec<A>)((Int)t - ((f + t < least) & (t > A(0))));  // a comparison that holds is -1
    won -= margin <= limit;
    store(s.margins + i, margin);
  }
  int64_t sum = 0;
  for (int64_t lane = 0; lane < kLanes<A>; ++lane) sum += won[lane];
  return sum;
}

// The bin of the element of rank `rank` (from 1 on, and made one within the bin); all elements up to it at most.
inline int64_t find_bin(const uint32_t* counts, int64_t* rank) {
  int64_t bin = 0;
  while (*rank > counts[bin]) *rank -= counts[bin++];
  return bin;
}

// Counts the leading digits of margins in (above, inf) into counts[0..kBins - 1]; how many there are.
template <typename A>
int64_t count_leading_digits(const BiasScratch<A>& s, A above) {
  using Int = IntegerVec<A>;
  for (int64_t i = 0; i < kCopies * (kBins + 1); ++i) s.counts[i] = 0;
  for (int64_t first = 0; first < s.step; first += kBinBlock) {
    const int64_t size = smaller(kBinBlock, s.step - first);  // a multiple of two vectors, so of kCopies
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      const Vec<A> t = load(s.margins + first + i);
      const Int taken = (t > above) & (t < infinity<A>());
      *reinterpret_cast<Int*>(s.bins + i) = taken ? (Int)t >> kLeadingShift<A> : Int{} + Integer<A>(kNoBin);
    }
    for (int64_t i = 0; i < size; i += kCopies)
      for (int64_t k = 0; k < kCopies; ++k) ++s.counts[k * (kBins + 1) + s.bins[i + k]];
  }
  int64_t total = 0;
  for (int64_t bin = 0; bin < kBins; ++bin) {
    for (int64_t k = 1; k < kCopies; ++k) s.counts[bin] += s.counts[k * (kBins + 1) + bin];
    total += s.counts[bin];
  }
  return total;
}

// Counts the next digit of margins above `above` whose bits from `shift + digit` on are `prefix`.
template <typename A>
void count_next_digits(const BiasScratch<A>& s, A above, Integer<A> prefix, int shift, int digit) {
  using Int = IntegerVec<A>;
  for (int64_t bin = 0; bin < kBins; ++bin) s.counts[bin] = 0;
  for (int64_t i = 0; i < s.step; i += kLanes<A>) {
    const Vec<A> t = load(s.margins + i);
    const Int agrees = ((Int)t >> (shift + digit)) == prefix;
    for (uint32_t lanes = lane_bits<A>(agrees & (t > above)); lanes != 0; lanes &= lanes - 1) {
      Integer<A> bits;
      memcpy(&bits, s.margins + i + __builtin_ctz(lanes), sizeof bits);
      ++s.counts[bits >> shift & ((Integer<A>(1) << digit) - 1)];
    }
  }
}

// The bias with which row margins' class wins in `missing` more pixels than with the bias `now`: in as many as there
// are if those are fewer.
template <typename A>
A raised_bias(const BiasScratch<A>& s, A now, int64_t missing) {
  const int64_t total = count_leading_digits(s, now);
  if (total == 0) return now;
  int64_t rank = smaller(missing, total);
  Integer<A> prefix = Integer<A>(find_bin(s.counts, &rank));
  for (int shift = kLeadingShift<A>; shift > 0;) {
    const int digit = smaller(shift, kDigitBits);
    shift -= digit;
    count_next_digits(s, now, prefix, shift, digit);
    prefix = Integer<A>(prefix << digit | find_bin(s.counts, &rank));
  }
  A margin;
  memcpy(&margin, &prefix, sizeof margin);
  Vec<A> next = broadcast(infinity<A>());
  for (int64_t i = 0; i < s.step; i += kLanes<A>) {
    const Vec<A> t = load(s.margins + i);
    next = (t > margin) & (t < next) ? t : next;
  }
  A least = infinity<A>();
  for (int64_t lane = 0; lane < kLanes<A>; ++lane) least = smaller<A>(least, next[lane]);
  return loss::bias_between(margin, least);
}

// Rounds over the classes in ascending order, the background first, until all have their quotas or `sweeps` are over.
template <typename A, typename Quota>
void raise_biases(const BiasScratch<A>& s, int64_t count, const Quota& quota, int64_t sweeps, A* bias) {
  bool changed = count > 1;
  for (int64_t sweep = 0; sweep < sweeps && changed; ++sweep) {
    changed = false;
    for (int64_t i = 0; i < count; ++i) {
      if (quota(i) == 0) continue;
      const int64_t missing = quota(i) - find_margins(s, count, i, bias);
      if (missing <= 0) continue;
      const A raised = raised_bias(s, bias[i], missing);
      changed |= raised > bias[i];
      bias[i] = raised;
    }
  }
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
