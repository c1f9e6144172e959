// permutohedral_vertex_kernel on CUDA devices: checks, buffers, order of the launches, registration.
#include "crf/permutohedral_vertex_kernel_cuda.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "crf/crf_cuda.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> permutohedral_vertex_kernel(Tensor key, Tensor offset, double scale, double cutoff,
                                                               double variance, bool float64) {
  check_vertex_kernel(key, offset, scale, cutoff, variance);
  const CudaLaunches launches(kVertexKernel, key);
  Kept kept(key);
  const int64_t vertices = key.size(0);
  const int d = static_cast<int>(key.size(1));
  const double period = scale * (d + 1), unit = period * period * 2 / 3;  // one squared standard deviation
  const VertexKernelTask task{.key = kept.read<int16_t>(key),
                              .offset = kept.read<int64_t>(offset),
                              .images = offset.numel() - 1,
                              .vertices = vertices,
                              .d = d,
                              .limit = int64_t(cutoff * cutoff * unit),
                              .exponent = -1 / (2 * variance * unit),
                              .box = kept.buffer<int32_t>(box_elements(vertices, d), ScalarType::Int)};
  Tensor row = torch::stable::new_empty(key, {vertices + 1}, ScalarType::Long);
  int64_t* const rows = static_cast<int64_t*>(row.data_ptr());
  int64_t entries = 0;
  if (vertices == 0) {
    torch::stable::zero_(row);
  } else {
    size_t bytes = 0;
    launches.check(launch_vertex_kernel_rows(task, rows, nullptr, bytes, launches.stream()));
    uint8_t* const temporary = kept.buffer<uint8_t>(int64_t(bytes), ScalarType::Byte);
    launches.check(launch_vertex_kernel_rows(task, rows, temporary, bytes, launches.stream()));
    launches.check(
        cudaMemcpyAsync(&entries, rows + vertices, sizeof entries, cudaMemcpyDeviceToHost, launches.stream()));
    launches.check(cudaStreamSynchronize(launches.stream()));
  }
  const Tensor vertex = torch::stable::new_empty(key, {entries}, ScalarType::Int);
  const Tensor weight = torch::stable::new_empty(key, {entries}, float64 ? ScalarType::Double : ScalarType::Float);
  if (entries > 0)
    launches.check(launch_vertex_kernel(task, rows, static_cast<int32_t*>(vertex.data_ptr()), weight.data_ptr(),
                                        float64, launches.stream()));
  return {row, vertex, weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("permutohedral_vertex_kernel", TORCH_BOX(&permutohedral_vertex_kernel));
}

}  // namespace pyseg::crf
