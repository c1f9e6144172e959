// Schema of sparse_pairwise: sums over the links of pixels, which may lie in different images.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // values [N, C, P]; pixels i = n * P + p of all images have rows: the entries of i are row_starts[i] to row_starts[i +
  // 1], each with a column (the other pixel) and a weight. The transpose's rows: transpose_starts, transpose_columns
  // (the row of an entry), transpose_entries (its place in weights).
  //     y_i = sum over the entries k of row i of weights_k * v_columns_k      (transpose: of the transposed matrix)
  m.def(
      "sparse_pairwise(Tensor values, Tensor weights, Tensor row_starts, Tensor columns, Tensor transpose_starts, "
      "Tensor transpose_columns, Tensor transpose_entries, bool transpose) -> Tensor");
  // For each entry: sum over the channels of left at its row times right at its column. The gradient of the weights.
  m.def(
      "_sparse_pairwise_backward_weight(Tensor left, Tensor right, Tensor row_starts, Tensor columns, Tensor "
      "transpose_starts, Tensor transpose_columns, Tensor transpose_entries) -> Tensor");
  // base + factor[c] * y, in one pass and without gradients: an iteration of mean field.
  m.def(
      "_sparse_pairwise_add(Tensor base, Tensor factor, Tensor values, Tensor weights, Tensor row_starts, Tensor "
      "columns) -> Tensor");
}
