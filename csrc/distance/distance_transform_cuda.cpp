// distance_transform and distance_to_two_nearest_objects on CUDA devices: checks, buffers, order of the passes,
// registration.
#include "distance/distance_transform_cuda.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/cuda_launches.h"
#include "distance/distance_transform_check.h"

namespace pyseg::distance {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType type_of(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::kInt32: return ScalarType::Int;
    case Arithmetic::kFloat: return ScalarType::Float;
    default: return ScalarType::Double;
  }
}

ScalarType distance_type(bool float64) { return float64 ? ScalarType::Double : ScalarType::Float; }

// Whether float32 holds all squared distances exactly, or there are none but float32's own.
bool exact_roots(const Grid& g, Arithmetic arithmetic) {
  const int64_t longest = g.sizes[0] * g.sizes[0] + g.sizes[1] * g.sizes[1] + g.sizes[2] * g.sizes[2];
  return arithmetic == Arithmetic::kFloat || longest < int64_t{1} << 24;
}

std::tuple<Tensor, Tensor> distance_transform(Tensor input, std::vector<double> spacing, std::string mode, bool squared,
                                              bool return_indices, bool float64) {
  const Mode checked_mode = check_mode(mode);
  const Grid grid = check_grid(kTransform, "input", input, spacing, float64);
  const bool labels = checked_mode == Mode::kLabels || checked_mode == Mode::kObjects;
  const Element element = check_element(kTransform, "input", input, labels);
  const CudaLaunches launches(kTransform, input);
  Tensor output = torch::stable::new_empty(input, input.sizes(), distance_type(float64));
  const std::vector<int64_t> sizes = return_indices ? index_sizes(input, grid.dims) : std::vector<int64_t>{0};
  Tensor indices = torch::stable::new_empty(input, sizes, ScalarType::Long);
  if (input.numel() == 0) return {output, indices};

  const Tensor x = torch::stable::contiguous(input);
  const auto [d, h, w] = grid.sizes;
  const Arithmetic arithmetic = arithmetic_for(grid.sizes, grid.spacing, float64);
  const auto buffer = [&](ScalarType type) { return torch::stable::new_empty(input, {input.numel()}, type); };
  // Rows -> squares -> output; with three axes rows -> (output's memory, if squares fit it) -> squares -> output.
  const Tensor squares = buffer(type_of(arithmetic));
  std::optional<Tensor> of_rows, edges, nearest, nearest_in_rows;
  const bool fits = (arithmetic == Arithmetic::kDouble) == float64;
  if (grid.dims == 3) of_rows = fits ? output : buffer(type_of(arithmetic));
  if (compares_labels(checked_mode)) edges = buffer(ScalarType::Byte);
  if (return_indices) nearest = buffer(ScalarType::Long);
  if (return_indices && grid.dims == 3) nearest_in_rows = buffer(ScalarType::Long);
  const auto bytes = [](const std::optional<Tensor>& t) { return t ? static_cast<uint8_t*>(t->data_ptr()) : nullptr; };
  const auto longs = [](const std::optional<Tensor>& t) { return t ? static_cast<int64_t*>(t->data_ptr()) : nullptr; };

  const bool three = grid.dims == 3;
  void* row_squares = three ? of_rows->data_ptr() : squares.data_ptr();
  int64_t* row_nearest = three ? longs(nearest_in_rows) : longs(nearest);
  launches.check(launch_row_pass({.input = x.data_ptr(),
                                  .element_bytes = element.bytes,
                                  .floating = element.floating,
                                  .mode = checked_mode,
                                  .n = grid.n,
                                  .d = d,
                                  .h = h,
                                  .w = w,
                                  .spacing = grid.spacing[2],
                                  .squares = row_squares,
                                  .edges = bytes(edges),
                                  .nearest = row_nearest},
                                 arithmetic, launches.stream()));
  AxisPass pass{.outer = grid.n * d,
                .rows = h,
                .columns = w,
                .spacing = grid.spacing[1],
                .squares = row_squares,
                .edges = bytes(edges),
                .edge = kEdgeAbove,
                .nearest = row_nearest,
                .result = three ? squares.data_ptr() : output.data_ptr(),
                .result_nearest = longs(nearest),
                .last = !three,
                .squared = squared,
                .float64 = float64,
                .exact_roots = exact_roots(grid, arithmetic),
                .mode = checked_mode,
                .indices = return_indices ? static_cast<int64_t*>(indices.data_ptr()) : nullptr,
                .dims = grid.dims,
                .w = w};
  launches.check(launch_axis_pass(pass, arithmetic, launches.stream()));
  if (three) {
    pass.outer = grid.n;
    pass.rows = d;
    pass.columns = h * w;
    pass.spacing = grid.spacing[0];
    pass.squares = squares.data_ptr();
    pass.edge = kEdgeBefore;
    pass.nearest = longs(nearest);
    pass.result = output.data_ptr();
    pass.last = true;
    launches.check(launch_axis_pass(pass, arithmetic, launches.stream()));
  }
  return {output, indices};
}

