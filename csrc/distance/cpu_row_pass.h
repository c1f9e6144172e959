// The first pass: how far is, along its row, the nearest source of every element.
#pragma once

#include "distance/cpu_lanes.h"
#include "distance/distance_transform_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

using distance::Mode;

// Calls f(E{}) with the unsigned integer type of the input's elements: only their bits are looked at.
template <typename F>
inline __attribute__((always_inline)) void by_element(int bytes, const F& f) {
  switch (bytes) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

template <typename E>
inline bool is_zero(E element, bool floating) {
  if constexpr (sizeof(E) == 1) return element == 0;
  return static_cast<E>(element << static_cast<int>(floating)) == 0;
}

// One element's bits.
inline uint64_t element_at(const DistanceArgs& a, int64_t at) {
  uint64_t bits = 0;
  by_element(a.element_bytes, [&](auto e) { bits = static_cast<const decltype(e)*>(a.input)[at]; });
  return bits;
}

inline bool zero_at(const DistanceArgs& a, int64_t at) {
  bool zero = false;
  by_element(a.element_bytes,
             [&](auto e) { zero = is_zero(static_cast<const decltype(e)*>(a.input)[at], a.floating); });
  return zero;
}

// Whether two elements are on different sides: other labels, or in the signed mode not both zero or both not.
inline bool differ_at(const DistanceArgs& a, int64_t at, int64_t other) {
  if (a.mode == Mode::kSigned) return zero_at(a, at) != zero_at(a, other);
  return element_at(a, at) != element_at(a, other);
}

// result[i] = whether rows p and q differ at i, as 1 or 0, minus `less`. Inlined where the count is a constant.
template <typename R>
inline __attribute__((always_inline)) void compare_rows(const DistanceArgs& a, int64_t p, int64_t q, int64_t count,
                                                        R less, R* __restrict result) {
  by_element(a.element_bytes, [&](auto e) __attribute__((always_inline)) {
    using E = decltype(e);
    const E *x = static_cast<const E*>(a.input) + p, *y = static_cast<const E*>(a.input) + q;
    if (a.mode == Mode::kSigned) {
      const bool floating = a.floating;
      for (int64_t i = 0; i < count; ++i)
        result[i] = static_cast<R>((is_zero(x[i], floating) != is_zero(y[i], floating)) - less);
    } else {
      for (int64_t i = 0; i < count; ++i) result[i] = static_cast<R>((x[i] != y[i]) - less);
    }
  });
}

// Makes what lies outside negative (signed) or zero (objects).
template <typename Out>
inline void finish_row(const DistanceArgs& a, int64_t at, int64_t count, Out* out) {
  if (a.mode != Mode::kSigned && a.mode != Mode::kObjects) return;
  by_element(a.element_bytes, [&](auto e) {
    using E = decltype(e);
    const E* x = static_cast<const E*>(a.input) + at;
    const bool floating = a.floating;
    if (a.mode == Mode::kSigned) {
      for (int64_t i = 0; i < count; ++i) out[i] = is_zero(x[i], floating) ? -out[i] : out[i];
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = is_zero(x[i], floating) ? Out(0) : out[i];
    }
  });
}

constexpr int64_t kRowUnit = 64;  // rows of scratch are that many elements long, or a multiple

inline int64_t row_stride(int64_t w) { return round_up(w, kRowUnit); }

// G: an unsigned type above the width by more than 1; its largest value means that the row has no source.
template <typename G>
constexpr G kNoSource = static_cast<G>(~G(0));

template <typename G>
class RowPass {
 public:
  static int64_t workspace(int64_t w) { return row_stride(w) * (1 + static_cast<int64_t>(sizeof(G))) + kRowUnit; }

  RowPass(const DistanceArgs& a, void* workspace)
      : a_(a),
        stride_(row_stride(a.w)),
        left_(static_cast<G*>(workspace)),
        flags_(static_cast<uint8_t*>(workspace) + stride_ * static_cast<int64_t>(sizeof(G))) {
    for (int64_t i = 0; i < stride_ + kRowUnit; ++i) flags_[i] = 0;
  }

  // Row number `row` of all, counted over images and planes, to g [stride].
  void run(int64_t row, G* g) {
    if (distance::compares_labels(a_.mode)) {  // the source lies one beyond the first or last element of a run
      compare_rows<uint8_t>(a_, row * a_.w + 1, row * a_.w, a_.w - 1, 0, flags_ + 1);
      fill(flags_, flags_ + 1, 1, g);
    } else {
      by_element(a_.element_bytes, [&](auto e) {
        using E = decltype(e);
        const E* x = static_cast<const E*>(a_.input) + row * a_.w;
        uint8_t* __restrict flags = flags_;
        const bool floating = a_.floating;
        const int64_t w = a_.w;
        for (int64_t i = 0; i < w; ++i) flags[i] = is_zero(x[i], floating);
      });
      fill(flags_, flags_, 0, g);
    }
  }

 private:
  static constexpr int kCount = kLaneCount<G>;
  using V = Lanes<G>;
  using Sequence = std::make_integer_sequence<int, kCount>;

  template <int... I>
  static V numbers(std::integer_sequence<int, I...>) {
    return V{static_cast<G>(I)...};
  }

  // Numbers where the flag is set, else 0.
  static V marked(const uint8_t* flags, V numbers) {
    typedef uint8_t Bytes __attribute__((vector_size(kCount)));
    Bytes bytes;
    __builtin_memcpy(&bytes, flags, kCount);
    return numbers & (V{} - __builtin_convertvector(bytes, V));
  }

  // Sources `beyond` after the nearest flag of `before` at or before x, or of `after` at or after x.
  void fill(const uint8_t* before, const uint8_t* after, G beyond, G* g) {
    const V iota = numbers(Sequence{});
    V carry{};
    for (int64_t x = 0; x < stride_; x += kCount) {  // the last flag's position + 1
      V v = running_max_up<G>(marked(before + x, iota + static_cast<G>(x + 1)));
      v = lanes_max(v, carry);
      carry = one_lane<kCount - 1>(v, Sequence{});
      store_lanes(left_ + x, v);
    }
    carry = V{};
    for (int64_t x = stride_ - kCount; x >= 0; x -= kCount) {  // stride - the next flag's position
      const V to_end = static_cast<G>(stride_ - x) - iota;
      V v = running_max_down<G>(marked(after + x, to_end));
      v = lanes_max(v, carry);
      carry = one_lane<0>(v, Sequence{});
      const V l = load_lanes(left_ + x), none = all_lanes<G>(kNoSource<G>);
      const V from_left = l == 0 ? none : iota + static_cast<G>(x + 1 + beyond) - l;
      const V from_right = v == 0 ? none : to_end - v + beyond;
      store_lanes(g + x, lanes_min(from_left, from_right));
    }
  }

  const DistanceArgs& a_;
  const int64_t stride_;
  G* left_;         // [stride]
  uint8_t* flags_;  // [stride + kRowUnit], zero beyond the width
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
