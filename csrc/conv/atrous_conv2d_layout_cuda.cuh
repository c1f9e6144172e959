// Rearrangements for atrous_conv2d: maps between channels-last and row layouts, dense weights into one matrix a tap.
//
// Elements are moved as unsigned integers of their size. A block passes a tile through shared memory, reading it along
// the source's contiguous dimension and writing it along the target's. Least bytes: every element once in, once out.
// Deterministic.
#pragma once

#include <cstdint>

#include "conv/atrous_conv2d_cuda.h"

namespace pyseg::atrous {

constexpr int kMapTile = 32;     // pixels and channels of a tile, as many as a warp has lanes
constexpr int kMapTileRows = 8;  // warps of a block
static_assert(kMapTile % kMapTileRows == 0, "each warp moves whole rows of the tile");

// Grid: pixel tiles * channel tiles * images; block: kMapTile x kMapTileRows.
template <typename Bits>
__global__ void __launch_bounds__(kMapTile* kMapTileRows)
    copy_map_kernel(const Bits* __restrict__ from,  // [N, C, H, W]
                    Strides from_strides,
                    Bits* __restrict__ to,  // [N, C, H, W]
                    Strides to_strides, int channels, uint32_t pixels, uint32_t width) {
  __shared__ Bits tile[kMapTile][kMapTile + 1];  // [channel][pixel], padded against bank conflicts
  const uint32_t pixel_tiles = (pixels + kMapTile - 1) / kMapTile, channel_tiles = (channels + kMapTile - 1) / kMapTile;
  const uint32_t pixel0 = blockIdx.x % pixel_tiles * kMapTile;
  const int channel0 = blockIdx.x / pixel_tiles % channel_tiles * kMapTile;
  const int64_t image = blockIdx.x / pixel_tiles / channel_tiles;

  // Calls visit(offset, channel in the tile, pixel in the tile) for this thread's part, lanes along the contiguous one.
  auto for_each = [&](const Strides& s, auto visit) {
    for (int row = threadIdx.y; row < kMapTile; row += kMapTileRows) {
      const int c = s.c == 1 ? threadIdx.x : row, p = s.c == 1 ? row : threadIdx.x;
      if (channel0 + c >= channels || pixel0 + p >= pixels) continue;
      const uint32_t y = (pixel0 + p) / width, x = (pixel0 + p) % width;
      visit(image * s.n + (channel0 + c) * s.c + y * s.h + x * s.w, c, p);
    }
  };
  for_each(from_strides, [&](int64_t offset, int c, int p) { tile[c][p] = from[offset]; });
  __syncthreads();
  for_each(to_strides, [&](int64_t offset, int c, int p) { to[offset] = tile[c][p]; });
}

// Channels of each side in a tile of weights: 9 * kWeightTile * (kWeightTile + 1) elements of shared memory.
template <typename Bits>
constexpr int kWeightTile = sizeof(Bits) == 8 ? 16 : 32;
constexpr int kPackThreads = 256;

// packed [3, 3, rows, columns], contiguous, from weight [K, C, 3, 3] of any strides. Rows are K and columns C, or with
// kForInputGradient the other way round and the taps turned by 180 degrees.
// Grid: tiles of columns x tiles of rows; block: kPackThreads.
template <typename Bits, bool kForInputGradient>
__global__ void __launch_bounds__(kPackThreads)
    pack_weight_kernel(const Bits* __restrict__ weight, WeightStrides strides, int64_t out_channels,
                       int64_t in_channels, Bits* __restrict__ packed) {
  constexpr int kTile = kWeightTile<Bits>;
  __shared__ Bits tile[kTile][kTile * 9 + 1];  // [k][c * 9 + tap]: 9 and the row length are odd, so no bank conflicts
  const int64_t rows = kForInputGradient ? in_channels : out_channels;
  const int64_t columns = kForInputGradient ? out_channels : in_channels;
  const int64_t column_tiles = (columns + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / column_tiles * kTile, column0 = blockIdx.x % column_tiles * kTile;
  const int64_t k0 = kForInputGradient ? column0 : row0, c0 = kForInputGradient ? row0 : column0;

  for (int i = threadIdx.x; i < kTile * kTile * 9; i += kPackThreads) {
    const int k = i / (kTile * 9), rest = i % (kTile * 9), c = rest / 9, tap = rest % 9;
    if (k0 + k < out_channels && c0 + c < in_channels) {
      tile[k][rest] = weight[(k0 + k) * strides.k + (c0 + c) * strides.c + tap / 3 * strides.ky + tap % 3 * strides.kx];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile * 9; i += kPackThreads) {
    const int tap = i / (kTile * kTile), row = i / kTile % kTile, column = i % kTile;
    if (row0 + row < rows && column0 + column < columns) {
      packed[(tap * rows + row0 + row) * columns + column0 + column] =
          kForInputGradient ? tile[column][row * 9 + 8 - tap] : tile[row][column * 9 + tap];
    }
  }
}

}  // namespace pyseg::atrous
