// Depthwise 3x3 atrous convolution, stride 1, on channels-last maps, and its weight gradient:
//   y[n, oy, ox, c] = epilogue(sum over ky, kx of w[c, ky, kx] * x[n, oy - pad_h + ky * dh, ox - pad_w + kx * dw, c])
//
// Memory-bound: at the least, the input is read and the output written once. Output rows oy, oy + dh, oy + 2 dh, ... of
// one phase share input rows, and so do columns ox, ox + dw, .... A thread owns one vector of channels (8 or 16
// bytes) and kColumns columns of one column phase, and walks `steps` rows down one row phase: each input row is loaded
// once (at kColumns + 2 columns, not 3 * kColumns) and goes into the three output rows in progress, in registers.
// Neighbouring lanes hold neighbouring channels, so accesses coalesce whatever the dilation. Shared memory is for weights only, no
// intermediates in memory. The rows layout (NCHW) is in atrous_conv2d_depthwise_rows_cuda.cuh.
// Deterministic: no atomics; the weight gradient writes one partial sum per block and adds them in a fixed order.
#pragma once

#include "atrous_conv2d_cuda.h"
#include "atrous_conv2d_elements.cuh"

namespace pyseg::atrous {

constexpr int kTaps = 9;
constexpr int kDepthwiseThreads = 128;

template <typename T>
struct DepthwiseMap {
  T* data;
  int64_t n, c, h, w;  // strides in elements
};

// What both layouts' kernels know about the convolution. Every size fits an int with room for sums (the launcher checks).
template <typename T>
struct DepthwiseArgs {
  DepthwiseMap<const T> input;  // [N, C, H, W]
  DepthwiseMap<T> output;       // [N, C, OH, OW]; in the weight gradient: grad_output
  const T* weight;              // [C, 3, 3]
  const T* bias;                // [C] or null, like scale and shift
  const T* scale;
  const T* shift;
  Accumulator<T>* partial;  // weight gradient: [splits, C, 3, 3]
  bool flip, relu;
  int batch, channels, height, width, out_height, out_width;
  int pad_h, pad_w, dilation_h, dilation_w;
};

// How the outputs of one image are dealt to threads: columns in groups of kColumns within a phase, rows in walks of
// `steps` within a phase. Groups of neighbouring phases are neighbours, so that a block's threads share cache lines.
struct DepthwiseWalks {
  int steps;
  int column_phases, column_groups;  // groups of all phases
  int row_phases, row_walks;         // walks of all phases
};

inline __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline DepthwiseWalks depthwise_walks(int out_height, int out_width, int dilation_h, int dilation_w, int columns,
                                      int steps) {
  DepthwiseWalks walks;
  walks.steps = steps;
  walks.column_phases = dilation_w < out_width ? dilation_w : out_width;
  walks.column_groups = walks.column_phases * ceil_div(ceil_div(out_width, dilation_w), columns);
  walks.row_phases = dilation_h < out_height ? dilation_h : out_height;
  walks.row_walks = walks.row_phases * ceil_div(ceil_div(out_height, dilation_h), steps);
  return walks;
}

// The kColumns columns and the walk that a thread works on.
template <int kColumns>
struct DepthwisePlace {
  int x, y;  // the first output column and row; the next ones are a dilation away

  __device__ __forceinline__ DepthwisePlace(const DepthwiseWalks& walks, int group, int walk, int dilation_h,
                                            int dilation_w) {
    const int column_turn = group / walks.column_phases;
    x = group - column_turn * walks.column_phases + column_turn * kColumns * dilation_w;
    const int row_turn = walk / walks.row_phases;
    y = walk - row_turn * walks.row_phases + row_turn * walks.steps * dilation_h;
  }
};

// kCount vectors of one row, a dilation apart; zeros where the map has no such row or column.
template <typename T, int kSize, int kCount>
struct DepthwiseRow {
  Vector<T, kSize> at[kCount];

  __device__ __forceinline__ void load(const DepthwiseMap<const T>& map, const T* image, int y, int height, int x,
                                       int width, int dilation) {
    const bool row = static_cast<unsigned>(y) < static_cast<unsigned>(height);
    const T* line = image + y * map.h;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = x + i * dilation;
      at[i] = row && static_cast<unsigned>(column) < static_cast<unsigned>(width)
                  ? Vector<T, kSize>::load(line + column * map.w)
                  : Vector<T, kSize>::filled(0);
    }
  }
};

