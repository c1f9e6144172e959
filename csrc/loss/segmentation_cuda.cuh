// Statistics, their backward pass and the loss of single pixels of segmentation maps (formulas: segmentation_math.h).
//
// A block takes kUnitPixels pixels of an image, a tile of P pixels and all C classes at a time. Tiles of logits, of a
// dense target and of dense weights lie in shared memory as [C, P], so that every element is read from device memory
// once, in 16 bytes where alignment allows, whatever the memory format: logits once forward, once backward, the
// gradient written once. kThreads / P lanes share a pixel for softmax; forward, a warp reduces a class of the tile by
// shuffles, adds it to the block's sums in shared memory, and a second kernel adds the blocks' sums, in double, in
// order. No atomics: deterministic. More classes than shared memory holds (about 200; kShared = false): elements are
// read again where they are needed, three times forward and four times backward, from the caches if these hold them.
// Labels out of range: the image's statistics, and the pixel's loss and gradient, are NaN.
#pragma once

#include "loss/segmentation_elements.cuh"

namespace pyseg::loss {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kBlocks = 1;              // told nothing, the compiler rather spills registers than lose a resident block
constexpr int kMostShared = 40 * 1024;  // four blocks on a multiprocessor of sm_80
constexpr unsigned kAllLanes = 0xffffffff;

// The columns that have a gradient.
enum GradColumn { kOfP, kOfPP, kOfPG, kOfPPG, kOfPos, kOfNeg, kOfNll, kGradColumns };
constexpr int kUnknown = -2, kNoLabel = -1;

// How a launch cuts the map; shared memory in elements of the type computed in.
struct Tiling {
  int pixels;  // P: 128, 64 or 32
  int stride;  // from one class of a tile to the next
  bool vectors;
};

// Shared memory of a block.
template <typename A>
struct Shared {
  A *logits, *target, *weights;  // [C, stride] each
  A *most, *scale, *log_sum;     // [P]: the largest logit, 1 / sum, log sum
  A* weight;                     // [P]
  A* columns;                    // [C, kStatistics]: sums, or [C, kGradColumns]: the gradient
  int* label;                    // [P]
};

__host__ __device__ inline int shared_elements(const SegmentationArgs& a, const Tiling& t, bool tiles) {
  const int maps = tiles ? 1 + a.dense + a.dense_weight : 0;
  return maps * a.classes * t.stride + 5 * t.pixels + (tiles ? a.classes * kStatistics : 0);
}

template <typename A>
__device__ inline Shared<A> shared_of(const SegmentationArgs& a, const Tiling& t, bool tiles, A* memory) {
  Shared<A> s = {};
  if (tiles) {
    const int tile = a.classes * t.stride;
    s.logits = memory;
    memory += tile;
    if (a.dense) s.target = memory, memory += tile;
    if (a.dense_weight) s.weights = memory, memory += tile;
    s.columns = memory;
    memory += a.classes * kStatistics;
  }
  s.most = memory;
  s.scale = s.most + t.pixels;
  s.log_sum = s.scale + t.pixels;
  s.weight = s.log_sum + t.pixels;
  s.label = reinterpret_cast<int*>(s.weight + t.pixels);
  return s;
}

// One block's place, and its view of the maps.
template <typename T, bool kShared>
struct Block {
  using A = Accumulator<T>;
  static constexpr int kVector = 16 / sizeof(T);

  const SegmentationArgs& a;
  const Tiling& t;
  Shared<A> s;
  int64_t image, first;  // pixel of the tile
  int count;             // pixels of the tile on the map

  __device__ Block(const SegmentationArgs& args, const Tiling& tiling, A* memory)
      : a(args), t(tiling), s(shared_of(args, tiling, kShared, memory)) {
    const int64_t units = (a.pixels + kUnitPixels - 1) / kUnitPixels;
    image = blockIdx.x / units;
    first = (blockIdx.x - image * units) * kUnitPixels;
    count = 0;
  }

  __device__ int64_t end_of_unit() const { return min(first / kUnitPixels * kUnitPixels + kUnitPixels, a.pixels); }

  __device__ int64_t index(int c, int pixel) const {
    return a.channels_last ? (image * a.pixels + first + pixel) * a.classes + c
                           : (image * a.classes + c) * a.pixels + first + pixel;
  }

  // --- Elements

  __device__ A logit(int c, int pixel) const {
    if constexpr (kShared) return s.logits[c * t.stride + pixel];
    return widen(static_cast<const T*>(a.logits)[index(c, pixel)]);
  }

  __device__ bool is_binary() const { return a.classes == 1 && a.activation != Activation::kSoftmax; }

