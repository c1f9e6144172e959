// Where runs of a keyframe's pixels lie in a view, in vectors, for one CPU target.
#pragma once

#include "common/cpu_convert.h"
#include "warp/warp_to_view_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kViewTile = 128;  // pixels of a row that are worked on together

// For pixels side by side: the upper left of the four elements of the view between which each lies, and how far beyond
// it. Of pixels that are not seen, something within the view.
struct ViewTile {
  int32_t y[kViewTile], x[kViewTile];
  double y_weight[kViewTile], x_weight[kViewTile];
  int32_t seen[kViewTile];  // 0 or 1
};

inline void read_depth(const ViewDepth& depth, int64_t image, int64_t at, int64_t count, double* to) {
  const int64_t first = image * depth.image_stride + at;
  if (depth.wide) {
    convert_run(static_cast<const double*>(depth.data) + first, to, count);
  } else {
    convert_run(static_cast<const float*>(depth.data) + first, to, count);
  }
}

template <typename D>
inline void read_measured(const D* depth, const int32_t* pixel, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = double(depth[pixel[i]]);
}

// Pixels u .. u + count - 1 of row v of keyframe n / views, in view n.
inline void locate(const ViewWarpArgs& a, int64_t n, int64_t v, int64_t u, int64_t count, ViewTile* tile) {
  ViewTile& t = *tile;
  const view::Projection projection = a.projection[n];
  const view::Visibility visibility = a.visibility;
  const double height = visibility.height, width = visibility.width, row = double(v);
  double z[kViewTile], depth[kViewTile], measured[kViewTile];
  int32_t pixel[kViewTile];
  read_depth(a.depth, n / a.views, v * a.key_width + u, count, z);
  const auto first = int32_t(u);
  for (int32_t i = 0; i < int32_t(count); ++i) {
    const view::ViewPoint p = view::project(projection, double(first + i), row, z[i]);
    const bool inside = view::is_inside(p, z[i], height, width);
    const view::Between y = view::between(inside ? p.y : 0, visibility.height);
    const view::Between x = view::between(inside ? p.x : 0, visibility.width);
    t.y[i] = y.low;
    t.x[i] = x.low;
    t.y_weight[i] = y.weight;
    t.x_weight[i] = x.weight;
    t.seen[i] = inside;
    depth[i] = p.depth;
    pixel[i] = y.near * visibility.width + x.near;
  }
  if (!visibility.tested) return;
  const int64_t image = n * a.source_depth.image_stride;
  if (a.source_depth.wide) {
    read_measured(static_cast<const double*>(a.source_depth.data) + image, pixel, count, measured);
  } else {
    read_measured(static_cast<const float*>(a.source_depth.data) + image, pixel, count, measured);
  }
  for (int64_t i = 0; i < count; ++i)
    t.seen[i] &= view::is_seen(depth[i], measured[i], visibility.absolute, visibility.relative);
}

// Elements from one of the four to the one beside it, and to the one below; 0 where the view has but one column or row.
inline int64_t step_right(const ViewWarpArgs& a, int64_t column_stride) {
  return a.visibility.width > 1 ? column_stride : 0;
}
inline int64_t step_below(const ViewWarpArgs& a, int64_t row_stride) {
  return a.visibility.height > 1 ? row_stride : 0;
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
