// The CPU kernels of point_supervision_loss for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "loss/cpu_point_supervision.h"
#include "loss/point_supervision_loss_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

int64_t units_of(const PointSupervisionInput& in) { return in.maps.images * units_of_image(in.maps); }

int64_t workspace(const PointSupervisionInput& in, int64_t workers) {
  return workers *
         (is_double(in.maps) ? PointSupervision<double>::workspace(in) : PointSupervision<float>::workspace(in));
}

int64_t partials(const PointSupervisionInput& in) {
  return units_of(in) * PointSupervision<float>::partial_size(in);  // of doubles for every type
}

template <typename A>
void forward_as(const PointSupervisionInput& in, double* partial, double* terms, double* kept,
                const SegmentationRun& run) {
  using Kernel = PointSupervision<A>;
  const int64_t size = Kernel::partial_size(in), units = units_of_image(in.maps), classes = in.maps.classes;
  const int64_t bytes = workspace(in, 1);
  each_unit<Kernel>(in, units_of(in), bytes, run,
                    [&](Kernel& kernel, int64_t unit) { kernel.run_forward(unit, partial + unit * size); });
  for_each_part(run.workers, in.maps.images * classes, [&](int64_t worker, int64_t first, int64_t last) {
    Kernel kernel(in, static_cast<char*>(run.workspace) + worker * bytes);
    for (int64_t row = first; row < last; ++row)
      kernel.finish_class(row / classes, row % classes, partial, kept + row * kPointKept);
  });
  for (int64_t image = 0; image < in.maps.images; ++image) {
    double* to = terms + image * kPointTerms;
    for (int64_t c = 0; c < classes; ++c) {
      const double* row = kept + (image * classes + c) * kPointKept;
      if (row[kPresence] < 0) continue;
      const bool present = row[kPresence] > 0;
      to[present ? kPresentTerm : kAbsentTerm] += softplus(present ? -row[kLogOdds] : row[kLogOdds]);
      to[present ? kPresentCount : kAbsentCount] += 1;
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      const double* rest = partial + (image * units + unit) * size + classes * Kernel::kBest;
      to[kObjectnessTerm] += rest[Kernel::kObjectnessSum];
      to[kPointTerm] += rest[Kernel::kPointSum];
      to[kPointCount] += rest[Kernel::kPointsOfAll];
    }
  }
}

void forward(const PointSupervisionInput& in, double* partial, double* terms, double* kept,
             const SegmentationRun& run) {
  if (is_double(in.maps)) return forward_as<double>(in, partial, terms, kept, run);
  forward_as<float>(in, partial, terms, kept, run);
}

template <typename A>
void backward_as(const PointSupervisionInput& in, const double* grad, const double* kept, void* to,
                 const SegmentationRun& run) {
  using Kernel = PointSupervision<A>;
  each_unit<Kernel>(in, units_of(in), workspace(in, 1), run, [&](Kernel& kernel, int64_t unit) {
    const int64_t image = unit / units_of_image(in.maps);
    kernel.run_backward(unit, grad + image * kPointTerms, kept + image * in.maps.classes * kPointKept, to);
  });
}

void backward(const PointSupervisionInput& in, const double* grad, const double* kept, void* to,
              const SegmentationRun& run) {
  if (is_double(in.maps)) return backward_as<double>(in, grad, kept, to, run);
  backward_as<float>(in, grad, kept, to, run);
}

}  // namespace

extern const PointSupervisionKernels point_supervision_kernels;
const PointSupervisionKernels point_supervision_kernels = {workspace, partials, forward, backward};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
