// The separable Gaussian: weighted sums of shifted lines (along the innermost axis) and of whole lines (along the
// others). Lines are processed a vector at a time, so buffers have room for kLinePad elements more than they hold.
#pragma once

#include <string.h>

#include "common/cpu_workers.h"
#include "common/simd.h"
#include "crf/crf_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int kLinePad = 4 * kVectorBytes / int(sizeof(float));
constexpr int kFirLines = 4;  // results of fir_lines, which share what they read

// to[e] = sum over t from -radius to radius of taps[|t|] * from[e + t * step], e < count.
template <typename T>
inline void fir_shifted(const T* from, int64_t step, const T* taps, int64_t radius, int64_t count, T* to) {
  constexpr int kUnroll = 4, kLane = kLanes<T>;
  for (int64_t e = 0; e < count; e += kUnroll * kLane) {
    Vec<T> sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = load(from + e + u * kLane) * taps[0];
    for (int64_t t = 1; t <= radius; ++t) {
      const T *const before = from + e - t * step, *const after = from + e + t * step;
      const Vec<T> tap = broadcast(taps[t]);
      for (int u = 0; u < kUnroll; ++u) sum[u] += (load(before + u * kLane) + load(after + u * kLane)) * tap;
    }
    for (int u = 0; u < kUnroll; ++u) store(to + e + u * kLane, sum[u]);
  }
}

// The taps as fir_lines reads them: zeros, all taps from -radius to radius, zeros.
inline int64_t spread_taps_size(int64_t radius) { return 2 * radius + 1 + 2 * (kFirLines - 1); }

template <typename T>
inline void spread_taps(const T* taps, int64_t radius, T* to) {
  memset(to, 0, size_t(spread_taps_size(radius)) * sizeof(T));
  for (int64_t t = -radius; t <= radius; ++t) to[kFirLines - 1 + radius + t] = taps[t < 0 ? -t : t];
}

// to[i * to_step + e] = sum over t from 0 to 2 * radius of tap t - radius times line(i + t)[e], i < kFirLines, e < count.
// line(k): a line, the first one `radius` before that of the first result.
template <typename T, typename Line>
inline void fir_lines(const Line& line, const T* spread, int64_t radius, int64_t count, T* to, int64_t to_step) {
  constexpr int kUnroll = 2, kLane = kLanes<T>;
  for (int64_t e = 0; e < count; e += kUnroll * kLane) {
    Vec<T> sum[kFirLines][kUnroll];
    for (int i = 0; i < kFirLines; ++i)
      for (int u = 0; u < kUnroll; ++u) sum[i][u] = Vec<T>{};
    for (int64_t k = 0; k < 2 * radius + kFirLines; ++k) {
      const T* const from = line(k) + e;
      Vec<T> v[kUnroll];
      for (int u = 0; u < kUnroll; ++u) v[u] = load(from + u * kLane);
      for (int i = 0; i < kFirLines; ++i) {
        const Vec<T> tap = broadcast(spread[kFirLines - 1 + k - i]);
        for (int u = 0; u < kUnroll; ++u) sum[i][u] += v[u] * tap;
      }
    }
    for (int i = 0; i < kFirLines; ++i)
      for (int u = 0; u < kUnroll; ++u) store(to + i * to_step + e + u * kLane, sum[i][u]);
  }
}

// A line with zeros before and after it, for fir_shifted: `margin` elements on either side.
template <typename T>
class PaddedLine {
 public:
  static int64_t size(int64_t count, int64_t margin) { return count + 2 * margin + kLinePad; }
  PaddedLine(T* memory, int64_t margin) : memory_(memory), margin_(margin) {}
  T* data() const { return memory_ + margin_; }

 private:
  T* memory_;
  int64_t margin_;
};

// gaussian_filter: one pass over the maps for each axis.
template <typename T>
class GaussianFilter {
 public:
  GaussianFilter(const GaussianArgs& a, const Workers& workers) : args_(a), workers_(workers) {}

  // Bytes for each worker.
  static int64_t worker_bytes(const GaussianArgs& a) {
    int64_t elements = 0;
    if (a.radius[2] >= 0) elements = PaddedLine<T>::size(a.axes[2], a.radius[2]) + a.axes[2] + kLinePad;
    for (int axis = 0; axis < 2; ++axis)
      if (a.radius[axis] >= 0)
        elements =
            larger(elements, spread_taps_size(a.radius[axis]) + (a.axes[axis] + kFirLines + 1) * (kStrip + kLinePad));
    return (elements * int64_t(sizeof(T)) + 63) / 64 * 64;
  }

