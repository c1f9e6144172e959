// _hausdorff_dt for one CPU target (Karimi and Salcudean 2019, equations 8 and 9, alpha = 2), one image at a time.
//
// 1. Normalisers of the softmax and the predicted label of every pixel: p > 0.5 holds in one class at most.
// 2. Classes share an image out among themselves. So one transform of the labels, to the nearest pixel of another one,
//    is the distance inside of every class; another does the same for the predictions.
// 3. For each class the distances outside of it, of target and prediction together; then, in one pass over its pixels,
//    p, the loss and the error.
// Distances are squared. Sums: vectors within kBlock pixels, doubles across them, in the order of the pixels.
#pragma once

#include "distance/cpu_lanes.h"
#include "distance/distance_transform_cpu_kernel.h"
#include "loss/cpu_binary.h"
#include "loss/hausdorff_dt_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// What an image's pixels predict, and what their probabilities are made of.
template <typename A>
class Predictions : Probabilities<A> {
  using Base = Probabilities<A>;
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;
  using Base::in_;
  using Base::stage_;

 public:
  Predictions(const SegmentationInput& input, void* workspace) : Base(input, workspace) {}
  static int64_t workspace(const SegmentationInput& in) { return Predictions(in, nullptr).arena_.used(); }
  using Base::error;

  // A unit's share of its image's maps, [pixels] each.
  void run(int64_t unit, A* most, A* scale, uint8_t* labels, uint8_t* predicted) {
    this->each_block(unit, [&] {
      const int64_t first = stage_.first, count = stage_.count;
      const int32_t* __restrict index = stage_.index;  // bytes may alias anything else
      uint8_t* __restrict to = labels + first;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(index[i]);
      classes(most + first, scale + first, predicted + first);
    });
  }

 private:
  void classes(A* most, A* scale, uint8_t* predicted) {
    this->softmax();
    A* label = this->delta_;
    const V half = broadcast<A>(A(0.5)), one = broadcast<A>(A(1));
    for (int64_t i = 0; i < stage_.padded; i += kLane) {
      const V r = one / load(this->total_ + i);
      store(this->scale_ + i, r);
      V found = broadcast<A>(A(kNoClass));
      // Where a class has more than half, it alone has the largest logit.
      for (int64_t c = 0; c < in_.classes; ++c)
        found = load(this->exps_ + c * stage_.step + i) == one ? broadcast<A>(A(c)) : found;
      store(label + i, r > half ? found : broadcast<A>(A(kNoClass)));
    }
    const int64_t count = stage_.count;
    memcpy(most, this->most_, count * sizeof(A));
    memcpy(scale, this->scale_, count * sizeof(A));
    const A* __restrict from = label;
    uint8_t* __restrict to = predicted;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(static_cast<int32_t>(from[i]));
  }
};

template <typename A>
class Hausdorff {
  using V = Vec<A>;
  using C = Code<A>;
  static constexpr int64_t kLane = kLanes<A>;
  static constexpr int64_t kBlock = 1024;

 public:
  static int64_t workspace(const HausdorffInput& in, int64_t workers) {
    static const Workers none{};
    return Hausdorff(in, SegmentationRun{nullptr, nullptr, none}, workers).arena_.used();
  }

  Hausdorff(const HausdorffInput& input, const SegmentationRun& run) : Hausdorff(input, run, run.workers.count) {}

  void run(double* loss, A* error) {
    for (int64_t image = 0; image < in_.images; ++image) {
      predict(image);
      transform(distance::Mode::kLabels, labels_, inside_, 0, sides_);
      for (int64_t i = 0; i < sides_ * in_.pixels; ++i)
        inside_[i] = inside_[i] <= largest() ? inside_[i] : A(0);  // an image of one label
      mark_present();
      for (int64_t k = 0; k < input_.chosen; ++k) {
        const int64_t c = input_.classes[k], at = image * in_.classes + c;
        loss[at] = one_class(image, c, error + at * in_.pixels) / double(in_.pixels);
      }
    }
  }

