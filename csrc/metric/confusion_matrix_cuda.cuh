// Confusion matrix of a segmentation on CUDA devices: m[i, j] = pixels of class i whose largest logit, or label, is
// class j.
//
// Layouts: logits [N, C, pixels] in rows (neighbouring pixels side by side), with classes side by side (channels_last),
// or of any strides; labels [N, pixels] of any integer type. A block takes tiles of pixels of one image in turns: (1)
// each thread finds the class of its pixels, reading every logit once, 16 bytes at a time where they are aligned; (2)
// threads take the tile's targets in order, so that these loads are coalesced too, and count. Counts go to a histogram
// in shared memory that is added to the matrix after the image, above a size to the matrix itself. The lanes of a warp
// that have the same cell, as most do inside an object, add once. Least bytes: logits and targets once in.
// Deterministic although atomics add: they add integers, and those sums do not depend on the order.
// A label out of range raises a flag, and the last kernel poisons that matrix: see kPoison.
#pragma once

#include <cstdint>

#include "common/element_cuda.cuh"
#include "metric/confusion_matrix_math.h"

namespace pyseg::metric {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kFinishThreads = 256;

struct ConfusionLaunch {
  ConfusionArgs a;
  int* bad;     // [1 or images], zeros
  bool shared;  // the histogram fits into shared memory
};

__device__ inline int64_t load_label(const void* labels, LabelType type, int64_t i) {
  switch (type) {
    case LabelType::kUInt8: return static_cast<const uint8_t*>(labels)[i];
    case LabelType::kInt8: return static_cast<const int8_t*>(labels)[i];
    case LabelType::kInt16: return static_cast<const int16_t*>(labels)[i];
    case LabelType::kInt32: return static_cast<const int32_t*>(labels)[i];
    default: return static_cast<const int64_t*>(labels)[i];
  }
}

// The first of the largest, NaN counting as the largest, as torch.argmax has it.
template <typename T>
struct Best {
  Accumulator<T> value;
  int cls;
  __device__ void offer(T logit, int c) {
    const auto v = widen(logit);
    if (c == 0 || (!(v <= value) && value == value)) {
      value = v;
      cls = c;
    }
  }
};

// --- How a tile's pixels find their classes. predict() fills predicted[0..count-1] for the pixels from `first` on.

// Labels are read where they are counted.
struct FromLabels {
  static constexpr int kThreads = 256, kTile = 1024;
  static constexpr bool kLogits = false;
  struct Shared {};
  __device__ static void predict(const ConfusionArgs&, int64_t, int64_t, int, Shared&, uint16_t*) {}
};

// Rows whose starts are aligned to 16 bytes: a thread takes as many pixels as one load has.
template <typename T>
struct FromRows {
  static constexpr int kThreads = 256, kVector = 16 / sizeof(T), kTile = kThreads * kVector;
  static constexpr bool kLogits = true;
  struct Shared {};
  union Vector {
    uint4 bits;
    T value[kVector];
    __device__ Vector() {}
  };
  __device__ static void predict(const ConfusionArgs& a, int64_t image, int64_t first, int count, Shared&,
                                 uint16_t* predicted) {
    const int p = threadIdx.x * kVector;
    if (p >= count) return;
    const T* logits = static_cast<const T*>(a.prediction) + image * a.strides.image + first + p;
    Best<T> best[kVector];
    if (count - p >= kVector) {
#pragma unroll 4
      for (int c = 0; c < a.classes; ++c) {
        Vector v;
        v.bits = __ldg(reinterpret_cast<const uint4*>(logits + c * a.strides.cls));
#pragma unroll
        for (int k = 0; k < kVector; ++k) best[k].offer(v.value[k], c);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) predicted[p + k] = static_cast<uint16_t>(best[k].cls);
    } else {
      for (int k = 0; k < count - p; ++k) {
        for (int c = 0; c < a.classes; ++c) best[0].offer(logits[c * a.strides.cls + k], c);
        predicted[p + k] = static_cast<uint16_t>(best[0].cls);
      }
    }
  }
};

// Any strides: neighbouring threads take neighbouring pixels.
template <typename T>
struct FromAnyStrides {
  static constexpr int kThreads = 256, kTile = 512;
  static constexpr bool kLogits = true;
  struct Shared {};
  __device__ static void predict(const ConfusionArgs& a, int64_t image, int64_t first, int count, Shared&,
                                 uint16_t* predicted) {
    for (int p = threadIdx.x; p < count; p += kThreads) {
      const T* logits = static_cast<const T*>(a.prediction) + image * a.strides.image + (first + p) * a.strides.pixel;
      Best<T> best;
#pragma unroll 4
      for (int c = 0; c < a.classes; ++c) best.offer(__ldg(logits + c * a.strides.cls), c);
      predicted[p] = static_cast<uint16_t>(best.cls);
    }
  }
};

// Classes side by side: the tile's logits come through shared memory, some classes at a time. A thread reads a row of
// it, and rows of an odd length keep threads in different banks.
template <typename T>
struct FromChannelsLast {
  static constexpr int kThreads = 128, kTile = kThreads;
  static constexpr bool kLogits = true;
  static constexpr int kClasses = sizeof(T) == 8 ? 16 : 32, kVector = 16 / sizeof(T);
  static_assert(kTile * sizeof(T) % 16 == 0, "tiles start on 16 bytes if the image does");
  struct alignas(16) Shared {
    T stage[kTile * (kClasses + 1)];
  };
  __device__ static void predict(const ConfusionArgs& a, int64_t image, int64_t first, int count, Shared& shared,
                                 uint16_t* predicted) {
    const T* logits = static_cast<const T*>(a.prediction) + image * a.strides.image + first * a.strides.pixel;
    const int thread = threadIdx.x;
    Best<T> best{};
    for (int c0 = 0; c0 < a.classes; c0 += kClasses) {
      if (c0 > 0) __syncthreads();
      const int classes = min(kClasses, a.classes - c0), row = classes | 1;
      if (classes == a.strides.pixel) {  // all of a pixel, nothing between pixels: one run of memory
        const int elements = count * classes;
        int copied = 0;
        if (row == classes && reinterpret_cast<uintptr_t>(logits) % 16 == 0) {  // as it lies
          copied = elements / kVector * kVector;
          for (int e = thread * kVector; e < copied; e += kThreads * kVector)
            *reinterpret_cast<uint4*>(shared.stage + e) = __ldg(reinterpret_cast<const uint4*>(logits + e));
        }
        for (int e = copied + thread; e < elements; e += kThreads)
          shared.stage[e / classes * row + e % classes] = __ldg(logits + e);
      } else {
        for (int e = thread; e < count * kClasses; e += kThreads) {
          const int p = e / kClasses, c = e % kClasses;
          if (c < classes) shared.stage[p * row + c] = __ldg(logits + p * a.strides.pixel + c0 + c);
        }
      }
      __syncthreads();
      if (thread < count)
        for (int c = 0; c < classes; ++c) best.offer(shared.stage[thread * row + c], c0 + c);
    }
    if (thread < count) predicted[thread] = static_cast<uint16_t>(best.cls);
  }
};

// --- Counting

// Adds 1 to the cell of each lane that has one (>= 0), once for all lanes with the same cell. The whole warp calls it.
template <typename Count>
__device__ inline void count_cells(Count* cells, int cell) {
  const unsigned same = __match_any_sync(kFullWarp, cell);
  const unsigned below = (1u << (threadIdx.x % 32)) - 1;
  if (cell >= 0 && (same & below) == 0) atomicAdd(cells + cell, static_cast<Count>(__popc(same)));
}

// Grid: blocks of an image x images; dynamic shared memory: classes * classes counters if l.shared.
template <typename Predictor>
__global__ void __launch_bounds__(Predictor::kThreads) confusion_matrix_kernel(ConfusionLaunch l) {
  constexpr int kThreads = Predictor::kThreads, kTile = Predictor::kTile;
  extern __shared__ uint32_t histogram[];  // [classes, classes]; a block sees fewer than 2^32 pixels of one image
  __shared__ uint16_t predicted[Predictor::kLogits ? kTile : 1];
  __shared__ typename Predictor::Shared shared;
  const ConfusionArgs& a = l.a;
  const int cells = a.classes * a.classes;

  for (int64_t image = blockIdx.y; image < a.images; image += gridDim.y) {
    unsigned long long* matrix = reinterpret_cast<unsigned long long*>(a.matrix) + (a.per_image ? image * cells : 0);
    if (l.shared) {
      for (int i = threadIdx.x; i < cells; i += kThreads) histogram[i] = 0;
      __syncthreads();
    }
    bool bad = false;
    for (int64_t first = int64_t{blockIdx.x} * kTile; first < a.pixels; first += int64_t{gridDim.x} * kTile) {
      const int count = static_cast<int>(min(int64_t{kTile}, a.pixels - first));
      if constexpr (Predictor::kLogits) {
        Predictor::predict(a, image, first, count, shared, predicted);
        __syncthreads();
      }
      for (int p = threadIdx.x; p - static_cast<int>(threadIdx.x) < count; p += kThreads) {
        int cell = -1;
        if (p < count) {
          const int64_t pixel = image * a.pixels + first + p;
          const int64_t truth = load_label(a.target, a.target_type, pixel);
          if (!(a.has_ignore && truth == a.ignore_index)) {
            const int64_t guess =
                Predictor::kLogits ? predicted[p] : load_label(a.prediction, a.prediction_type, pixel);
            const bool inside = truth >= 0 && truth < a.classes && guess >= 0 && guess < a.classes;
            if (inside) cell = static_cast<int>(truth) * a.classes + static_cast<int>(guess);
            bad |= !inside;
          }
        }
        if (l.shared) {
          count_cells(histogram, cell);
        } else {
          count_cells(matrix, cell);
        }
      }
      if constexpr (Predictor::kLogits) __syncthreads();  // `predicted` is read before the next tile overwrites it
    }
    if (bad) atomicOr(l.bad + (a.per_image ? image : 0), 1);
    if (l.shared) {
      __syncthreads();
      for (int i = threadIdx.x; i < cells; i += kThreads)
        if (histogram[i] != 0) atomicAdd(matrix + i, static_cast<unsigned long long>(histogram[i]));
      __syncthreads();
    }
  }
}

// Poisons the matrices whose flag is up. A thread a cell.
__global__ void __launch_bounds__(kFinishThreads)
    confusion_matrix_finish(int64_t* __restrict__ matrix,  // [matrices, cells]
                            const int* __restrict__ bad,   // [matrices]
                            int64_t cells, int64_t all) {
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i < all && bad[i / cells] != 0) matrix[i] += kPoison;
}

}  // namespace pyseg::metric
