// The CPU kernels of mask pasting for one instruction set: compiled once per target, PYSEG_TARGET is its name.
//
// A mask is first stretched along the lines of the output (rows; columns for run lengths, which COCO counts downwards):
// one line for each line of the mask, of which there are few. Every line of the output is then a weighted sum of two
// of those, all of it vectors, and is compared, packed or counted while it is in the cache. Threads take masks.
#include "roi/paste_masks_cpu_kernel.h"

#include <stdlib.h>
#include <string.h>

#include "common/cpu_convert.h"
#include "common/cpu_workers.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kLine = 64;                     // lines of scratch are whole cache lines
constexpr int64_t kStreamed = int64_t{16} << 20;  // bytes of output from which stores pass by the caches

constexpr int64_t padded(int64_t n) { return round_up(n, kLine); }

// Zeros; where the output is larger than the caches, without reading it first.
inline void clear(void* to, int64_t bytes, bool streamed) {
  constexpr int64_t kWorthIt = 512;
  auto* p = static_cast<char*>(to);
  if (streamed && bytes >= kWorthIt) {
    const int64_t head = (kVectorBytes - reinterpret_cast<uintptr_t>(p) % kVectorBytes) % kVectorBytes;
    memset(p, 0, head);
    p += head;
    bytes -= head;
    for (; bytes >= kVectorBytes; bytes -= kVectorBytes, p += kVectorBytes)
      stream(reinterpret_cast<float*>(p), Vec<float>{});
  }
  memset(p, 0, bytes);
}

// A mask's lines stretched over the visible pixels across them.
template <typename T, typename A>
class Stretched {
 public:
  // along: the axis of the output's lines; `step`, `stride`: between the mask's elements along a line, and between
  // lines, of which there are `lines` of `size` elements.
  Stretched(const PasteArgs& a, const T* mask, const roi::PasteAxis& along, int64_t size, int64_t step, int64_t lines,
            int64_t stride, A* scratch)
      : lines_(lines), padding_(a.padding), width_(along.end - along.begin), pitch_(padded(width_)), data_(scratch) {
    memset(zero(), 0, pitch_ * sizeof(A));
    A* framed = zero() + pitch_;  // [size + 2 padding]
    auto* low = reinterpret_cast<int32_t*>(framed + padded(size + 2 * a.padding));
    A* weight = reinterpret_cast<A*>(low + 2 * pitch_);
    const int64_t framed_size = size + 2 * a.padding;
    for (int64_t x = 0; x < width_; ++x) {
      const auto point = roi::paste_point<A>(along, along.begin + x, framed_size);
      low[x] = int32_t(point.low);
      low[pitch_ + x] = int32_t(point.high);
      weight[x] = point.w_high;
    }
    memset(framed, 0, framed_size * sizeof(A));
    for (int64_t i = 0; i < lines; ++i) {
      for (int64_t x = 0; x < size; ++x) framed[a.padding + x] = A(widen(mask[i * stride + x * step]));
      A* to = data_ + i * pitch_;
      for (int64_t x = 0; x < width_; ++x)
        to[x] = framed[low[x]] * (A(1) - weight[x]) + framed[low[pitch_ + x]] * weight[x];
    }
  }

  // Elements of scratch, for any box of the image.
  static int64_t scratch(int64_t lines, int64_t size, int64_t padding, int64_t longest) {
    return (lines + 5) * padded(longest) + padded(size + 2 * padding) + kLine;
  }

  // The line of the output at `at` of the axis across.
  void line(const roi::PasteAxis& across, int64_t at, A* to) const {
    const auto point = roi::paste_point<A>(across, at, lines_ + 2 * padding_);
    const A *low = framed_line(point.low), *high = framed_line(point.high);
    const A w_low = point.w_low, w_high = point.w_high;
    for (int64_t x = 0; x < width_; ++x) to[x] = low[x] * w_low + high[x] * w_high;
  }

  int64_t width() const { return width_; }

