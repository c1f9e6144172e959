// The CPU kernels of expectation_labels for one instruction set: compiled once per target, PYSEG_TARGET is its name.
//
// Without shares: blocks of pixels that stay in the first-level cache, the best score and its class in vectors over
// pixels, rows of the logits where they lie if type and layout allow. With shares: the rows of the classes that compete
// come once into scratch (cpu_expectation_bias.h), where all passes of the selection and the labels find them.
#include "common/cpu_workers.h"
#include "loss/cpu_expectation_bias.h"
#include "loss/expectation_labels_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

using loss::ExpectationArgs;

constexpr int64_t kBlock = 1024;  // pixels

// The classes of a block of pixels.
template <typename A>
class Labels {
  using Int = Integer<A>;
  using IntVec = decltype(Vec<A>{} < Vec<A>{});

 public:
  void begin() {
    for (int64_t i = 0; i < kBlock; ++i) best_[i] = -infinity<A>();
    fresh_ = true;
  }

  // A class's scores of whole vectors of pixels. The first of equal ones stays.
  void offer(const A* row, int64_t padded, A bias, int64_t c) {
    const IntVec own = IntVec{} + Int(c);
    for (int64_t i = 0; i < padded; i += kLanes<A>) {
      const Vec<A> v = load(row + i);
      const Vec<A> score = (v == v ? v : broadcast(infinity<A>())) + bias, best = load(best_ + i);
      const IntVec wins = fresh_ ? ~IntVec{} : score > best;
      store(best_ + i, wins ? score : best);
      IntVec* at = reinterpret_cast<IntVec*>(class_ + i);
      *at = wins ? own : *at;
    }
    fresh_ = false;
  }

  void write(const ExpectationArgs& a, int64_t image, int64_t first, int64_t count) const {
    int64_t* to = a.labels + image * a.pixels + first;
    if (fresh_) {
      for (int64_t i = 0; i < count; ++i) to[i] = a.ignore_index;
      return;
    }
    for (int64_t i = 0; i < count; ++i) to[i] = class_[i];
    if (a.valid == nullptr) return;
    const uint8_t* valid = a.valid + image * a.pixels + first;
    for (int64_t i = 0; i < count; ++i) to[i] = valid[i] ? to[i] : a.ignore_index;
  }

 private:
  alignas(64) A best_[kBlock];
  alignas(64) Int class_[kBlock];
  bool fresh_;  // no class yet
};

// Scratch of a worker: the competing classes, their biases, and what the selection needs.
template <typename A>
struct Scratch {
  int64_t* classes;  // [competing]
  A* bias;           // [competing]
  BiasScratch<A> rows;

  Scratch(const ExpectationArgs& a, int64_t competing, Arena& arena)
      : classes(arena.take<int64_t>(competing)),
        bias(arena.take<A>(competing)),
        rows(is_adaptive(a) ? competing : 0, is_adaptive(a) ? a.pixels : 0, arena) {}
};

// The classes that compete in an image and what their biases start at; all biases of the image are written.
template <typename A>
int64_t list_classes(const ExpectationArgs& a, int64_t image, const Scratch<A>& s) {
  const uint8_t* present = a.present + image * a.classes;
  int64_t count = 0;
  for (int64_t c = 0; c < a.classes; ++c) {
    if (a.exclude_absent && !present[c]) continue;
    s.classes[count] = c;
    s.bias[count++] = A(!present[c] ? 0 : c == 0 ? a.background_bias : a.foreground_bias);
  }
  return count;
}

template <typename A>
void write_bias(const ExpectationArgs& a, int64_t image, const Scratch<A>& s, int64_t count) {
  A* to = static_cast<A*>(a.bias) + image * a.classes;
  for (int64_t c = 0; c < a.classes; ++c) to[c] = -infinity<A>();
  for (int64_t i = 0; i < count; ++i) to[s.classes[i]] = s.bias[i];
}

