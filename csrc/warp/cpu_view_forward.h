// warp_to_view's forward pass for one CPU target: a tile of a keyframe's row at a time, all views and channels of it. The
// geometry is found once for a pixel and view; in channels_last the channels are lanes of vectors, otherwise the pixels
// are, and the two elements side by side of a plane come in one load.
#pragma once

#include <utility>

#include "common/cpu_channel_blocks.h"
#include "warp/cpu_view_geometry.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename T, typename A>
class ViewForward {
  using V = Vec<A>;
  using Mask = decltype(V{} < V{});
  using MaskLane = std::remove_reference_t<decltype(Mask{}[0])>;
  static constexpr int64_t kLane = kLanes<A>;

 public:
  ViewForward(const ViewWarpArgs& a, void* scratch)
      : a_(a),
        step_(a.last ? round_up(a.channels, kLane) : kViewTile),
        sums_(static_cast<A*>(scratch)),
        right_(step_right(a, a.column_stride)),
        below_(step_below(a, a.row_stride)) {
    const int64_t images = a.keys * a.views;
    end_ = static_cast<const T*>(a.scores) + (images - 1) * a.image_stride + (a.channels - 1) * a.channel_stride +
           (a.visibility.height - 1) * a.row_stride + (a.visibility.width - 1) * a.column_stride + 1;
  }

  int64_t scratch(int64_t workers) const { return workers * sums_of_worker() * int64_t(sizeof(A)); }

  void run(const Workers& workers) const {
    for_each_part(workers, a_.keys * a_.key_height, [&](int64_t worker, int64_t first, int64_t last) {
      A* const sums = sums_ + worker * sums_of_worker();
      for (int64_t row = first; row < last; ++row)
        for (int64_t u = 0; u < a_.key_width; u += kViewTile)
          run_tile(row, u, smaller(kViewTile, a_.key_width - u), sums);
    });
  }

 private:
  // [C, kViewTile], or [kViewTile, C] with the channels padded to whole vectors.
  int64_t sums_of_worker() const { return a_.last ? kViewTile * step_ : a_.channels * kViewTile; }

  // row: of all keyframes.
  void run_tile(int64_t row, int64_t u, int64_t count, A* sums) const {
    const int64_t key = row / a_.key_height, v = row % a_.key_height;
    uint8_t* const seen = a_.seen + row * a_.key_width + u;
    memset(seen, 0, count);
    memset(sums, 0, sums_of_worker() * sizeof(A));
    ViewTile tile;
    for (int64_t n = key * a_.views; n < (key + 1) * a_.views; ++n) {
      locate(a_, n, v, u, count, &tile);
      for (int64_t i = 0; i < count; ++i) seen[i] = uint8_t(seen[i] + tile.seen[i]);
      const T* const image = static_cast<const T*>(a_.scores) + n * a_.image_stride;
      if (a_.last) {
        add_pixels(tile, image, count, sums);
      } else {
        add_planes(tile, image, count, sums);
      }
    }
    write(key, v, u, count, sums);
  }

  // ---- channels_last ----

  void add_pixels(const ViewTile& tile, const T* image, int64_t count, A* sums) const {
    for (int64_t i = 0; i < count; ++i) {
      if (!tile.seen[i]) continue;
      const T* const p = image + tile.y[i] * a_.row_stride + tile.x[i] * a_.column_stride;
      const A y = A(tile.y_weight[i]), x = A(tile.x_weight[i]);
      const A w00 = (A(1) - y) * (A(1) - x), w01 = (A(1) - y) * x, w10 = y * (A(1) - x), w11 = y * x;
      A* const sum = sums + i * step_;
      int64_t c = 0;
      // What lies behind the last channel is added to lanes that are not written out.
      const int64_t whole = end_ - (p + below_ + right_) >= step_ ? step_ : a_.channels / kLane * kLane;
      for (; c < whole; c += kLane) {
        const V top = broadcast<A>(w00) * load_as<A>(p + c) + broadcast<A>(w01) * load_as<A>(p + right_ + c);
        const V bottom =
            broadcast<A>(w10) * load_as<A>(p + below_ + c) + broadcast<A>(w11) * load_as<A>(p + below_ + right_ + c);
        store(sum + c, load(sum + c) + (top + bottom));
      }
      for (; c < a_.channels; ++c)
        sum[c] += (w00 * A(widen(p[c])) + w01 * A(widen(p[right_ + c]))) +
                  (w10 * A(widen(p[below_ + c])) + w11 * A(widen(p[below_ + right_ + c])));
    }
  }

  // ---- planes ----

  // The pixels of a tile as the loops over planes need them, up to whole vectors of pixels.
  struct PlaneTile {
    int64_t offset[kViewTile];
    alignas(kVectorBytes) A top[2 * kViewTile], bottom[2 * kViewTile];  // weights: left, right, left, right, ...
    alignas(kVectorBytes) MaskLane seen[kViewTile];                     // all bits or none
  };

