// nms on the CPU: the order of the boxes, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <unordered_map>

#include "common/cpu_capability.h"
#include "roi/nms_cpu_kernel.h"
#include "roi/roi_check.h"

namespace pyseg::roi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const NmsKernelTable& nms_kernels() { return PYSEG_CPU_TABLE(nms_kernels); }

Tensor as(const Tensor& t, ScalarType type) { return torch::stable::contiguous(torch::stable::to(t, type)); }

// Rows by falling score, NaN first, equal ones in their order: torch.argsort(descending=True, stable=True).
template <typename A>
std::vector<int64_t> order_of(const A* scores, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return scores[i] > scores[j] || (std::isnan(scores[i]) && !std::isnan(scores[j]));
  });
  return order;
}

// idxs: of the groups, or null for one group.
template <typename A>
std::vector<int64_t> kept_rows(const Tensor& boxes, const std::vector<int64_t>& order, const int64_t* idxs,
                               double threshold) {
  const size_t rows = order.size();
  std::vector<int64_t> count, group(rows), place(rows);  // of the row order[i]: its group, its place among all boxes
  std::unordered_map<int64_t, int64_t> number;
  for (size_t i = 0; i < rows; ++i) {
    group[i] = number.try_emplace(idxs != nullptr ? idxs[order[i]] : 0, int64_t(count.size())).first->second;
    if (group[i] == int64_t(count.size())) count.push_back(0);
    place[i] = count[group[i]]++;
  }
  std::vector<int64_t> begin{0};
  for (const int64_t boxes_of_group : count)
    begin.push_back(begin.back() + (boxes_of_group + kNmsPadding - 1) / kNmsPadding * kNmsPadding);
  const int64_t total = begin.back();
  std::vector<A> coordinates(5 * total), removed(total);
  const A* box = static_cast<const A*>(boxes.data_ptr());
  double pairs = 0;
  for (const int64_t boxes_of_group : count) pairs += double(boxes_of_group) * double(boxes_of_group);
  for (size_t i = 0; i < rows; ++i) {
    place[i] += begin[group[i]];
    const A* row = box + 4 * order[i];
    for (int c = 0; c < 4; ++c) coordinates[c * total + place[i]] = row[c];
    coordinates[4 * total + place[i]] = (row[2] - row[0]) * (row[3] - row[1]);
  }
  const NmsArgs args{.groups = int64_t(count.size()),
                     .begin = begin.data(),
                     .count = count.data(),
                     .total = total,
                     .float64 = sizeof(A) == 8,
                     .coordinates = coordinates.data(),
                     .threshold = threshold,
                     .removed = removed.data()};
  nms_kernels().suppress(args, workers_for(pairs));
  std::vector<int64_t> kept;
  for (size_t i = 0; i < rows; ++i)
    if (removed[place[i]] == A(0)) kept.push_back(order[i]);
  return kept;
}

std::vector<int64_t> kept_of(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                             double threshold) {
  check_nms(boxes, scores, idxs);
  const Tensor groups = idxs ? torch::stable::contiguous(*idxs) : scores;
  const int64_t* group = idxs ? static_cast<const int64_t*>(groups.data_ptr()) : nullptr;
  threshold = nms_threshold(boxes, threshold);
  const Tensor values = as(scores, ScalarType::Double);
  const auto order = order_of(static_cast<const double*>(values.data_ptr()), boxes.size(0));
  return boxes.scalar_type() == ScalarType::Double
             ? kept_rows<double>(as(boxes, ScalarType::Double), order, group, threshold)
             : kept_rows<float>(as(boxes, ScalarType::Float), order, group, threshold);
}

Tensor nms(Tensor boxes, Tensor scores, std::optional<Tensor> idxs, double iou_threshold) {
  const auto kept = kept_of(boxes, scores, idxs, iou_threshold);
  Tensor out = torch::stable::new_empty(boxes, {int64_t(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), static_cast<int64_t*>(out.data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor> nms_padded(Tensor boxes, Tensor scores, std::optional<Tensor> idxs, double iou_threshold) {
  const auto kept = kept_of(boxes, scores, idxs, iou_threshold);
  Tensor out = torch::stable::new_empty(boxes, {boxes.size(0)}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(boxes, {}, ScalarType::Long);
  auto* rows = static_cast<int64_t*>(out.data_ptr());
  std::fill(std::copy(kept.begin(), kept.end(), rows), rows + boxes.size(0), int64_t{-1});
  *static_cast<int64_t*>(count.data_ptr()) = int64_t(kept.size());
  return {out, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("nms_padded", TORCH_BOX(&nms_padded));
}

}  // namespace pyseg::roi
