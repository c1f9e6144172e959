// Launchers of the kernels on a lattice's rows.
#include <utility>

#include "crf/lattice_rows_cuda.cuh"
#include "crf/permutohedral_math.h"

namespace pyseg::crf {
namespace {

int64_t blocks_for(int64_t elements, int64_t each) { return (elements + each - 1) / each; }

// Calls f(T{}) and looks for an error.
template <typename F>
cudaError_t with_type(bool float64, const F& f) {
  if (float64)
    f(double{});
  else
    f(float{});
  return cudaGetLastError();
}

dim3 tile_grid(const RowLanes& lanes, int64_t images, int64_t points) {
  return {static_cast<unsigned>(images * blocks_for(points, kTilePoints)), lanes.chunks, 1};
}

dim3 row_grid(const RowLanes& lanes, int64_t rows) {
  return {static_cast<unsigned>(blocks_for(rows, lanes.rows)), lanes.chunks, 1};
}

}  // namespace

double blur_factor(const LatticeView& l) { return l.kernel_row != nullptr ? 1 : blur_scale(l.corners - 1); }

cudaError_t launch_pack(const Rows& rows, const void* planes, int64_t images, int64_t points, double factor, double pad,
                        void* to, cudaStream_t stream) {
  const RowLanes lanes = row_lanes(rows.units(), kRowThreads);
  return with_type(rows.float64, [&](auto t) {
    using T = decltype(t);
    crf_pack_kernel<T><<<tile_grid(lanes, images, points), kRowThreads, 0, stream>>>(
        lanes, static_cast<const T*>(planes), points, rows.channels, T(factor), T(pad), static_cast<T*>(to));
  });
}

cudaError_t launch_unpack(const Rows& rows, const void* from, int64_t images, int64_t points, void* planes,
                          cudaStream_t stream) {
  const RowLanes lanes = row_lanes(rows.units(), kRowThreads);
  return with_type(rows.float64, [&](auto t) {
    using T = decltype(t);
    crf_unpack_kernel<T><<<tile_grid(lanes, images, points), kRowThreads, 0, stream>>>(
        lanes, static_cast<const T*>(from), points, rows.channels, static_cast<T*>(planes));
  });
}

cudaError_t launch_items(const LatticeView& l, const PointScale& scale, bool float64, const SplatItems& items,
                         cudaStream_t stream) {
  return with_type(float64, [&](auto t) {
    lattice_items_kernel<decltype(t)>
        <<<static_cast<unsigned>(blocks_for(l.entries, kRowThreads)), kRowThreads, 0, stream>>>(l, scale, items);
  });
}

cudaError_t launch_vertices(const LatticeView& l, const Rows& rows, const SplatItems& items, const SplatCarry& carry,
                            const void* values, bool reverse, void* table, void* other, cudaStream_t stream) {
  if (l.vertices == 0) return cudaSuccess;
  const RowLanes lanes = row_lanes(rows.units(), kRowThreads);
  const int64_t segments = segments_of(l);
  return with_type(rows.float64, [&](auto t) {
    using T = decltype(t);
    T *from = static_cast<T*>(table), *to = static_cast<T*>(other);
    if (l.kernel_row != nullptr || l.corners % 2 == 1) std::swap(from, to);  // so that the last pass writes `table`
    const RowLanes splat_lanes = row_lanes(rows.units(), kSplatThreads);
    lattice_splat_kernel<T><<<row_grid(splat_lanes, segments), kSplatThreads, 0, stream>>>(
        l, splat_lanes, items, static_cast<const T*>(values), carry, from);
    const dim3 warps(static_cast<unsigned>(blocks_for(segments, kRowThreads / kWarpLanes)), lanes.chunks);
    lattice_carry_kernel<T><<<warps, kRowThreads, 0, stream>>>(l, lanes, segments, carry, from);
    if (l.kernel_row != nullptr) {
      lattice_product_kernel<T><<<row_grid(lanes, l.vertices), kRowThreads, 0, stream>>>(l, lanes, from, to);
    } else {
      for (int pass = 0; pass < l.corners; ++pass) {
        const int direction = reverse ? l.corners - 1 - pass : pass;
        lattice_blur_kernel<T><<<row_grid(lanes, l.vertices), kRowThreads, 0, stream>>>(l, lanes, direction, from, to);
        std::swap(from, to);
      }
    }
  });
}

cudaError_t launch_slice(const LatticeView& l, const Rows& rows, const void* table, void* planes, cudaStream_t stream) {
  const RowLanes lanes = row_lanes(rows.units(), kRowThreads);
  return with_type(rows.float64, [&](auto t) {
    using T = decltype(t);
    lattice_slice_kernel<T><<<tile_grid(lanes, l.images, l.points), kRowThreads, 0, stream>>>(
        l, lanes, static_cast<const T*>(table), T(blur_factor(l)), rows.channels, static_cast<T*>(planes));
  });
}

cudaError_t launch_weight_gradient(const LatticeView& l, const Rows& rows, const void* values, const void* grad,
                                   const void* of_values, const void* of_grad, void* grad_weight, cudaStream_t stream) {
  int group = 1;
  while (group < rows.units() && group < kWarpLanes) group *= 2;
  const int64_t blocks = blocks_for(l.images * l.points * group, kRowThreads);
  return with_type(rows.float64, [&](auto t) {
    using T = decltype(t);
    lattice_weight_gradient_kernel<T><<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(
        l, static_cast<int>(rows.units()), group, static_cast<const T*>(values), static_cast<const T*>(grad),
        static_cast<const T*>(of_values), static_cast<const T*>(of_grad), T(blur_factor(l)),
        static_cast<T*>(grad_weight));
  });
}

}  // namespace pyseg::crf
