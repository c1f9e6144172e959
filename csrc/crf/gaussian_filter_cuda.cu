// gaussian_filter on CUDA devices: checks, buffers, launches, registration.
#include "crf/gaussian_filter_cuda.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "crf/crf_cuda.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

template <typename T, int kUnit, int kOutputs>
cudaError_t launch_pass(const GaussianPass& p, cudaStream_t stream) {
  const int64_t units = p.inner / kUnit;
  const int across = static_cast<int>(std::min<int64_t>(units, kMostUnits)), down = kGaussianThreads / across;
  const int64_t slots = p.outer * ((p.length + kOutputs - 1) / kOutputs);
  const int64_t blocks = (units + across - 1) / across * ((slots + down - 1) / down);
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  gaussian_pass_kernel<T, kUnit, kOutputs><<<static_cast<unsigned>(blocks), kGaussianThreads, 0, stream>>>(p, across);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_of_type(const GaussianPass& p, cudaStream_t stream) {
  constexpr int kOutputs = 8;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kUnitBytes == 0; };
  const bool whole = aligned(p.from) && aligned(p.to) && p.scale_run % Unit<T>::kLanes == 0;
  if (p.inner == 1) return launch_pass<T, 1, 1>(p, stream);
  if (whole && p.inner % Unit<T>::kLanes == 0) return launch_pass<T, Unit<T>::kLanes, kOutputs>(p, stream);
  return launch_pass<T, 1, kOutputs>(p, stream);
}

}  // namespace

cudaError_t launch_gaussian_pass(const GaussianPass& p, cudaStream_t stream) {
  return p.float64 ? launch_of_type<double>(p, stream) : launch_of_type<float>(p, stream);
}

cudaError_t launch_gaussian_taps(double sigma, int64_t radius, double peak, bool float64, void* taps,
                                 cudaStream_t stream) {
  const int64_t count = radius + 1;
  const auto blocks = static_cast<unsigned>((count + kGaussianThreads - 1) / kGaussianThreads);
  const double exponent = sigma > 0 ? -1 / (2 * sigma * sigma) : 0;
  if (float64)
    gaussian_taps_kernel<<<blocks, kGaussianThreads, 0, stream>>>(exponent, count, peak, static_cast<double*>(taps));
  else
    gaussian_taps_kernel<<<blocks, kGaussianThreads, 0, stream>>>(exponent, count, peak, static_cast<float*>(taps));
  return cudaGetLastError();
}

namespace {

Tensor gaussian_filter(Tensor values, std::vector<double> sigma, double truncate, bool normalize) {
  check_gaussian(values, sigma);
  const CudaLaunches launches(kGaussian, values);
  const Tensor wide = as_type(values, wide_type(values));
  const bool float64 = wide.scalar_type() == ScalarType::Double;
  const auto narrow = [&](const Tensor& t) {
    return t.scalar_type() == values.scalar_type() ? t : torch::stable::to(t, values.scalar_type());
  };
  std::vector<std::vector<double>> taps;  // of axes
  int64_t passes = 0;
  for (const double s : sigma) {
    taps.push_back(gaussian_taps(kGaussian, s, truncate, normalize));
    passes += taps.back().size() > 1;
  }
  if (passes == 0 || wide.numel() == 0) {
    const Tensor copy = torch::stable::new_empty(wide, wide.sizes());
    if (wide.numel() > 0)
      launches.check(cudaMemcpyAsync(copy.data_ptr(), wide.data_ptr(), size_t(wide.numel()) * (float64 ? 8 : 4),
                                     cudaMemcpyDeviceToDevice, launches.stream()));
    return narrow(copy);
  }
  Kept kept(wide);
  const Tensor output = torch::stable::new_empty(wide, wide.sizes());
  void* const scratch = kept.numbers(passes > 1 ? wide.numel() : 0, float64);
  const void* from = wide.data_ptr();
  int64_t left = passes, inner = 1;
  for (int64_t axis = int64_t(sigma.size()) - 1; axis >= 0; inner *= wide.size(2 + axis), --axis) {
    if (taps[axis].size() == 1) continue;
    const int64_t length = wide.size(2 + axis), radius = int64_t(taps[axis].size()) - 1;
    void* const own_taps = kept.numbers(radius + 1, float64);
    launches.check(launch_gaussian_taps(sigma[axis], radius, taps[axis][0], float64, own_taps, launches.stream()));
    void* const to = --left % 2 == 0 ? output.data_ptr() : scratch;  // the last pass writes the output
    launches.check(launch_gaussian_pass({.float64 = float64,
                                         .outer = wide.numel() / (length * inner),
                                         .length = length,
                                         .inner = inner,
                                         .radius = radius,
                                         .taps = own_taps,
                                         .from = from,
                                         .to = to,
                                         .scale = nullptr,
                                         .scale_run = kUnitBytes,
                                         .scale_period = 1},
                                        launches.stream()));
    from = to;
  }
  return narrow(output);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) { m.impl("gaussian_filter", TORCH_BOX(&gaussian_filter)); }

}  // namespace pyseg::crf
