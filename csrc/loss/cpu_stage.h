// Blocks of pixels of a segmentation map in the scratch memory of one worker: rows of one class over the block's
// pixels, in the type that is computed in, whatever the memory format and dtype of the tensors.
//
// A block is padded to whole vectors, and padding counts as pixels that are left out, so that no loop has a remainder.
// Logits lie in the map's classes far apart, at distances that often share all sets of the caches; in the scratch they
// lie close together, and the passes that follow find them there.
#pragma once

#include "common/cpu_convert.h"
#include "common/cpu_workers.h"
#include "loss/segmentation_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kUnitPixels = 8192;      // pixels of an image whose sums are added up before others join them
constexpr int64_t kBlockBytes = 16 << 10;  // of a block's logits: the first-level cache has room for the next block too
constexpr int64_t kMostPixels = 1024, kLeastPixels = 64;
constexpr int64_t kCacheLine = 64;

// Kept logarithms of sums serve up to this magnitude: exp(z - L) has an error of |L| units in the last place.
constexpr int kMostLogSum = 32;

// What an element that is left out has for a target, in g rows. No target is this number.
template <typename A>
constexpr A kLeftOut = A(-0x1p127);

template <typename T>
constexpr bool kIsFloat = kSame<T, Half> || kSame<T, BFloat16> || kSame<T, float> || kSame<T, double>;

template <typename Pointer>
struct Pointee;
template <typename T>
struct Pointee<const T*> {
  using Type = T;
};

inline bool is_double(const SegmentationInput& in) { return in.logits.type == Element::kDouble; }
inline int64_t units_of_image(const SegmentationInput& in) { return (in.pixels + kUnitPixels - 1) / kUnitPixels; }

// One channel that is no softmax is the foreground of a binary problem: its labels are 0 and 1.
inline bool is_binary(const SegmentationInput& in) { return in.classes == 1 && in.activation != Activation::kSoftmax; }
inline int64_t label_limit(const SegmentationInput& in) { return is_binary(in) ? 2 : in.classes; }

template <typename A>
int64_t block_pixels(const SegmentationInput& in) {
  const int64_t fitting = kBlockBytes / (int64_t(sizeof(A)) * (in.classes + 1)) / kLeastPixels * kLeastPixels;
  return smaller(larger(fitting, kLeastPixels), kMostPixels);
}

// Hands out pieces of a workspace, or only counts them where it is null.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* piece = base_ + used_;
    used_ += round_up(count * int64_t(sizeof(T)), kCacheLine);
    return base_ ? reinterpret_cast<T*>(piece) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// to[c * step + i] = from[i * channels + c]
template <typename A, typename T>
inline void split_channels(const T* from, int64_t count, int64_t channels, A* to, int64_t step) {
  constexpr int64_t kTile = 16;
  for (int64_t first = 0; first < count; first += kTile) {
    const int64_t last = smaller(first + kTile, count);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = first; i < last; ++i) to[c * step + i] = A(widen(from[i * channels + c]));
  }
}

// The reverse.
template <typename A, typename T>
inline void join_channels(const A* from, int64_t step, int64_t count, int64_t channels, T* to) {
  constexpr int64_t kTile = 16;
  for (int64_t first = 0; first < count; first += kTile) {
    const int64_t last = smaller(first + kTile, count);
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < channels; ++c) to[i * channels + c] = narrowed<T>(from[c * step + i]);
  }
}

template <typename A>
class Stage {
 public:
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;
  static constexpr int64_t kPad = 2 * kLane;  // loops over pixels may take two vectors at a time

