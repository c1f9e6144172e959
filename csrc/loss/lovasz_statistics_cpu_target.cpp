// The CPU kernels of lovasz_statistics for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "loss/cpu_lovasz.h"
#include "loss/lovasz_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// What is shared by all workers lies before their own workspaces: two maps for softmax.
template <typename A>
int64_t map_bytes(const SegmentationInput& in) {
  if (in.activation != Activation::kSoftmax) return 0;
  return round_up((in.images * in.pixels + Stage<A>::kPad) * int64_t(sizeof(A)), kCacheLine);
}

template <typename A>
int64_t worker_bytes(const SegmentationInput& in, bool per_image) {
  return larger(Normaliser<A>::workspace(in), Lovasz<A>::workspace(in, per_image));
}

template <typename A>
int64_t bytes(const SegmentationInput& in, bool per_image, int64_t workers) {
  return 2 * map_bytes<A>(in) + workers * worker_bytes<A>(in, per_image);
}

int64_t workspace(const SegmentationInput& in, bool per_image, int64_t workers) {
  return is_double(in) ? bytes<double>(in, per_image, workers) : bytes<float>(in, per_image, workers);
}

template <typename A>
void run_as(const SegmentationInput& in, bool per_image, bool hinge, double* loss, void* to,
            const SegmentationRun& run) {
  char* const maps = static_cast<char*>(run.workspace);
  A* const most = reinterpret_cast<A*>(maps);
  A* const scale = reinterpret_cast<A*>(maps + map_bytes<A>(in));
  const auto own = [&](int64_t worker) {
    return maps + 2 * map_bytes<A>(in) + worker * worker_bytes<A>(in, per_image);
  };
  if (in.activation == Activation::kSoftmax) {
    for_each_part(run.workers, in.images * units_of_image(in), [&](int64_t worker, int64_t first, int64_t last) {
      Normaliser<A> normaliser(in, own(worker));
      for (int64_t unit = first; unit < last; ++unit) normaliser.run(unit, most, scale);
    });
  }
  const int64_t groups = per_image ? in.images : 1;
  for_each_part(run.workers, groups * in.classes, [&](int64_t worker, int64_t first, int64_t last) {
    Lovasz<A> lovasz(in, per_image, hinge, most, scale, own(worker));
    for (int64_t plane = first; plane < last; ++plane)
      loss[plane] = lovasz.run(plane / in.classes, plane % in.classes, to);
    run.errors[worker] = lovasz.error();
  });
}

void run(const SegmentationInput& in, bool per_image, bool hinge, double* loss, void* to, const SegmentationRun& r) {
  if (is_double(in)) return run_as<double>(in, per_image, hinge, loss, to, r);
  run_as<float>(in, per_image, hinge, loss, to, r);
}

}  // namespace

extern const LovaszKernels lovasz_kernels;
const LovaszKernels lovasz_kernels = {workspace, run};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