  void add_planes(const ViewTile& tile, const T* image, int64_t count, A* sums) const {
    PlaneTile planes;
    const int64_t padded = round_up(count, kLane);
    for (int64_t i = 0; i < padded; ++i) {
      const bool exists = i < count;
      planes.offset[i] = exists ? tile.y[i] * a_.row_stride + tile.x[i] * a_.column_stride : 0;
      planes.seen[i] = exists ? -MaskLane(tile.seen[i]) : 0;
    }
    for (int64_t i = 0; i < count; ++i) {
      const A y = A(tile.y_weight[i]), x = A(tile.x_weight[i]);
      planes.top[2 * i] = (A(1) - y) * (A(1) - x);
      planes.top[2 * i + 1] = (A(1) - y) * x;
      planes.bottom[2 * i] = y * (A(1) - x);
      planes.bottom[2 * i + 1] = y * x;
    }
    for (int64_t i = 2 * count; i < 2 * padded; ++i) planes.top[i] = planes.bottom[i] = A(0);
    for (int64_t c = 0; c < a_.channels; ++c)
      add_plane(planes, image + c * a_.channel_stride, padded, sums + c * kViewTile);
  }

  void add_plane(const PlaneTile& tile, const T* plane, int64_t count, A* sum) const {
    if constexpr (kSame<T, float>) {
      if (right_ == 1) {
        for (int64_t i = 0; i < count; i += kLane)
          add(tile, i, pairs(plane, tile.offset + i), pairs(plane, tile.offset + i + kLane / 2),
              pairs(plane + below_, tile.offset + i), pairs(plane + below_, tile.offset + i + kLane / 2), sum);
        return;
      }
    }
    T top[2 * kViewTile], bottom[2 * kViewTile];
    alignas(kVectorBytes) A wide_top[2 * kViewTile], wide_bottom[2 * kViewTile];
    for (int64_t i = 0; i < count; ++i) {
      const T* const p = plane + tile.offset[i];
      top[2 * i] = p[0];
      top[2 * i + 1] = p[right_];
      bottom[2 * i] = p[below_];
      bottom[2 * i + 1] = p[below_ + right_];
    }
    convert_run(top, wide_top, 2 * count);
    convert_run(bottom, wide_bottom, 2 * count);
    for (int64_t i = 0; i < count; i += kLane)
      add(tile, i, load(wide_top + 2 * i), load(wide_top + 2 * i + kLane), load(wide_bottom + 2 * i),
          load(wide_bottom + 2 * i + kLane), sum);
  }

  // Adds a vector of pixels: two vectors of pairs of each row.
  static void add(const PlaneTile& tile, int64_t i, V top0, V top1, V bottom0, V bottom1, A* sum) {
    const V half0 = load(tile.top + 2 * i) * top0 + load(tile.bottom + 2 * i) * bottom0;
    const V half1 = load(tile.top + 2 * i + kLane) * top1 + load(tile.bottom + 2 * i + kLane) * bottom1;
    const V value = sums_of_pairs(half0, half1, std::make_index_sequence<size_t(kLane)>{});
    const Mask seen = *reinterpret_cast<const Mask*>(tile.seen + i);
    store(sum + i, load(sum + i) + (V)((Mask)value & seen));  // not times 0: what lies there may be NaN
  }

  template <size_t... l>
  static V sums_of_pairs(V a, V b, std::index_sequence<l...>) {
    return __builtin_shufflevector(a, b, int(2 * l)...) + __builtin_shufflevector(a, b, int(2 * l + 1)...);
  }

  // Elements offset[i] and offset[i] + 1 of a plane of floats, as many as a vector holds.
  static V pairs(const float* plane, const int64_t* offset) {
#if defined(__AVX512F__)
    // A fifth faster than eight loads. Masked, since gcc 12 warns of the plain one.
    return (V)_mm512_mask_i64gather_pd(_mm512_setzero_pd(), 0xff, _mm512_loadu_si512(offset), plane, 4);
#else
    return (V)each_pair(plane, offset, std::make_index_sequence<size_t(kLane / 2)>{});
#endif
  }
  template <size_t... l>
  static Vec<double> each_pair(const float* plane, const int64_t* offset, std::index_sequence<l...>) {
    return Vec<double>{two_floats(plane + offset[l])...};
  }
  static double two_floats(const float* p) {
    double bits;
    memcpy(&bits, p, sizeof bits);
    return bits;
  }

  // ---- output ----

  void write(int64_t key, int64_t v, int64_t u, int64_t count, const A* sums) const {
    const int64_t pixels = a_.key_height * a_.key_width, at = v * a_.key_width + u;
    T* const image = static_cast<T*>(a_.output) + key * a_.channels * pixels;
    if (!a_.last) {
      for (int64_t c = 0; c < a_.channels; ++c) narrow_run(sums + c * kViewTile, image + c * pixels + at, count);
      return;
    }
    T* const to = image + at * a_.channels;
    for (int64_t i = 0; i < count; ++i) {
      const A* const sum = sums + i * step_;
      if constexpr (kSame<T, A>) {
        if (i * a_.channels + step_ <= count * a_.channels) {  // the next pixel overwrites what is too much
          for (int64_t c = 0; c < step_; c += kLane) store(to + i * a_.channels + c, load(sum + c));
          continue;
        }
      }
      narrow_run(sum, to + i * a_.channels, a_.channels);
    }
  }

  const ViewWarpArgs& a_;
  const int64_t step_;  // of sums
  A* const sums_;
  const int64_t right_, below_;
  const T* end_;  // behind the last element of scores
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
