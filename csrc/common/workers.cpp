#include "common/workers.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace pyseg {
namespace {

void run_workers(int64_t count, void (*body)(void*, int64_t), void* context) {
  if (count == 1) return body(context, 0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) body(context, w);
  });
}

}  // namespace

Workers workers_for(double work) {
  constexpr double kWorthAThread = 2e5;
  const double most = std::max(1., work / kWorthAThread);
  return {int64_t(std::min(most, double(torch::stable::get_num_threads()))), run_workers};
}

}  // namespace pyseg
