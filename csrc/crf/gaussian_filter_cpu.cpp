// gaussian_filter on the CPU: layouts, workspace, threads, registration.
#include <torch/csrc/stable/library.h>

#include "crf/crf_cpu.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

Tensor gaussian_filter(Tensor values, std::vector<double> sigma, double truncate, bool normalize) {
  check_gaussian(values, sigma);
  const Tensor wide = as_type(values, wide_type(values));
  GaussianArgs args{.maps = wide.size(0) * wide.size(1),
                    .axes = {1, 1, 1},
                    .taps = {},
                    .radius = {-1, -1, -1},
                    .float64 = wide.scalar_type() == ScalarType::Double,
                    .values = wide.data_ptr(),
                    .output = nullptr,
                    .scratch = nullptr};
  Tensor taps[3];
  int passes = 0;
  double work = 8;
  for (int64_t i = 0; i < wide.dim() - 2; ++i) {
    const int64_t axis = 3 - (wide.dim() - 2) + i;
    args.axes[axis] = wide.size(2 + i);
    const std::vector<double> numbers = gaussian_taps(kGaussian, sigma[i], truncate, normalize);
    if (numbers.size() == 1) continue;  // its one tap is 1
    args.radius[axis] = int64_t(numbers.size()) - 1;
    taps[axis] = taps_of(wide, numbers);
    args.taps[axis] = taps[axis].data_ptr();
    work += 2 * double(numbers.size());
    ++passes;
  }
  Tensor output = torch::stable::new_empty(wide, wide.sizes());
  if (output.numel() > 0) {
    args.output = output.data_ptr();
    const Tensor scratch = torch::stable::new_empty(wide, passes > 1 ? sizes_of(wide) : Ints{0});
    args.scratch = passes > 1 ? scratch.data_ptr() : nullptr;
    const Workers workers = workers_for(work * double(output.numel()));
    const Workspace workspace(wide, crf_kernels().gaussian_workspace(args, workers.count));
    crf_kernels().gaussian(args, workspace.data, workers);
  }
  return output.scalar_type() == values.scalar_type() ? output : torch::stable::to(output, values.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("gaussian_filter", TORCH_BOX(&gaussian_filter)); }

}  // namespace pyseg::crf
