// The places that a run of pixels of the output reads, for one CPU target: plain loops that the compiler vectorises.
//
// Along a row only the last coordinate changes: the affine map adds one product, and the displacement is one cubic in
// it for each cell of the grid, whose control points are interpolated along the other axes once a row.
#pragma once

#include "common/cpu_convert.h"
#include "common/cpu_workers.h"
#include "warp/joint_warp_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

using warp::Border;

constexpr int kRun = 256;  // pixels whose places are held at a time: all of it stays in the first-level cache

template <typename A, int kDims>
struct WarpPlaces {
  alignas(64) A at[kDims][kRun];
};

// The two elements on each axis between which a place lies. Lanes beyond the run read the first element.
template <typename A, typename Index, int kDims>
struct WarpTaps {
  alignas(64) A low[kDims][kRun], high[kDims][kRun];  // weights
  alignas(64) A outside[kRun];                        // what is left of 1; for Border::kConstant only
  alignas(64) Index index[kRun];                      // of the first of them all
  int64_t step[kDims];                                // to the second on each axis
};

// Row `row` of all images' rows.
template <int kDims>
struct WarpRow {
  int64_t image, outer[kDims - 1];
  WarpRow(const WarpGeometry& g, int64_t row) {
    for (int d = kDims - 2; d >= 0; --d) {
      const int64_t size = g.out[warp::kMostDims - kDims + d];
      outer[d] = row % size;
      row /= size;
    }
    image = row;
  }
};

template <int kDims>
int64_t rows_of_image(const WarpGeometry& g) {
  return kDims == 3 ? g.out[0] * g.out[1] : g.out[1];
}

template <typename A, int kDims>
class PlacesOfRow {
 public:
  static constexpr int kFirst = warp::kMostDims - kDims;

  // Elements of A: the control points of a row.
  static int64_t scratch(const WarpGeometry& g) { return kDims * round_up(g.grid[2], 64 / int64_t(sizeof(A))); }

  PlacesOfRow(const WarpGeometry& g, A* scratch)
      : g_(g), row_points_(scratch), pitch_(round_up(g.grid[2], 64 / int64_t(sizeof(A)))) {
    for (int d = 0; d < kDims; ++d) grid_[d] = warp::grid_axis<A>(g.grid[kFirst + d], g.out[kFirst + d]);
  }

  void start(const WarpRow<kDims>& row) {
    const A* const affine = static_cast<const A*>(g_.affine) + row.image * kDims * (kDims + 1);
    for (int c = 0; c < kDims; ++c) {
      const A* const m = affine + c * (kDims + 1);
      A sum = m[0] * A(row.outer[0]);
      if constexpr (kDims == 3) sum = sum + m[1] * A(row.outer[1]);
      base_[c] = sum + m[kDims];
      slope_[c] = m[kDims - 1];
    }
    if (g_.displacement != nullptr) interpolate_points(row);
  }

  // Pixels first .. first + n - 1 of the row.
  void run(int64_t first, int n, WarpPlaces<A, kDims>& places) const {
    const int32_t start = int32_t(first);
    for (int c = 0; c < kDims; ++c) {
      const A base = base_[c], slope = slope_[c];
      A* const at = places.at[c];
      for (int i = 0; i < n; ++i) at[i] = base + slope * A(start + i);
    }
    if (g_.displacement != nullptr) add_displacement(start, n, places);
  }

 private:
  A cubic() const { return A(g_.cubic); }

  // The control points of this row: the grid interpolated along all axes but the last.
  void interpolate_points(const WarpRow<kDims>& row) {
    int32_t cell[kDims - 1];
    A rest[kDims - 1];
    for (int d = 0; d < kDims - 1; ++d) {
      cell[d] = warp::grid_cell(grid_[d], row.outer[d]);
      rest[d] = warp::grid_rest(grid_[d], row.outer[d], cell[d]);
    }
    const int64_t width = g_.grid[2], plane = g_.grid[1] * width;
    const int64_t points = g_.grid[0] * plane;
    const A* from = static_cast<const A*>(g_.displacement) + row.image * kDims * points;
    // Along an axis of `count` points that are `pitch` apart.
    const auto along = [&](const auto& point, int d) {
      const int32_t count = grid_[d].count;
      const auto at = [&](int32_t i) { return point(warp::grid_index(cell[d] + i, count)); };
      return warp::cubic_at(warp::cubic_between<A>(at(-1), at(0), at(1), at(2), cubic()), rest[d]);
    };
    for (int c = 0; c < kDims; ++c, from += points) {
      for (int64_t x = 0; x < width; ++x) {
        const auto in_plane = [&](int64_t z) {
          return along([&](int32_t y) { return from[z * plane + y * width + x]; }, kDims - 2);
        };
        if constexpr (kDims == 3) {
          row_points_[c * pitch_ + x] = along(in_plane, 0);
        } else {
          row_points_[c * pitch_ + x] = in_plane(0);
        }
      }
    }
  }

