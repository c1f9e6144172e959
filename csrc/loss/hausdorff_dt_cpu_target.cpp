// The CPU kernels of _hausdorff_dt for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "loss/cpu_hausdorff.h"
#include "loss/hausdorff_dt_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

int64_t workspace(const HausdorffInput& in, int64_t workers) {
  return is_double(in.maps) ? Hausdorff<double>::workspace(in, workers) : Hausdorff<float>::workspace(in, workers);
}

void run(const HausdorffInput& in, double* loss, void* error, const SegmentationRun& run) {
  if (is_double(in.maps)) {
    Hausdorff<double>(in, run).run(loss, static_cast<double*>(error));
  } else {
    Hausdorff<float>(in, run).run(loss, static_cast<float*>(error));
  }
}

}  // namespace

extern const HausdorffKernels hausdorff_kernels;
const HausdorffKernels hausdorff_kernels = {workspace, run};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
