// point_supervision_loss: image-level, point and objectness terms (formulas: point_supervision_math.h).
//
// Tiles of [C, P] logits in shared memory as in segmentation_cuda.cuh: forward every logit is read from device memory once,
// backward once too and the gradient written once; without objectness a tile's logits are read only where it holds a
// point or a class's best pixel, and all other tiles are zeros. kThreads / P lanes share a pixel: they reduce the maxima
// and the sums of exponentials of its two sets of classes by shuffles. Then a warp looks through a class's row for its
// largest rank; only if some lane has found a larger one is the warp's first largest pixel looked for. A warp for each
// image and class chooses among the blocks' pixels and computes the class's log-odds there; a block for each image adds
// up. Sums in a fixed order, no atomics: deterministic. Labels out of range make the image's point term NaN.
#pragma once

#include "loss/point_supervision_cuda.h"
#include "loss/segmentation_cuda.cuh"

namespace pyseg::loss {

// Behind a Block's shared memory. Of every class, forward: the largest rank so far, its pixel of the unit, its points,
// whether it is an object. Backward: its best pixel if that is in the unit, else -1, and there the largest of the other
// classes' logits, the gradient of the class's own and, before exp(z - most), of the others'.
template <typename A>
struct PointShared {
  A *value, *most, *own, *others;
  int *at, *points, *object;

  __device__ PointShared(const SegmentationArgs& a, A* memory) {
    value = most = memory;
    own = most + a.classes;
    others = own + a.classes;
    at = reinterpret_cast<int*>(others + a.classes);
    points = at + a.classes;
    object = points + a.classes;
  }
};

inline size_t point_shared_bytes(int classes, size_t size) { return classes * (3 * size + 3 * sizeof(int)); }

static_assert(kMostPointClasses * (3 * sizeof(double) + 3 * sizeof(int)) + 5 * kThreads * sizeof(double) <= 48 << 10,
              "with most classes there are no tiles, and the rest fits what a block may have without asking");

__device__ __forceinline__ bool is_object(const PointSupervisionArgs& p, int c) {
  return p.objects[c / 32] >> (c % 32) & 1;
}

template <typename A>
__device__ __forceinline__ A softplus(A x) {
  return max(x, A(0)) + logarithm_1p(exponential(-abs(x)));
}
template <typename A>
__device__ __forceinline__ A logistic(A x) {
  const A e = exponential(-abs(x)), r = A(1) / (A(1) + e);
  return x < A(0) ? e * r : r;
}

// Whether value v at `at` comes before the other: the larger one, the first of equal ones; NaN is the largest, as in torch.
template <typename A, typename I>
__device__ __forceinline__ bool precedes(A v, I at, A other, I other_at) {
  const bool nan = v != v, other_nan = other != other;
  if (nan != other_nan) return nan;
  return v > other || ((nan || v == other) && at < other_at);
}

// The largest logit and the sum of exponentials of each set of classes; without objectness all are in the second. Also,
// in `rest`, that sum without one of the largest: these are counted, since beside a 1 small exponentials would be lost.
template <typename A>
struct PixelSums {
  A most_objects = A(-INFINITY), most = A(-INFINITY);
  A objects = A(0), sum = A(0), rest_objects = A(0), rest = A(0);

