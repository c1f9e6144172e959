// The CUDA parts of atrous_conv2d as seen by its registration: torch-free host functions over raw device pointers.
//
// Every function launches on `stream` of the current device, never synchronises, allocates nothing, and returns the
// first error of its launches. What comes in has been checked: sizes and strides fit, pointers are aligned to their
// element, groups is 1 (dense) or C (depthwise). Sizes of zero are allowed wherever they make sense: no output, no
// launch; nothing to sum (batch 0, no input channels), the sum is zero.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyseg::atrous {

enum class DType { kFloat, kDouble, kHalf, kBFloat16 };

inline int element_size(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// y[n, k, oy, ox] = sum over c, ky, kx of x[n, c, oy - pad_h + ky * dilation_h, ox - pad_w + kx * dilation_w] *
// w[k, c, ky, kx], with x zero outside its map. Depthwise: channels == out_channels, the sum over c is left out.
// A padding may be negative (the input gradient of a padding above 2 * dilation): the map is cropped then.
struct Shape {
  int64_t batch;
  int64_t channels, height, width;              // input
  int64_t out_channels, out_height, out_width;  // output; out_height = height + 2 * pad_h - 2 * dilation_h
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;  // >= 1
};

// A map [N, C, H, W] in elements. "Channels last" means c == 1: the other strides are free, so that the map may be a
// channel slice of a larger tensor. "Rows" means w == 1 (contiguous NCHW among them). The stride of a dimension of
// size 1 or 0 may be anything.
struct Strides {
  int64_t n, c, h, w;
};

// Applied to each sum in the accumulator's type, in this order: + bias[k], * scale[k], + shift[k], max(., 0) (NaN stays).
// Null pointers are left out. All are contiguous [out_channels] of the operator's dtype.
struct Epilogue {
  const void* bias;
  const void* scale;
  const void* shift;
  bool relu;
};

struct Forward {
  Shape shape;
  DType dtype;
  const void* input;
  Strides input_strides;
  const void* weight;  // layout: see each function
  void* output;
  Strides output_strides;
  Epilogue epilogue;
};

struct WeightGradient {
  Shape shape;  // of the forward convolution
  DType dtype;
  const void* input;
  Strides input_strides;
  const void* grad_output;
  Strides grad_output_strides;
  void* grad_weight;  // contiguous: [C_out, C_in, 3, 3], depthwise [C, 1, 3, 3]
  void* workspace;    // *_workspace(...) bytes, 256-byte aligned, uninitialised
};

// --- Depthwise (atrous_conv2d_depthwise_cuda.cu). Input and output are both channels last or both rows.
// weight [C, 1, 3, 3] contiguous; `flip` turns it by 180 degrees (the input gradient).
cudaError_t launch_depthwise_forward(const Forward& args, bool flip, cudaStream_t stream);
int64_t depthwise_weight_gradient_workspace(const WeightGradient& args);
cudaError_t launch_depthwise_weight_gradient(const WeightGradient& args, cudaStream_t stream);

// --- Dense weight gradient, deterministic (atrous_conv2d_wgrad_cuda.cu). Input and grad_output are channels last.
// `tensor_cores` says that mma.sync may be used: sm_80 or above, and half, bfloat16, or float32 as tf32.
int64_t dense_weight_gradient_workspace(const WeightGradient& args, bool tensor_cores);
cudaError_t launch_dense_weight_gradient(const WeightGradient& args, bool tensor_cores, cudaStream_t stream);

// --- Dense forward without tensor cores, every dtype, every device (atrous_conv2d_plain_cuda.cu).
// Input channels last; output any strides; weight packed [3, 3, C_out, C_in] contiguous. Also the input gradient, by a
// weight packed for it.
cudaError_t launch_dense_plain(const Forward& args, cudaStream_t stream);

// --- Dense forward with mma.sync (atrous_conv2d_dense_cuda.cu): half, bfloat16, float32 as tf32; sm_80 and above.
// Layouts as in launch_dense_plain; workspace: dense_tensor_cores_workspace(args) bytes, 256-byte aligned, uninitialised.
int64_t dense_tensor_cores_workspace(const Forward& args);
cudaError_t launch_dense_tensor_cores(const Forward& args, void* workspace, cudaStream_t stream);

// --- Rearranging (atrous_conv2d_layout_cuda.cu).
// packed [3, 3, C_out, C_in] from weight [C_out, C_in, 3, 3] of any strides: packed[ky][kx][k][c] = weight[k, c, ky, kx],
// with `for_input_gradient` packed [3, 3, C_in, C_out]: packed[ky][kx][c][k] = weight[k, c, 2 - ky, 2 - kx].
struct WeightStrides {
  int64_t k, c, ky, kx;
};
cudaError_t launch_pack_weight(const void* weight, WeightStrides strides, int64_t out_channels, int64_t in_channels,
                               DType dtype, bool for_input_gradient, void* packed, cudaStream_t stream);

// A map of any strides copied to one of any strides, both [N, C, H, W]; fast between rows and channels last.
cudaError_t launch_copy_map(const void* from, Strides from_strides, void* to, Strides to_strides, int64_t batch,
                            int64_t channels, int64_t height, int64_t width, DType dtype, cudaStream_t stream);

}  // namespace pyseg::atrous
