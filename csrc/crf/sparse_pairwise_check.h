// Checks of sparse_pairwise's arguments and layouts of its values, the same on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "crf/crf_check.h"

namespace pyseg::crf {

constexpr const char* kSparse = "sparse_pairwise";
constexpr const char* kSparseBackward = "_sparse_pairwise_backward_weight";
constexpr const char* kSparseAdd = "_sparse_pairwise_add";

// Values [N, C, P] whose channels (`rows`) or whose pixels lie side by side.
struct SparseValues {
  torch::stable::Tensor data;  // contiguous: [N, P, C] or [N, C, P]
  bool rows;
};

inline SparseValues sparse_values(const torch::stable::Tensor& t, ScalarType type) {
  const torch::stable::Tensor turned = torch::stable::transpose(t, 1, 2);
  const bool rows = !t.is_contiguous() && turned.is_contiguous();
  return {as_type(rows ? turned : t, type), rows};
}

inline torch::stable::Tensor as_planes(const SparseValues& v) {
  return v.rows ? torch::stable::contiguous(torch::stable::transpose(v.data, 1, 2)) : v.data;
}

// A result in the layout and type of `like`.
inline torch::stable::Tensor sparse_result(const torch::stable::Tensor& data, bool rows, ScalarType type) {
  const torch::stable::Tensor own = data.scalar_type() == type ? data : torch::stable::to(data, type);
  return rows ? torch::stable::transpose(own, 1, 2) : own;
}

// starts [N * P + 1], columns [L], entries [L] or null.
struct SparseRows {
  torch::stable::Tensor starts, columns;
  std::optional<torch::stable::Tensor> entries;
};

inline void check_sparse_values(const char* op, const char* name, const torch::stable::Tensor& values) {
  check_floating(op, name, values);
  PYSEG_CHECK(values.dim() == 3, op, ": ", name, " must be [N, C, P], got ", values.sizes());
  // Pixels are counted in 32 bits.
  PYSEG_CHECK(double(values.size(0)) * double(values.size(2)) < double(int64_t{1} << 31), op, ": ", name,
              " must have N * P below 2^31, got ", values.sizes());
}

inline void check_sparse_rows(const char* op, const SparseRows& rows, int64_t length,
                              const torch::stable::Tensor& values) {
  const bool transpose = rows.entries.has_value();
  check_like(op, transpose ? "transpose_starts" : "row_starts", rows.starts, ScalarType::Long,
             {values.size(0) * values.size(2) + 1}, values);
  PYSEG_CHECK(length < int64_t{1} << 31, op, ": columns must have fewer than 2^31 elements, got ", length);
  check_like(op, transpose ? "transpose_columns" : "columns", rows.columns, ScalarType::Int, {length}, values);
  if (transpose) check_like(op, "transpose_entries", *rows.entries, ScalarType::Int, {length}, values);
}

inline void check_sparse(const char* op, const torch::stable::Tensor& values, const torch::stable::Tensor& weights,
                         const SparseRows& rows, const SparseRows& transposed) {
  check_sparse_values(op, "values", values);
  check_like(op, "weights", weights, wide_type(values), {weights.numel()}, values);
  check_sparse_rows(op, rows, weights.numel(), values);
  check_sparse_rows(op, transposed, weights.numel(), values);
}

inline void check_sparse_add(const torch::stable::Tensor& base, const torch::stable::Tensor& factor,
                             const torch::stable::Tensor& values, const torch::stable::Tensor& weights,
                             const SparseRows& rows) {
  check_sparse_values(kSparseAdd, "values", values);
  check_like(kSparseAdd, "base", base, values.scalar_type(), sizes_of(values), values);
  check_like(kSparseAdd, "factor", factor, wide_type(values), {values.size(1)}, values);
  check_like(kSparseAdd, "weights", weights, wide_type(values), {weights.numel()}, values);
  check_sparse_rows(kSparseAdd, rows, weights.numel(), values);
}

inline void check_sparse_dots(const torch::stable::Tensor& left, const torch::stable::Tensor& right,
                              const SparseRows& rows, const SparseRows& transposed) {
  check_sparse_values(kSparseBackward, "left", left);
  check_like(kSparseBackward, "right", right, left.scalar_type(), sizes_of(left), left);
  check_sparse_rows(kSparseBackward, rows, rows.columns.numel(), left);
  check_sparse_rows(kSparseBackward, transposed, rows.columns.numel(), left);
}

}  // namespace pyseg::crf
