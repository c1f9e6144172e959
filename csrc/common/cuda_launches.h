// Launches of one operator call: they go to the current stream of the tensors' device.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"

namespace pyseg {

class CudaLaunches {
 public:
  CudaLaunches(const char* op, const torch::stable::Tensor& tensor) : op_(op), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  void check(cudaError_t error) const { PYSEG_CHECK(error == cudaSuccess, op_, ": CUDA: ", cudaGetErrorString(error)); }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace pyseg