  // The target of an element; false where it does not count.
  __device__ bool target(int c, int pixel, A& g) const {
    bool counts = true;
    if (a.dense) {
      if constexpr (kShared) {
        g = s.target[c * t.stride + pixel];
      } else {
        g = load_number<A>(a.target, a.target_type, index(c, pixel));
      }
      counts = !a.has_ignore || a.target_type <= Element::kBFloat16 || g != A(a.ignore);
      if (counts && a.target_type > Element::kBFloat16 && g != A(0) && g != A(1)) g = A(nan(""));
    } else {
      const int label = s.label[pixel];
      counts = label != kNoLabel;
      g = label == kUnknown ? A(nan("")) : A(label == (is_binary() ? 1 : c));
    }
    g = g * A(a.target_scale) + A(a.target_shift);
    return counts;
  }

  __device__ A weight(int c, int pixel) const {
    if (!a.dense_weight) return s.weight[pixel];
    if constexpr (kShared) return s.weights[c * t.stride + pixel];
    return load_number<A>(a.weight, a.weight_type, index(c, pixel));
  }

  __device__ Probability<A> probability(int c, int pixel) const {
    const A z = logit(c, pixel);
    switch (a.activation) {
      case Activation::kSoftmax: return softmax_of(z - s.most[pixel], s.scale[pixel], s.log_sum[pixel]);
      case Activation::kSigmoid: return sigmoid_of(z);
      default: return probability_of(z);
    }
  }

  // The gradient of a column of the image and class.
  __device__ A gradient(int c, GradColumn column) const {
    if constexpr (kShared) return s.columns[c * kGradColumns + column];
    return gradient_from_memory(c, column);
  }
  __device__ A gradient_from_memory(int c, int column) const {
    if (a.grad) {
      const int from = column < kOfPos ? kP | kPP << 8 | kPG << 16 | kPPG << 24 : kPos | kNeg << 8 | kNll << 16;
      return A(a.grad[(image * a.classes + c) * kStatistics + (from >> column % 4 * 8 & 255)]);
    }
    if (a.scale) return column == kOfPG ? load_number<A>(a.scale, a.scale_type, image * a.classes + c) : A(0);
    const double factor = column == kOfPos ? a.of_pos : column == kOfNeg ? a.of_neg : column == kOfNll ? a.of_nll : 0;
    return A(factor) * (a.class_weight ? load_number<A>(a.class_weight, a.class_weight_type, c) : A(1));
  }
  __device__ void load_gradients() {
    if constexpr (kShared) {
      for (int i = threadIdx.x; i < a.classes * kGradColumns; i += kThreads) {
        const int c = i / kGradColumns;
        s.columns[i] = gradient_from_memory(c, i - c * kGradColumns);
      }
    }
  }

  // --- Tiles

  // f(offset in memory, class, pixel) for the tile's vectors of kSize elements; along a class, channels_last along
  // classes.
  template <int kSize, typename F>
  __device__ void each_vector(const F& f) const {
    if (a.channels_last) {
      const int64_t from = (image * a.pixels + first) * a.classes;
      const int vectors = count * a.classes / kSize;
      for (int v = threadIdx.x; v < vectors; v += kThreads) {
        const int pixel = v * kSize / a.classes;
        f(from + v * kSize, v * kSize - pixel * a.classes, pixel);
      }
    } else {
      const int of_row = t.pixels / kSize;
      for (int v = threadIdx.x; v < a.classes * of_row; v += kThreads) {
        const int c = v / of_row, pixel = (v - c * of_row) * kSize;
        if (pixel < count) f((image * a.classes + c) * a.pixels + first + pixel, c, pixel);
      }
    }
  }

  // Where element j of a vector that starts at (c, pixel) lies in a tile; steps c and pixel on to the next.
  __device__ int step(int& c, int& pixel) const {
    const int at = c * t.stride + pixel;
    if (!a.channels_last) {
      ++pixel;
    } else if (++c == a.classes) {
      c = 0;
      ++pixel;
    }
    return at;
  }

  __device__ void load_logits() {
    const T* from = static_cast<const T*>(a.logits);
    if (t.vectors) {
      each_vector<kVector>([&](int64_t offset, int c, int pixel) {
        const uint4 bits = *reinterpret_cast<const uint4*>(from + offset);
        T elements[kVector];
        __builtin_memcpy(elements, &bits, 16);
#pragma unroll
        for (int j = 0; j < kVector; ++j) s.logits[step(c, pixel)] = widen(elements[j]);
      });
    } else {
      each_vector<1>([&](int64_t offset, int c, int pixel) { s.logits[c * t.stride + pixel] = widen(from[offset]); });
    }
  }

