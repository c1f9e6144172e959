// _mean_field on the CPU: layouts, workspace, threads, registration.
#include <torch/csrc/stable/library.h>

#include <list>
#include <memory>

#include "crf/crf_cpu.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

// Where a coarse grid serves: the kernel spans enough of its nodes, and the image's borders, at which it errs most, are
// few among its pixels.
constexpr double kLeastCoarseSigma = 3;  // in pixels
constexpr int64_t kLeastCoarseSize = 32;

// The taps between nodes two pixels apart which, with the tents [1 3 3 1] / 4 before and after them, make up a Gaussian:
// of the variance that the tents, of 3/4 each, leave over, and of the sum that its own taps have.
std::vector<double> coarse_taps(double sigma, double truncate) {
  const double variance = (sigma * sigma - 1.5) / 4;
  std::vector<double> taps(gaussian_radius(kMeanField, std::sqrt(variance), truncate) + 2, 1.);
  double sum = 1, wanted = -1;
  for (size_t x = 1; x < taps.size(); ++x) sum += 2 * (taps[x] = std::exp(-double(x) * double(x) / (2 * variance)));
  for (const double tap : gaussian_taps(kMeanField, sigma, truncate, false)) wanted += 2 * tap;
  for (double& tap : taps) tap *= wanted / 2 / sum;  // a node stands for two pixels
  return taps;
}

Tensor mean_field(Tensor unary, std::optional<Tensor> initial, int64_t iterations, double temperature,
                  std::vector<Tensor> lattices, std::vector<double> sigmas, double truncate, bool coarse,
                  std::vector<Tensor> scale_in, std::vector<Tensor> scale_out, std::vector<Tensor> compatibility) {
  const MeanFieldShape shape =
      check_mean_field(unary, initial, iterations, temperature, lattices, sigmas, scale_in, scale_out, compatibility);
  const ScalarType type = wide_type(unary);
  const Tensor wide = as_type(unary, type);
  Tensor output = torch::stable::new_empty(wide, wide.sizes());
  const auto narrow = [&](const Tensor& t) {
    return unary.scalar_type() == type ? t : torch::stable::to(t, unary.scalar_type());
  };
  if (output.numel() == 0) return narrow(output);

  std::list<Tensor> kept;  // what the kernels point into
  const auto keep = [&](const Tensor& t) -> const Tensor& { return kept.emplace_back(torch::stable::contiguous(t)); };
  std::vector<LatticeInput> inputs;
  double work = 30;  // for each class and pixel
  for (size_t k = 0; k < shape.lattices; ++k) {
    const Lattice l = lattice_at(lattices, k);
    const Lattice own{keep(l.vertex),     keep(l.weight),        keep(l.row),
                      keep(l.entry),      keep(l.neighbour),     keep(l.offset),
                      keep(l.kernel_row), keep(l.kernel_vertex), keep(l.kernel_weight)};
    check_lattice_contents(kMeanField, own);
    inputs.push_back(input_of(own));
    work += 2 * l.corners();
  }
  const int64_t axes = unary.dim() - 2;
  std::vector<const void*> taps(3 * shape.gaussians, nullptr);
  std::vector<int64_t> radius(3 * shape.gaussians, -1);
  const std::unique_ptr<bool[]> on_coarse_grid(new bool[shape.gaussians]);
  for (size_t g = 0; g < shape.gaussians; ++g) {
    const double* const sigma = sigmas.data() + g * axes;
    on_coarse_grid[g] = coarse && axes >= 2;
    for (int64_t i = std::max<int64_t>(0, axes - 2); i < axes; ++i)
      on_coarse_grid[g] &= sigma[i] >= kLeastCoarseSigma && unary.size(2 + i) >= kLeastCoarseSize;
    for (int64_t i = 0; i < axes; ++i) {
      const size_t at = 3 * g + (3 - axes) + i;
      const bool halved = on_coarse_grid[g] && i >= axes - 2;
      const std::vector<double> numbers =
          halved ? coarse_taps(sigma[i], truncate) : gaussian_taps(kMeanField, sigma[i], truncate, false);
      if (numbers.size() == 1) continue;
      radius[at] = int64_t(numbers.size()) - 1;
      taps[at] = kept.emplace_back(taps_of(wide, numbers)).data_ptr();
      work += 2 * double(numbers.size());
    }
  }
  std::vector<PairwiseInput> pairwise;
  const auto scale_of = [&](const Tensor& t) -> ScaleInput {
    if (t.numel() == 0) return {nullptr, 0};
    return {keep(t).data_ptr(), t.size(0) == 1 ? 0 : shape.points};
  };
  for (size_t k = 0; k < compatibility.size(); ++k)
    pairwise.push_back({.scale_in = scale_of(scale_in[k]),
                        .scale_out = scale_of(scale_out[k]),
                        .compatibility = keep(compatibility[k]).data_ptr(),
                        .matrix = compatibility[k].dim() == 2});
  MeanFieldArgs args{.images = shape.images,
                     .classes = shape.classes,
                     .axes = {shape.axes[0], shape.axes[1], shape.axes[2]},
                     .float64 = type == ScalarType::Double,
                     .unary = wide.data_ptr(),
                     .initial = nullptr,
                     .iterations = iterations,
                     .temperature = temperature,
                     .lattices = inputs.data(),
                     .lattice_count = int64_t(shape.lattices),
                     .taps = taps.data(),
                     .radius = radius.data(),
                     .coarse = on_coarse_grid.get(),
                     .gaussian_count = int64_t(shape.gaussians),
                     .pairwise = pairwise.data(),
                     .output = output.data_ptr()};
  if (initial) args.initial = kept.emplace_back(as_type(*initial, type)).data_ptr();
  const Workers workers = workers_for(work * double(output.numel()));
  const Workspace workspace(wide, crf_kernels().mean_field_workspace(args, workers.count));
  PYSEG_CHECK(crf_kernels().mean_field(args, workspace.data, workers), kMeanField, ": unary must not be NaN");
  return narrow(output);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("_mean_field", TORCH_BOX(&mean_field)); }

}  // namespace pyseg::crf
