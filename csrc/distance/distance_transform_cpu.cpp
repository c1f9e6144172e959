// distance_transform and distance_to_two_nearest_objects on the CPU: workspace, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "distance/distance_transform_check.h"
#include "distance/distance_transform_cpu_kernel.h"

namespace pyseg::distance {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const DistanceKernelTable& distance_kernel_table() { return PYSEG_CPU_TABLE(distance_kernels); }

constexpr double kWorkPerElement = 8;  // in the multiply-adds that workers_for counts

Tensor new_distances(const Tensor& like, bool float64) {
  return torch::stable::new_empty(like, like.sizes(), float64 ? ScalarType::Double : ScalarType::Float);
}

std::tuple<Tensor, Tensor> distance_transform(Tensor input, std::vector<double> spacing, std::string mode, bool squared,
                                              bool return_indices, bool float64) {
  const Mode checked_mode = check_mode(mode);
  const Grid grid = check_grid(kTransform, "input", input, spacing, float64);
  const bool labels = checked_mode == Mode::kLabels || checked_mode == Mode::kObjects;
  const Element element = check_element(kTransform, "input", input, labels);
  const Tensor x = torch::stable::contiguous(input);
  Tensor output = new_distances(input, float64);
  Tensor indices = torch::stable::new_empty(
      input, return_indices ? index_sizes(input, grid.dims) : std::vector<int64_t>{0}, ScalarType::Long);
  if (input.numel() == 0) return {output, indices};
  const DistanceArgs args{.input = x.data_ptr(),
                          .element_bytes = element.bytes,
                          .floating = element.floating,
                          .mode = checked_mode,
                          .dims = grid.dims,
                          .n = grid.n,
                          .d = grid.sizes[0],
                          .h = grid.sizes[1],
                          .w = grid.sizes[2],
                          .spacing = {grid.spacing[0], grid.spacing[1], grid.spacing[2]},
                          .squared = squared,
                          .float64 = float64,
                          .output = output.data_ptr(),
                          .indices = return_indices ? static_cast<int64_t*>(indices.data_ptr()) : nullptr};
  const DistanceKernelTable& kernels = distance_kernel_table();
  const Workers workers = workers_for(kWorkPerElement * double(input.numel()));
  const Workspace workspace(input, kernels.transform_workspace(args, workers.count));
  kernels.transform(args, workspace.data, workers);
  return {output, indices};
}

std::tuple<Tensor, Tensor> distance_to_two_nearest_objects(Tensor labels, std::vector<double> spacing, bool squared,
                                                           bool float64) {
  const Grid grid = check_grid(kTwoNearest, "labels", labels, spacing, float64);
  check_element(kTwoNearest, "labels", labels, true);
  const Tensor x = torch::stable::contiguous(torch::stable::to(labels, ScalarType::Int));
  Tensor first = new_distances(labels, float64), second = new_distances(labels, float64);
  if (labels.numel() == 0) return {first, second};
  const TwoNearestArgs args{.labels = static_cast<const int32_t*>(x.data_ptr()),
                            .n = grid.n,
                            .d = grid.sizes[0],
                            .h = grid.sizes[1],
                            .w = grid.sizes[2],
                            .spacing = {grid.spacing[0], grid.spacing[1], grid.spacing[2]},
                            .squared = squared,
                            .float64 = float64,
                            .first = first.data_ptr(),
                            .second = second.data_ptr()};
  const DistanceKernelTable& kernels = distance_kernel_table();
  const Workers workers = workers_for(2 * kWorkPerElement * double(labels.numel()));
  const Workspace workspace(labels, kernels.two_nearest_workspace(args, workers.count));
  kernels.two_nearest(args, workspace.data, workers);
  return {first, second};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("distance_transform", TORCH_BOX(&distance_transform));
  m.impl("distance_to_two_nearest_objects", TORCH_BOX(&distance_to_two_nearest_objects));
}

}  // namespace pyseg::distance