// Grid: (vectors of channels, then column groups: flattened over the block; row walks; images), all in x.
template <typename T, int kSize, int kColumns>
__global__ void __launch_bounds__(kDepthwiseThreads)
    atrous_conv2d_depthwise_channels_last(DepthwiseArgs<T> args, DepthwiseWalks walks, int blocks_per_walk) {
  using Acc = Accumulator<T>;
  const int vectors = args.channels / kSize;

  // 1. Where this thread works.
  const int block_walk = blockIdx.x / blocks_per_walk;
  const int first_item = (blockIdx.x - block_walk * blocks_per_walk) * kDepthwiseThreads;
  const int first_vector = first_item % vectors;
  const int item = first_item + threadIdx.x;
  const int image = block_walk / walks.row_walks;
  const int group = item / vectors;
  const int channel = (item - group * vectors) * kSize;

  // 2. The weights of its channels, by way of shared memory: the block's threads need them one vector after the other
  // from the first one's on, and again from 0, so that their number is the last one's plus one, or all.
  __shared__ alignas(kVectorBytes) T shared_weight[kDepthwiseThreads * kSize * kTaps];
  const int block_vectors = min(vectors, kDepthwiseThreads);
  for (int i = threadIdx.x; i < block_vectors * kTaps; i += kDepthwiseThreads) {
    int from = first_vector * kTaps + i;
    from -= from >= vectors * kTaps ? vectors * kTaps : 0;
    Vector<T, kSize>::load(args.weight + int64_t{from} * kSize).store(shared_weight + i * kSize);
  }
  __syncthreads();
  if (group >= walks.column_groups) return;
  const DepthwisePlace<kColumns> place(walks, group, block_walk - image * walks.row_walks, args.dilation_h,
                                       args.dilation_w);
  if (place.x >= args.out_width || place.y >= args.out_height) return;
  Vector<T, kSize> raw_weight[kTaps];  // weight[channel + i][tap] is element i * 9 + tap
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    raw_weight[i] = Vector<T, kSize>::load(shared_weight + (threadIdx.x % block_vectors * kTaps + i) * kSize);
  }
  Acc weight[kSize][kTaps];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int ahead = i * kTaps + tap, turned = i * kTaps + kTaps - 1 - tap;
      weight[i][tap] = widen(args.flip ? raw_weight[turned / kSize].at[turned % kSize]
                                       : raw_weight[ahead / kSize].at[ahead % kSize]);
    }
  }
  const ChannelEpilogue<T, kSize> epilogue(args.bias, args.scale, args.shift, args.relu, channel);

  // 3. The walk. sums[ky] belong to the output row that has ky rows of the window behind it.
  const T* input = args.input.data + image * args.input.n + channel;
  T* output = args.output.data + image * args.output.n + channel;
  Acc sums[3][kColumns][kSize] = {};
  int y_in = place.y - args.pad_h;
  int y_out = place.y - 2 * args.dilation_h;
#pragma unroll 1
  for (int step = 0; step < walks.steps + 2 && y_out < args.out_height;
       ++step, y_in += args.dilation_h, y_out += args.dilation_h) {
    DepthwiseRow<T, kSize, kColumns + 2> row;
    row.load(args.input, input, y_in, args.height, place.x - args.pad_w, args.width, args.dilation_w);
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const Acc x = widen(row.at[column + kx].at[i]);
#pragma unroll
          for (int ky = 0; ky < 3; ++ky) sums[ky][column][i] += weight[i][ky * 3 + kx] * x;
        }
      }
    }
    // sums[2] is complete: the row that started two steps ago.
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int x_out = place.x + column * args.dilation_w;
      if (step >= 2 && x_out < args.out_width) {
        Vector<T, kSize> y;
#pragma unroll
        for (int i = 0; i < kSize; ++i) y.at[i] = epilogue(sums[2][column][i], i);
        y.store(output + y_out * args.output.h + x_out * args.output.w);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sums[2][column][i] = sums[1][column][i];
        sums[1][column][i] = sums[0][column][i];
        sums[0][column][i] = 0;
      }
    }
  }
}

// The weight gradient's lanes: 2^lanes_log2 vectors of channels beside each other in a block, the rest of the block's
// threads are workers that take (image, walk, column group) units in turn.
struct DepthwiseGradientGrid {
  int lanes_log2;
  int splits;  // blocks that share one group of channels, so partial sums per weight
  int units;
};