  // The log-odds of the objects together.
  __device__ A log_odds() const { return (most_objects - most) + (logarithm(objects) - logarithm(sum)); }
};

template <typename T, bool kShared>
__device__ __forceinline__ PixelSums<Accumulator<T>> pixel_sums(const Block<T, kShared>& block, const int* object,
                                                                int pixel, int classes) {
  using A = Accumulator<T>;
  PixelSums<A> s;
  for (int c = block.own_class(); c < classes; c += block.lanes()) {
    const A z = block.logit(c, pixel);
    if (object[c]) {
      s.most_objects = max(s.most_objects, z);
    } else {
      s.most = max(s.most, z);
    }
  }
  for (int mask = 32 / block.lanes(); mask < 32; mask *= 2) {
    s.most_objects = max(s.most_objects, __shfl_xor_sync(kAllLanes, s.most_objects, mask));
    s.most = max(s.most, __shfl_xor_sync(kAllLanes, s.most, mask));
  }
  A most_counts = A(0), object_counts = A(0);
  for (int c = block.own_class(); c < classes; c += block.lanes()) {
    const A z = block.logit(c, pixel), most = object[c] ? s.most_objects : s.most;
    const A e = z == most ? A(0) : exponential(z - most), count = z == most ? A(1) : A(0);
    if (object[c]) {
      s.rest_objects += e;
      object_counts += count;
    } else {
      s.rest += e;
      most_counts += count;
    }
  }
  s.rest_objects = block.sum_of_pixel(s.rest_objects);
  s.rest = block.sum_of_pixel(s.rest);
  object_counts = block.sum_of_pixel(object_counts);
  most_counts = block.sum_of_pixel(most_counts);
  s.objects = s.rest_objects + object_counts;
  s.sum = s.rest + most_counts;
  s.rest_objects += object_counts - A(1);
  s.rest += most_counts - A(1);
  return s;
}

// Of a pixel's largest logit: itself, -log of its S, its rank.
template <typename A>
struct LargestLogit {
  A logit, lost, rank;
};

template <typename T, bool kShared>
__device__ __forceinline__ LargestLogit<Accumulator<T>> largest_logit(const Block<T, kShared>& block,
                                                                      const PixelSums<Accumulator<T>>& sums,
                                                                      bool objectness, int pixel) {
  using A = Accumulator<T>;
  constexpr A kLost = sizeof(A) == 8 ? A(0x1p-960) : A(0x1p-100);  // exponentials beside it may have vanished
  A most = sums.most, rest = sums.rest;
  if (objectness) {
    const A distance = sums.most_objects - most, e = exponential(-abs(distance));
    rest = distance > A(0) ? sums.rest_objects + sums.sum * e : rest + sums.objects * e;
    most = distance > A(0) ? sums.most_objects : most;
  }
  rest += most - most;  // NaN for infinity
  A x = -logarithm(rest);
  if (rest < kLost) {
    A second = A(-INFINITY), sum = A(0);
    for (int c = 0; c < block.a.classes; ++c) {
      const A z = block.logit(c, pixel);
      if (z < most) second = max(second, z);
    }
    for (int c = 0; c < block.a.classes; ++c) {
      const A z = block.logit(c, pixel);
      if (z != most) sum += exponential(z - second);
    }
    x = (most - second) - logarithm(sum);
  }
  const A l = logarithm_1p(rest < A(1) ? rest : A(1) / rest), lost = max(-x, A(0)) + l;
  return {most, lost, x < A(0) ? -lost : x + (l - A(kLog4))};
}

// Of a logit against the others' largest one and the sum of their exponentials after that; NaN for infinity.
template <typename A>
__device__ __forceinline__ A log_odds_of(A own, A most, A sum) {
  return own < A(INFINITY) ? (own - most) - logarithm(sum) : A(nan(""));
}

// A class at a pixel against the others: its log-odds, their largest logit, the sum of their exponentials after that.
template <typename A>
struct OneAgainstOthers {
  A log_odds, most, sum;
};

// By one thread, from device memory: for the few pixels of a tile that have labels.
template <typename T, bool kShared>
__device__ __forceinline__ OneAgainstOthers<Accumulator<T>> against_others(const Block<T, kShared>& block, int c,
                                                                           int pixel) {
  using A = Accumulator<T>;
  const T* logits = static_cast<const T*>(block.a.logits);
  A most = A(-INFINITY), sum = A(0);
  for (int k = 0; k < block.a.classes; ++k)
    if (k != c) most = max(most, widen(logits[block.index(k, pixel)]));
  for (int k = 0; k < block.a.classes; ++k)
    if (k != c) sum += exponential(widen(logits[block.index(k, pixel)]) - most);
  return {log_odds_of(widen(logits[block.index(c, pixel)]), most, sum), most, sum};
}

// The sum over a block of each of kCount doubles, in all threads.
template <int kCount>
__device__ __forceinline__ void block_sums(double (&x)[kCount]) {
  __shared__ double of_warp[kWarps][kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = warp_sum(x[i]);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) x[i] += of_warp[warp][i];
  }
}

