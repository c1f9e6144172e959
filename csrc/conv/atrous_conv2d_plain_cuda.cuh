// Dense 3x3 atrous convolution, stride 1, without tensor cores: an implicit matrix product on a channels-last input,
//   y[p, k] = epilogue(sum over taps and c of x[p at the tap, c] * w[tap, k, c]),   p = (n, oy, ox)
// for every element type on every device (float32 where tf32 is not allowed, float64, 16 bits below sm_80); 16-bit
// types accumulate in float32. With a weight packed for it, the input gradient too.
//
// A block computes kPlainTile pixels x kPlainTile channels, a thread 4 x 4 of them. Per step kPlainInner channels of one
// tap of both operands go through registers into one of two shared-memory buffers, transposed so that the sums read
// neighbouring pixels and channels; the next step's loads are under way during the sums. Taps at which none of the
// block's pixels has an input inside the map are left out. At the least, the input is read once per tap and tile of
// output channels (mostly from cache), the weight once per tile of pixels, the output written once. Deterministic.
#pragma once

#include "atrous_conv2d_cuda.h"
#include "atrous_conv2d_elements.cuh"

namespace pyseg::atrous {

constexpr int kPlainTile = 64;
constexpr int kPlainInner = 16;
constexpr int kPlainThreads = 256;
static_assert(kPlainThreads * 4 == kPlainTile * kPlainInner,
              "a thread copies four channels of a pixel and of a weight");
static_assert(kPlainThreads * 16 == kPlainTile * kPlainTile, "a thread sums 4 x 4 outputs");

template <typename T>
struct PlainArgs {
  const T* input;   // [N, H, W, C_in], strides below
  const T* weight;  // [9, C_out, C_in]
  T* output;        // [N, C_out, OH, OW], strides below
  const T* bias;    // [C_out] or null, like scale and shift
  const T* scale;
  const T* shift;
  Strides input_strides, output_strides;
  int in_channels, out_channels, height, width, out_height, out_width;
  int pad_h, pad_w, dilation_h, dilation_w;
  int pixels;  // N * OH * OW
  bool relu;
  bool input_aligned, weight_aligned, output_aligned;  // four channels can travel together
};

// Columns of the transposed buffers are permuted by the row, in steps of whole quads, so that a warp, which stores four
// rows apart (kPlainInner / 4 lanes side by side), hits every bank once.
template <typename Acc>
__device__ __forceinline__ int plain_column(int column, int row) {
  constexpr int kStep = 32 / sizeof(Acc);
  static_assert(kStep % 4 == 0, "quads stay together");
  return column ^ (row / 4 * kStep);
}

// kRows: the output's pixels are neighbours in memory, not its channels; lanes are dealt accordingly.
// Grid: (tiles of pixels, tiles of output channels).
template <typename T, bool kRows>
__global__ void __launch_bounds__(kPlainThreads) atrous_conv2d_plain(const __grid_constant__ PlainArgs<T> args) {
  using Acc = Accumulator<T>;
  __shared__ alignas(kVectorBytes) Acc shared[2][2][kPlainInner][kPlainTile];  // [buffer, operand, c, pixel or k]
  static_assert(sizeof(shared) <= 48 * 1024, "static shared memory ends there");

  // 1. What this thread copies: four channels of one pixel and of one output channel's weights.
  const int row = threadIdx.x / 4, quad = threadIdx.x % 4;
  const int plane = args.out_height * args.out_width;
  const int pixel = blockIdx.x * kPlainTile + row;
  const int image = pixel / plane, in_plane = pixel - image * plane;
  const int y = in_plane / args.out_width, x = in_plane - y * args.out_width;
  const int k = blockIdx.y * kPlainTile + row;
  const T* from_image = args.input + image * args.input_strides.n;

  const auto in_map = [&](int tap) {
    const int y_in = y - args.pad_h + tap / 3 * args.dilation_h, x_in = x - args.pad_w + tap % 3 * args.dilation_w;
    return pixel < args.pixels && static_cast<unsigned>(y_in) < static_cast<unsigned>(args.height) &&
           static_cast<unsigned>(x_in) < static_cast<unsigned>(args.width);
  };
  Quad<Acc> next_input, next_weight;
  const auto load = [&](int tap, int first_c) {
    const int c = first_c + quad * 4;
    const int y_in = y - args.pad_h + tap / 3 * args.dilation_h, x_in = x - args.pad_w + tap % 3 * args.dilation_w;
    next_input = load_quad(from_image + y_in * args.input_strides.h + x_in * args.input_strides.w + c,
                           in_map(tap) ? args.in_channels - c : 0, args.input_aligned);
    next_weight = load_quad(args.weight + (int64_t{tap} * args.out_channels + k) * args.in_channels + c,
                            k < args.out_channels ? args.in_channels - c : 0, args.weight_aligned);
  };

  // 2. The taps that matter to the block.
  unsigned taps = 0;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) taps |= __syncthreads_or(in_map(tap)) ? 1u << tap : 0u;
  if (args.in_channels == 0) taps = 0;