// partial[split, c, ky, kx] = sum over the split's outputs of g[n, oy, ox, c] * x[n, iy, ix, c].
// Grid: (groups of channels, splits).
template <typename T, int kSize, int kColumns>
__global__ void __launch_bounds__(kDepthwiseThreads)
    atrous_conv2d_depthwise_weight_gradient_channels_last(DepthwiseArgs<T> args, DepthwiseWalks walks,
                                                          DepthwiseGradientGrid grid) {
  using Acc = Accumulator<T>;
  constexpr int kSums = kTaps * kSize;
  // One row of the table per sum, one element longer than needed: stage 3 reads columns, from different banks.
  constexpr int kPitch = kDepthwiseThreads + 1;
  __shared__ Acc table[kSums * kPitch];
  static_assert(sizeof(table) <= 48 * 1024, "static shared memory ends there");

  const int lanes = 1 << grid.lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int worker = threadIdx.x >> grid.lanes_log2;
  const int workers = kDepthwiseThreads >> grid.lanes_log2;
  const int vectors = args.channels / kSize;
  const int vector = blockIdx.x * lanes + lane;
  const bool live = vector < vectors;

  // 1. Each thread sums its units. A step brings one row of x, which meets the three latest rows of g.
  Acc sums[kTaps][kSize] = {};
  for (int unit = blockIdx.y * workers + worker; live && unit < grid.units; unit += grid.splits * workers) {
    const int block_walk = unit / walks.column_groups;
    const int image = block_walk / walks.row_walks;
    const DepthwisePlace<kColumns> place(walks, unit - block_walk * walks.column_groups,
                                         block_walk - image * walks.row_walks, args.dilation_h, args.dilation_w);
    if (place.x >= args.out_width || place.y >= args.out_height) continue;
    const T* input = args.input.data + image * args.input.n + vector * kSize;
    const DepthwiseMap<const T> gradient{args.output.data, args.output.n, args.output.c, args.output.h, args.output.w};
    const T* grad_output = gradient.data + image * gradient.n + vector * kSize;

    DepthwiseRow<T, kSize, kColumns> g[3];  // g[ky]: the row that started ky steps ago
#pragma unroll
    for (int ky = 0; ky < 3; ++ky) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) g[ky].at[column] = Vector<T, kSize>::filled(0);
    }
    int y_in = place.y - args.pad_h;
    int y_out = place.y;
#pragma unroll 1
    for (int step = 0; step < walks.steps + 2 && y_out - 2 * args.dilation_h < args.out_height;
         ++step, y_in += args.dilation_h, y_out += args.dilation_h) {
      g[2] = g[1];
      g[1] = g[0];
      g[0].load(gradient, grad_output, step < walks.steps ? y_out : -1, args.out_height, place.x, args.out_width,
                args.dilation_w);
      DepthwiseRow<T, kSize, kColumns + 2> row;
      row.load(args.input, input, y_in, args.height, place.x - args.pad_w, args.width, args.dilation_w);
#pragma unroll
      for (int ky = 0; ky < 3; ++ky) {
#pragma unroll
        for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
          for (int column = 0; column < kColumns; ++column) {
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              sums[ky * 3 + kx][i] += widen(g[ky].at[column].at[i]) * widen(row.at[column + kx].at[i]);
            }
          }
        }
      }
    }
  }

  // 2. All sums into the table: rows in the order of the weights of one vector of channels.
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) table[(i * kTaps + tap) * kPitch + threadIdx.x] = sums[tap][i];
  }
  __syncthreads();

  // 3. The workers' sums are added in order and written, in the order of memory.
  for (int item = threadIdx.x; item < kSums * lanes; item += kDepthwiseThreads) {
    const int of_lane = item / kSums, sum = item - of_lane * kSums;
    if (blockIdx.x * lanes + of_lane >= vectors) break;
    Acc total = 0;
    for (int i = 0; i < workers; ++i) total += table[sum * kPitch + (i << grid.lanes_log2) + of_lane];
    args.partial[(int64_t{blockIdx.y} * vectors + blockIdx.x * lanes) * kSums + item] = total;
  }
}

constexpr int kReduceElements = 32;  // one warp reads neighbouring weights
constexpr int kReduceSlices = 8;     // threads that share the splits of one weight

// out[i] = sum over splits of partial[split, i], in a fixed order. Block: (kReduceElements, kReduceSlices).
template <typename T>
__global__ void __launch_bounds__(kReduceElements* kReduceSlices)
    atrous_conv2d_depthwise_weight_gradient_reduce(const Accumulator<T>* __restrict__ partial,  // [splits, count]
                                                   T* __restrict__ out,                         // [count]
                                                   int splits, int64_t count) {
  __shared__ Accumulator<T> slices[kReduceSlices][kReduceElements];
  const int64_t i = int64_t{blockIdx.x} * kReduceElements + threadIdx.x;
  Accumulator<T> sum = 0;
  if (i < count) {
#pragma unroll 4
    for (int split = threadIdx.y; split < splits; split += kReduceSlices) sum += partial[split * count + i];
  }
  slices[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && i < count) {
#pragma unroll
    for (int slice = 1; slice < kReduceSlices; ++slice) sum += slices[slice][threadIdx.x];
    out[i] = narrow<T>(sum);
  }
}

}  // namespace pyseg::atrous
