// What the kernels of valve_conv2d and region_gate are given, on every device: plain data, torch-free.
//
//   y = relu?(f * r) or relu?(f + r),  r = conv2d(region, V) + b,  f the features, stored or conv2d(image, W) + c
//
// Both convolutions are of maps with few channels. A block of pixels is turned into columns, one for each tap, and one
// more of ones, whose weight is the bias; a convolution of the block is then a product of two small matrices.
#pragma once

#include <cstdint>

namespace pyseg::valve {

// A convolution of a map that is read where it lies. Strides of the map in elements.
struct Window {
  const void* map;  // [N, C, H, W]; null where features are given instead
  int64_t channels, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
  int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  const void* weight;  // [K, C, kH, kW], dense
  const void* bias;    // [K], dense; or null
  int64_t taps;        // C * kH * kW
};

// Where the lines of a map [N, K, H, W] begin: a line is a channel's pixels, in channels_last a pixel's channels.
struct Lines {
  void* data;
  int64_t image_stride, line_stride;
};

struct Maps {
  int64_t images, channels, height, width;  // of the output: N, K, H, W
  bool last;                                // channels_last
  bool additive, relu;
  Window region, image;
  Lines features;  // not used where image.map is given
  Lines output;    // forward
  // backward; `sums` and `scattered` are of what is computed in
  Lines grad, features_grad;  // features_grad.data may be null
  void* sums;  // [parts][region.taps + 1 + image.taps + 1][K], or without image [parts][region.taps + 1][K]; or null
  int64_t parts;
  void* scattered;  // gradients of the region's columns: [groups of K, N, region.taps, H * W]; or null
};

// Columns of both windows, each with its ones.
constexpr int64_t columns_of(const Maps& m) { return m.region.taps + 1 + (m.image.map ? m.image.taps + 1 : 0); }

}  // namespace pyseg::valve