  Stage(const SegmentationInput& input, Arena& arena)
      : in(input),
        step(block_pixels<A>(input)),
        logits(arena.take<A>((input.classes + 1) * step)),
        label(arena.take<A>(step)),
        index(arena.take<int32_t>(step)),
        weight(arena.take<A>(step)),
        g(arena.take<A>(step)),
        targets_(input.dense && input.target.channels_last ? arena.take<A>(input.classes * step) : nullptr),
        weights_(input.dense_weight && input.weight.channels_last ? arena.take<A>(input.classes * step) : nullptr),
        limit_(A(label_limit(input))) {
    // Pixels that are left out carry the label after the last: it has a row, so that nobody need ask.
    if (logits)
      for (int64_t i = 0; i < step; ++i) logits[in.classes * step + i] = A(0);
  }

  const SegmentationInput& in;
  const int64_t step;  // from one row to the next
  A* const logits;     // [classes + 1, step]
  A* const label;      // [step], as numbers of the type that vectors compare
  int32_t* const index;
  A* const weight;  // [step], 0 for pixels that are left out
  A* const g;       // [step], a class's targets: load_target
  int64_t image = 0, first = 0, count = 0, padded = 0;
  LabelError error{};

  // The block's pixels first..first + count of an image. Labels and weights of pixels are read, logits are not.
  void begin(int64_t image_, int64_t first_, int64_t count_) {
    image = image_;
    first = first_;
    count = count_;
    padded = round_up(count, kPad);
    if (!in.dense) load_labels();
    if (in.dense && targets_) load_channels(in.target, [&](auto from) { split_targets(from); });
    if (in.pixel || in.smoothing) load_weights();
  }

  // begin() and f() for the blocks of a unit, which are counted through the images.
  template <typename F>
  void each_block(int64_t unit, const F& f) {
    const int64_t units = units_of_image(in), of = unit / units;
    const int64_t from = unit % units * kUnitPixels, last = smaller(from + kUnitPixels, in.pixels);
    for (int64_t i = from; i < last; i += step) {
      begin(of, i, smaller(step, last - i));
      f();
    }
  }

  bool all_count() const { return all_count_; }
  A limit() const { return limit_; }

  // Row c of the logits, in the scratch, and the larger of `most` and its elements into `most`.
  const A* load_logits_and_most(int64_t c, A* most) {
    constexpr Element kOwn = sizeof(A) == 8 ? Element::kDouble : Element::kFloat;
    A* row = logits + c * step;
    if (!in.logits.channels_last && in.logits.type == kOwn && padded == count) {
      const A* from = static_cast<const A*>(in.logits.data) + (image * in.classes + c) * in.pixels + first;
      for (int64_t i = 0; i < padded; i += kLane) {
        // The next block's run: the processor's own prefetchers give up where runs are this short.
        __builtin_prefetch(from + step + i, 0, 3);
        const V z = load(from + i), m = load(most + i);
        store(row + i, z);
        store(most + i, m < z ? z : m);
      }
      return row;
    }
    if (!in.logits.channels_last) load_logits(c);
    for (int64_t i = 0; i < padded; i += kLane) {
      const V z = load(row + i), m = load(most + i);
      store(most + i, m < z ? z : m);
    }
    return row;
  }

  // Row c of the logits, in the scratch.
  A* load_logits(int64_t c) {
    A* row = logits + c * step;
    load_row(in.logits, c, row);
    return row;
  }

  // The same, in either memory format.
  const A* load_class(int64_t c) {
    if (!in.logits.channels_last) return load_logits(c);
    A* row = logits + c * step;
    load_channels(in.logits, [&](auto from) {
      for (int64_t i = 0; i < count; ++i) row[i] = A(widen(from[i * in.classes + c]));
    });
    pad(row, A(0));
    return row;
  }

  void load_all_logits() {
    if (!in.logits.channels_last) {
      for (int64_t c = 0; c < in.classes; ++c) load_logits(c);
      return;
    }
    load_channels(in.logits, [&](auto from) { split_channels(from, count, in.classes, logits, step); });
    for (int64_t c = 0; c < in.classes; ++c) pad(logits + c * step, A(0));
  }