  __device__ void load_map(const void* from, Element type, A* tile) {
    each_vector<1>(
        [&](int64_t offset, int c, int pixel) { tile[c * t.stride + pixel] = load_number<A>(from, type, offset); });
  }

  // The tile of logits, which holds a result by now, to memory.
  template <typename To>
  __device__ void store_tile(To* to) const {
    constexpr int kSize = 16 / sizeof(To);
    if (t.vectors) {
      each_vector<kSize>([&](int64_t offset, int c, int pixel) {
        To elements[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) elements[j] = narrow<To>(s.logits[step(c, pixel)]);
        uint4 bits;
        __builtin_memcpy(&bits, elements, 16);
        __stwb(reinterpret_cast<uint4*>(to + offset), bits);  // an assignment may be taken apart
      });
    } else {
      each_vector<1>(
          [&](int64_t offset, int c, int pixel) { to[offset] = narrow<To>(s.logits[c * t.stride + pixel]); });
    }
  }

  // Labels and weights of the tile that starts at `first`. Returns whether this thread saw a label out of range.
  __device__ bool load_pixels() {
    count = static_cast<int>(min(int64_t{t.pixels}, a.pixels - first));
    bool unknown = false;
    for (int pixel = threadIdx.x; pixel < count; pixel += kThreads) {
      const int64_t at = image * a.pixels + first + pixel;
      int label = 0;
      if (!a.dense) {
        const int64_t given = load_integer(a.target, a.target_type, at);
        const int64_t limit = is_binary() ? 2 : a.classes;
        const bool ignored = a.has_ignore && given == a.ignore;
        const bool known = given >= 0 && given < limit;
        label = ignored ? kNoLabel : known ? static_cast<int>(given) : kUnknown;
        unknown |= label == kUnknown;
      }
      s.label[pixel] = label;
      s.weight[pixel] = a.weight && !a.dense_weight ? load_number<A>(a.weight, a.weight_type, at) : A(1);
    }
    return unknown;
  }

  // The same with the rest of the tile and, for softmax, what a pixel's classes share.
  __device__ bool load() {
    const bool unknown = load_pixels();
    if constexpr (kShared) {
      load_logits();
      if (a.dense) load_map(a.target, a.target_type, s.target);
      if (a.dense_weight) load_map(a.weight, a.weight_type, s.weights);
    }
    __syncthreads();
    if (a.activation == Activation::kSoftmax) {
      normalise();
      __syncthreads();
    }
    return unknown;
  }

  // --- Lanes that share a pixel

  __device__ int lanes() const { return kThreads / t.pixels; }
  __device__ int own_pixel() const {
    const int pixels = 32 / lanes();
    return threadIdx.x / 32 * pixels + threadIdx.x % pixels;
  }
  __device__ int own_class() const { return threadIdx.x % 32 / (32 / lanes()); }