// One image with shares.
template <typename T, typename A>
void adapt(const ExpectationArgs& a, int64_t image, Scratch<A>& s, Labels<A>& labels) {
  const int64_t count = list_classes(a, image, s);
  const uint8_t* valid = a.valid ? a.valid + image * a.pixels : nullptr;
  const T* logits = static_cast<const T*>(a.logits) + image * a.image_stride;
  for (int64_t i = 0; i < count; ++i)
    fill_row(s.rows, i, logits + s.classes[i] * a.class_stride, a.pixel_stride, valid, a.pixels);
  const uint8_t* present = a.present + image * a.classes;
  int64_t pixels = a.pixels, foreground = 0;
  for (int64_t c = 1; c < a.classes; ++c) foreground += present[c] != 0;
  if (valid)
    for (int64_t p = 0; p < a.pixels; ++p) pixels -= valid[p] == 0;
  const loss::Quotas quotas = loss::quotas_of(a, present[0] != 0, foreground, pixels);
  const auto quota = [&](int64_t i) {
    const int64_t c = s.classes[i];
    return !present[c] ? 0 : c == 0 ? quotas.background : quotas.foreground;
  };
  raise_biases(s.rows, count, quota, a.sweeps, s.bias);
  write_bias(a, image, s, count);
  for (int64_t first = 0; first < a.pixels; first += kBlock) {
    const int64_t pixels_here = smaller(kBlock, a.pixels - first), padded = round_up(pixels_here, kLanes<A>);
    labels.begin();
    for (int64_t i = 0; i < count; ++i) labels.offer(s.rows.row(i) + first, padded, s.bias[i], s.classes[i]);
    labels.write(a, image, first, pixels_here);
  }
}

// A block of pixels of one class as whole vectors: where it lies, or in `staged`.
template <typename T, typename A>
const A* scores(const ExpectationArgs& a, const T* from, int64_t count, int64_t padded, A* staged) {
  if constexpr (kSame<T, A>) {
    if (a.pixel_stride == 1 && padded == count) {
      // The next block's run: the processor's own prefetchers give up where runs are this short.
      for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + kBlock + i, 0, 2);
      return from;
    }
  }
  if (a.pixel_stride == 1) {
    convert_run(from, staged, count);
  } else {
    for (int64_t i = 0; i < count; ++i) staged[i] = A(widen(from[i * a.pixel_stride]));
  }
  for (int64_t i = count; i < padded; ++i) staged[i] = A(0);
  return staged;
}

// Blocks first..last - 1 of all images, without shares.
template <typename T, typename A>
void label_blocks(const ExpectationArgs& a, int64_t first, int64_t last, const Scratch<A>& s, Labels<A>& labels) {
  alignas(64) A staged[kBlock];
  const int64_t blocks = (a.pixels + kBlock - 1) / kBlock;
  int64_t image = -1, count = 0;
  for (int64_t block = first; block < last; ++block) {
    if (block / blocks != image) {
      image = block / blocks;
      count = list_classes(a, image, s);
    }
    const int64_t from = block % blocks * kBlock, pixels = smaller(kBlock, a.pixels - from);
    const int64_t padded = round_up(pixels, kLanes<A>);
    const T* logits = static_cast<const T*>(a.logits) + image * a.image_stride + from * a.pixel_stride;
    labels.begin();
    for (int64_t i = 0; i < count; ++i) {
      const A* row = scores<T, A>(a, logits + s.classes[i] * a.class_stride, pixels, padded, staged);
      labels.offer(row, padded, s.bias[i], s.classes[i]);
    }
    labels.write(a, image, from, pixels);
  }
}

template <typename T, typename A>
void run_as(const ExpectationArgs& a, int64_t competing, char* workspace, int64_t bytes, const Workers& workers) {
  const bool adaptive = is_adaptive(a);
  if (!adaptive) {
    Arena arena(workspace);
    const Scratch<A> s(a, competing, arena);
    for (int64_t image = 0; image < a.images; ++image) write_bias(a, image, s, list_classes(a, image, s));
  }
  const int64_t blocks = (a.pixels + kBlock - 1) / kBlock;
  for_each_part(workers, adaptive ? a.images : a.images * blocks, [&](int64_t worker, int64_t first, int64_t last) {
    Arena arena(workspace + worker * bytes);
    Scratch<A> s(a, competing, arena);
    Labels<A> labels;
    if (!adaptive) return label_blocks<T, A>(a, first, last, s, labels);
    for (int64_t image = first; image < last; ++image) adapt<T, A>(a, image, s, labels);
  });
}

template <typename A>
int64_t bytes_as(const ExpectationArgs& a, int64_t competing) {
  Arena arena(nullptr);
  const Scratch<A> s(a, competing, arena);
  return arena.used();
}

int64_t worker_bytes(const ExpectationArgs& a, int64_t competing) {
  return a.logits_type == Element::kDouble ? bytes_as<double>(a, competing) : bytes_as<float>(a, competing);
}

void run(const ExpectationArgs& a, int64_t competing, void* workspace, const Workers& workers) {
  const int64_t bytes = worker_bytes(a, competing);
  with_types(a.logits_type, [&]<typename T, typename A>() {
    run_as<T, A>(a, competing, static_cast<char*>(workspace), bytes, workers);
  });
}

}  // namespace

extern const ExpectationKernels expectation_kernels;
const ExpectationKernels expectation_kernels = {worker_bytes, run};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
