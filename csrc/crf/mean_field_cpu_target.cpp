// Filters and mean field on the CPU, for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include <type_traits>

#include "crf/cpu_gaussian.h"
#include "crf/cpu_lattice_filter.h"
#include "crf/cpu_mean_field.h"
#include "crf/crf_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// The filters take up to kMostOneChunk channels at a time.
int64_t filter_workspace(const FilterArgs& a, int64_t workers) {
  int64_t bytes = 0;
  for (int64_t first = 0; first < a.channels; first += kMostOneChunk)
    bytes = larger(bytes, with_rows(a.float64, smaller(kMostOneChunk, a.channels - first), [&](const auto& rows) {
                     return LatticeFilter<std::decay_t<decltype(rows)>>::workspace(rows, a, workers);
                   }));
  return bytes;
}

void filter(const FilterArgs& a, void* workspace, const Workers& workers) {
  for (int64_t first = 0; first < a.channels; first += kMostOneChunk) {
    const int64_t channels = smaller(kMostOneChunk, a.channels - first);
    with_rows(a.float64, channels, [&](const auto& rows) {
      LatticeFilter<std::decay_t<decltype(rows)>>(rows, a, workspace, workers).run(first, channels);
    });
  }
}

int64_t gaussian_workspace(const GaussianArgs& a, int64_t workers) {
  return workers * (a.float64 ? GaussianFilter<double>::worker_bytes(a) : GaussianFilter<float>::worker_bytes(a));
}

void gaussian(const GaussianArgs& a, void* workspace, const Workers& workers) {
  if (a.float64)
    GaussianFilter<double>(a, workers).run(workspace);
  else
    GaussianFilter<float>(a, workers).run(workspace);
}

int64_t mean_field_workspace(const MeanFieldArgs& a, int64_t workers) {
  return with_rows(a.float64, a.classes, [&](const auto& rows) {
    return MeanField<std::decay_t<decltype(rows)>>::workspace(rows, a, workers);
  });
}

bool mean_field(const MeanFieldArgs& a, void* workspace, const Workers& workers) {
  return with_rows(a.float64, a.classes, [&](const auto& rows) {
    return MeanField<std::decay_t<decltype(rows)>>(rows, a, workspace, workers).run();
  });
}

}  // namespace

extern const CrfKernels crf_kernels;
const CrfKernels crf_kernels = {.filter_workspace = filter_workspace,
                                .filter = filter,
                                .gaussian_workspace = gaussian_workspace,
                                .gaussian = gaussian,
                                .mean_field_workspace = mean_field_workspace,
                                .mean_field = mean_field};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
