// The CPU kernel of confusion_matrix for one instruction set: compiled once per target, PYSEG_TARGET is its name.
//
// Pixels go through in blocks that stay in the first-level cache: (1) the argmax, with the running maximum and its
// class in vectors over pixels, so that each logit is read once and in order; (2) target and prediction together become
// the number of a cell; (3) the cells are counted. Neighbouring pixels mostly fall into the same cell, and an increment
// that waits for the store of the last one is slow: a few histograms take turns. Counts are integers, so the result
// does not depend on how the pixels are split over threads.
#include "common/cpu_workers.h"
#include "metric/confusion_matrix_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

using metric::ConfusionArgs;
using metric::LabelType;
using metric::LogitType;

constexpr int kBlock = 1024;  // pixels: 21 classes of float32 are 84 KB, read through once
constexpr int kGather = 128;  // pixels at a time where neighbours do not lie side by side
constexpr int kGroup = 4;     // classes at a time: the running maximum is loaded and stored once for all of them
constexpr int kCopies = 4;    // histograms that take turns

constexpr int kVeryFewClasses = 4;  // up to here each cell is counted by comparing vectors with it
constexpr int kFewClasses = 32;     // up to here all the copies fit into the first-level cache
constexpr int kSomeClasses = 256;   // up to here a worker has a histogram of its own, above it counts in the result

// --- Argmax. An order tells how logits of one type compare: a key for each, and whether it replaces the best so far.
// NaN counts as the largest, the first of equals wins, as in torch.argmax.

template <typename I>
struct Integers {
  typedef I Vec __attribute__((vector_size(kVectorBytes)));
  typedef I Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(I)), may_alias));
  static Vec load(const I* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(I* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
};

template <typename T, typename I>
struct FloatOrder {
  using Element = T;
  using Key = T;
  using Index = I;
  using Keys = Vec<T>;
  static Keys load_keys(const T* p) { return load(p); }
  static Keys keys(const Element* p) { return load(p); }
  static void store_keys(Key* p, Keys v) { store(p, v); }
  static typename Integers<I>::Vec replaces(Keys v, Keys best) { return ~(v <= best) & (best == best); }
};

// 16-bit floats compare like integers once sign and magnitude are turned into two's complement; no conversion is
// needed.
template <int kInfinity>
struct ShortFloatOrder {
  using Element = int16_t;
  using Key = int16_t;
  using Index = int16_t;
  using Keys = Integers<int16_t>::Vec;
  static Keys load_keys(const Key* p) { return Integers<int16_t>::load(p); }
  static Keys keys(const Element* p) {
    const Keys bits = Integers<int16_t>::load(p);
    const Keys magnitude = bits & int16_t(0x7fff), sign = bits >> 15;
    const Keys ordered = (magnitude ^ sign) - sign;  // both zeros become 0
    return magnitude > int16_t(kInfinity) ? Keys{} + int16_t(0x7fff) : ordered;
  }
  static void store_keys(Key* p, Keys v) { Integers<int16_t>::store(p, v); }
  static Keys replaces(Keys v, Keys best) { return v > best; }
};

// Rows of logits, pixels side by side, of the classes c to c + kCount - 1 against the best of the classes before. Each
// row is a few KB, too short for the processor to foresee what comes next: the rows `ahead` elements further are asked
// for here, those of the next classes or of the next block (5 instead of 10 ms for 84 MB).
template <typename Order, int kCount>
inline void argmax_step(const typename Order::Element* rows, int64_t class_stride, int64_t ahead, int pixels, int c,
                        typename Order::Key* best, typename Order::Index* best_class) {
  using Index = typename Order::Index;
  using Indices = Integers<Index>;
  constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Index));
  for (int i = 0; i < pixels; i += kWidth) {
    auto maximum = Order::load_keys(best + i);
    auto index = Indices::load(best_class + i);
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) {
      const auto v = Order::keys(rows + g * class_stride + i);
      __builtin_prefetch(rows + g * class_stride + ahead + i);
      const auto replaces = Order::replaces(v, maximum);
      maximum = replaces ? v : maximum;
      index = replaces ? typename Indices::Vec{} + Index(c + g) : index;
    }
    Order::store_keys(best + i, maximum);
    Indices::store(best_class + i, index);
  }
}