  // Row c of the logits at first + c * step: in their own memory where that will do, else in the scratch.
  struct Rows {
    const A* first;
    int64_t step;
  };
  Rows logits_where_they_lie() {
    if (in_place(in.logits.type)) {
      const A* image_first = static_cast<const A*>(in.logits.data) + image * in.classes * in.pixels;
      return {image_first + first, in.pixels};
    }
    load_all_logits();
    return {logits, step};
  }

  // The block's part of a map [images, pixels], in the type that is computed in.
  void load_plane(const PixelMap& map, A* row) const {
    load_pixels(map, [&](auto from) { convert_run(from, row, count); });
    pad(row, A(0));
  }

  // The logarithms of the sums that the forward pass has kept, into `row`; false where there are none that serve.
  bool load_log_sums(A* row) const {
    if (in.log_sum == nullptr) return false;
    const A* from = static_cast<const A*>(in.log_sum) + image * in.pixels + first;
    bool serve = true;
    for (int64_t i = 0; i < count; ++i) {
      row[i] = from[i];
      serve &= from[i] <= kMostLogSum && from[i] >= -kMostLogSum;
    }
    pad(row, A(0));
    return serve;
  }
  void keep_log_sums(const A* row) const {
    memcpy(static_cast<A*>(in.log_sum) + image * in.pixels + first, row, count * sizeof(A));
  }

  // Class c's targets into g; kLeftOut where an element does not count.
  void load_target(int64_t c) {
    if (!in.dense) {
      const V own = broadcast<A>(is_binary(in) ? A(1) : A(c)), none = broadcast<A>(limit_);
      const V yes = broadcast<A>(A(1) * A(in.target_scale) + A(in.target_shift)), no = broadcast<A>(A(in.target_shift));
      const V out = broadcast<A>(kLeftOut<A>);
      for (int64_t i = 0; i < padded; i += kLane) {
        const V l = load(label + i);
        store(g + i, l == none ? out : l == own ? yes : no);
      }
      return;
    }
    if (targets_) {
      for (int64_t i = 0; i < padded; i += kLane) store(g + i, load(targets_ + c * step + i));
    } else {
      load_run(in.target, c, [&](auto from) { targets_of(from, count, g); });
    }
    pad(g, kLeftOut<A>);
    if (in.target_scale == 1 && in.target_shift == 0) return;
    const V scale = broadcast<A>(A(in.target_scale)), shift = broadcast<A>(A(in.target_shift));
    const V out = broadcast<A>(kLeftOut<A>);
    for (int64_t i = 0; i < padded; i += kLane) {
      const V v = load(g + i);
      store(g + i, v == out ? out : v * scale + shift);
    }
  }

  // Class c's weights, where every element has one.
  void load_weight(int64_t c) {
    if (!in.dense_weight) return;
    if (weights_) {
      for (int64_t i = 0; i < padded; i += kLane) store(weight + i, load(weights_ + c * step + i));
    } else {
      load_row(in.weight, c, weight);
    }
  }