 private:
  const HausdorffInput& input_;
  const SegmentationInput& in_;
  const SegmentationRun& run_;
  const int64_t sides_;  // target, and prediction
  const int64_t units_;
  Arena arena_;
  A *most_, *scale_;           // [pixels]
  uint8_t *labels_, *others_;  // [sides, pixels]: labels; whether they are others than a class's
  A *inside_, *outside_;       // [sides, pixels]
  double* partial_;            // [units]
  char* own_;                  // [workers, own_bytes_]
  const int64_t own_bytes_;
  char* for_transforms_;
  bool present_[2][256];

  Hausdorff(const HausdorffInput& input, const SegmentationRun& run, int64_t workers)
      : input_(input),
        in_(input.maps),
        run_(run),
        sides_(input.one_sided ? 1 : 2),
        units_(units_of_image(in_)),
        arena_(run.workspace),
        most_(arena_.take<A>(in_.pixels)),
        scale_(arena_.take<A>(in_.pixels)),
        labels_(arena_.take<uint8_t>(2 * in_.pixels)),
        others_(arena_.take<uint8_t>(2 * in_.pixels)),
        inside_(arena_.take<A>(sides_ * in_.pixels)),
        outside_(arena_.take<A>(sides_ * in_.pixels)),
        partial_(arena_.take<double>(units_)),
        own_(nullptr),
        own_bytes_(larger(Predictions<A>::workspace(in_), round_up(kBlock * int64_t(sizeof(A)), kCacheLine))) {
    own_ = arena_.take<char>(workers * own_bytes_);
    const auto bytes = [&](distance::Mode mode, int64_t images) {
      return distance_kernels.transform_workspace(transform_arguments(mode, nullptr, nullptr, images), workers);
    };
    int64_t most = 0;
    for (int64_t images = 1; images <= sides_; ++images)
      most = larger(most, larger(bytes(distance::Mode::kLabels, images), bytes(distance::Mode::kMask, images)));
    for_transforms_ = arena_.take<char>(most);
  }

  static A largest() { return sizeof(A) == 8 ? A(__DBL_MAX__) : A(__FLT_MAX__); }

  void predict(int64_t image) {
    for_each_part(run_.workers, units_, [&](int64_t worker, int64_t first, int64_t last) {
      Predictions<A> predictions(in_, own_ + worker * own_bytes_);
      for (int64_t unit = first; unit < last; ++unit)
        predictions.run(image * units_ + unit, most_, scale_, labels_, labels_ + in_.pixels);
      if (!run_.errors[worker].found) run_.errors[worker] = predictions.error();
    });
  }

  void mark_present() {
    memset(present_, 0, sizeof present_);
    for (int64_t side = 0; side < sides_; ++side)
      for (int64_t i = 0; i < in_.pixels; ++i) present_[side][labels_[side * in_.pixels + i]] = true;
  }

  DistanceArgs transform_arguments(distance::Mode mode, const uint8_t* from, A* to, int64_t images) const {
    return {.input = from,
            .element_bytes = 1,
            .floating = false,
            .mode = mode,
            .dims = input_.dims,
            .n = images,
            .d = input_.sizes[0],
            .h = input_.sizes[1],
            .w = input_.sizes[2],
            .spacing = {input_.spacing[0], input_.spacing[1], input_.spacing[2]},
            .squared = true,
            .float64 = sizeof(A) == 8,
            .output = to,
            .indices = nullptr};
  }

  // Of sides first .. last - 1.
  void transform(distance::Mode mode, const uint8_t* from, A* to, int64_t first, int64_t last) const {
    if (first == last) return;
    const int64_t at = first * in_.pixels;
    distance_kernels.transform(transform_arguments(mode, from + at, to + at, last - first), for_transforms_,
                               run_.workers);
  }

