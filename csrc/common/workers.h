// How a kernel of a CPU target, which knows nothing of torch, is given threads.
#pragma once

#include <cstdint>

namespace pyseg {

// Runs body(context, worker) for every worker in 0..workers-1, on as many threads as there are.
struct Workers {
  int64_t count;
  void (*run)(int64_t count, void (*body)(void* context, int64_t worker), void* context);
};

// One worker for each of torch's threads, but fewer where waking another would take longer than its share of the work, which is
// counted in multiply-adds.
Workers workers_for(double work);

}  // namespace pyseg