template <typename Order>
struct Argmax {
  using Element = typename Order::Element;
  using Index = typename Order::Index;
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Index));

  alignas(64) typename Order::Key best[kBlock];
  alignas(64) Index best_class[kBlock];
  alignas(64) Element gathered[kGroup * kGather];

  void run(const Element* from, int64_t class_stride, int64_t pixel_stride, int pixels, int classes, int32_t* to) {
    const int in_place = pixel_stride == 1 ? pixels / kWidth * kWidth : 0;
    if (in_place > 0) {
      run_rows(in_place, classes, 0, [&](int c, int) { return from + c * class_stride; }, class_stride);
    }
    for (int first = in_place; first < pixels; first += kGather) {
      const int count = smaller(kGather, pixels - first);
      const int padded = (count + kWidth - 1) / kWidth * kWidth;
      const auto gather = [&](int c, int group) -> const Element* {
        const Element* at = from + c * class_stride + first * pixel_stride;
        for (int p = 0; p < count; ++p)
          for (int g = 0; g < group; ++g) gathered[g * kGather + p] = at[p * pixel_stride + g * class_stride];
        // The classes of a pixel come in several passes over these pixels, in which memory would idle.
        if (class_stride == 1 && c * int(sizeof(Element)) % 64 < group * int(sizeof(Element)))
          for (int p = 0; p < count; ++p) __builtin_prefetch(at + (kGather + p) * pixel_stride);
        return gathered;
      };
      run_rows(padded, classes, first, gather, kGather);
    }
    for (int i = 0; i < pixels; ++i) to[i] = static_cast<int32_t>(best_class[i]);
  }

 private:
  // rows(c, count) returns the rows of `count` classes from c on, row_stride apart.
  template <typename Rows>
  void run_rows(int pixels, int classes, int first, const Rows& rows, int64_t row_stride) {
    const Element* row = rows(0, 1);
    for (int i = 0; i < pixels; i += kWidth) {
      Order::store_keys(best + first + i, Order::keys(row + i));
      __builtin_prefetch(row + kBlock + i);
      Integers<Index>::store(best_class + first + i, typename Integers<Index>::Vec{});
    }
    int c = 1;
    for (; c + kGroup <= classes; c += kGroup) {
      const int64_t ahead = c + 2 * kGroup <= classes ? kGroup * row_stride : kBlock;
      argmax_step<Order, kGroup>(rows(c, kGroup), row_stride, ahead, pixels, c, best + first, best_class + first);
    }
    for (; c < classes; ++c)
      argmax_step<Order, 1>(rows(c, 1), row_stride, kBlock, pixels, c, best + first, best_class + first);
  }
};

// --- Labels

// Labels as 32-bit numbers, -1 where they are out of range; ignored ones get the number `classes`: a row of their own,
// after the others.
template <typename Label>
inline void read_labels(const Label* from, int pixels, int classes, bool has_ignore, int64_t ignore_index,
                        int32_t* to) {
  const Label ignore = static_cast<Label>(ignore_index);
  for (int i = 0; i < pixels; ++i) {
    const int64_t label = from[i];
    to[i] = label >= 0 && label < classes ? static_cast<int32_t>(label) : -1;
  }
  if (!has_ignore) return;
  for (int i = 0; i < pixels; ++i) to[i] = from[i] == ignore ? classes : to[i];
}

inline void read_labels(const void* from, LabelType type, int64_t offset, int pixels, int classes, bool has_ignore,
                        int64_t ignore_index, int32_t* to) {
  const auto read = [&](const auto* labels) {
    read_labels(labels + offset, pixels, classes, has_ignore, ignore_index, to);
  };
  switch (type) {
    case LabelType::kUInt8: return read(static_cast<const uint8_t*>(from));
    case LabelType::kInt8: return read(static_cast<const int8_t*>(from));
    case LabelType::kInt16: return read(static_cast<const int16_t*>(from));
    case LabelType::kInt32: return read(static_cast<const int32_t*>(from));
    case LabelType::kInt64: return read(static_cast<const int64_t*>(from));
  }
}

// --- Counting

constexpr int copies_for(int classes) { return classes <= kFewClasses ? kCopies : classes <= kSomeClasses ? 1 : 0; }
inline int64_t cells_with_ignored(int classes) { return int64_t(classes + 1) * classes; }

inline void add(int64_t* to, int64_t count) { __atomic_fetch_add(to, count, __ATOMIC_RELAXED); }

// One worker's counts of one matrix.
class Histogram {
 public:
  Histogram(int64_t* counts, int classes)
      : counts_(counts), classes_(classes), copies_(copies_for(classes)), size_(cells_with_ignored(classes)) {
    for (int64_t i = 0; i < copies_ * size_; ++i) counts_[i] = 0;
  }

  void count(const int32_t* cells, int pixels, int64_t* matrix) {
    if (classes_ <= kVeryFewClasses) {
      for (int cell = 0; cell < classes_ * classes_; ++cell) {
        int32_t count = 0;
        for (int i = 0; i < pixels; ++i) count += cells[i] == cell;
        counts_[cell] += count;
      }
    } else if (copies_ == kCopies) {
      int i = 0;
      for (; i + kCopies <= pixels; i += kCopies)
        for (int k = 0; k < kCopies; ++k) ++counts_[k * size_ + cells[i + k]];
      for (; i < pixels; ++i) ++counts_[cells[i]];
    } else if (copies_ == 1) {
      for (int i = 0; i < pixels; ++i) ++counts_[cells[i]];
    } else {
      for (int i = 0; i < pixels; ++i)
        if (cells[i] < classes_ * classes_) add(matrix + cells[i], 1);
    }
  }

