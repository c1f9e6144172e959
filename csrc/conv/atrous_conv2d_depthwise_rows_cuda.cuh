// Depthwise 3x3 atrous convolution, stride 1, on maps of rows (NCHW), and its weight gradient; formula and arguments as
// in atrous_conv2d_depthwise_cuda.cuh.
//
// At the least, the input is read and the output written once. A block takes a tile of one plane: `columns` output
// columns, and rows y0 + p + k * dilation_h for `phases` neighbouring row phases p and `steps` steps k. The input that
// these touch goes into shared memory once, 16 bytes a thread wherever a row's own alignment allows (rows of odd width
// start anywhere: a row keeps its misalignment in shared memory), zeros where the map has none. Threads own one column
// and phase and walk kWalk steps down, each row of the tile into the three output rows in progress, which stay in
// registers. Only rows and columns of the halo (2 steps; 2 dilations, or none where the tile is as wide as the map) are
// read twice. Deterministic: no atomics; per block partial sums, added in a fixed order.
#pragma once

#include "atrous_conv2d_depthwise_cuda.cuh"

namespace pyseg::atrous {

constexpr int kRowsThreads = 256;
constexpr int kRowsTileBytes = 24 * 1024;  // several blocks per multiprocessor hide each other's loads
constexpr int kRowsMostColumns = 128;
constexpr int kWalk = 8;  // output rows of one walk: 10 rows read from shared memory for 8
constexpr int kTileVectors = kRowsTileBytes / kVectorBytes;
static_assert(kRowsTileBytes / (3 * (kRowsMostColumns * 8 + 2 * kVectorBytes)) >= 3,
              "a window of three rows of the widest elements must fit, whatever the dilation");

// The tiles of a plane. `segments` is 1 (columns + 2 dilations in one piece) or 3 (one piece per tap, where the dilation
// is wider than the tile).
struct DepthwiseTiles {
  int columns, column_tiles;
  int phases, phase_tiles, row_phases;
  int steps, step_tiles;
  int segments, segment_columns, segment_vectors;
};

inline DepthwiseTiles depthwise_tiles(int out_height, int out_width, int dilation_h, int dilation_w,
                                      int element_bytes) {
  DepthwiseTiles tiles;
  const int vector = kVectorBytes / element_bytes;
  tiles.column_tiles = ceil_div(out_width, kRowsMostColumns);
  tiles.columns = ceil_div(out_width, tiles.column_tiles);
  tiles.segments = dilation_w > tiles.columns ? 3 : 1;
  tiles.segment_columns = tiles.columns + (tiles.segments == 1 ? 2 * dilation_w : 0);
  tiles.segment_vectors = ceil_div(tiles.segment_columns + vector - 1, vector);  // whatever the misalignment
  const int most_rows = kTileVectors / (tiles.segments * tiles.segment_vectors);

  // As many steps as there are, so that no row is read twice; what is left of the tile goes to further phases.
  const int all_steps = ceil_div(out_height, dilation_h);
  tiles.step_tiles = ceil_div(all_steps, most_rows - 2);
  tiles.steps = ceil_div(all_steps, tiles.step_tiles);
  tiles.row_phases = dilation_h < out_height ? dilation_h : out_height;
  const int most_phases = most_rows / (tiles.steps + 2);
  tiles.phase_tiles = ceil_div(tiles.row_phases, most_phases);
  tiles.phases = ceil_div(tiles.row_phases, tiles.phase_tiles);
  return tiles;
}

// A block's tile of one plane, its input in shared memory, and the walks through it.
template <typename T>
struct DepthwiseTile {
  static constexpr int kVector = kVectorBytes / sizeof(T);

  const DepthwiseArgs<T>& args;
  const DepthwiseTiles& tiles;
  int image, channel, index;  // index: of the tile in its plane
  int x0, p0, k0;             // first output column, row phase and step
  int y_in0;                  // input row of the first row of the tile
  // The element that segment 0 of the map's row 0 starts with (perhaps outside the map), and its number counted from
  // address 0, of which the low bits are the misalignment.
  const T* origin;
  uint32_t origin_number;

