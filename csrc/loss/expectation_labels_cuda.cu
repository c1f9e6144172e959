// expectation_labels on CUDA devices: checks, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "common/cuda_device.h"
#include "common/cuda_launches.h"
#include "loss/expectation_labels_check.h"
#include "loss/expectation_labels_cuda.cuh"

namespace pyseg::loss {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostImagesInGrid = 65535, kBlocksPerMultiprocessor = 8;

// Biases and numbers of all classes.
template <typename A>
size_t list_bytes(const ExpectationArgs& a) {
  return a.classes * (sizeof(A) + sizeof(uint16_t));
}
static_assert(sizeof(BiasBlock<double>) + kMostExpectationClasses * (sizeof(double) + sizeof(uint16_t)) <= 48 << 10,
              "shared memory that needs no opt-in");

template <typename T, int kPixels>
void launch_labels(const CudaLaunches& launches, const ExpectationArgs& a) {
  const int64_t tile = int64_t{kLabelThreads} * kPixels, tiles = (a.pixels + tile - 1) / tile;
  const int64_t images = std::min(a.images, kMostImagesInGrid);
  const int64_t useful = std::max<int64_t>(1, multiprocessor_count() * kBlocksPerMultiprocessor / images);
  const dim3 grid(static_cast<unsigned>(std::min(tiles, useful)), static_cast<unsigned>(images));
  expectation_labels_kernel<T, kPixels><<<grid, kLabelThreads, list_bytes<Accumulator<T>>(a), launches.stream()>>>(a);
  launches.check(cudaGetLastError());
}

template <typename T>
void launch(const CudaLaunches& launches, const ExpectationArgs& a, void* margins) {
  using A = Accumulator<T>;
  expectation_bias_kernel<T>
      <<<static_cast<unsigned>(a.images), kBiasThreads, sizeof(BiasBlock<A>) + list_bytes<A>(a), launches.stream()>>>(
          a, static_cast<A*>(margins));
  launches.check(cudaGetLastError());
  if (a.pixels == 0) return;
  const bool pairs = a.pixel_stride == 1 && a.pixels % 2 == 0 && a.class_stride % 2 == 0 && a.image_stride % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(a.logits) % (2 * sizeof(T)) == 0;
  if (pairs) {
    launch_labels<T, 2>(launches, a);
  } else {
    launch_labels<T, 1>(launches, a);
  }
}

std::tuple<Tensor, Tensor> expectation_labels(Tensor logits, Tensor present, OptTensor valid, double background_bias,
                                              double foreground_bias, double background_share, double foreground_share,
                                              bool exclude_absent, int64_t sweeps, int64_t ignore_index) {
  ExpectationArgs a = check_expectation(logits, present, valid, background_bias, foreground_bias, background_share,
                                        foreground_share, exclude_absent, sweeps, ignore_index);
  PYSEG_CHECK(a.pixels < int64_t{1} << 31 && a.images < int64_t{1} << 31, kExpectation,
              ": logits must have fewer than 2^31 images and pixels an image, got ", logits.sizes());
  const CudaLaunches launches(kExpectation, logits);
  Tensor labels = torch::stable::new_empty(logits, sizes_of_pixels(logits), ScalarType::Long);
  Tensor bias = torch::stable::new_empty(logits, {a.images, a.classes}, wide_dtype(logits));
  if (a.images == 0) return {labels, bias};
  a.labels = static_cast<int64_t*>(labels.data_ptr());
  a.bias = bias.data_ptr();
  const Tensor margins =
      torch::stable::new_empty(logits, {is_adaptive(a) ? a.images * a.pixels : 0}, wide_dtype(logits));
  switch (a.logits_type) {
    case Element::kFloat: launch<float>(launches, a, margins.data_ptr()); break;
    case Element::kDouble: launch<double>(launches, a, margins.data_ptr()); break;
    case Element::kHalf: launch<__half>(launches, a, margins.data_ptr()); break;
    default: launch<__nv_bfloat16>(launches, a, margins.data_ptr()); break;
  }
  return {labels, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) { m.impl("expectation_labels", TORCH_BOX(&expectation_labels)); }

}  // namespace pyseg::loss