  __device__ A sum_of_pixel(A x) const {
    for (int mask = 32 / lanes(); mask < 32; mask *= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
    return x;
  }

  __device__ void normalise() {
    const int pixel = own_pixel();
    const int classes = pixel < count ? a.classes : 0;
    A most = A(-INFINITY), sum = A(0);
    for (int c = own_class(); c < classes; c += lanes()) {
      const A z = logit(c, pixel);
      most = most < z ? z : most;  // a NaN shows in the sum
    }
    for (int mask = 32 / lanes(); mask < 32; mask *= 2) {
      const A other = __shfl_xor_sync(kAllLanes, most, mask);
      most = most < other ? other : most;
    }
    for (int c = own_class(); c < classes; c += lanes()) sum += exponential(logit(c, pixel) - most);
    sum = sum_of_pixel(sum);
    if (own_class() == 0 && pixel < count) {
      s.most[pixel] = most;
      s.scale[pixel] = A(1) / sum;
      s.log_sum[pixel] = logarithm(sum);
    }
  }
};

template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

extern __shared__ __align__(16) unsigned char segmentation_shared[];

// Grid: images * units. Without tiles the sums of a class stay in the first lane of its warp only for the time of a
// unit: the loops over classes and tiles change places.
template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    segmentation_statistics_kernel(const __grid_constant__ SegmentationArgs a, const __grid_constant__ Tiling t) {
  using A = Accumulator<T>;
  Block<T, kShared> block(a, t, reinterpret_cast<A*>(segmentation_shared));
  double* partial = a.partial + blockIdx.x * (int64_t{a.classes} * kStatistics);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool softmax = a.activation == Activation::kSoftmax;
  const A gamma = A(a.gamma);

  // 1. Sums start at zero.
  for (int i = threadIdx.x; i < a.classes * kStatistics; i += kThreads) {
    if constexpr (kShared) {
      block.s.columns[i] = A(0);
    } else {
      partial[i] = 0;
    }
  }

  bool unknown = false;
  for (const int64_t end = block.end_of_unit(); block.first < end; block.first += t.pixels) {
    // 2. The tile; the barrier inside also ends the last one's use.
    __syncthreads();
    unknown |= block.load();

    // 3. A warp adds up a class.
    for (int c = warp; c < a.classes; c += kWarps) {
      A sum[kStatistics] = {};
      for (int pixel = lane; pixel < block.count; pixel += 32) {
        A g;
        if (!block.target(c, pixel, g)) continue;
        const Probability<A> x = block.probability(c, pixel);
        if (a.region) {
          sum[kPG] += x.p * g;
          sum[kP] += x.p;
          sum[kG] += g;
          sum[kPP] += x.p * x.p;
          sum[kGG] += g * g;
          sum[kPPG] += x.p * x.p * g;
        }
        const A w = block.weight(c, pixel);
        if (a.pixel) {
          if (w * g != A(0)) sum[kPos] += w * g * (power(x.rest, gamma) * x.log_p);
          const A no = w * (A(1) - g);
          if (!softmax && no != A(0)) sum[kNeg] += no * (power(x.p, gamma) * x.log_rest);
          sum[kWG] += w * g;
          sum[kW] += w;
        }
        if (a.smoothing) sum[kNll] += w * x.log_p;
      }
      __syncwarp();
#pragma unroll
      for (int column = 0; column < kStatistics; ++column) {
        const bool asked = column <= kPPG ? a.region : column <= kW ? a.pixel : a.smoothing;
        if (!asked) continue;
        const A total = warp_sum(sum[column]);
        if (lane != 0) continue;
        if constexpr (kShared) {
          block.s.columns[c * kStatistics + column] += total;
        } else {
          partial[c * kStatistics + column] += double(total);
        }
      }
      __syncwarp();
    }
  }

  // 4. The block's sums.
  unknown = __syncthreads_or(unknown);
  for (int i = threadIdx.x; i < a.classes * kStatistics; i += kThreads) {
    if constexpr (kShared) {
      partial[i] = unknown ? nan("") : double(block.s.columns[i]);
    } else if (unknown) {
      partial[i] = nan("");
    }
  }
}

// statistics[n, i] = sum over the image's units of partial[n, unit, i], i < row = C * kStatistics.
static __global__ void __launch_bounds__(kThreads)
    segmentation_statistics_reduce(const double* partial, double* statistics, int64_t images, int units, int row) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= images * row) return;
  const int64_t image = at / row, i = at - image * row;
  const double* from = partial + image * units * row + i;
  double total = 0;
  for (int unit = 0; unit < units; ++unit) total += from[int64_t{unit} * row];
  statistics[at] = total;
}