  __device__ __forceinline__ DepthwiseTile(const DepthwiseArgs<T>& args_, const DepthwiseTiles& tiles_, int block)
      : args(args_), tiles(tiles_) {
    const int per_plane = tiles.column_tiles * tiles.phase_tiles * tiles.step_tiles;
    const int plane = block / per_plane;
    index = block - plane * per_plane;
    image = plane / args.channels;
    channel = plane - image * args.channels;
    const int row_tile = index / tiles.column_tiles;
    const int step_tile = row_tile / tiles.phase_tiles;
    x0 = (index - row_tile * tiles.column_tiles) * tiles.columns;
    p0 = (row_tile - step_tile * tiles.phase_tiles) * tiles.phases;
    k0 = step_tile * tiles.steps;
    y_in0 = k0 * args.dilation_h + p0 - args.pad_h;
    origin = args.input.data + image * args.input.n + channel * args.input.c + x0 - args.pad_w;
    origin_number = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(origin) / sizeof(T));
  }

  __device__ __forceinline__ int misalignment(int y) const {
    return (origin_number + static_cast<uint32_t>(y) * static_cast<uint32_t>(args.input.h)) & (kVector - 1);
  }

  // Fills `tile` [steps + 2, phases, segments, segment_vectors]; ends with the block's barrier.
  __device__ __forceinline__ void load(uint4* tile) const {
    const int row_vectors = tiles.segments * tiles.segment_vectors;
    const int rows = (tiles.steps + 2) * tiles.phases;
    const T* plane = origin - (x0 - args.pad_w);
    const T* plane_end = plane + (args.height - 1) * args.input.h + args.width;
#pragma unroll 2
    for (int item = threadIdx.x; item < rows * row_vectors; item += kRowsThreads) {
      const int row = item / row_vectors;
      const int in_row = item - row * row_vectors;
      const int step = row / tiles.phases;
      const int y = y_in0 + step * args.dilation_h + row - step * tiles.phases;
      const int segment = in_row / tiles.segment_vectors;  // 0 unless there are three
      const int shift = segment * args.dilation_w;
      const int skew = (misalignment(y) + shift) & (kVector - 1);
      // First column of this vector, counted from the origin, and in the map.
      const int from_origin = shift - skew + (in_row - segment * tiles.segment_vectors) * kVector;
      const int column = from_origin + x0 - args.pad_w;
      uint4 bits = {0, 0, 0, 0};
      if (static_cast<unsigned>(y) < static_cast<unsigned>(args.height) && column > -kVector && column < args.width) {
        const T* from = origin + y * args.input.h + from_origin;
        // A vector may reach into the neighbouring rows of the plane, but not out of it.
        const bool whole = from >= plane && from + kVector <= plane_end;
        if (whole) bits = *reinterpret_cast<const uint4*>(from);
        if (!whole || column < 0 || column + kVector > args.width) {
          T elements[kVector];
          __builtin_memcpy(elements, &bits, kVectorBytes);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const bool in_row = static_cast<unsigned>(column + i) < static_cast<unsigned>(args.width);
            if (in_row && !whole) elements[i] = from[i];
            if (!in_row) elements[i] = narrow<T>(0);
          }
          __builtin_memcpy(&bits, elements, kVectorBytes);
        }
      }
      tile[item] = bits;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int walks() const { return tiles.columns * tiles.phases * ceil_div(tiles.steps, kWalk); }
};

// One column of one row phase, from step `k` of the tile on.
template <typename T>
struct DepthwiseWalk {
  int column, phase, k, steps;  // steps is 0 where the tile hangs over the map's edge
  int x, y;                     // output

  __device__ __forceinline__ DepthwiseWalk(const DepthwiseTile<T>& tile, int item) {
    const int line = item / tile.tiles.columns;
    const int turn = line / tile.tiles.phases;
    column = item - line * tile.tiles.columns;
    phase = line - turn * tile.tiles.phases;
    k = turn * kWalk;
    x = tile.x0 + column;
    y = (tile.k0 + k) * tile.args.dilation_h + tile.p0 + phase;
    steps = min(kWalk, tile.tiles.steps - k);
    if (x >= tile.args.out_width || tile.p0 + phase >= tile.tiles.row_phases) steps = 0;
  }

  // The three inputs of this column in the tile's row of step k + step.
  __device__ __forceinline__ void read(const DepthwiseTile<T>& tile, const T* shared, int step,
                                       Accumulator<T> (&x_in)[3]) const {
    constexpr int kVector = DepthwiseTile<T>::kVector;
    const DepthwiseTiles& tiles = tile.tiles;
    const int skew = tile.misalignment(tile.y_in0 + (k + step) * tile.args.dilation_h + phase);
    const int pitch = tiles.segment_vectors * kVector;
    const T* row = shared + ((k + step) * tiles.phases + phase) * tiles.segments * pitch + column;
    const bool apart = tiles.segments == 3;
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
      const int shift = kx * tile.args.dilation_w;
      x_in[kx] = widen(row[apart ? kx * pitch + ((skew + shift) & (kVector - 1)) : skew + shift]);
    }
  }
};