// Grid: images * units.
template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    point_supervision_kernel(const __grid_constant__ SegmentationArgs a, const __grid_constant__ Tiling t,
                             const __grid_constant__ PointSupervisionArgs p) {
  using A = Accumulator<T>;
  A* memory = reinterpret_cast<A*>(segmentation_shared);
  Block<T, kShared> block(a, t, memory);
  const PointShared<A> s(a, memory + shared_elements(a, t, kShared));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t start = block.first;

  // 1. Nothing has been found.
  for (int c = threadIdx.x; c < a.classes; c += kThreads) {
    s.value[c] = A(-INFINITY);
    s.at[c] = 0;
    s.points[c] = 0;
    s.object[c] = p.objectness && is_object(p, c);
  }

  double rest[kPointRest] = {};
  bool unknown = false;
  for (const int64_t end = block.end_of_unit(); block.first < end; block.first += t.pixels) {
    // 2. The tile; a barrier for the last one's use.
    __syncthreads();
    unknown |= block.load_pixels();
    if constexpr (kShared) block.load_logits();
    __syncthreads();

    // 3. What a pixel's classes share, and the pixel's terms.
    const int pixel = block.own_pixel();
    const bool on_map = pixel < block.count;
    const PixelSums<A> sums = pixel_sums(block, s.object, pixel, on_map ? a.classes : 0);
    bool labelled = false;
    if (on_map && block.own_class() == 0) {
      const LargestLogit<A> largest = largest_logit(block, sums, p.objectness != nullptr, pixel);
      block.s.most[pixel] = largest.logit;
      block.s.log_sum[pixel] = largest.lost;
      block.s.scale[pixel] = largest.rank;
      if (p.objectness) {
        const A u = sums.log_odds(), up = softplus(u);
        const A prior = load_number<A>(p.objectness, p.objectness_type, block.image * a.pixels + block.first + pixel);
        rest[kObjectnessSum] += double(product(prior, softplus(-u)) + product(A(1) - prior, up));
      }
      const int label = block.s.label[pixel];
      labelled = label >= 0;
      if (labelled) {
        rest[kPointSum] += double(block.s.weight[pixel] * softplus(-against_others(block, label, pixel).log_odds));
        rest[kPointsOfAll] += 1;
      }
    }
    const bool any_labelled = __syncthreads_or(labelled);

    // 4. A warp looks through a class.
    const int offset = static_cast<int>(block.first - start);
    for (int c = warp; c < a.classes; c += kWarps) {
      A value = s.value[c];
      int at = s.at[c];
      bool found = false;
      for (int i = lane; i < block.count; i += 32) {
        const A distance = block.logit(c, i) - block.s.most[i];
        const A v = distance == A(0) ? block.s.scale[i] : distance - block.s.log_sum[i];
        if (!precedes(v, offset + i, value, at)) continue;
        value = v;
        at = offset + i;
        found = true;
      }
      if (__any_sync(kAllLanes, found)) {
        for (int mask = 16; mask > 0; mask /= 2) {
          const A other = __shfl_xor_sync(kAllLanes, value, mask);
          const int other_at = __shfl_xor_sync(kAllLanes, at, mask);
          if (!precedes(other, other_at, value, at)) continue;
          value = other;
          at = other_at;
        }
      }
      int points = 0;
      if (any_labelled) {
        for (int i = lane; i < block.count; i += 32) points += block.s.label[i] == c;
        points = warp_sum(points);
      }
      __syncwarp();
      if (lane != 0) continue;
      s.value[c] = value;
      s.at[c] = at;
      s.points[c] += points;
    }
  }

  // 5. The block's results.
  if (unknown) rest[kPointSum] = nan("");
  block_sums(rest);
  for (int c = threadIdx.x; c < a.classes; c += kThreads) {
    double* to = p.best + (int64_t{blockIdx.x} * a.classes + c) * kPointBest;
    to[kValue] = double(s.value[c]);
    to[kPixel] = double(start + s.at[c]);
    to[kPoints] = s.points[c];
  }
  if (threadIdx.x < kPointRest) {
    double own = rest[0];
#pragma unroll
    for (int i = 1; i < kPointRest; ++i) own = threadIdx.x == i ? rest[i] : own;
    p.rest[int64_t{blockIdx.x} * kPointRest + threadIdx.x] = own;
  }
}

