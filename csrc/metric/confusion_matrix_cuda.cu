// confusion_matrix on CUDA devices: checks, choice of the kernel, launch, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/cuda_device.h"
#include "common/cuda_launches.h"
#include "metric/confusion_matrix_check.h"
#include "metric/confusion_matrix_cuda.cuh"

namespace pyseg::metric {
namespace {

constexpr int64_t kMostSharedBytes = 40 * 1024;  // with the predictions of a tile below the 48 KB that need no opt-in
constexpr int64_t kMostStagedSharedBytes = 16 * 1024;  // beside 17 KB of logits: four blocks a multiprocessor on sm_80
constexpr int64_t kBlocksPerMultiprocessor = 8;
constexpr int64_t kMostImagesInGrid = 65535;

template <typename Predictor>
void launch(const CudaLaunches& launches, ConfusionLaunch l, int64_t most_shared_bytes) {
  const int64_t bytes = int64_t{l.a.classes} * l.a.classes * sizeof(uint32_t);
  l.shared = bytes <= most_shared_bytes;
  const int64_t tiles = (l.a.pixels + Predictor::kTile - 1) / Predictor::kTile;
  const int64_t images = std::min(l.a.images, kMostImagesInGrid);
  const int64_t useful = std::max<int64_t>(1, multiprocessor_count() * kBlocksPerMultiprocessor / images);
  const dim3 grid(static_cast<unsigned>(std::min(tiles, useful)), static_cast<unsigned>(images));
  confusion_matrix_kernel<Predictor><<<grid, Predictor::kThreads, l.shared ? bytes : 0, launches.stream()>>>(l);
  launches.check(cudaGetLastError());
}

template <typename T>
void launch_logits(const CudaLaunches& launches, const ConfusionLaunch& l) {
  const LogitStrides& s = l.a.strides;
  const auto aligned = [](int64_t stride) { return stride * sizeof(T) % 16 == 0; };
  if (s.pixel == 1 && reinterpret_cast<uintptr_t>(l.a.prediction) % 16 == 0 && aligned(s.cls) &&
      (l.a.images == 1 || aligned(s.image))) {
    launch<FromRows<T>>(launches, l, kMostSharedBytes);
  } else if (s.cls == 1 && s.pixel != 1) {
    launch<FromChannelsLast<T>>(launches, l, kMostStagedSharedBytes);
  } else {
    launch<FromAnyStrides<T>>(launches, l, kMostSharedBytes);
  }
}

Tensor confusion_matrix(Tensor prediction, Tensor target, int64_t num_classes, std::optional<int64_t> ignore_index,
                        bool per_image) {
  ConfusionLaunch l{};
  l.a = check_arguments(prediction, target, num_classes, ignore_index, per_image);
  const CudaLaunches launches(kConfusionMatrix, target);
  Tensor matrix = torch::stable::new_empty(target, matrix_sizes(target, num_classes, per_image), ScalarType::Long);
  if (matrix.numel() == 0) return matrix;
  const int64_t cells = num_classes * num_classes, matrices = matrix.numel() / cells;
  const Tensor bad = torch::stable::new_empty(target, {matrices}, ScalarType::Int);
  l.a.matrix = static_cast<int64_t*>(matrix.data_ptr());
  l.bad = static_cast<int*>(bad.data_ptr());
  launches.check(cudaMemsetAsync(l.a.matrix, 0, matrix.numel() * sizeof(int64_t), launches.stream()));
  launches.check(cudaMemsetAsync(l.bad, 0, matrices * sizeof(int), launches.stream()));
  if (target.numel() == 0) return matrix;

  if (!l.a.from_logits) {
    launch<FromLabels>(launches, l, kMostSharedBytes);
  } else {
    switch (l.a.logit_type) {
      case LogitType::kFloat: launch_logits<float>(launches, l); break;
      case LogitType::kDouble: launch_logits<double>(launches, l); break;
      case LogitType::kHalf: launch_logits<__half>(launches, l); break;
      case LogitType::kBFloat16: launch_logits<__nv_bfloat16>(launches, l); break;
    }
  }
  const int64_t blocks = (matrix.numel() + kFinishThreads - 1) / kFinishThreads;
  PYSEG_CHECK(blocks <= INT32_MAX, kConfusionMatrix, ": num_classes and images make too large a result, got ",
              matrix.sizes());
  confusion_matrix_finish<<<static_cast<unsigned>(blocks), kFinishThreads, 0, launches.stream()>>>(
      l.a.matrix, l.bad, cells, matrix.numel());
  launches.check(cudaGetLastError());
  return matrix;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) { m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix)); }

}  // namespace pyseg::metric
