// Splitting loops over the caller's threads.
#pragma once

#include "common/simd.h"
#include "common/workers.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// Calls f(worker, first, last) with the worker's even share of 0..n-1, for workers whose share is not empty.
template <typename F>
inline void for_each_part(const Workers& workers, int64_t n, const F& f) {
  struct Context {
    const F* f;
    int64_t n, count;
  } context{&f, n, workers.count};
  workers.run(
      workers.count,
      [](void* p, int64_t worker) {
        const Context& c = *static_cast<const Context*>(p);
        const int64_t first = c.n * worker / c.count, last = c.n * (worker + 1) / c.count;
        if (first < last) (*c.f)(worker, first, last);
      },
      &context);
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
