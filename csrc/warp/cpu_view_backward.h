// The gradient of warp_to_view for one CPU target: what was gathered is scattered back. Threads own bands of a view's rows
// and each walks the keyframe's pixels in their order, past tiles that do not reach its band; so an element's sum has one
// order, whatever the bands and threads. A band's sums have their channels side by side and stay in the cache.
#pragma once

#include "common/cpu_channel_blocks.h"
#include "common/cpu_workers.h"
#include "warp/cpu_view_geometry.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename T, typename A>
class ViewBackward {
  static constexpr int64_t kLane = kLanes<A>;
  static constexpr int64_t kMostChannels = 64;  // that are added up together
  static constexpr int64_t kBandBytes = 512
                                        << 10;  // of sums: with the gradients that are read, what a core's cache holds

 public:
  ViewBackward(const ViewWarpArgs& a, void* scratch)
      : a_(a),
        height_(a.visibility.height),
        width_(a.visibility.width),
        block_(round_up(smaller(a.channels, kMostChannels), kTransposeBlock)),
        band_(smaller(height_, larger<int64_t>(1, kBandBytes / (width_ * block_ * int64_t(sizeof(A)))))),
        tiles_((a.key_width + kViewTile - 1) / kViewTile),
        right_(step_right(a, block_)),
        below_(step_below(a, width_ * block_)) {
    auto* at = static_cast<char*>(scratch);
    const auto take = [&](int64_t bytes) {
      char* const taken = at;
      at += round_up(bytes, 64);
      return taken;
    };
    points_ = reinterpret_cast<Point*>(take(a.key_height * a.key_width * int64_t(sizeof(Point))));
    reach_ = reinterpret_cast<Reach*>(take(a.key_height * tiles_ * int64_t(sizeof(Reach))));
    of_workers_ = reinterpret_cast<A*>(at);
    shared_bytes_ = at - static_cast<char*>(scratch);
  }

  int64_t scratch(int64_t workers) const { return shared_bytes_ + workers * of_worker() * int64_t(sizeof(A)); }

  void run(const Workers& workers) const {
    for (int64_t n = 0; n < a_.keys * a_.views; ++n) {
      for_each_part(workers, a_.key_height, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t v = first; v < last; ++v) find_row(n, v);
      });
      for_each_part(workers, (height_ + band_ - 1) / band_, [&](int64_t worker, int64_t first, int64_t last) {
        A* const sums = of_workers_ + worker * of_worker();
        for (int64_t band = first; band < last; ++band)
          for (int64_t c = 0; c < a_.channels; c += block_) run_band(n, band * band_, c, sums);
      });
    }
  }

 private:
  struct Point {
    int32_t y, x;
    A y_weight, x_weight;
  };
  // The rows of the view that a tile adds to: first .. last, or none.
  struct Reach {
    int32_t first, last;
  };

  int64_t of_worker() const { return (band_ * width_ + kViewTile) * block_; }

  void find_row(int64_t n, int64_t v) const {
    ViewTile tile;
    for (int64_t u = 0; u < a_.key_width; u += kViewTile) {
      const int64_t count = smaller(kViewTile, a_.key_width - u);
      locate(a_, n, v, u, count, &tile);
      Point* const points = points_ + v * a_.key_width + u;
      Reach reach{int32_t(height_), -1};
      for (int64_t i = 0; i < count; ++i) {
        const int32_t y = tile.y[i], below = y + (height_ > 1);
        points[i] = {tile.seen[i] ? y : -1, tile.x[i], A(tile.y_weight[i]), A(tile.x_weight[i])};
        if (!tile.seen[i]) continue;
        reach = {smaller(reach.first, y), larger(reach.last, below)};
      }
      reach_[v * tiles_ + u / kViewTile] = reach;
    }
  }

  // Rows first_row .. of channels c .. of view n.
  void run_band(int64_t n, int64_t first_row, int64_t c, A* sums) const {
    const int64_t rows = smaller(band_, height_ - first_row), channels = smaller(block_, a_.channels - c);
    A* const staged = sums + band_ * width_ * block_;
    memset(sums, 0, rows * width_ * block_ * sizeof(A));
    for (int64_t v = 0; v < a_.key_height; ++v)
      for (int64_t t = 0; t < tiles_; ++t) {
        const Reach& reach = reach_[v * tiles_ + t];
        if (reach.last < first_row || reach.first >= first_row + rows) continue;
        const int64_t u = t * kViewTile, count = smaller(kViewTile, a_.key_width - u);
        stage(n / a_.views, v * a_.key_width + u, c, channels, count, staged);
        spread(points_ + v * a_.key_width + u, count, first_row, rows, staged, sums);
      }
    for (int64_t row = 0; row < rows; ++row) write(n, first_row + row, c, channels, sums + row * width_ * block_);
  }

  // The gradients of pixels at .. at + count - 1 of a keyframe: [count][block_], zero in channels that are not there.
  void stage(int64_t key, int64_t at, int64_t c, int64_t channels, int64_t count, A* staged) const {
    const int64_t pixels = a_.key_height * a_.key_width;
    const T* const image = static_cast<const T*>(a_.grad) + key * a_.channels * pixels;
    if (!a_.last) {
      for (int64_t i = 0; i < count; i += kTransposeBlock)
        gather_run(image + c * pixels + at, pixels, 1, channels, staged, block_, i,
                   smaller(kTransposeBlock, count - i));
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      convert_run(image + (at + i) * a_.channels + c, staged + i * block_, channels);
      for (int64_t k = channels; k < block_; ++k) staged[i * block_ + k] = A(0);
    }
  }

  void spread(const Point* points, int64_t count, int64_t first_row, int64_t rows, const A* staged, A* sums) const {
    for (int64_t i = 0; i < count; ++i) {
      const Point& p = points[i];
      if (p.y < 0) continue;
      const int64_t y = p.y - first_row;
      A* const top = sums + (y * width_ + p.x) * block_;
      const A* const grad = staged + i * block_;
      if (y >= 0 && y < rows) add(grad, A(1) - p.y_weight, p.x_weight, top);
      const int64_t lower = y + (below_ != 0);
      if (lower >= 0 && lower < rows) add(grad, p.y_weight, p.x_weight, top + below_);
    }
  }

  void add(const A* grad, A y, A x, A* to) const {
    const Vec<A> left = broadcast<A>(y * (A(1) - x)), right = broadcast<A>(y * x);
    for (int64_t c = 0; c < block_; c += kLane) {
      const Vec<A> g = load(grad + c);
      store(to + c, load(to + c) + left * g);
      store(to + right_ + c, load(to + right_ + c) + right * g);
    }
  }

  void write(int64_t n, int64_t row, int64_t c, int64_t channels, const A* sums) const {
    T* const image = static_cast<T*>(a_.grad_scores) + n * a_.channels * height_ * width_;
    if (!a_.last) {
      T* const to = image + (c * height_ + row) * width_;
      for (int64_t x = 0; x < width_; x += kTransposeBlock)
        scatter_run(sums, block_, channels, to, height_ * width_, x, smaller(kTransposeBlock, width_ - x));
      return;
    }
    for (int64_t x = 0; x < width_; ++x)
      narrow_run(sums + x * block_, image + (row * width_ + x) * a_.channels + c, channels);
  }

  const ViewWarpArgs& a_;
  const int64_t height_, width_, block_, band_, tiles_, right_, below_;
  Point* points_;  // [key_height, key_width]
  Reach* reach_;   // [key_height, tiles_]
  A* of_workers_;  // [workers]: sums [band_, width_, block_], then gradients [kViewTile, block_]
  int64_t shared_bytes_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