std::tuple<Tensor, Tensor> distance_to_two_nearest_objects(Tensor labels, std::vector<double> spacing, bool squared,
                                                           bool float64) {
  const Grid grid = check_grid(kTwoNearest, "labels", labels, spacing, float64);
  check_element(kTwoNearest, "labels", labels, true);
  const CudaLaunches launches(kTwoNearest, labels);
  Tensor first = torch::stable::new_empty(labels, labels.sizes(), distance_type(float64));
  Tensor second = torch::stable::new_empty(labels, labels.sizes(), distance_type(float64));
  if (labels.numel() == 0) return {first, second};

  const Tensor x = torch::stable::contiguous(torch::stable::to(labels, ScalarType::Int));
  const auto [d, h, w] = grid.sizes;
  const Arithmetic arithmetic = arithmetic_for(grid.sizes, grid.spacing, float64);
  std::vector<Tensor> kept;
  const auto candidates = [&]() -> TwoNearest {
    for (const ScalarType type : {type_of(arithmetic), type_of(arithmetic), ScalarType::Int, ScalarType::Int})
      kept.push_back(torch::stable::new_empty(labels, {labels.numel()}, type));
    const Tensor* t = &kept[kept.size() - 4];
    return {t[0].data_ptr(), t[1].data_ptr(), static_cast<int32_t*>(t[2].data_ptr()),
            static_cast<int32_t*>(t[3].data_ptr())};
  };
  const TwoNearest output{first.data_ptr(), second.data_ptr(), nullptr, nullptr};
  const TwoNearest rows = candidates();
  launches.check(launch_two_nearest_rows(static_cast<const int32_t*>(x.data_ptr()), grid.n * d * h, w, grid.spacing[2],
                                         rows, arithmetic, launches.stream()));
  AxisPass pass{};
  pass.outer = grid.n * d;
  pass.rows = h;
  pass.columns = w;
  pass.spacing = grid.spacing[1];
  pass.last = grid.dims == 2;
  pass.squared = squared;
  pass.float64 = float64;
  pass.exact_roots = exact_roots(grid, arithmetic);
  const TwoNearest planes = pass.last ? output : candidates();
  launches.check(launch_two_nearest_axis(pass, rows, planes, arithmetic, launches.stream()));
  if (grid.dims == 3) {
    pass.outer = grid.n;
    pass.rows = d;
    pass.columns = h * w;
    pass.spacing = grid.spacing[0];
    pass.last = true;
    launches.check(launch_two_nearest_axis(pass, planes, output, arithmetic, launches.stream()));
  }
  return {first, second};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("distance_transform", TORCH_BOX(&distance_transform));
  m.impl("distance_to_two_nearest_objects", TORCH_BOX(&distance_to_two_nearest_objects));
}

}  // namespace pyseg::distance