  // Where class c's row of a result is to be written: in place, or into `row` of the scratch, which `write` then
  // stores. Results have the memory format of the logits.
  A* row_of_result(void* to, Element type, int64_t c, A* row) const {
    return in_place(type) ? static_cast<A*>(to) + (image * in.classes + c) * in.pixels + first : row;
  }
  // Fills class c's row of a result, value(i) of the vector of pixels from i on, and returns it. `scratch`: where the row is
  // kept until `write` if it cannot be written in place; may be what value reads at i.
  template <typename F>
  const A* fill_row(void* to, Element type, int64_t c, A* scratch, const F& value) const {
    A* row = row_of_result(to, type, c, scratch);
    if (streams(row, scratch)) {
      for (int64_t i = 0; i < padded; i += kLane) stream(row + i, value(i));
    } else {
      for (int64_t i = 0; i < padded; i += kLane) store(row + i, value(i));
    }
    return row;
  }
  // Whether the rows of a result go past the caches: those that are written in place, of results too large for these,
  // where alignment allows. `scratch` is where a row is if it is not in place.
  bool streams(const A* row, const A* scratch) const {
    constexpr int64_t kLargest = int64_t{4} << 20;
    return row != scratch && reinterpret_cast<uintptr_t>(row) % kVectorBytes == 0 &&
           in.images * in.classes * in.pixels * int64_t(sizeof(A)) > kLargest;
  }
  void write(const A* row, void* to, Element type, int64_t c) const {
    if (in.logits.channels_last || in_place(type)) return;
    with_type(type, [&](auto pointer) {
      using T = typename Pointee<decltype(pointer)>::Type;
      narrow_run(row, static_cast<T*>(to) + (image * in.classes + c) * in.pixels + first, count);
    });
  }
  // All pixels of an image's class, in either memory format.
  void write_plane(const A* plane, A* to, int64_t image_, int64_t c) const {
    A* target = to + image_ * in.classes * in.pixels;
    if (in.logits.channels_last) {
      for (int64_t i = 0; i < in.pixels; ++i) target[i * in.classes + c] = plane[i];
    } else {
      memcpy(target + c * in.pixels, plane, in.pixels * sizeof(A));
    }
  }
  // After the last row: all rows, [classes, step], of a channels-last result.
  void write_all(const A* rows, void* to, Element type) const {
    if (!in.logits.channels_last) return;
    with_type(type, [&](auto pointer) {
      using T = typename Pointee<decltype(pointer)>::Type;
      join_channels(rows, step, count, in.classes, static_cast<T*>(to) + (image * in.pixels + first) * in.classes);
    });
  }

 private:
  A* const targets_;
  A* const weights_;
  const A limit_;
  bool all_count_ = true;

  bool in_place(Element type) const {
    return !in.logits.channels_last && type == (sizeof(A) == 8 ? Element::kDouble : Element::kFloat) && padded == count;
  }

  void pad(A* row, A value) const {
    for (int64_t i = count; i < padded; ++i) row[i] = value;
  }

  // f gets the address of class c's run of pixels.
  template <typename F>
  void load_run(const PixelMap& map, int64_t c, const F& f) const {
    with_type(map.type, [&](auto type) {
      f(static_cast<decltype(type)>(map.data) + (image * in.classes + c) * in.pixels + first);
    });
  }
  // f gets the address of the block's first pixel in a channels-last map.
  template <typename F>
  void load_channels(const PixelMap& map, const F& f) const {
    with_type(map.type,
              [&](auto type) { f(static_cast<decltype(type)>(map.data) + (image * in.pixels + first) * in.classes); });
  }
  // f gets the address of the run of pixels in a map without classes.
  template <typename F>
  void load_pixels(const PixelMap& map, const F& f) const {
    with_type(map.type, [&](auto type) { f(static_cast<decltype(type)>(map.data) + image * in.pixels + first); });
  }

