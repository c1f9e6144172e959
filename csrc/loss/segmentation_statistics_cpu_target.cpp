// The CPU kernels of segmentation_statistics for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "loss/cpu_segmentation.h"
#include "loss/segmentation_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename A>
int64_t worker_bytes(const SegmentationInput& in) {
  return Segmentation<A>::workspace(in);
}

int64_t worker_workspace(const SegmentationInput& in) {
  return is_double(in) ? worker_bytes<double>(in) : worker_bytes<float>(in);
}

int64_t workspace(const SegmentationInput& in, int64_t workers) { return workers * worker_workspace(in); }

int64_t partials(const SegmentationInput& in) { return in.images * units_of_image(in); }

// f(segmentation, unit) for all units.
template <typename A, typename F>
void each_unit(const SegmentationInput& in, void* workspace, LabelError* errors, const Workers& workers, const F& f) {
  const int64_t bytes = worker_bytes<A>(in);
  for_each_part(workers, partials(in), [&](int64_t worker, int64_t first, int64_t last) {
    Segmentation<A> segmentation(in, static_cast<char*>(workspace) + worker * bytes);
    for (int64_t unit = first; unit < last; ++unit) f(segmentation, unit);
    errors[worker] = segmentation.error();
  });
}

template <typename A>
void statistics_as(const SegmentationInput& in, double* partial, double* statistics, void* workspace,
                   LabelError* errors, const Workers& workers) {
  const int64_t row = in.classes * kStatistics, units = units_of_image(in);
  each_unit<A>(in, workspace, errors, workers, [&](Segmentation<A>& segmentation, int64_t unit) {
    segmentation.statistics(unit, partial + unit * row);
  });
  for (int64_t image = 0; image < in.images; ++image)
    for (int64_t i = 0; i < row; ++i) {
      double total = 0;
      for (int64_t unit = 0; unit < units; ++unit) total += partial[(image * units + unit) * row + i];
      statistics[image * row + i] = total;
    }
}

void statistics(const SegmentationInput& in, double* partial, double* statistics, void* workspace, LabelError* errors,
                const Workers& workers) {
  if (is_double(in)) return statistics_as<double>(in, partial, statistics, workspace, errors, workers);
  statistics_as<float>(in, partial, statistics, workspace, errors, workers);
}

template <typename A>
void backward_as(const SegmentationInput& in, const double* grad, int64_t grad_stride, void* to, void* workspace,
                 LabelError* errors, const Workers& workers) {
  each_unit<A>(in, workspace, errors, workers, [&](Segmentation<A>& segmentation, int64_t unit) {
    segmentation.backward(unit, grad + unit / units_of_image(in) * grad_stride, to);
  });
}

void backward(const SegmentationInput& in, const double* grad, int64_t grad_stride, void* to, void* workspace,
              LabelError* errors, const Workers& workers) {
  if (is_double(in)) return backward_as<double>(in, grad, grad_stride, to, workspace, errors, workers);
  backward_as<float>(in, grad, grad_stride, to, workspace, errors, workers);
}

}  // namespace

extern const SegmentationKernels segmentation_kernels;
const SegmentationKernels segmentation_kernels = {workspace, partials, statistics, backward};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