// A warp for each image and class: its best pixel, presence and log-odds there.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    point_supervision_classes_kernel(const __grid_constant__ SegmentationArgs a,
                                     const __grid_constant__ PointSupervisionArgs p, int units) {
  using A = Accumulator<T>;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= a.images * a.classes) return;
  const int lane = threadIdx.x % 32;
  const int64_t image = row / a.classes;
  const int c = static_cast<int>(row - image * a.classes);

  // 1. Of the units.
  double value = -INFINITY, at = INFINITY, points = 0, points_of_all = 0;
  for (int unit = lane; unit < units; unit += 32) {
    const int64_t block = image * units + unit;
    const double* from = p.best + (block * a.classes + c) * kPointBest;
    if (precedes(from[kValue], from[kPixel], value, at)) {
      value = from[kValue];
      at = from[kPixel];
    }
    points += from[kPoints];
    points_of_all += p.rest[block * kPointRest + kPointsOfAll];
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, mask), other_at = __shfl_xor_sync(kAllLanes, at, mask);
    if (!precedes(other, other_at, value, at)) continue;
    value = other;
    at = other_at;
  }
  points = warp_sum(points);
  points_of_all = warp_sum(points_of_all);

  // 2. The log-odds.
  const T* logits = static_cast<const T*>(a.logits);
  const int64_t pixel = static_cast<int64_t>(at);
  const auto logit = [&](int k) {
    return widen(logits[a.channels_last ? (image * a.pixels + pixel) * a.classes + k
                                        : (image * a.classes + k) * a.pixels + pixel]);
  };
  A most = A(-INFINITY), sum = A(0);
  for (int k = lane; k < a.classes; k += 32)
    if (k != c) most = max(most, logit(k));
  for (int mask = 16; mask > 0; mask /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, mask));
  for (int k = lane; k < a.classes; k += 32)
    if (k != c) sum += exponential(logit(k) - most);
  sum = warp_sum(sum);

  if (lane != 0) return;
  double presence = points > 0 || !is_object(p, c) ? 1 : 0;
  if (points_of_all == 0) presence = -1;
  if (p.image_labels) {
    const int64_t label = p.image_labels[row];
    presence = label > 0 ? 1 : label == 0 ? 0 : -1;
  }
  double* kept = p.kept + row * kPointKept;
  kept[kBestPixel] = at;
  kept[kPresence] = presence;
  kept[kLogOdds] = double(log_odds_of(logit(c), most, sum));
  kept[kMostOther] = double(most);
  kept[kSumOther] = double(sum);
}

// A block for each image: its terms.
static __global__ void __launch_bounds__(kThreads)
    point_supervision_terms_kernel(const __grid_constant__ PointSupervisionArgs p, int classes, int units) {
  const int64_t image = blockIdx.x;
  double x[kPointTerms] = {};
  for (int c = threadIdx.x; c < classes; c += kThreads) {
    const double* kept = p.kept + (image * classes + c) * kPointKept;
    const double presence = kept[kPresence], cost = softplus(presence > 0 ? -kept[kLogOdds] : kept[kLogOdds]);
    if (presence > 0) {
      x[kPresentTerm] += cost;
      x[kPresentCount] += 1;
    } else if (presence == 0) {
      x[kAbsentTerm] += cost;
      x[kAbsentCount] += 1;
    }
  }
  for (int unit = threadIdx.x; unit < units; unit += kThreads) {
    const double* rest = p.rest + (image * units + unit) * kPointRest;
    x[kObjectnessTerm] += rest[kObjectnessSum];
    x[kPointTerm] += rest[kPointSum];
    x[kPointCount] += rest[kPointsOfAll];
  }
  block_sums(x);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kPointTerms; ++i) p.terms[image * kPointTerms + i] = x[i];
}

