// sparse_pairwise on the CPU: layouts, threads, errors, registration.
#include <torch/csrc/stable/library.h>

#include "crf/crf_cpu.h"
#include "crf/sparse_pairwise_check.h"
#include "crf/sparse_pairwise_cpu_kernel.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

const SparseKernels& sparse_kernels() { return PYSEG_CPU_TABLE(sparse_kernels); }

// Compressed rows that lie contiguously.
class OwnRows {
 public:
  OwnRows(const SparseRows& rows, const SparseValues& values, int64_t channels)
      : starts_(torch::stable::contiguous(rows.starts)), columns_(torch::stable::contiguous(rows.columns)) {
    if (rows.entries) entries_ = torch::stable::contiguous(*rows.entries);
    const Tensor& data = values.data;
    args_ = {.starts = static_cast<const int64_t*>(starts_.data_ptr()),
             .columns = elements<int32_t>(columns_),
             .entries = entries_ ? elements<int32_t>(*entries_) : nullptr,
             .length = columns_.numel(),
             .images = data.size(0),
             .channels = channels,
             .points = data.size(values.rows ? 1 : 2),
             .float64 = data.scalar_type() == ScalarType::Double,
             .rows = values.rows};
  }
  const SparseArgs& args() const { return args_; }
  Workers workers() const {
    return workers_for(double(args_.channels) * (2. * double(args_.images * args_.points) + 8. * double(args_.length)));
  }

  void check_ends(const char* op) const {
    PYSEG_CHECK(args_.starts[0] == 0 && args_.starts[pixels()] == args_.length, op,
                ": starts of rows must begin with 0 and end with ", args_.length, " for as many columns, got ",
                args_.starts[0], " and ", args_.starts[pixels()]);
  }

  // What a kernel stopped at.
  [[noreturn]] void throw_bad(const char* op) const {
    for (int64_t i = 0; i < pixels(); ++i)
      PYSEG_CHECK(args_.starts[i] <= args_.starts[i + 1], op, ": starts of rows must ascend, got ", args_.starts[i],
                  " before ", args_.starts[i + 1]);
    for (int64_t k = 0; k < args_.length; ++k) {
      PYSEG_CHECK(uint32_t(args_.columns[k]) < uint64_t(pixels()), op, ": columns must be from 0 to ", pixels() - 1,
                  ", got ", args_.columns[k]);
      if (entries_)
        PYSEG_CHECK(uint32_t(args_.entries[k]) < uint64_t(args_.length), op, ": transpose_entries must be from 0 to ",
                    args_.length - 1, ", got ", args_.entries[k]);
    }
    throw_error(op, ": compressed rows changed while they were read");
  }

 private:
  Tensor starts_, columns_;
  std::optional<Tensor> entries_;
  SparseArgs args_;

  int64_t pixels() const { return args_.images * args_.points; }
};

Tensor product(const char* op, const Tensor& values, const Tensor& weights, const SparseRows& rows, const Tensor* base,
               const Tensor* factor) {
  const ScalarType type = wide_type(values);
  const SparseValues own = sparse_values(values, type);
  const OwnRows compressed(rows, own, values.size(1));
  compressed.check_ends(op);
  const Tensor output = torch::stable::new_empty(own.data, own.data.sizes());
  if (output.numel() > 0) {
    const Tensor own_weights = torch::stable::contiguous(weights);
    std::optional<Tensor> own_base, own_factor;
    if (base != nullptr) {
      const Tensor turned = own.rows ? torch::stable::transpose(*base, 1, 2) : *base;
      own_base = as_type(turned, type);
      own_factor = torch::stable::contiguous(*factor);
    }
    const SparseProductArgs args{.sparse = compressed.args(),
                                 .weights = own_weights.data_ptr(),
                                 .values = own.data.data_ptr(),
                                 .output = output.data_ptr(),
                                 .base = own_base ? own_base->data_ptr() : nullptr,
                                 .factor = own_factor ? own_factor->data_ptr() : nullptr};
    if (!sparse_kernels().product(args, compressed.workers())) compressed.throw_bad(op);
  }
  return sparse_result(output, own.rows, values.scalar_type());
}

Tensor sparse_pairwise(Tensor values, Tensor weights, Tensor row_starts, Tensor columns, Tensor transpose_starts,
                       Tensor transpose_columns, Tensor transpose_entries, bool transpose) {
  const SparseRows rows{row_starts, columns, std::nullopt};
  const SparseRows transposed{transpose_starts, transpose_columns, transpose_entries};
  check_sparse(kSparse, values, weights, rows, transposed);
  return product(kSparse, values, weights, transpose ? transposed : rows, nullptr, nullptr);
}

Tensor sparse_pairwise_add(Tensor base, Tensor factor, Tensor values, Tensor weights, Tensor row_starts,
                           Tensor columns) {
  const SparseRows rows{row_starts, columns, std::nullopt};
  check_sparse_add(base, factor, values, weights, rows);
  return product(kSparseAdd, values, weights, rows, &base, &factor);
}

Tensor sparse_pairwise_backward_weight(Tensor left, Tensor right, Tensor row_starts, Tensor columns,
                                       Tensor transpose_starts, Tensor transpose_columns, Tensor transpose_entries) {
  const SparseRows rows{row_starts, columns, std::nullopt};
  check_sparse_dots(left, right, rows, {transpose_starts, transpose_columns, transpose_entries});
  const ScalarType type = wide_type(left);
  SparseValues own = sparse_values(left, type), other = sparse_values(right, type);
  if (own.rows != other.rows) own = {as_planes(own), false}, other = {as_planes(other), false};
  const OwnRows compressed(rows, own, left.size(1));
  compressed.check_ends(kSparseBackward);
  const Tensor output = torch::stable::new_empty(own.data, columns.sizes());
  if (output.numel() > 0) {
    const SparseDotsArgs args{.sparse = compressed.args(),
                              .left = own.data.data_ptr(),
                              .right = other.data.data_ptr(),
                              .output = output.data_ptr()};
    if (!sparse_kernels().dots(args, compressed.workers())) compressed.throw_bad(kSparseBackward);
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("sparse_pairwise", TORCH_BOX(&sparse_pairwise));
  m.impl("_sparse_pairwise_backward_weight", TORCH_BOX(&sparse_pairwise_backward_weight));
  m.impl("_sparse_pairwise_add", TORCH_BOX(&sparse_pairwise_add));
}

}  // namespace pyseg::crf
