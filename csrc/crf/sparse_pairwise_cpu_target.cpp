// sparse_pairwise on the CPU, for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "crf/cpu_sparse.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

bool product(const SparseProductArgs& a, const Workers& workers) {
  return a.sparse.float64 ? SparseProduct<double>(a, workers).run() : SparseProduct<float>(a, workers).run();
}

bool dots(const SparseDotsArgs& a, const Workers& workers) {
  return a.sparse.float64 ? SparseDots<double>(a, workers).run() : SparseDots<float>(a, workers).run();
}

}  // namespace

extern const SparseKernels sparse_kernels;
const SparseKernels sparse_kernels = {.product = product, .dots = dots};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
