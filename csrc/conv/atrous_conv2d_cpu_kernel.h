// The interface between atrous_conv2d_cpu.cpp and its kernels, which are compiled once per instruction set:
// plain data and tables of functions, torch-free and without inline functions.
#pragma once

#include <cstdint>

#include "common/workers.h"
#include "conv/atrous_conv2d_math.h"

namespace pyseg {

// A channels_last map: element (n, y, x, c) at data[n * image + y * row + x * pixel + c].
template <typename T>
struct Map {
  T* data;
  int64_t image, row, pixel;
};

struct ConvGeometry {
  int64_t n, h, w, h_out, w_out;
  int64_t c_in, c_out;
  int64_t pad_h, pad_w, dil_h, dil_w;
  int kernel;  // taps along each axis: 3, or 1 (dense, direct path only)
};

// The weight of a dense convolution as seen by a product C_in -> C_out. Either packed (panels of 16 output channels, see
// _atrous_conv2d_pack) or an element (out, in, tap) at data[out * stride_out + in * stride_in + tap * stride_tap], taps counted
// ky * kernel + kx; the input gradient reads it with in and out exchanged and the taps reversed.
template <typename T>
struct Weight {
  const T* packed;
  const T* data;
  int64_t stride_out, stride_in, stride_tap;
};

// y = relu?(scale * conv(x) + shift). scale and shift are padded to a multiple of 16 channels; null: left out.
template <typename T>
struct DenseArgs {
  ConvGeometry g;
  Map<const T> x;
  Map<T> y;
  Weight<T> weight;
  const T* scale;
  const T* shift;
  bool relu;
  AxisTiles tiles_y, tiles_x;  // of the Winograd path
};

// grad_weight[out, in, tap] = sum over images and pixels of grad[pixel, out] * x[pixel + tap, in], contiguous
// [C_out, C_in, kernel * kernel].
template <typename T>
struct DenseWeightGradArgs {
  ConvGeometry g;
  Map<const T> x;
  Map<const T> grad;
  T* grad_weight;
  AxisTiles tiles_y, tiles_x;
};

// Maps of a depthwise convolution in either layout: element (n, c, y, x) at
// data[n * image + c * channel + y * row + x * pixel]; channel (channels_last) or pixel (NCHW) is 1.
template <typename T>
struct DepthwiseMap {
  T* data;
  int64_t image, channel, row, pixel;
};

template <typename T>
struct DepthwiseArgs {
  ConvGeometry g;
  bool channels_last;
  DepthwiseMap<const T> x;
  DepthwiseMap<T> y;
  const T* weight;  // [C, 9], already times the scale
  const T* shift;   // [C] or null
  bool relu;
};

template <typename T>
struct DepthwiseWeightGradArgs {
  ConvGeometry g;
  bool channels_last;
  DepthwiseMap<const T> x;
  DepthwiseMap<const T> grad;
  T* grad_weight;  // [C, 9]
};

// Every routine states how many elements of workspace it needs for a number of workers, then runs with them.
template <typename T>
struct ConvKernels {
  void (*pack)(const Weight<T>&, int64_t c_in, int64_t c_out, int taps, T* packed, const Workers&);
  void (*direct)(const DenseArgs<T>&, const Workers&);  // needs a packed weight
  int64_t (*winograd_workspace)(const DenseArgs<T>&, int64_t workers);
  void (*winograd)(const DenseArgs<T>&, T* workspace, const Workers&);
  int64_t (*direct_weight_grad_workspace)(const DenseWeightGradArgs<T>&, int64_t workers);
  void (*direct_weight_grad)(const DenseWeightGradArgs<T>&, T* workspace, const Workers&);
  int64_t (*winograd_weight_grad_workspace)(const DenseWeightGradArgs<T>&, int64_t workers);
  void (*winograd_weight_grad)(const DenseWeightGradArgs<T>&, T* workspace, const Workers&);
  int64_t (*depthwise_workspace)(const DepthwiseArgs<T>&, int64_t workers);
  void (*depthwise)(const DepthwiseArgs<T>&, T* workspace, const Workers&);
  int64_t (*depthwise_weight_grad_workspace)(const DepthwiseWeightGradArgs<T>&, int64_t workers);
  void (*depthwise_weight_grad)(const DepthwiseWeightGradArgs<T>&, T* workspace, const Workers&);
  // Transposes n matrices of rows x columns: NCHW to channels_last and back.
  void (*transpose)(const T* from, T* to, int64_t n, int64_t rows, int64_t columns, const Workers&);
};

struct ConvKernelTable {
  ConvKernels<float> f32;
  ConvKernels<double> f64;
};

namespace baseline {
extern const ConvKernelTable conv_kernels;
}
namespace avx2 {
extern const ConvKernelTable conv_kernels;
}
namespace avx512 {
extern const ConvKernelTable conv_kernels;
}

}  // namespace pyseg