  // The next block's run: the processor's own prefetchers give up where runs are this short.
  template <typename T>
  void prefetch_next(const T* from) const {
    const char* next = reinterpret_cast<const char*>(from + step);
    for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += kCacheLine) __builtin_prefetch(next + i, 0, 2);
  }

  void load_row(const PixelMap& map, int64_t c, A* row) const {
    load_run(map, c, [&](auto from) {
      prefetch_next(from);
      convert_run(from, row, count);
    });
    pad(row, A(0));
  }

  template <typename T>
  void labels_of(const T* from) {
    constexpr int64_t n = kLanes<double>;
    typedef int64_t Wide __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Index __attribute__((vector_size(kVectorBytes / 2)));
    typedef T Narrow __attribute__((vector_size(n * sizeof(T))));
    typedef A Label __attribute__((vector_size(n * sizeof(A))));
    const int64_t limit = label_limit(in), ignore = in.ignore;
    const Wide ignores = Wide{} - int64_t(in.has_ignore);
    Wide wrong{}, ignored{};
    int64_t i = 0;
    prefetch_next(from);
    for (; i + n <= count; i += n) {
      Narrow narrow;
      memcpy(&narrow, from + i, sizeof narrow);
      const Wide l = __builtin_convertvector(narrow, Wide);
      const Wide out = (l == ignore) & ignores, unknown = (l < 0) | (l >= limit);
      wrong |= unknown & ~out;
      ignored |= out;
      const Index at = __builtin_convertvector(out | unknown ? Wide{} + limit : l, Index);
      const Label as_number = __builtin_convertvector(at, Label);
      memcpy(index + i, &at, sizeof at);
      memcpy(label + i, &as_number, sizeof as_number);
    }
    bool any_wrong = false, any_ignored = count != padded;
    for (int lane = 0; lane < n; ++lane) {
      any_wrong |= wrong[lane] != 0;
      any_ignored |= ignored[lane] != 0;
    }
    for (; i < padded; ++i) {
      const int64_t l = i < count ? int64_t(from[i]) : limit;
      const bool out = i >= count || (in.has_ignore && l == ignore), unknown = l < 0 || l >= limit;
      any_wrong |= unknown && !out;
      any_ignored |= out;
      index[i] = int32_t(out || unknown ? limit : l);
      label[i] = A(index[i]);
    }
    all_count_ = !(any_ignored || any_wrong);
    if (!any_wrong) return;
    for (i = 0; i < count && !error.found; ++i) note(from[i], limit);
  }

  void note(int64_t value, int64_t limit) {
    if (error.found || (value >= 0 && value < limit) || (in.has_ignore && value == in.ignore)) return;
    error = {true, value};
  }

  void load_labels() {
    load_pixels(in.target, [&](auto from) {
      using T = typename Pointee<decltype(from)>::Type;
      if constexpr (!kIsFloat<T>) labels_of(from);  // labels of other dtypes have been refused
    });
  }

  // Targets of single elements: numbers in [0, 1], or the integers 0, 1 and the one to leave out.
  template <typename T>
  A target_of(T value) {
    if constexpr (kIsFloat<T>) {
      return A(widen(value));
    } else {
      if (in.has_ignore && value == in.ignore) return kLeftOut<A>;
      if (value == 0 || value == 1) return A(value);
      note(value, 2);
      return kLeftOut<A>;
    }
  }
  template <typename T>
  void targets_of(const T* from, int64_t n, A* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = target_of(from[i]);
  }
  template <typename T>
  void split_targets(const T* from) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < in.classes; ++c) targets_[c * step + i] = target_of(from[i * in.classes + c]);
  }

  void load_weights() {
    if (in.weight.data == nullptr) {
      for (int64_t i = 0; i < padded; ++i) weight[i] = A(1);
    } else if (weights_) {
      load_channels(in.weight, [&](auto from) { split_channels(from, count, in.classes, weights_, step); });
      for (int64_t c = 0; c < in.classes; ++c) pad(weights_ + c * step, A(0));
    } else if (!in.dense_weight) {
      load_plane(in.weight, weight);
    }
    if (in.dense || all_count_ || in.dense_weight) return;
    const V none = broadcast<A>(limit_);
    for (int64_t i = 0; i < padded; i += kLane) store(weight + i, load(label + i) == none ? V{} : load(weight + i));
  }
};

// Calls f(kernel, unit) for all units, with a Kernel of `bytes` of workspace for each worker.
template <typename Kernel, typename Input, typename F>
void each_unit(const Input& in, int64_t units, int64_t bytes, const SegmentationRun& run, const F& f) {
  for_each_part(run.workers, units, [&](int64_t worker, int64_t first, int64_t last) {
    Kernel kernel(in, static_cast<char*>(run.workspace) + worker * bytes);
    for (int64_t unit = first; unit < last; ++unit) f(kernel, unit);
    stream_fence();
    run.errors[worker] = kernel.error();
  });
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