  void run(void* workspace) const {
    int passes = 0;
    for (int axis = 0; axis < 3; ++axis) passes += args_.radius[axis] >= 0;
    const T* from = static_cast<const T*>(args_.values);
    T* const output = static_cast<T*>(args_.output);
    T* const scratch = static_cast<T*>(args_.scratch);
    if (passes == 0) {
      memcpy(output, from, size_t(args_.maps * args_.axes[0] * args_.axes[1] * args_.axes[2]) * sizeof(T));
      return;
    }
    // The last pass writes the output.
    for (int axis = 2, left = passes; axis >= 0; --axis) {
      if (args_.radius[axis] < 0) continue;
      T* const to = --left % 2 == 0 ? output : scratch;
      if (axis == 2)
        inner(from, to, static_cast<char*>(workspace));
      else
        outer(axis, from, to, static_cast<char*>(workspace));
      from = to;
    }
  }

 private:
  static constexpr int64_t kStrip = 64;  // columns that a worker filters together

  GaussianArgs args_;
  Workers workers_;

  const T* taps(int axis) const { return static_cast<const T*>(args_.taps[axis]); }

  void inner(const T* from, T* to, char* workspace) const {
    const int64_t width = args_.axes[2], radius = args_.radius[2];
    for_each_part(workers_, args_.maps * args_.axes[0] * args_.axes[1],
                  [&](int64_t worker, int64_t begin, int64_t end) {
                    T* const memory = reinterpret_cast<T*>(workspace + worker * worker_bytes(args_));
                    const PaddedLine<T> line(memory, radius);
                    T* const result = memory + PaddedLine<T>::size(width, radius);
                    memset(memory, 0, size_t(PaddedLine<T>::size(width, radius)) * sizeof(T));
                    for (int64_t row = begin; row < end; ++row) {
                      memcpy(line.data(), from + row * width, size_t(width) * sizeof(T));
                      fir_shifted(line.data(), 1, taps(2), radius, width, result);
                      memcpy(to + row * width, result, size_t(width) * sizeof(T));
                    }
                  });
  }

  // Along another axis: a strip of columns at a time is copied into lines of its own, so that lines lie side by side.
  void outer(int axis, const T* from, T* to, char* workspace) const {
    const int64_t length = args_.axes[axis], radius = args_.radius[axis];
    const int64_t columns = axis == 1 ? args_.axes[2] : args_.axes[1] * args_.axes[2];
    const int64_t outer = args_.maps * (axis == 1 ? args_.axes[0] : 1);
    const int64_t strips = (columns + kStrip - 1) / kStrip;
    constexpr int64_t kStride = kStrip + kLinePad;
    for_each_part(workers_, outer * strips, [&](int64_t worker, int64_t begin, int64_t end) {
      T* const spread = reinterpret_cast<T*>(workspace + worker * worker_bytes(args_));
      spread_taps(taps(axis), radius, spread);
      T* const zeros = spread + spread_taps_size(radius);
      T* const lines = zeros + kStride;
      T* const results = lines + length * kStride;
      memset(zeros, 0, size_t(kStride) * sizeof(T));
      for (int64_t at = begin; at < end; ++at) {
        const int64_t column = at % strips * kStrip, count = smaller(kStrip, columns - column);
        const int64_t offset = at / strips * length * columns + column;
        for (int64_t i = 0; i < length; ++i)
          memcpy(lines + i * kStride, from + offset + i * columns, size_t(count) * sizeof(T));
        for (int64_t i = 0; i < length; i += kFirLines) {
          const auto line = [&](int64_t k) {
            const int64_t source = i + k - radius;
            return source < 0 || source >= length ? zeros : lines + source * kStride;
          };
          fir_lines(line, spread, radius, count, results, kStride);
          for (int64_t j = 0; j < smaller<int64_t>(kFirLines, length - i); ++j)
            memcpy(to + offset + (i + j) * columns, results + j * kStride, size_t(count) * sizeof(T));
        }
      }
    });
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