  // 3. The sums.
  const int fast = threadIdx.x % 16, slow = threadIdx.x / 16;
  const auto pixel_of = [&](int i) { return kRows ? fast + 16 * i : slow * 4 + i; };  // in the tile
  const int quad_of_k = (kRows ? slow : fast) * 4;
  Acc sums[4][4] = {};
  int c = 0, buffer = 0;
  if (taps) load(__ffs(taps) - 1, 0);
  while (taps) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = plain_column<Acc>(row, quad * 4);
      shared[buffer][0][quad * 4 + i][at] = next_input.at[i];
      shared[buffer][1][quad * 4 + i][at] = next_weight.at[i];
    }
    __syncthreads();  // who reads the other buffer late has not passed this barrier, so nobody overwrites it
    c += kPlainInner;
    if (c >= args.in_channels) {
      c = 0;
      taps &= taps - 1;
    }
    if (taps) load(__ffs(taps) - 1, c);
#pragma unroll
    for (int inner = 0; inner < kPlainInner; ++inner) {
      const Quad<Acc> b =
          *reinterpret_cast<const Quad<Acc>*>(&shared[buffer][1][inner][plain_column<Acc>(quad_of_k, inner)]);
      Quad<Acc> a;
      if constexpr (kRows) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a.at[i] = shared[buffer][0][inner][plain_column<Acc>(pixel_of(i), inner)];
      } else {
        a = *reinterpret_cast<const Quad<Acc>*>(&shared[buffer][0][inner][plain_column<Acc>(pixel_of(0), inner)]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a.at[i] * b.at[j];
      }
    }
    buffer ^= 1;
  }

  // 4. Epilogue and output.
  const int first_k = blockIdx.y * kPlainTile + quad_of_k;
  T bias[4], scale[4], shift[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = min(first_k + j, args.out_channels - 1);
    bias[j] = args.bias ? args.bias[at] : narrow<T>(0);
    scale[j] = args.scale ? args.scale[at] : narrow<T>(1);
    shift[j] = args.shift ? args.shift[at] : narrow<T>(0);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int out_pixel = blockIdx.x * kPlainTile + pixel_of(i);
    if (out_pixel >= args.pixels) break;
    const int out_image = out_pixel / plane, out_in_plane = out_pixel - out_image * plane;
    const int out_y = out_in_plane / args.out_width, out_x = out_in_plane - out_y * args.out_width;
    T* to = args.output + out_image * args.output_strides.n + out_y * args.output_strides.h +
            out_x * args.output_strides.w + first_k * args.output_strides.c;
    T out[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Acc sum = (sums[i][j] + widen(bias[j])) * widen(scale[j]) + widen(shift[j]);
      out[j] = narrow<T>(args.relu && sum < 0 ? Acc(0) : sum);  // a NaN stays
    }
    if constexpr (kRows) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first_k + j < args.out_channels) to[j * args.output_strides.c] = out[j];
      }
    } else {
      store_quad(to, out, args.out_channels - first_k, args.output_aligned);
    }
  }
}

}  // namespace pyseg::atrous
