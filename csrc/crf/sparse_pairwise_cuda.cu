// sparse_pairwise on CUDA devices: checks, layouts, launches, registration.
#include "crf/sparse_pairwise_cuda.cuh"

#include <torch/csrc/stable/library.h>

#include "crf/crf_cuda.h"
#include "crf/sparse_pairwise_check.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

// Compressed rows of the pixels of some values.
SparseView sparse_view(const SparseRows& rows, const SparseValues& values, int64_t channels, Kept& kept) {
  return {.starts = kept.read<int64_t>(rows.starts),
          .columns = kept.read<int32_t>(rows.columns),
          .entries = rows.entries ? kept.read<int32_t>(*rows.entries) : nullptr,
          .length = rows.columns.numel(),
          .images = values.data.size(0),
          .channels = channels,
          .points = values.data.size(values.rows ? 1 : 2)};
}

unsigned sparse_blocks(const char* op, int64_t threads) {
  const int64_t blocks = (threads + kSparseThreads - 1) / kSparseThreads;
  PYSEG_CHECK(blocks < int64_t{1} << 31, op, ": values must have fewer than 2^39 elements");
  return static_cast<unsigned>(blocks);
}

struct ProductPointers {
  const void *weights, *values, *base, *factor;
  void* output;
};

template <typename T, int kUnit>
void launch_rows(const char* op, const SparseView& s, const ProductPointers& p, cudaStream_t stream) {
  const unsigned blocks = sparse_blocks(op, s.pixels() * (s.channels / kUnit));
  sparse_rows_kernel<T, kUnit><<<blocks, kSparseThreads, 0, stream>>>(
      s, static_cast<const T*>(p.weights), static_cast<const T*>(p.values), static_cast<const T*>(p.base),
      static_cast<const T*>(p.factor), static_cast<T*>(p.output));
}

template <typename T>
void launch_product(const char* op, const SparseView& s, bool rows, const ProductPointers& p, cudaStream_t stream) {
  constexpr int kUnit = Unit<T>::kLanes;
  if (rows)
    return s.channels % kUnit == 0 ? launch_rows<T, kUnit>(op, s, p, stream) : launch_rows<T, 1>(op, s, p, stream);
  const int64_t groups = (s.channels + kSparseChannels - 1) / kSparseChannels;
  PYSEG_CHECK(groups < 65536, op, ": values must have fewer than 2^20 channels, got ", s.channels);
  const dim3 grid(sparse_blocks(op, s.pixels()), static_cast<unsigned>(groups));
  sparse_planes_kernel<T><<<grid, kSparseThreads, 0, stream>>>(
      s, static_cast<const T*>(p.weights), static_cast<const T*>(p.values), static_cast<const T*>(p.base),
      static_cast<const T*>(p.factor), static_cast<T*>(p.output));
}

template <typename T>
void launch_dots(const char* op, const SparseView& s, bool rows, const void* left, const void* right, void* output,
                 cudaStream_t stream) {
  sparse_dots_kernel<T><<<sparse_blocks(op, s.pixels()), kSparseThreads, 0, stream>>>(
      s, rows, static_cast<const T*>(left), static_cast<const T*>(right), static_cast<T*>(output));
}

Tensor product(const char* op, const Tensor& values, const Tensor& weights, const SparseRows& rows, const Tensor* base,
               const Tensor* factor) {
  const ScalarType type = wide_type(values);
  const CudaLaunches launches(op, values);
  const SparseValues own = sparse_values(values, type);
  const Tensor output = torch::stable::new_empty(own.data, own.data.sizes());
  if (output.numel() > 0) {
    Kept kept(own.data);
    const SparseView view = sparse_view(rows, own, values.size(1), kept);
    const auto like_values = [&](const Tensor& t) {
      return kept.read<void>(as_type(own.rows ? torch::stable::transpose(t, 1, 2) : t, type));
    };
    const ProductPointers p{.weights = kept.read<void>(weights),
                            .values = kept.read<void>(own.data),
                            .base = base != nullptr ? like_values(*base) : nullptr,
                            .factor = factor != nullptr ? kept.read<void>(*factor) : nullptr,
                            .output = output.data_ptr()};
    if (type == ScalarType::Double)
      launch_product<double>(op, view, own.rows, p, launches.stream());
    else
      launch_product<float>(op, view, own.rows, p, launches.stream());
    launches.check(cudaGetLastError());
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
  const CudaLaunches launches(kSparseBackward, left);
  SparseValues own = sparse_values(left, type), other = sparse_values(right, type);
  if (own.rows != other.rows) own = {as_planes(own), false}, other = {as_planes(other), false};
  // Entries that no row has, in rows that lie, keep zeros.
  const Tensor output = torch::stable::new_zeros(own.data, columns.sizes());
  if (output.numel() > 0 && own.data.numel() > 0) {
    Kept kept(own.data);
    const SparseView view = sparse_view(rows, own, left.size(1), kept);
    const auto *const a = kept.read<void>(own.data), *const b = kept.read<void>(other.data);
    if (type == ScalarType::Double)
      launch_dots<double>(kSparseBackward, view, own.rows, a, b, output.data_ptr(), launches.stream());
    else
      launch_dots<float>(kSparseBackward, view, own.rows, a, b, output.data_ptr(), launches.stream());
    launches.check(cudaGetLastError());
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("sparse_pairwise", TORCH_BOX(&sparse_pairwise));
  m.impl("_sparse_pairwise_backward_weight", TORCH_BOX(&sparse_pairwise_backward_weight));
  m.impl("_sparse_pairwise_add", TORCH_BOX(&sparse_pairwise_add));
}

}  // namespace pyseg::crf