 private:
  A* zero() const { return data_ + lines_ * pitch_; }
  const A* framed_line(int64_t i) const {
    return i < padding_ || i >= lines_ + padding_ ? zero() : data_ + (i - padding_) * pitch_;
  }

  const int64_t lines_, padding_, width_, pitch_;
  A* const data_;  // [lines, pitch], then a line of zeros and scratch
};

// Eight booleans a byte, the first in the highest bit.
inline void pack(const uint8_t* bits, uint8_t* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t eight;
    memcpy(&eight, bits + 8 * i, 8);
    to[i] = uint8_t(eight * 0x8040201008040201u >> 56);
  }
}

// The runs of one mask in COCO's order, column by column from the top left, as its compressed string: the difference to
// the length two runs before, five bits a character, the least first, 32 set where more follow, from '0' on.
class RunWriter {
 public:
  explicit RunWriter(PasteRuns& runs) : runs_(runs) {}

  // The next run ends before position `end`.
  void run(int64_t end) {
    const int64_t length = end - last_end_;
    last_end_ = end;
    int64_t x = number_ > 2 ? length - before_[number_ % 2] : length;
    before_[number_ % 2] = length;
    ++number_;
    bool more = true;
    while (more) {
      int64_t bits = x & 31;
      x >>= 5;
      more = (bits & 16) != 0 ? x != -1 : x != 0;
      put(uint8_t(bits + (more ? 32 : 0) + 48));
    }
  }

 private:
  void put(uint8_t byte) {
    if (runs_.size == runs_.capacity && !grow()) return;
    runs_.data[runs_.size++] = byte;
  }
  bool grow() {
    constexpr int64_t kFirst = 4096;
    const int64_t capacity = runs_.capacity == 0 ? kFirst : 2 * runs_.capacity;
    auto* data = runs_.failed ? nullptr : static_cast<uint8_t*>(realloc(runs_.data, capacity));
    runs_.failed = data == nullptr;
    if (runs_.failed) return false;
    runs_.data = data;
    runs_.capacity = capacity;
    return true;
  }

  PasteRuns& runs_;
  int64_t last_end_ = 0, number_ = 0, before_[2] = {};
};

template <typename T, typename A>
class Paste {
 public:
  Paste(const PasteArgs& a, void* workspace, const Workers& workers)
      : a_(a), workers_(workers), workspace_(static_cast<A*>(workspace)) {}

  static int64_t workspace(const PasteArgs& a, int64_t workers) { return workers * each(a) * int64_t(sizeof(A)); }

