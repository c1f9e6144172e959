// Launchers of the distance transforms' kernels.
#include "distance/distance_transform_cuda.cuh"
#include "distance/distance_transform_cuda.h"

namespace pyseg::distance {
namespace {

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int64_t kStaticShared = 48 * 1024;  // more has to be asked for

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls launch(T{}) with the arithmetic's type.
template <typename Launch>
cudaError_t by_arithmetic(Arithmetic arithmetic, Launch launch) {
  switch (arithmetic) {
    case Arithmetic::kInt32: return launch(int32_t{});
    case Arithmetic::kFloat: return launch(float{});
    case Arithmetic::kDouble: return launch(double{});
  }
  return cudaErrorInvalidValue;
}

template <typename T, int kColumns, bool kShared>
cudaError_t launch_tiles(const AxisPass& args, int64_t shared_bytes, int64_t most_shared, cudaStream_t stream) {
  const int64_t blocks = args.outer * ceil_div(args.columns, kColumns);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  auto kernel = distance_along_axis<T, kColumns, kShared>;
  if (shared_bytes > kStaticShared) {  // always the most: another thread may launch between this and the launch below
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), kAxisThreads, static_cast<size_t>(shared_bytes), stream>>>(args);
  return cudaGetLastError();
}

cudaError_t most_shared_bytes(int64_t& bytes) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  bytes = most;
  return error;
}

}  // namespace

cudaError_t launch_row_pass(const RowPass& args, Arithmetic arithmetic, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.n * args.d * args.h, kRowWarps);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
  return by_arithmetic(arithmetic, [&](auto t) {
    using T = decltype(t);
    switch (args.element_bytes) {
      case 1: distance_rows<uint8_t, T><<<grid, kRowWarps * kWarp, 0, stream>>>(args); break;
      case 2: distance_rows<uint16_t, T><<<grid, kRowWarps * kWarp, 0, stream>>>(args); break;
      case 4: distance_rows<uint32_t, T><<<grid, kRowWarps * kWarp, 0, stream>>>(args); break;
      default: distance_rows<uint64_t, T><<<grid, kRowWarps * kWarp, 0, stream>>>(args); break;
    }
    return cudaGetLastError();
  });
}

cudaError_t launch_axis_pass(const AxisPass& args, Arithmetic arithmetic, cudaStream_t stream) {
  int64_t most_shared = 0;
  if (const cudaError_t error = most_shared_bytes(most_shared); error != cudaSuccess) return error;
  return by_arithmetic(arithmetic, [&](auto t) {
    using T = decltype(t);
    constexpr int kWide = 32, kNarrow = 8;  // a sector of 32 bytes at the least
    const int64_t line = args.rows * static_cast<int64_t>(sizeof(T) + (args.edges ? 1 : 0));
    if (line * kWide <= kStaticShared) return launch_tiles<T, kWide, true>(args, line * kWide, most_shared, stream);
    if (line * kNarrow <= most_shared) return launch_tiles<T, kNarrow, true>(args, line * kNarrow, most_shared, stream);
    return launch_tiles<T, kWide, false>(args, 0, most_shared, stream);
  });
}

cudaError_t launch_two_nearest_rows(const int32_t* labels, int64_t rows, int64_t w, double spacing, TwoNearest result,
                                    Arithmetic arithmetic, cudaStream_t stream) {
  const int64_t blocks = ceil_div(rows * w, kTwoThreads);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  return by_arithmetic(arithmetic, [&](auto t) {
    using T = decltype(t);
    two_nearest_rows<T>
        <<<static_cast<unsigned>(blocks), kTwoThreads, 0, stream>>>(labels, rows * w, w, spacing, result);
    return cudaGetLastError();
  });
}

cudaError_t launch_two_nearest_axis(const AxisPass& args, TwoNearest from, TwoNearest result, Arithmetic arithmetic,
                                    cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.outer * args.rows * args.columns, kTwoThreads);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  return by_arithmetic(arithmetic, [&](auto t) {
    using T = decltype(t);
    two_nearest_along_axis<T><<<static_cast<unsigned>(blocks), kTwoThreads, 0, stream>>>(args, from, result);
    return cudaGetLastError();
  });
}

}  // namespace pyseg::distance
