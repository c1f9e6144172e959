// The CPU kernels of the operators on segmentation maps for one instruction set: compiled once per target, PYSEG_TARGET
// is its name.
#include "loss/cpu_backward.h"
#include "loss/cpu_binary.h"
#include "loss/cpu_pixel_loss.h"
#include "loss/cpu_statistics.h"
#include "loss/segmentation_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename A>
int64_t worker_bytes(const SegmentationInput& in) {
  const int64_t general = larger(Statistics<A>::workspace(in), Backward<A>::workspace(in));
  const int64_t binary = larger(BinaryStatistics<A>::workspace(in), BinaryBackward<A>::workspace(in));
  return larger(larger(general, binary), PixelLoss<A>::workspace(in));
}

int64_t workspace(const SegmentationInput& in, int64_t workers) {
  return workers * (is_double(in) ? worker_bytes<double>(in) : worker_bytes<float>(in));
}

int64_t partials(const SegmentationInput& in) { return in.images * units_of_image(in); }

template <typename Kernel, typename F>
void each_unit(const SegmentationInput& in, const SegmentationRun& run, const F& f) {
  each_unit<Kernel>(in, partials(in), workspace(in, 1), run, f);
}

template <typename A>
void statistics_as(const SegmentationInput& in, double* partial, double* statistics, const SegmentationRun& run) {
  const int64_t row = in.classes * kStatistics, units = units_of_image(in);
  const auto add = [&](auto& kernel, int64_t unit) { kernel.run(unit, partial + unit * row); };
  if (has_binary_labels(in)) {
    each_unit<BinaryStatistics<A>>(in, run, add);
  } else {
    each_unit<Statistics<A>>(in, run, add);
  }
  for (int64_t image = 0; image < in.images; ++image)
    for (int64_t i = 0; i < row; ++i) {
      double total = 0;
      for (int64_t unit = 0; unit < units; ++unit) total += partial[(image * units + unit) * row + i];
      statistics[image * row + i] = total;
    }
}

void statistics(const SegmentationInput& in, double* partial, double* statistics, const SegmentationRun& run) {
  if (is_double(in)) return statistics_as<double>(in, partial, statistics, run);
  statistics_as<float>(in, partial, statistics, run);
}

template <typename A>
void backward_as(const SegmentationInput& in, const double* grad, int64_t grad_stride, void* to,
                 const SegmentationRun& run) {
  const auto write = [&](auto& kernel, int64_t unit) {
    kernel.run(unit, grad + unit / units_of_image(in) * grad_stride, to);
  };
  if (has_binary_labels(in)) {
    each_unit<BinaryBackward<A>>(in, run, write);
  } else {
    each_unit<Backward<A>>(in, run, write);
  }
}

void backward(const SegmentationInput& in, const double* grad, int64_t grad_stride, void* to,
              const SegmentationRun& run) {
  if (is_double(in)) return backward_as<double>(in, grad, grad_stride, to, run);
  backward_as<float>(in, grad, grad_stride, to, run);
}

template <typename A>
void pixel_loss_as(const SegmentationInput& in, const double* factors, void* to, const SegmentationRun& run) {
  each_unit<PixelLoss<A>>(in, run, [&](auto& kernel, int64_t unit) { kernel.run(unit, factors, to); });
}

void pixel_loss(const SegmentationInput& in, const double* factors, void* to, const SegmentationRun& run) {
  if (is_double(in)) return pixel_loss_as<double>(in, factors, to, run);
  pixel_loss_as<float>(in, factors, to, run);
}

}  // namespace

extern const SegmentationKernels segmentation_kernels;
const SegmentationKernels segmentation_kernels = {workspace, partials, statistics, backward, pixel_loss};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