  // The sum over the pixels of one class.
  double one_class(int64_t image, int64_t c, A* error) {
    const int label = static_cast<int>(c);
    int64_t first = sides_, last = 0;
    for (int64_t side = 0; side < sides_; ++side) {
      if (present_[side][label]) first = smaller(first, side), last = side + 1;
    }
    if (first >= last) {  // neither side has such pixels: no distances
      memset(error, 0, in_.pixels * sizeof(A));
      return 0;
    }
    for (int64_t side = 0; side < sides_; ++side)
      if (!present_[side][label]) memset(outside_ + side * in_.pixels, 0, in_.pixels * sizeof(A));
    const uint8_t* __restrict labels = labels_;  // bytes may alias anything else
    uint8_t* __restrict others = others_;
    const int64_t stop = last * in_.pixels;
    for (int64_t i = first * in_.pixels; i < stop; ++i) others[i] = labels[i] != label;
    transform(distance::Mode::kMask, others_, outside_, first, last);

    for_each_part(run_.workers, units_, [&](int64_t worker, int64_t begin, int64_t end) {
      A* scratch = reinterpret_cast<A*>(own_ + worker * own_bytes_);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t from = unit * kUnitPixels, to = smaller(from + kUnitPixels, in_.pixels);
        double sum = 0;
        for (int64_t i = from; i < to; i += kBlock)
          sum += block(image, c, label, i, smaller(kBlock, to - i), scratch, error + i);
        partial_[unit] = sum;
      }
    });
    double sum = 0;
    for (int64_t unit = 0; unit < units_; ++unit) sum += partial_[unit];
    return sum;
  }

  // Pixels first .. first + count - 1 of an image's class c.
  double block(int64_t image, int64_t c, int label, int64_t first, int64_t count, A* scratch, A* error) const {
    const A* z = logits(image, c, first, count, scratch);
    const V sums = pixels(z, label, first, count, error);
    double sum = 0;
    for (int64_t lane = 0; lane < kLane; ++lane) sum += double(sums[lane]);
    return sum;
  }

  const A* logits(int64_t image, int64_t c, int64_t first, int64_t count, A* scratch) const {
    const int64_t classes = in_.classes;
    const A* run = nullptr;
    with_type(in_.logits.type, [&](auto from) {
      using T = typename Pointee<decltype(from)>::Type;
      const T* data = static_cast<const T*>(in_.logits.data);
      if (in_.logits.channels_last) {
        data += (image * in_.pixels + first) * classes + c;
        for (int64_t i = 0; i < count; ++i) scratch[i] = A(widen(data[i * classes]));
        run = scratch;
      } else {
        data += (image * classes + c) * in_.pixels + first;
        if constexpr (kSame<T, A>) {
          run = data;
        } else {
          convert_run(data, scratch, count);
          run = scratch;
        }
      }
    });
    return run;
  }

  template <typename T, typename Lanes>
  static Lanes some(const T* from, int64_t n) {
    Lanes lanes{};
    memcpy(&lanes, from, n * sizeof(T));
    return lanes;
  }
  static C is_label(const uint8_t* labels, int label, int64_t n) {
    typedef uint8_t Bytes __attribute__((vector_size(kLane)));
    const Bytes bytes = n == kLane ? some<uint8_t, Bytes>(labels, kLane) : some<uint8_t, Bytes>(labels, n);
    return __builtin_convertvector(bytes, C) == label;
  }

  V pixels(const A* z, int label, int64_t first, int64_t count, A* error) const {
    const V factor = broadcast<A>(A(2. / double(in_.pixels))), one = broadcast<A>(A(1));
    const bool past_caches = reinterpret_cast<uintptr_t>(error) % kVectorBytes == 0 &&
                             in_.images * in_.classes * in_.pixels * int64_t(sizeof(A)) > (int64_t{4} << 20);
    V sums{};
    for (int64_t i = 0; i < count; i += kLane) {
      const int64_t n = smaller(kLane, count - i), at = first + i;
      const auto read = [&](const A* from) { return n == kLane ? load(from) : some<A, V>(from, n); };
      const V p = exp_nonpositive(read(z + i) - read(most_ + at)) * read(scale_ + at);
      V distance{}, g{};
      for (int64_t side = 0; side < sides_; ++side) {
        const int64_t there = side * in_.pixels + at;
        V d = read(outside_ + there);
        const C within = is_label(labels_ + there, label, n);
        if (any_lane(within)) {  // seldom: what lies inside need not be read for the others
          d = within ? read(inside_ + there) : d;
          if (side == 0) g = within ? one : V{};
        }
        distance += d;
      }
      const V difference = p - g, slope = distance * difference;
      sums += slope * difference;
      if (n < kLane) {
        const V e = slope * factor;
        memcpy(error + i, &e, n * sizeof(A));
      } else if (past_caches) {
        stream(error + i, slope * factor);
      } else {
        store(error + i, slope * factor);
      }
    }
    return sums;
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
