// Launches of _mean_field's kernels.
#include "crf/mean_field_cuda.cuh"

namespace pyseg::crf {
namespace {

template <typename T>
void launch_of_type(const Update& a, cudaStream_t stream) {
  const int units = static_cast<int>((a.classes + Unit<T>::kLanes - 1) / Unit<T>::kLanes);
  int group = 1;
  while (group < units && group < kWarpLanes) group *= 2;
  const auto blocks = static_cast<unsigned>((a.images * a.points * group + kUpdateThreads - 1) / kUpdateThreads);
  if (units <= kWarpLanes)
    mean_field_update_kernel<T, 1><<<blocks, kUpdateThreads, 0, stream>>>(a, units, group);
  else if (units <= 2 * kWarpLanes)
    mean_field_update_kernel<T, 2><<<blocks, kUpdateThreads, 0, stream>>>(a, units, group);
  else
    mean_field_update_kernel<T, 0><<<blocks, kUpdateThreads, 0, stream>>>(a, units, group);
}

}  // namespace

cudaError_t launch_update(const Update& a, cudaStream_t stream) {
  if (a.float64)
    launch_of_type<double>(a, stream);
  else
    launch_of_type<float>(a, stream);
  return cudaGetLastError();
}

cudaError_t launch_compatibility(const Rows& rows, const void* compatibility, bool matrix, double factor, void* to,
                                 cudaStream_t stream) {
  const int64_t elements = (matrix ? rows.stride() : 1) * rows.stride();
  const auto blocks = static_cast<unsigned>((elements + kUpdateThreads - 1) / kUpdateThreads);
  if (rows.float64)
    mean_field_compatibility_kernel<double>
        <<<blocks, kUpdateThreads, 0, stream>>>(static_cast<const double*>(compatibility), rows.channels, rows.stride(),
                                                matrix, factor, static_cast<double*>(to));
  else
    mean_field_compatibility_kernel<float>
        <<<blocks, kUpdateThreads, 0, stream>>>(static_cast<const float*>(compatibility), rows.channels, rows.stride(),
                                                matrix, float(factor), static_cast<float*>(to));
  return cudaGetLastError();
}

}  // namespace pyseg::crf