  void run(void* out) const {
    for_each_part(workers_, a_.count, [&](int64_t worker, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) mask(k, worker, static_cast<char*>(out) + k * a_.height * row_bytes());
      if (streamed()) stream_fence();
    });
  }

  void run_lengths(PasteRuns* runs) const {
    for_each_part(workers_, a_.count, [&](int64_t worker, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) count_runs(k, worker, runs[k]);
    });
  }

  void backward(const void* grad, void* grad_masks) const {
    for_each_part(workers_, a_.count, [&](int64_t worker, int64_t first, int64_t last) {
      const int64_t size = a_.mask_height * a_.mask_width;
      for (int64_t k = first; k < last; ++k)
        gradient(k, static_cast<const T*>(grad) + k * a_.height * a_.width, scratch(worker),
                 static_cast<T*>(grad_masks) + k * size);
    });
  }

 private:
  static int64_t longest(const PasteArgs& a) { return larger(a.height, a.width); }
  static int64_t stretched(const PasteArgs& a) {
    const int64_t most = larger(a.mask_height, a.mask_width);
    return Stretched<T, A>::scratch(most, most, a.padding, longest(a));
  }
  // A stretched mask, a line of values and one of booleans.
  static int64_t each(const PasteArgs& a) { return padded(stretched(a)) + 2 * padded(longest(a) + 2 * kLine); }

  A* scratch(int64_t worker) const { return workspace_ + worker * each(a_); }
  A* line(int64_t worker) const { return scratch(worker) + padded(stretched(a_)); }
  uint8_t* bits(int64_t worker) const {
    return reinterpret_cast<uint8_t*>(line(worker) + padded(longest(a_) + 2 * kLine));
  }

  int64_t row_bytes() const {
    switch (a_.output) {
      case roi::PasteOutput::kValues: return a_.width * int64_t(sizeof(T));
      case roi::PasteOutput::kBool: return a_.width;
      default: return (a_.width + 7) / 8;
    }
  }
  bool streamed() const { return a_.count * a_.height * row_bytes() >= kStreamed; }
  const T* mask_of(int64_t k) const { return static_cast<const T*>(a_.masks) + k * a_.mask_height * a_.mask_width; }

  void mask(int64_t k, int64_t worker, char* out) const {
    const roi::PasteAxis &rows = a_.rows[k], &columns = a_.columns[k];
    const int64_t width = columns.end - columns.begin;
    if (width == 0 || rows.end == rows.begin) return clear(out, a_.height * row_bytes(), streamed());
    const Stretched<T, A> stretched(a_, mask_of(k), columns, a_.mask_width, 1, a_.mask_height, a_.mask_width,
                                    scratch(worker));
    A* const values = line(worker);
    uint8_t* const above = bits(worker);
    // Bytes of a row that the box touches; what lies between two rows' is cleared in one go.
    const int64_t unit = a_.output == roi::PasteOutput::kValues ? int64_t(sizeof(T)) : 1;
    const bool packed = a_.output == roi::PasteOutput::kPacked;
    const int64_t begin = packed ? columns.begin / 8 : columns.begin * unit;
    const int64_t end = packed ? (columns.end + 7) / 8 : columns.end * unit;
    if (packed) memset(above, 0, 8 * (end - begin));
    int64_t cleared = 0;
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      char* const to = out + y * row_bytes() + begin;
      clear(out + cleared, y * row_bytes() + begin - cleared, streamed());
      cleared = y * row_bytes() + end;
      if (a_.output == roi::PasteOutput::kValues) {
        if constexpr (kSame<T, A>) {
          stretched.line(rows, y, reinterpret_cast<T*>(to));
        } else {
          stretched.line(rows, y, values);
          narrow_run(values, reinterpret_cast<T*>(to), width);
        }
      } else {
        stretched.line(rows, y, values);
        if (packed) {
          compare(values, width, above + columns.begin % 8);
          pack(above, reinterpret_cast<uint8_t*>(to), end - begin);
        } else {
          compare(values, width, reinterpret_cast<uint8_t*>(to));
        }
      }
    }
    clear(out + cleared, a_.height * row_bytes() - cleared, streamed());
  }

  // Values are those of the masks' type before they are compared, as in torch; so is the threshold.
  void compare(const A* values, int64_t count, uint8_t* above) const {
    const A threshold = A(a_.threshold);
    if constexpr (kSame<T, A>) {
      for (int64_t x = 0; x < count; ++x) above[x] = values[x] > threshold;
    } else {
      for (int64_t x = 0; x < count; ++x) above[x] = widen(narrowed<T>(values[x])) > threshold;
    }
  }

  // Columns instead of rows; 64 pixels a word, in which the ends of runs are the bits that differ from the one before.
  void count_runs(int64_t k, int64_t worker, PasteRuns& runs) const {
    const roi::PasteAxis &rows = a_.rows[k], &columns = a_.columns[k];
    const int64_t height = rows.end - rows.begin, words = (height + 63) / 64;
    RunWriter writer(runs);
    bool inside = false;  // the pixel before is above the threshold
    if (height > 0 && columns.end > columns.begin) {
      const Stretched<T, A> stretched(a_, mask_of(k), rows, a_.mask_height, a_.mask_width, a_.mask_width, 1,
                                      scratch(worker));
      A* const values = line(worker);
      uint8_t* const above = bits(worker);
      memset(above, 0, 64 * words);
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        stretched.line(columns, x, values);
        compare(values, height, above);
        const int64_t top = x * a_.height + rows.begin;
        // What is above the box in this column, and below it in the last, is background.
        if (inside && rows.begin > 0) inside = end_run(writer, top - rows.begin);
        for (int64_t w = 0; w < words; ++w) {
          uint64_t word = 0;
          for (int64_t i = 0; i < 8; ++i) {
            uint64_t eight;
            memcpy(&eight, above + 64 * w + 8 * i, 8);
            word |= (eight * 0x0102040810204080u >> 56) << (8 * i);
          }
          uint64_t ends = word ^ (word << 1 | uint64_t(inside));
          const int64_t valid = height - 64 * w;
          if (valid < 64) ends &= (uint64_t{1} << valid) - 1;
          for (; ends != 0; ends &= ends - 1) writer.run(top + 64 * w + __builtin_ctzll(ends));
          inside = word >> (smaller<int64_t>(valid, 64) - 1) & 1;
        }
        if (inside && rows.end < a_.height) inside = end_run(writer, top + height);
      }
    }
    if (inside && a_.columns[k].end * a_.height < a_.width * a_.height) end_run(writer, columns.end * a_.height);
    writer.run(a_.width * a_.height);
  }

  static bool end_run(RunWriter& writer, int64_t at) {
    writer.run(at);
    return false;
  }

  // The transpose: lines of the gradient are added to the two lines of the mask that they come from, then each pixel of
  // those to its two elements.
  void gradient(int64_t k, const T* grad, A* sums, T* out) const {
    const roi::PasteAxis &rows = a_.rows[k], &columns = a_.columns[k];
    const int64_t width = columns.end - columns.begin, pitch = padded(width), p = a_.padding;
    memset(sums, 0, a_.mask_height * pitch * sizeof(A));
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const auto point = roi::paste_point<A>(rows, y, a_.mask_height + 2 * p);
      const T* from = grad + y * a_.width + columns.begin;
      const auto add = [&](int64_t i, A weight) {
        if (i < p || i >= a_.mask_height + p) return;
        A* to = sums + (i - p) * pitch;
        for (int64_t x = 0; x < width; ++x) to[x] += weight * A(widen(from[x]));
      };
      add(point.low, point.w_low);
      add(point.high, point.w_high);
    }
    A* const row = sums + a_.mask_height * pitch;
    for (int64_t i = 0; i < a_.mask_height; ++i) {
      memset(row, 0, a_.mask_width * sizeof(A));
      for (int64_t x = 0; x < width; ++x) {
        const auto point = roi::paste_point<A>(columns, columns.begin + x, a_.mask_width + 2 * p);
        const A g = sums[i * pitch + x];
        if (point.low >= p && point.low < a_.mask_width + p) row[point.low - p] += point.w_low * g;
        if (point.high >= p && point.high < a_.mask_width + p) row[point.high - p] += point.w_high * g;
      }
      for (int64_t x = 0; x < a_.mask_width; ++x) out[i * a_.mask_width + x] = narrowed<T>(row[x]);
    }
  }

  const PasteArgs& a_;
  const Workers& workers_;
  A* const workspace_;
};

int64_t workspace(const PasteArgs& a, int64_t workers) {
  return with_types(a.type, [&]<typename T, typename A>() { return Paste<T, A>::workspace(a, workers); });
}

void paste(const PasteArgs& a, void* out, void* workspace, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { Paste<T, A>(a, workspace, workers).run(out); });
}

void backward(const PasteArgs& a, const void* grad, void* grad_masks, void* workspace, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { Paste<T, A>(a, workspace, workers).backward(grad, grad_masks); });
}

void run_lengths(const PasteArgs& a, PasteRuns* runs, void* workspace, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { Paste<T, A>(a, workspace, workers).run_lengths(runs); });
}

}  // namespace

extern const PasteKernelTable paste_kernels;
const PasteKernelTable paste_kernels = {
    .workspace = workspace, .paste = paste, .backward = backward, .run_lengths = run_lengths};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
