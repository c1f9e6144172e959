// What fuse_query's coordinates add to an output, for CPU targets and CUDA kernels. Torch-free. Functions are static:
// units for different instruction sets must not share one.
//
// With u and v the centre of a pixel in [-1, 1] along x and y, its coordinates are (u - 1/W, v - 1/H, u + 1/W, v + 1/H,
// u, v, 1/W, 1/H) (1603.06180, section 3.3), so eight weights add constant + column * u + row * v.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYSEG_FUSE_INLINE static __host__ __device__ inline
#else
#define PYSEG_FUSE_INLINE static inline
#endif

namespace pyseg::fuse {

constexpr int kCoordinates = 8;
constexpr double kLeastNorm = 1e-12;  // of a pixel's channels, as in torch's normalize

// Of the weights, or of gradients: the sums over the pixels of g, g * u and g * v.
template <typename A>
struct Ramp {
  A constant, column, row;
};

// The centre of element i of n, `inverse` = 1 / n.
template <typename A>
PYSEG_FUSE_INLINE A centre_of(int64_t i, int64_t n, A inverse) {
  return A(2 * i + 1 - n) * inverse;
}

template <typename A>
PYSEG_FUSE_INLINE Ramp<A> ramp_of(const A* w /* [8] */, A inverse_height, A inverse_width) {
  return {(w[2] - w[0] + w[6]) * inverse_width + (w[3] - w[1] + w[7]) * inverse_height, w[0] + w[2] + w[4],
          w[1] + w[3] + w[5]};
}

// The transpose of ramp_of.
template <typename A>
PYSEG_FUSE_INLINE void coordinates_gradient(const Ramp<A>& sum, A inverse_height, A inverse_width, A* grad /* [8] */) {
  const A x = sum.constant * inverse_width, y = sum.constant * inverse_height;
  grad[0] = sum.column - x;
  grad[1] = sum.row - y;
  grad[2] = sum.column + x;
  grad[3] = sum.row + y;
  grad[4] = sum.column;
  grad[5] = sum.row;
  grad[6] = x;
  grad[7] = y;
}

}  // namespace pyseg::fuse
