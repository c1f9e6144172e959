// RoIAlign (He et al. 2017, section 3) of boxes on all levels of a pyramid (Lin et al. 2017, equation 1), forward.
//
// roi_align_plan: a thread computes a box's geometry, level and reach, once for all channels and launches.
// roi_align_forward: the blocks of a column of the grid take a box; a thread takes a bin and 16 bytes of channels, so
// that a point's geometry serves them all. channels_last: lanes are neighbouring channels, loads and stores of 16
// bytes. Contiguous: lanes are neighbouring bins. One launch for all levels, whatever their layouts.
//
// Bytes at the least: the outputs, and the elements of the maps that boxes cover. Each output has one writer, which
// adds its points up in their order: deterministic. Differs from the CPU in the order of the sums.
#pragma once

#include "roi/element_cuda.cuh"
#include "roi/roi_align_cuda.h"

namespace pyseg::roi {

constexpr int kPlanThreads = 128;
constexpr int kForwardThreads = 128;
constexpr int kForwardBlocks = 4;  // a multiprocessor, at the least: with 128 registers nothing is spilled
constexpr int kVectorBytes = 16;

template <typename A>
__device__ __forceinline__ A not_a_number() {
  return A(__longlong_as_double(0x7ff8000000000000));
}

// The elements that a box can reach along an axis, and one more on each side: rounding is somebody else's.
template <typename A>
__device__ __forceinline__ void set_reach(CudaPlan<A>& plan, int axis, A low, A high) {
  const int64_t size = plan.box.axis[axis].size;
  const A from = (low < high ? low : high) - A(2), to = (low < high ? high : low) + A(2);
  plan.first[axis] = from > A(0) ? (from < A(size) ? int64_t(from) : size) : 0;
  plan.last[axis] = to < A(size) - A(1) ? (to >= A(0) ? int64_t(to) : -1) : size - 1;
}

// A thread a box. The sine and cosine in double precision need a stack frame.
template <typename A>
__global__ void __launch_bounds__(kPlanThreads) roi_align_plan(const __grid_constant__ CudaRoiArgs a) {
  const int64_t k = int64_t(blockIdx.x) * kPlanThreads + threadIdx.x;
  if (k >= a.boxes) return;
  const A* row = static_cast<const A*>(a.box) + k * a.columns;
  CudaPlan<A>& plan = static_cast<CudaPlan<A>*>(a.plans)[k];
  bool valid = row[0] >= A(0) && row[0] < A(a.images);
  for (int64_t i = 1; i < a.columns; ++i) valid = valid && isfinite(row[i]);
  plan.level = valid ? 0 : kNoBox;
  if (!valid) return;
  plan.image = int64_t(row[0]);
  const bool rotated = a.sampling.kind == BoxKind::kRotated;
  if (a.has_pyramid) {
    const int level = pyramid_level(row, rotated, a.pyramid);
    plan.level = level < a.levels ? level : kNoLevel;
    if (plan.level < 0) return;
  }
  const CudaLevel& level = a.level[plan.level];
  plan.box = make_box(row, A(level.scale), a.sampling, level.size);
  const Box<A>& box = plan.box;
  plan.first[kZ] = plan.last[kZ] = 0;
  if (rotated) {
    const A half_y = fabs(box.axis[kY].start), half_x = fabs(box.axis[kX].start);
    const A cosine = fabs(box.cosine), sine = fabs(box.sine);
    const A reach_y = half_y * cosine + half_x * sine, reach_x = half_y * sine + half_x * cosine;
    set_reach(plan, kY, box.centre_y - reach_y, box.centre_y + reach_y);
    set_reach(plan, kX, box.centre_x - reach_x, box.centre_x + reach_x);
    return;
  }
  for (int axis = kAxes - box.dims; axis < kAxes; ++axis) {
    const Axis<A>& along = box.axis[axis];
    set_reach(plan, axis, along.start, along.start + along.bin * A(along.bins));
  }
}

// All sampling points of a bin that can lie on the map, in order: f(points along z, y, x; their numbers i, j, k).
template <BoxKind kKind, typename A, typename F>
__device__ __forceinline__ void each_point(const Box<A>& box, int64_t z, int64_t y, int64_t x, const F& f) {
  constexpr bool kRotated = kKind == BoxKind::kRotated, kVolume = kKind == BoxKind::kAligned3d;
  int64_t z0 = 0, z1 = 1, y0, y1, x0, x1;
  if constexpr (kVolume) samples_on_map(box, kZ, z, &z0, &z1);
  samples_on_map(box, kY, y, &y0, &y1);
  samples_on_map(box, kX, x, &x0, &x1);
  const Axis<A> along_y = box.axis[kY], along_x = box.axis[kX];
  for (int64_t i = z0; i < z1; ++i) {
    Point<A> pz{true, 0, 0, A(1), A(0), A(0)};
    if constexpr (kVolume) pz = make_point(position(box.axis[kZ], z, i), box.axis[kZ].size);
    for (int64_t j = y0; j < y1; ++j) {
      const A at_y = position(along_y, y, j);
      Point<A> py;
      if constexpr (!kRotated) py = make_point(at_y, along_y.size);
      for (int64_t k = x0; k < x1; ++k) {
        A at_x = position(along_x, x, k);
        if constexpr (kRotated) {
          py = make_point(at_y * box.cosine - at_x * box.sine + box.centre_y, along_y.size);
          at_x = at_y * box.sine + at_x * box.cosine + box.centre_x;
        }
        f(pz, py, make_point(at_x, along_x.size), i, j, k);
      }
    }
  }
}

// The corners of a point: f(offset, weight).
template <BoxKind kKind, typename A, typename F>
__device__ __forceinline__ void each_corner(const Point<A>& z, const Point<A>& y, const Point<A>& x,
                                            const int64_t* stride, const F& f) {
  const auto plane = [&](int64_t offset, A weight) {
    const int64_t low = offset + y.low * stride[kY], high = offset + y.high * stride[kY];
    f(low + x.low * stride[kX], weight * (y.w_low * x.w_low));
    f(low + x.high * stride[kX], weight * (y.w_low * x.w_high));
    f(high + x.low * stride[kX], weight * (y.w_high * x.w_low));
    f(high + x.high * stride[kX], weight * (y.w_high * x.w_high));
  };
  if constexpr (kKind == BoxKind::kAligned3d) {
    plane(z.low * stride[kZ], z.w_low);
    plane(z.high * stride[kZ], z.w_high);
  } else {
    plane(0, A(1));
  }
}

template <typename A>
__device__ __forceinline__ A samples_of(const Box<A>& box) {
  return A(box.axis[kZ].samples) * A(box.axis[kY].samples) * A(box.axis[kX].samples);
}

// Adds weight * from[i * stride] to sum[i] for n channels.
template <int kVector, typename T, typename A>
__device__ __forceinline__ void add_channels(const T* from, int64_t stride, bool vector, int n, A weight, A* sum) {
  if (kVector > 1 && vector) {
    alignas(kVectorBytes) T values[kVector];
    *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(from));
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += weight * widen(values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (i < n) sum[i] += weight * widen(__ldg(from + i * stride));
}

// T: of the maps; uint8_t: masks of one channel. Out: of the output. Grid: boxes x parts of their bins and channels.
template <typename T, typename Out, BoxKind kKind>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks)
    roi_align_forward(const __grid_constant__ CudaRoiArgs a) {
  using A = Accumulator<T>;
  constexpr int kVector = sizeof(T) == 1 ? 1 : kVectorBytes / int(sizeof(T));
  const int64_t box_number = blockIdx.x;
  const CudaPlan<A>& plan = static_cast<const CudaPlan<A>*>(a.plans)[box_number];
  const int64_t bins = a.sampling.bins[kZ] * a.sampling.bins[kY] * a.sampling.bins[kX];
  const int64_t groups = (a.channels + kVector - 1) / kVector, items = bins * groups;
  Out* const output = static_cast<Out*>(a.output) + box_number * a.channels * bins;
  const int level_number = plan.level;
  for (int64_t item = int64_t(blockIdx.y) * kForwardThreads + threadIdx.x; item < items;
       item += int64_t(gridDim.y) * kForwardThreads) {
    // 1. The bin and the channels.
    int64_t bin, group, y, x;
    if (a.last) {
      bin = divide(item, groups, &group);
    } else {
      group = divide(item, bins, &bin);
    }
    const int64_t row = divide(bin, a.sampling.bins[kX], &x), z = divide(row, a.sampling.bins[kY], &y);
    const int64_t c = group * kVector;
    const int n = int(a.channels - c < kVector ? a.channels - c : kVector);
    A result[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) result[i] = level_number == kNoBox ? not_a_number<A>() : A(0);

    // 2. Its points.
    if (level_number >= 0) {
      const CudaLevel& level = a.level[level_number];
      const T* from = static_cast<const T*>(level.input) + plan.image * level.stride[0] + c * level.stride[1];
      const bool vector = level.vectors && n == kVector;
      int64_t on_map = 0;
      each_point<kKind>(plan.box, z, y, x,
                        [&](const Point<A>& pz, const Point<A>& py, const Point<A>& px, int64_t, int64_t, int64_t) {
                          if (!(pz.inside && py.inside && px.inside)) return;
                          if (!a.maximum) {
                            each_corner<kKind>(pz, py, px, level.stride + 2, [&](int64_t offset, A weight) {
                              add_channels<kVector>(from + offset, level.stride[1], vector, n, weight, result);
                            });
                            return;
                          }
                          A value[kVector] = {};
                          each_corner<kKind>(pz, py, px, level.stride + 2, [&](int64_t offset, A weight) {
                            add_channels<kVector>(from + offset, level.stride[1], vector, n, weight, value);
                          });
                          const bool none = on_map++ == 0;
#pragma unroll
                          for (int i = 0; i < kVector; ++i) {
                            const A v = value[i], best = result[i];
                            result[i] = none || v > best || (v != v && best == best) ? v : best;
                          }
                        });
      // A mean is of all points; of a maximum those off the map are 0.
      const A samples = samples_of(plan.box);
      const A part = a.maximum || samples == A(0) ? A(1) : A(1) / samples;
      const bool zero = a.maximum && A(on_map) != samples;
#pragma unroll
      for (int i = 0; i < kVector; ++i) result[i] = zero && result[i] < A(0) ? A(0) : result[i] * part;
    }

    // 3. The output.
    if (a.last && kVector > 1 && a.channels % kVector == 0) {
      alignas(kVectorBytes) Out values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = narrow<Out>(result[i]);
      *reinterpret_cast<uint4*>(output + bin * a.channels + c) = *reinterpret_cast<const uint4*>(values);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i < n) output[a.last ? bin * a.channels + c + i : (c + i) * bins + bin] = narrow<Out>(result[i]);
    }
  }
}

}  // namespace pyseg::roi
