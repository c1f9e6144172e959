// Where a pixel of a keyframe lies in another view, for host and device. Torch-free. Everything is in double precision
// on every device and for every dtype: whether a pixel is seen must not hang on the dtype of the scores.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYSEG_VIEW_INLINE static __host__ __device__ inline
#else
#define PYSEG_VIEW_INLINE static inline
#endif

namespace pyseg::view {

// The keyframe's pixel (u, v) at depth z is z * m (u, v, 1) + b in the view: its depth times (x, y, 1), then its depth.
struct Projection {
  double m[3][3], b[3];
};

// What a pixel of the keyframe needs to be seen in a view of height x width pixels.
struct Visibility {
  int32_t height, width;
  bool tested;  // against the depth that the view itself measured
  double absolute, relative;
};

// m = K_s R K_k^-1, b = K_s t with the pose [R t; 0 1] and K = [fx s cx; 0 fy cy; 0 0 1], all row by row; the last rows
// are not read. Numbers: what [i] gives the elements of.
template <typename Numbers>
PYSEG_VIEW_INLINE Projection projection_of(Numbers key, Numbers source, Numbers pose) {
  const double fx = key[0], s = key[1], cx = key[2], fy = key[4], cy = key[5];
  const double inverse[3][3] = {{1 / fx, -s / (fx * fy), (s * cy / fy - cx) / fx}, {0, 1 / fy, -cy / fy}, {0, 0, 1}};
  Projection p;
  double rotated[3][4];
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      rotated[i][j] = 0;
      for (int k = 0; k <= j; ++k) rotated[i][j] += pose[4 * i + k] * inverse[k][j];
    }
    rotated[i][3] = pose[4 * i + 3];
  }
  const auto to_image = [&](int row, int column) {
    if (row == 2) return rotated[2][column];
    double sum = source[3 * row + 2] * rotated[2][column] + source[3 * row + 1] * rotated[1][column];
    if (row == 0) sum += source[0] * rotated[0][column];
    return sum;
  };
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) p.m[i][j] = to_image(i, j);
    p.b[i] = to_image(i, 3);
  }
  return p;
}

// x, y in pixels, whose centres are whole numbers; depth in the view.
struct ViewPoint {
  double x, y, depth;
};

PYSEG_VIEW_INLINE ViewPoint project(const Projection& p, double u, double v, double z) {
  const double depth = z * (p.m[2][0] * u + (p.m[2][1] * v + p.m[2][2])) + p.b[2], inverse = 1 / depth;
  return {(z * (p.m[0][0] * u + (p.m[0][1] * v + p.m[0][2])) + p.b[0]) * inverse,
          (z * (p.m[1][0] * u + (p.m[1][1] * v + p.m[1][2])) + p.b[1]) * inverse, depth};
}

// Whether the keyframe's depth z is one, and the point lies in front of the view and in one of its pixels. NaN is none.
PYSEG_VIEW_INLINE bool is_inside(const ViewPoint& p, double z, double height, double width) {
  return bool(int(z > 0) & int(p.depth > 0) & int(p.x >= -0.5) & int(p.x <= width - 0.5) & int(p.y >= -0.5) &
              int(p.y <= height - 0.5));
}

// Whether the view measured the same depth there.
PYSEG_VIEW_INLINE bool is_seen(double depth, double measured, double absolute, double relative) {
  const double apart = depth - measured;
  return bool(int(measured > 0) & int(measured <= 1.7976931348623157e308) &
              int((apart < 0 ? -apart : apart) <= absolute + relative * measured));
}

// Along one axis of `size` elements: between low and low + 1, or on 0 where there is but one; beyond the outer pixels'
// centres the value is theirs. `near` is the nearest element.
struct Between {
  int32_t low, near;
  double weight;
};
PYSEG_VIEW_INLINE Between between(double at, int32_t size) {
  const double last = double(size - 1), clamped = at < 0 ? 0 : at > last ? last : at;
  const auto whole = int32_t(clamped);
  const int32_t last_low = size > 1 ? size - 2 : 0, low = whole < last_low ? whole : last_low;
  return {low, int32_t(clamped + 0.5), clamped - double(low)};
}

}  // namespace pyseg::view