  // Adds the counts to the matrix, which other workers may be adding to, and starts anew.
  void flush(int64_t* matrix) {
    for (int64_t i = 0; copies_ > 0 && i < size_; ++i) {
      int64_t sum = 0;
      for (int k = 0; k < copies_; ++k) {
        sum += counts_[k * size_ + i];
        counts_[k * size_ + i] = 0;
      }
      if (sum != 0 && i < int64_t(classes_) * classes_) add(matrix + i, sum);
    }
  }

 private:
  int64_t* counts_;
  int classes_, copies_;
  int64_t size_;
};

// Calls f(Order{}) with the order of the logits' type.
template <typename F>
inline void with_order(LogitType type, const F& f) {
  switch (type) {
    case LogitType::kFloat: return f(FloatOrder<float, int32_t>{});
    case LogitType::kDouble: return f(FloatOrder<double, int64_t>{});
    case LogitType::kHalf: return f(ShortFloatOrder<0x7c00>{});
    case LogitType::kBFloat16: return f(ShortFloatOrder<0x7f80>{});
  }
}

struct NoArgmax {
  void run(const ConfusionArgs& a, int64_t pixel, int pixels, int32_t* to) {
    read_labels(a.prediction, a.prediction_type, pixel, pixels, a.classes, false, 0, to);
  }
};

template <typename Order>
struct WithArgmax {
  Argmax<Order> argmax;
  void run(const ConfusionArgs& a, int64_t pixel, int pixels, int32_t* to) {
    const auto* logits = static_cast<const typename Order::Element*>(a.prediction);
    const int64_t offset = pixel / a.pixels * a.strides.image + pixel % a.pixels * a.strides.pixel;
    argmax.run(logits + offset, a.strides.cls, a.strides.pixel, pixels, a.classes, to);
  }
};

// The worker's blocks; returns the first bad pixel or -1.
template <typename Predict>
inline int64_t run_blocks(const ConfusionArgs& a, int64_t first, int64_t last, int64_t* counts) {
  Predict predict;
  alignas(64) int32_t target[kBlock], predicted[kBlock];
  const int64_t blocks_of_image = (a.pixels + kBlock - 1) / kBlock;
  const int64_t matrix_size = int64_t(a.classes) * a.classes;
  const auto matrix_of = [&](int64_t block) {
    return a.matrix + (a.per_image ? block / blocks_of_image * matrix_size : 0);
  };
  Histogram histogram(counts, a.classes);
  for (int64_t block = first; block < last; ++block) {
    const int64_t in_image = block % blocks_of_image * kBlock;
    const int64_t pixel = block / blocks_of_image * a.pixels + in_image;
    const int pixels = static_cast<int>(smaller<int64_t>(kBlock, a.pixels - in_image));
    predict.run(a, pixel, pixels, predicted);
    read_labels(a.target, a.target_type, pixel, pixels, a.classes, a.has_ignore, a.ignore_index, target);
    int32_t bad = 0;
    for (int i = 0; i < pixels; ++i) {
      const int32_t t = target[i], p = predicted[i];
      bad |= t < 0 || (p < 0 && t < a.classes);
      target[i] = t * a.classes + (p < 0 ? 0 : p);
    }
    if (bad) {
      for (int i = 0; i < pixels; ++i)
        if (target[i] < 0 || (predicted[i] < 0 && target[i] < a.classes * a.classes)) return pixel + i;
    }
    histogram.count(target, pixels, matrix_of(block));
    if (block + 1 == last || matrix_of(block + 1) != matrix_of(block)) histogram.flush(matrix_of(block));
  }
  return -1;
}

int64_t workspace(const ConfusionArgs& a, int64_t workers) {
  return workers * (copies_for(a.classes) * cells_with_ignored(a.classes) + 1);
}

int64_t run(const ConfusionArgs& a, int64_t* workspace, const Workers& workers) {
  const int64_t blocks = a.images * ((a.pixels + kBlock - 1) / kBlock);
  const int64_t counts_of_worker = copies_for(a.classes) * cells_with_ignored(a.classes);
  int64_t* const bad = workspace + workers.count * counts_of_worker;
  for (int64_t w = 0; w < workers.count; ++w) bad[w] = -1;
  for_each_part(workers, blocks, [&](int64_t worker, int64_t first, int64_t last) {
    int64_t* counts = workspace + worker * counts_of_worker;
    if (!a.from_logits) {
      bad[worker] = run_blocks<NoArgmax>(a, first, last, counts);
    } else {
      with_order(a.logit_type,
                 [&](auto order) { bad[worker] = run_blocks<WithArgmax<decltype(order)>>(a, first, last, counts); });
    }
  });
  for (int64_t w = 0; w < workers.count; ++w)  // workers have their pixels in order
    if (bad[w] >= 0) return bad[w];
  return -1;
}

}  // namespace

extern const ConfusionKernelTable confusion_kernels;
const ConfusionKernelTable confusion_kernels = {workspace, run};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
