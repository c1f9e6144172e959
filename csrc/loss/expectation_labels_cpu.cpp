// expectation_labels on the CPU: checks, workspace, threads, registration. With shares the images are spread over the
// threads, without them blocks of pixels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "loss/expectation_labels_check.h"
#include "loss/expectation_labels_cpu_kernel.h"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The most classes that compete in an image.
int64_t most_competing(const ExpectationArgs& a) {
  if (!a.exclude_absent) return a.classes;
  int64_t most = 0;
  for (int64_t n = 0; n < a.images; ++n) {
    const uint8_t* present = a.present + n * a.classes;
    most = std::max<int64_t>(most, std::count_if(present, present + a.classes, [](uint8_t p) { return p != 0; }));
  }
  return most;
}

std::tuple<Tensor, Tensor> expectation_labels(Tensor logits, Tensor present, OptTensor valid, double background_bias,
                                              double foreground_bias, double background_share, double foreground_share,
                                              bool exclude_absent, int64_t sweeps, int64_t ignore_index) {
  ExpectationArgs args = check_expectation(logits, present, valid, background_bias, foreground_bias, background_share,
                                           foreground_share, exclude_absent, sweeps, ignore_index);
  Tensor labels = torch::stable::new_empty(logits, sizes_of_pixels(logits), ScalarType::Long);
  Tensor bias = torch::stable::new_empty(logits, {args.images, args.classes}, wide_dtype(logits));
  if (args.images == 0) return {labels, bias};
  args.labels = static_cast<int64_t*>(labels.data_ptr());
  args.bias = bias.data_ptr();
  const ExpectationKernels& kernels = PYSEG_CPU_TABLE(expectation_kernels);
  const int64_t competing = most_competing(args);
  const double reads = double(args.images) * double(args.pixels) * double(competing + 1);
  Workers workers = workers_for(is_adaptive(args) ? 20 * reads : 2 * reads);
  if (is_adaptive(args)) workers.count = std::min(workers.count, args.images);
  const Workspace workspace(logits, workers.count * kernels.worker_bytes(args, competing));
  kernels.run(args, competing, workspace.data, workers);
  return {labels, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) { m.impl("expectation_labels", TORCH_BOX(&expectation_labels)); }

}  // namespace pyseg::loss
