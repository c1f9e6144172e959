// nms on CUDA devices: the order of the boxes, launches, registration.
#include "roi/nms_cuda.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/cuda_launches.h"
#include "roi/roi_check.h"

namespace pyseg::roi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor as(const Tensor& t, ScalarType type) { return torch::stable::contiguous(torch::stable::to(t, type)); }

// Rows by falling score, NaN first, equal ones in their order: torch's own sort, which does not wait for the device.
Tensor order_of(const Tensor& scores) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(scores),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor values = torch::stable::detail::to<Tensor>(stack[0]);  // owned, and freed here
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[1]));
}

std::tuple<Tensor, Tensor> nms_padded(Tensor boxes, Tensor scores, std::optional<Tensor> idxs, double iou_threshold) {
  check_nms(boxes, scores, idxs);
  const int64_t count = boxes.size(0);
  PYSEG_CHECK(count <= int64_t{kMostNmsWords} * kNmsWord, kNms, ": boxes must be at most ", kMostNmsWords * kNmsWord,
              " on CUDA devices, got ", count);
  const CudaLaunches launches(kNms, boxes);
  Tensor rows = torch::stable::new_empty(boxes, {count}, ScalarType::Long);
  Tensor number = torch::stable::new_empty(boxes, {}, ScalarType::Long);
  if (count == 0) {
    launches.check(cudaMemsetAsync(number.data_ptr(), 0, sizeof(int64_t), launches.stream()));
    return {rows, number};
  }
  const bool wide = boxes.scalar_type() == ScalarType::Double;
  const Tensor coordinates = as(boxes, wide ? ScalarType::Double : ScalarType::Float), order = order_of(scores);
  const Tensor groups = idxs ? torch::stable::contiguous(*idxs) : rows;
  const int64_t words = (count + kNmsWord - 1) / kNmsWord, groups_of_words = (words + kNmsGroup - 1) / kNmsGroup;
  const NmsBoxes args{.boxes = coordinates.data_ptr(),
                      .order = static_cast<const int64_t*>(order.data_ptr()),
                      .groups = idxs ? static_cast<const int64_t*>(groups.data_ptr()) : nullptr,
                      .count = count,
                      .words = words,
                      .pitch = groups_of_words * kNmsGroup,
                      .threshold = nms_threshold(boxes, iou_threshold)};
  const Tensor matrix = torch::stable::new_empty(boxes, {count * args.pitch}, ScalarType::Long);
  auto* const bits = static_cast<uint64_t*>(matrix.data_ptr());
  const dim3 grid(static_cast<unsigned>(groups_of_words), static_cast<unsigned>(words));
  if (wide) {
    nms_overlaps<double><<<grid, kNmsWord, 0, launches.stream()>>>(args, bits);
  } else {
    nms_overlaps<float><<<grid, kNmsWord, 0, launches.stream()>>>(args, bits);
  }
  launches.check(cudaGetLastError());
  nms_reduce<<<1, kNmsThreads, 0, launches.stream()>>>(args, bits, static_cast<int64_t*>(rows.data_ptr()),
                                                       static_cast<int64_t*>(number.data_ptr()));
  launches.check(cudaGetLastError());
  return {rows, number};
}

// The result's size is data: waits for the device once.
Tensor nms(Tensor boxes, Tensor scores, std::optional<Tensor> idxs, double iou_threshold) {
  auto [rows, number] = nms_padded(boxes, scores, idxs, iou_threshold);
  const CudaLaunches launches(kNms, boxes);
  int64_t kept = 0;
  launches.check(cudaMemcpyAsync(&kept, number.data_ptr(), sizeof(kept), cudaMemcpyDeviceToHost, launches.stream()));
  launches.check(cudaStreamSynchronize(launches.stream()));
  return torch::stable::narrow(rows, 0, 0, kept);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("nms_padded", TORCH_BOX(&nms_padded));
}

}  // namespace pyseg::roi