// Grid: tiles of a plane fastest, then channels, then images, all in x.
template <typename T>
__global__ void __launch_bounds__(kRowsThreads)
    atrous_conv2d_depthwise_rows(DepthwiseArgs<T> args, DepthwiseTiles tiles) {
  using Acc = Accumulator<T>;
  __shared__ uint4 shared[kTileVectors];
  __shared__ Acc shared_weight[kTaps];

  // 1. The tile and the plane's weights into shared memory.
  const DepthwiseTile<T> tile(args, tiles, blockIdx.x);
  if (threadIdx.x < kTaps) {
    const int tap = args.flip ? kTaps - 1 - threadIdx.x : threadIdx.x;
    shared_weight[threadIdx.x] = widen(args.weight[int64_t{tile.channel} * kTaps + tap]);
  }
  tile.load(shared);
  Acc weight[kTaps];
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) weight[tap] = shared_weight[tap];
  const ChannelEpilogue<T, 1> epilogue(args.bias, args.scale, args.shift, args.relu, tile.channel);

  // 2. The walks. sums[ky] belongs to the output row that has ky rows of the window behind it.
  T* output = args.output.data + tile.image * args.output.n + tile.channel * args.output.c;
  for (int item = threadIdx.x; item < tile.walks(); item += kRowsThreads) {
    const DepthwiseWalk<T> walk(tile, item);
    if (walk.steps == 0) continue;
    Acc sums[3] = {};
    int y = walk.y - 2 * args.dilation_h;
    for (int step = 0; step < walk.steps + 2 && y < args.out_height; ++step, y += args.dilation_h) {
      Acc x[3];
      walk.read(tile, reinterpret_cast<const T*>(shared), step, x);
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
        for (int ky = 0; ky < 3; ++ky) sums[ky] += weight[ky * 3 + kx] * x[kx];
      }
      if (step >= 2) output[y * args.output.h + walk.x] = epilogue(sums[2], 0);
      sums[2] = sums[1];
      sums[1] = sums[0];
      sums[0] = 0;
    }
  }
}

// partial[image * tiles + tile, c, ky, kx] = sum over the tile's outputs of g * x. Grid as above.
template <typename T>
__global__ void __launch_bounds__(kRowsThreads)
    atrous_conv2d_depthwise_weight_gradient_rows(DepthwiseArgs<T> args, DepthwiseTiles tiles) {
  using Acc = Accumulator<T>;
  constexpr int kWarps = kRowsThreads / 32;
  __shared__ uint4 shared[kTileVectors];
  __shared__ Acc warp_sums[kTaps][kWarps];

  // 1. The tile of x into shared memory; g is read once, straight from memory.
  const DepthwiseTile<T> tile(args, tiles, blockIdx.x);
  tile.load(shared);

  // 2. The walks: a row of x meets the three latest rows of g.
  const T* grad_output = args.output.data + tile.image * args.output.n + tile.channel * args.output.c;
  Acc sums[kTaps] = {};
  for (int item = threadIdx.x; item < tile.walks(); item += kRowsThreads) {
    const DepthwiseWalk<T> walk(tile, item);
    if (walk.steps == 0) continue;
    Acc g[3] = {};
    int y = walk.y;
    for (int step = 0; step < walk.steps + 2 && y - 2 * args.dilation_h < args.out_height;
         ++step, y += args.dilation_h) {
      g[2] = g[1];
      g[1] = g[0];
      g[0] = step < walk.steps && y < args.out_height ? widen(grad_output[y * args.output.h + walk.x]) : Acc(0);
      Acc x[3];
      walk.read(tile, reinterpret_cast<const T*>(shared), step, x);
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
        for (int ky = 0; ky < 3; ++ky) sums[ky * 3 + kx] += g[ky] * x[kx];
      }
    }
  }

  // 3. The block's sums, in a fixed order.
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sums[tap] += __shfl_down_sync(~0u, sums[tap], offset);
    if (threadIdx.x % 32 == 0) warp_sums[tap][threadIdx.x / 32] = sums[tap];
  }
  __syncthreads();
  if (threadIdx.x < kTaps) {
    Acc total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[threadIdx.x][warp];
    const int per_plane = tiles.column_tiles * tiles.phase_tiles * tiles.step_tiles;
    const int64_t split = int64_t{tile.image} * per_plane + tile.index;
    args.partial[(split * args.channels + tile.channel) * kTaps + threadIdx.x] = total;
  }
}

}  // namespace pyseg::atrous