// x = p dp - u - n of an element (softmax; see cpu_backward.h), or its whole gradient.
template <typename T, bool kShared>
__device__ __forceinline__ Accumulator<T> element_slope(const Block<T, kShared>& block,
                                                        const Probability<Accumulator<T>>& x, int c, int pixel) {
  using A = Accumulator<T>;
  const SegmentationArgs& a = block.a;
  const A gamma = A(a.gamma), least = A(kLeastDenominator);
  A g;
  if (!block.target(c, pixel, g)) return A(0);
  A slope = A(0);
  if (a.region) {
    const A dp = block.gradient(c, kOfP) + A(2) * block.gradient(c, kOfPP) * x.p +
                 g * (block.gradient(c, kOfPG) + A(2) * block.gradient(c, kOfPPG) * x.p);
    slope = a.activation == Activation::kSoftmax   ? x.p * dp
            : a.activation == Activation::kSigmoid ? x.p * x.rest * dp
                                                   : dp;
  }
  if (!a.pixel && !a.smoothing) return slope;
  const A w = block.weight(c, pixel);
  if (a.pixel) {
    const A positive = w * g * block.gradient(c, kOfPos), negative = w * (A(1) - g) * block.gradient(c, kOfNeg);
    switch (a.activation) {
      case Activation::kSoftmax:
        if (positive != A(0)) slope -= positive * focal_slope(x.p, x.rest, x.log_p, gamma);
        break;
      case Activation::kSigmoid:
        if (positive != A(0)) slope -= positive * power(x.rest, gamma) * (x.rest + gamma * product(x.p, x.log_p));
        if (negative != A(0)) slope += negative * power(x.p, gamma) * (x.p + gamma * product(x.rest, x.log_rest));
        break;
      case Activation::kNone:
        if (positive != A(0)) slope -= positive * focal_slope(x.p, x.rest, x.log_p, gamma) / max(x.p, least);
        if (negative != A(0)) slope += negative * focal_slope(x.rest, x.p, x.log_rest, gamma) / max(x.rest, least);
    }
  }
  if (a.smoothing) {
    const A n = w * block.gradient(c, kOfNll);
    slope -= a.activation == Activation::kSoftmax   ? n
             : a.activation == Activation::kSigmoid ? n * x.rest
                                                    : n / max(x.p, least);
  }
  return slope;
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    segmentation_backward_kernel(const __grid_constant__ SegmentationArgs a, const __grid_constant__ Tiling t) {
  using A = Accumulator<T>;
  Block<T, kShared> block(a, t, reinterpret_cast<A*>(segmentation_shared));
  T* to = static_cast<T*>(a.to);
  block.load_gradients();
  for (const int64_t end = block.end_of_unit(); block.first < end; block.first += t.pixels) {
    // 1. The tile; a barrier for the last one's use.
    __syncthreads();
    block.load();

    // 2. Softmax: dz_c = x_c - p_c sum(x).
    const int pixel = block.own_pixel();
    const int classes = pixel < block.count ? a.classes : 0;
    const bool softmax = a.activation == Activation::kSoftmax;
    A sum = A(0);
    if (softmax) {
      for (int c = block.own_class(); c < classes; c += block.lanes())
        sum += element_slope(block, block.probability(c, pixel), c, pixel);
      __syncwarp();
      sum = block.sum_of_pixel(sum);
      // A label out of range has reached all classes through the sum; one that is ignored counts for none.
      if (!a.dense && pixel < block.count && block.s.label[pixel] == kNoLabel) sum = A(0);
    }

    // 3. The gradient, in the logits' place: each by the thread that alone reads that logit.
    for (int c = block.own_class(); c < classes; c += block.lanes()) {
      const Probability<A> x = block.probability(c, pixel);
      A dz = element_slope(block, x, c, pixel);
      const bool ignored = !a.dense && block.s.label[pixel] == kNoLabel;
      if (softmax && !ignored) dz -= x.p * sum;
      if constexpr (kShared) {
        block.s.logits[c * t.stride + pixel] = dz;
      } else {
        to[block.index(c, pixel)] = narrow<T>(dz);
      }
    }
    if constexpr (kShared) {
      __syncthreads();
      block.store_tile(to);
    }
  }
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    segmentation_pixel_loss_kernel(const __grid_constant__ SegmentationArgs a, const __grid_constant__ Tiling t) {
  using A = Accumulator<T>;
  Block<T, kShared> block(a, t, reinterpret_cast<A*>(segmentation_shared));
  A* to = static_cast<A*>(a.to);
  const A gamma = A(a.gamma);
  const bool softmax = a.activation == Activation::kSoftmax;
  block.load_gradients();
  for (const int64_t end = block.end_of_unit(); block.first < end; block.first += t.pixels) {
    __syncthreads();
    block.load();
    const int pixel = block.own_pixel();
    const int classes = pixel < block.count ? a.classes : 0;
    A sum = A(0);
    for (int c = block.own_class(); c < classes; c += block.lanes()) {
      A g, loss = A(0);
      if (block.target(c, pixel, g)) {
        const Probability<A> x = block.probability(c, pixel);
        const A positive = g * block.gradient(c, kOfPos), negative = (A(1) - g) * block.gradient(c, kOfNeg);
        if (positive != A(0)) loss += positive * (power(x.rest, gamma) * x.log_p);
        if (!softmax && negative != A(0)) loss += negative * (power(x.p, gamma) * x.log_rest);
        if (a.smoothing) loss += block.gradient(c, kOfNll) * x.log_p;
      }
      sum += loss;
      if (softmax) continue;
      if constexpr (kShared) {
        block.s.logits[c * t.stride + pixel] = loss;
      } else {
        to[block.index(c, pixel)] = loss;
      }
    }
    __syncwarp();
    if (softmax) {
      sum = block.sum_of_pixel(sum);
      if (block.own_class() == 0 && pixel < block.count) to[block.image * a.pixels + block.first + pixel] = sum;
    } else if constexpr (kShared) {
      __syncthreads();
      block.store_tile(to);
    }
  }
}

}  // namespace pyseg::loss