// Grid: images * units.
template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads, kBlocks)
    point_supervision_backward_kernel(const __grid_constant__ SegmentationArgs a, const __grid_constant__ Tiling t,
                                      const __grid_constant__ PointSupervisionArgs p) {
  using A = Accumulator<T>;
  A* memory = reinterpret_cast<A*>(segmentation_shared);
  Block<T, kShared> block(a, t, memory);
  const PointShared<A> s(a, memory + shared_elements(a, t, kShared));
  T* to = static_cast<T*>(a.to);
  const double* grad = p.grad + block.image * kPointTerms;
  const double* kept = p.kept + block.image * a.classes * kPointKept;
  const int64_t start = block.first;

  // 1. The classes whose best pixel is in the unit.
  for (int c = threadIdx.x; c < a.classes; c += kThreads) {
    const double* of_class = kept + c * kPointKept;
    const double at = of_class[kBestPixel] - double(start), presence = of_class[kPresence];
    const bool here = at >= 0 && at < kUnitPixels && presence >= 0;
    s.at[c] = here ? static_cast<int>(at) : -1;
    s.object[c] = p.objectness && is_object(p, c);
    if (!here) continue;
    const A x = A(of_class[kLogOdds]);
    s.most[c] = A(of_class[kMostOther]);
    s.own[c] = presence > 0 ? -A(grad[kPresentTerm]) * logistic(-x) : A(grad[kAbsentTerm]) * logistic(x);
    s.others[c] = -s.own[c] / A(of_class[kSumOther]);
  }

  for (const int64_t end = block.end_of_unit(); block.first < end; block.first += t.pixels) {
    // 2. Labels, and whether the tile holds points or best pixels; a barrier for the last tile's use.
    __syncthreads();
    block.load_pixels();
    const int offset = static_cast<int>(block.first - start);
    bool labelled = false, best = false;
    for (int i = threadIdx.x; i < block.count; i += kThreads) labelled |= block.s.label[i] != kNoLabel;
    for (int c = threadIdx.x; c < a.classes; c += kThreads) best |= s.at[c] >= offset && s.at[c] < offset + block.count;
    const bool any_labelled = __syncthreads_or(labelled), any_best = __syncthreads_or(best);
    const bool asked = p.objectness || any_labelled || any_best;  // for the logits; else all is zero

    // 3. The logits, and what a pixel's classes share.
    if constexpr (kShared) {
      if (asked) block.load_logits();
      __syncthreads();
    }
    const int pixel = block.own_pixel();
    const int classes = pixel < block.count ? a.classes : 0;
    PixelSums<A> sums;
    A of_objects = A(0), of_rest = A(0);
    if (p.objectness) {
      sums = pixel_sums(block, s.object, pixel, classes);
      if (classes) {
        const int64_t at = block.image * a.pixels + block.first + pixel;
        const A prior = load_number<A>(p.objectness, p.objectness_type, at);
        const A slope = (logistic(sums.log_odds()) - prior) * A(grad[kObjectnessTerm]);
        of_objects = slope / sums.objects;
        of_rest = -slope / sums.sum;
      }
    }

    // 4. Whether the pixel is some class's best, or a point.
    A hits = A(0);
    if (any_best) {
      for (int c = block.own_class(); c < classes; c += block.lanes()) hits += A(s.at[c] == offset + pixel);
      hits = block.sum_of_pixel(hits);
    }
    const int label = any_labelled && classes ? block.s.label[pixel] : kNoLabel;
    A most = A(0), own = A(0), others = A(0);
    if (label >= 0) {
      const OneAgainstOthers<A> point = against_others(block, label, pixel);
      most = point.most;
      own = -block.s.weight[pixel] * A(grad[kPointTerm]) * logistic(-point.log_odds);
      others = -own / point.sum;
    }

    // 5. The gradient, in the logits' place: each by the thread that alone reads that logit.
    __syncwarp();
    for (int k = block.own_class(); k < classes; k += block.lanes()) {
      const A z = asked ? block.logit(k, pixel) : A(0);
      A dz = A(0);
      if (p.objectness)
        dz = s.object[k] ? exponential(z - sums.most_objects) * of_objects : exponential(z - sums.most) * of_rest;
      if (label >= 0) dz += k == label ? own : others * exponential(z - most);
      if (label == kUnknown) dz = A(nan(""));
      for (int c = 0; hits > A(0) && c < classes; ++c)
        if (s.at[c] == offset + pixel) dz += k == c ? s.own[c] : s.others[c] * exponential(z - s.most[c]);
      if constexpr (kShared) {
        block.s.logits[k * t.stride + pixel] = dz;
      } else {
        to[block.index(k, pixel)] = narrow<T>(dz);
      }
    }
    if constexpr (kShared) {
      __syncthreads();
      block.store_tile(to);
    }
  }
}

}  // namespace pyseg::loss
