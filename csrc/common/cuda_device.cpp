#include "common/cuda_device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <string>

#include "common/check.h"

namespace pyseg {
namespace {

constexpr int kMaxDevices = 64;  // devices above are asked anew each time
using Cache = std::array<std::atomic<int>, kMaxDevices>;

void check(cudaError_t error) { PYSEG_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

template <typename Query>
int cached(Cache& cache, Query query) {
  int device = 0;
  check(cudaGetDevice(&device));
  if (device >= kMaxDevices) return query(device);
  int value = cache[device].load(std::memory_order_relaxed);
  if (value == 0) {  // no answer is zero; threads that ask at once write the same
    value = query(device);
    cache[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

int compute_capability() {
  static Cache cache;
  return cached(cache, [](int device) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
  });
}

int multiprocessor_count() {
  static Cache cache;
  return cached(cache, [](int device) { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

}  // namespace pyseg