  // Cell by cell, each as long as grid_cell says.
  void add_displacement(int32_t start, int n, WarpPlaces<A, kDims>& places) const {
    const warp::GridAxis<A>& axis = grid_[kDims - 1];
    for (int begin = 0; begin < n;) {
      const int32_t cell = warp::grid_cell(axis, start + begin);
      const int end = end_of_cell(cell, start, begin, n);
      for (int c = 0; c < kDims; ++c) {
        const A* const points = row_points_ + c * pitch_;
        const auto point = [&](int32_t i) { return points[warp::grid_index(cell + i, axis.count)]; };
        const warp::Cubic<A> k = warp::cubic_between<A>(point(-1), point(0), point(1), point(2), cubic());
        const A scale = axis.scale, corner = A(cell);
        A* const at = places.at[c];
        for (int i = begin; i < end; ++i) at[i] = at[i] + warp::cubic_at(k, A(start + i) * scale - corner);
      }
      begin = end;
    }
  }

  // The first pixel beyond a cell that `begin` is in.
  int end_of_cell(int32_t cell, int32_t start, int begin, int n) const {
    const warp::GridAxis<A>& axis = grid_[kDims - 1];
    const auto is_in = [&](int i) { return warp::grid_cell(axis, start + i) == cell; };
    if (is_in(n - 1)) return n;
    const double guess = double(cell + 1) / double(axis.scale) - double(start);
    int end = guess > double(begin + 1) ? guess < double(n) ? int(guess) : n - 1 : begin + 1;
    while (end < n && is_in(end)) ++end;
    while (!is_in(end - 1)) --end;
    return end;
  }

  const WarpGeometry& g_;
  A* const row_points_;  // [d, grid's last]
  const int64_t pitch_;
  warp::GridAxis<A> grid_[kDims];
  A base_[kDims], slope_[kDims];
};

// ---- from places to elements ----

template <typename A, int kDims>
struct ImageAxes {
  warp::ImageAxis<A> axis[kDims];
  Border border;
  ImageAxes(const WarpGeometry& g, Border b) : border(b) {
    for (int d = 0; d < kDims; ++d) axis[d] = warp::image_axis<A>(g.in[warp::kMostDims - kDims + d], b);
  }

  // The places of a run along axis d, brought into the image. A loop of its own: together with what follows it, GCC 12
  // does not vectorise the reflection.
  void fold(int d, const A* at, int n, A* to) const {
    const warp::ImageAxis<A> a = axis[d];
    if (border == Border::kReflect) {
      for (int i = 0; i < n; ++i) to[i] = warp::reflected(a, at[i]);
    } else {
      for (int i = 0; i < n; ++i) to[i] = warp::clamped(a, at[i]);
    }
  }
};

// stride: of the last three axes.
template <typename A, typename Index, int kDims>
void find_taps(const WarpGeometry& g, const ImageAxes<A, kDims>& axes, const int64_t* stride,
               const WarpPlaces<A, kDims>& places, int n, WarpTaps<A, Index, kDims>& taps) {
  Index* const index = taps.index;
  for (int d = 0; d < kDims; ++d) {
    const int64_t size = g.in[warp::kMostDims - kDims + d];
    const Index to_next = Index(stride[warp::kMostDims - kDims + d]);
    taps.step[d] = size > 1 ? to_next : 0;
    alignas(64) A at[kRun];
    axes.fold(d, places.at[d], n, at);
    A *const low = taps.low[d], *const high = taps.high[d];
    const warp::ImageAxis<A> axis = axes.axis[d];
    for (int i = 0; i < n; ++i) {
      const int32_t tap = warp::first_tap(axis, at[i]);
      const A beyond = at[i] - A(tap);
      low[i] = warp::hat(beyond, A(1));
      high[i] = warp::hat(beyond - A(1), axis.reach);
      index[i] = (d == 0 ? Index(0) : index[i]) + Index(tap) * to_next;
    }
  }
  if (axes.border == Border::kConstant)
    for (int i = 0; i < n; ++i) {
      A covered = taps.low[0][i] + taps.high[0][i];
      for (int d = 1; d < kDims; ++d) covered = covered * (taps.low[d][i] + taps.high[d][i]);
      taps.outside[i] = A(1) - covered;
    }
  for (int i = n; i < round_up(n, kLanes<float>); ++i) {
    index[i] = 0;
    for (int d = 0; d < kDims; ++d) taps.low[d][i] = taps.high[d][i] = A(0);
    taps.outside[i] = A(0);
  }
}

// index: of the nearest element; -1 where there is none.
template <typename A, typename Index, int kDims>
void find_nearest(const ImageAxes<A, kDims>& axes, const int64_t* stride, const WarpPlaces<A, kDims>& places, int n,
                  Index* index) {
  for (int d = 0; d < kDims; ++d) {
    const Index to_next = Index(stride[warp::kMostDims - kDims + d]);
    alignas(64) A at[kRun];
    axes.fold(d, places.at[d], n, at);
    const warp::ImageAxis<A> axis = axes.axis[d];
    for (int i = 0; i < n; ++i) {
      const Index before = d == 0 ? Index(0) : index[i];
      const Index element = before + Index(warp::nearest_element(axis, at[i])) * to_next;
      index[i] = before >= 0 && warp::is_inside(axis, at[i]) ? element : Index(-1);
    }
  }
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
