// Launches of the depthwise kernels: which layout, vectors or single elements, how the work is dealt out.
#include "atrous_conv2d_depthwise_cuda.cuh"
#include "atrous_conv2d_depthwise_rows_cuda.cuh"
#include "atrous_conv2d_launch_cuda.h"

namespace pyseg::atrous {
namespace {

// Channels and columns of one thread, chosen for 16 warps on a multiprocessor (128 registers). Eight 16-bit channels would
// halve the warps for the same number of bytes under way. Four columns read 1.5 for each one written.
template <typename T>
constexpr int kVectorChannels = sizeof(T) == 8 ? 2 : 4;
template <typename T>
constexpr int kForwardColumns = sizeof(T) == 8 ? 2 : 4;
constexpr int kGradientColumns = 2;
constexpr int kGradientSteps = 8;

constexpr int kLongestWalk = 32, kShortestWalk = 4;
constexpr int64_t kEnoughThreads = 1 << 15;  // walks are halved below it: more threads, more rows read twice
constexpr int kEnoughBlocks = 256;           // the same for the weight gradient's splits

bool fits(const Shape& s) { return sizes_fit(s) && s.channels * s.out_width < kMostBlocks; }

bool has_output(const Shape& s) { return s.batch > 0 && s.channels > 0 && s.out_height > 0 && s.out_width > 0; }

// Both maps have neighbouring channels side by side. One channel is rows where pixels are side by side, and else a map
// of one-channel vectors (a slice of a wider channels-last tensor).
bool channels_last(const Shape& shape, const Strides& input, const Strides& output) {
  if (shape.channels > 1) return input.c == 1 && output.c == 1;
  return (shape.width > 1 && input.w != 1) || (shape.out_width > 1 && output.w != 1);
}

template <typename T>
bool aligned(const void* data) {
  return is_aligned(data, kVectorChannels<T> * sizeof(T));
}

template <typename T>
bool vectors_fit(const void* data, const Strides& strides, int64_t batch, int64_t height, int64_t width) {
  return pixels_aligned(data, strides, batch, height, width, kVectorChannels<T>, kVectorChannels<T> * sizeof(T));
}

template <typename T>
DepthwiseArgs<T> make_args(const Shape& s, const void* input, const Strides& in, const void* output,
                           const Strides& out) {
  DepthwiseArgs<T> args = {};
  args.input = {static_cast<const T*>(input), in.n, in.c, in.h, in.w};
  args.output = {static_cast<T*>(const_cast<void*>(output)), out.n, out.c, out.h, out.w};
  args.batch = static_cast<int>(s.batch);
  args.channels = static_cast<int>(s.channels);
  args.height = static_cast<int>(s.height);
  args.width = static_cast<int>(s.width);
  args.out_height = static_cast<int>(s.out_height);
  args.out_width = static_cast<int>(s.out_width);
  args.pad_h = static_cast<int>(s.pad_h);
  args.pad_w = static_cast<int>(s.pad_w);
  args.dilation_h = static_cast<int>(s.dilation_h);
  args.dilation_w = static_cast<int>(s.dilation_w);
  return args;
}

template <typename T>
DepthwiseWalks make_walks(const DepthwiseArgs<T>& args, int columns, int steps) {
  return depthwise_walks(args.out_height, args.out_width, args.dilation_h, args.dilation_w, columns, steps);
}

template <typename T>
DepthwiseTiles make_tiles(const DepthwiseArgs<T>& args) {
  return depthwise_tiles(args.out_height, args.out_width, args.dilation_h, args.dilation_w, sizeof(T));
}

int64_t tile_blocks(const DepthwiseTiles& tiles) {
  return int64_t{tiles.column_tiles} * tiles.phase_tiles * tiles.step_tiles;
}

template <typename T, int kSize>
cudaError_t forward_channels_last(const DepthwiseArgs<T>& args, cudaStream_t stream) {
  const int vectors = args.channels / kSize;
  int steps = kLongestWalk;
  DepthwiseWalks walks = make_walks(args, kForwardColumns<T>, steps);
  while (steps > kShortestWalk &&
         int64_t{vectors} * walks.column_groups * walks.row_walks * args.batch < kEnoughThreads) {
    walks = make_walks(args, kForwardColumns<T>, steps /= 2);
  }
  const int64_t blocks_per_walk = (int64_t{vectors} * walks.column_groups + kDepthwiseThreads - 1) / kDepthwiseThreads;
  const int64_t blocks = blocks_per_walk * walks.row_walks * args.batch;
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  atrous_conv2d_depthwise_channels_last<T, kSize, kForwardColumns<T>>
      <<<static_cast<unsigned>(blocks), kDepthwiseThreads, 0, stream>>>(args, walks, static_cast<int>(blocks_per_walk));
  return cudaGetLastError();
}

template <typename T>
cudaError_t forward(const Forward& f, bool flip, cudaStream_t stream) {
  constexpr int kVector = kVectorChannels<T>;
  const Shape& s = f.shape;
  DepthwiseArgs<T> args = make_args<T>(s, f.input, f.input_strides, f.output, f.output_strides);
  args.weight = static_cast<const T*>(f.weight);
  args.bias = static_cast<const T*>(f.epilogue.bias);
  args.scale = static_cast<const T*>(f.epilogue.scale);
  args.shift = static_cast<const T*>(f.epilogue.shift);
  args.flip = flip;
  args.relu = f.epilogue.relu;
  if (!channels_last(s, f.input_strides, f.output_strides)) {
    const DepthwiseTiles tiles = make_tiles(args);
    const int64_t blocks = tile_blocks(tiles) * s.batch * s.channels;
    if (blocks > kMostBlocks) return cudaErrorInvalidValue;
    atrous_conv2d_depthwise_rows<T><<<static_cast<unsigned>(blocks), kRowsThreads, 0, stream>>>(args, tiles);
    return cudaGetLastError();
  }
  const bool vectors = s.channels % kVector == 0 && aligned<T>(args.weight) && aligned<T>(args.bias) &&
                       aligned<T>(args.scale) && aligned<T>(args.shift) &&
                       vectors_fit<T>(f.input, f.input_strides, s.batch, s.height, s.width) &&
                       vectors_fit<T>(f.output, f.output_strides, s.batch, s.out_height, s.out_width);
  return vectors ? forward_channels_last<T, kVector>(args, stream) : forward_channels_last<T, 1>(args, stream);
}

// How the channels-last weight gradient is dealt out; depends on the shape alone, so that results do too.
template <typename T>
DepthwiseGradientGrid gradient_grid(const DepthwiseArgs<T>& args, const DepthwiseWalks& walks, int vectors) {
  DepthwiseGradientGrid grid;
  grid.lanes_log2 = 0;
  while (grid.lanes_log2 < 5 && (1 << grid.lanes_log2) < vectors) ++grid.lanes_log2;
  grid.units = walks.column_groups * walks.row_walks * args.batch;
  const int workers = kDepthwiseThreads >> grid.lanes_log2;
  const int enough = ceil_div(kEnoughBlocks, ceil_div(vectors, 1 << grid.lanes_log2));
  const int most = ceil_div(grid.units, workers);
  grid.splits = enough < most ? enough : most;
  return grid;
}

template <typename T>
bool gradient_in_vectors(const WeightGradient& w) {
  constexpr int kVector = kVectorChannels<T>;
  const Shape& s = w.shape;
  return s.channels % kVector == 0 && vectors_fit<T>(w.input, w.input_strides, s.batch, s.height, s.width) &&
         vectors_fit<T>(w.grad_output, w.grad_output_strides, s.batch, s.out_height, s.out_width);
}

template <typename T>
int64_t gradient_splits(const WeightGradient& w) {
  const DepthwiseArgs<T> args = make_args<T>(w.shape, w.input, w.input_strides, w.grad_output, w.grad_output_strides);
  if (!channels_last(w.shape, w.input_strides, w.grad_output_strides))
    return tile_blocks(make_tiles(args)) * args.batch;
  const int vector = gradient_in_vectors<T>(w) ? kVectorChannels<T> : 1;
  return gradient_grid(args, make_walks(args, kGradientColumns, kGradientSteps), args.channels / vector).splits;
}

template <typename T, int kSize>
void gradient_channels_last(const DepthwiseArgs<T>& args, cudaStream_t stream) {
  const DepthwiseWalks walks = make_walks(args, kGradientColumns, kGradientSteps);
  const int vectors = args.channels / kSize;
  const DepthwiseGradientGrid grid = gradient_grid(args, walks, vectors);
  const dim3 blocks(ceil_div(vectors, 1 << grid.lanes_log2), grid.splits);
  atrous_conv2d_depthwise_weight_gradient_channels_last<T, kSize, kGradientColumns>
      <<<blocks, kDepthwiseThreads, 0, stream>>>(args, walks, grid);
}

template <typename T>
cudaError_t weight_gradient(const WeightGradient& w, cudaStream_t stream) {
  DepthwiseArgs<T> args = make_args<T>(w.shape, w.input, w.input_strides, w.grad_output, w.grad_output_strides);
  args.partial = static_cast<Accumulator<T>*>(w.workspace);
  const int64_t splits = gradient_splits<T>(w);
  if (!channels_last(w.shape, w.input_strides, w.grad_output_strides)) {
    const int64_t blocks = splits * args.channels;
    if (blocks > kMostBlocks) return cudaErrorInvalidValue;
    atrous_conv2d_depthwise_weight_gradient_rows<T>
        <<<static_cast<unsigned>(blocks), kRowsThreads, 0, stream>>>(args, make_tiles(args));
  } else if (gradient_in_vectors<T>(w)) {
    gradient_channels_last<T, kVectorChannels<T>>(args, stream);
  } else {
    gradient_channels_last<T, 1>(args, stream);
  }
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;

  const int64_t count = int64_t{args.channels} * kTaps;
  const dim3 threads(kReduceElements, kReduceSlices);
  atrous_conv2d_depthwise_weight_gradient_reduce<T>
      <<<static_cast<unsigned>((count + kReduceElements - 1) / kReduceElements), threads, 0, stream>>>(
          args.partial, static_cast<T*>(w.grad_weight), static_cast<int>(splits), count);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_depthwise_forward(const Forward& args, bool flip, cudaStream_t stream) {
  if (!has_output(args.shape)) return cudaSuccess;
  if (!fits(args.shape)) return cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::kFloat: return forward<float>(args, flip, stream);
    case DType::kDouble: return forward<double>(args, flip, stream);
    case DType::kHalf: return forward<__half>(args, flip, stream);
    case DType::kBFloat16: return forward<__nv_bfloat16>(args, flip, stream);
  }
  return cudaErrorInvalidValue;
}

int64_t depthwise_weight_gradient_workspace(const WeightGradient& args) {
  if (!has_output(args.shape) || !fits(args.shape)) return 0;
  const int64_t count = args.shape.channels * kTaps;
  switch (args.dtype) {
    case DType::kFloat: return gradient_splits<float>(args) * count * int64_t{sizeof(float)};
    case DType::kDouble: return gradient_splits<double>(args) * count * int64_t{sizeof(double)};
    case DType::kHalf: return gradient_splits<__half>(args) * count * int64_t{sizeof(float)};
    case DType::kBFloat16: return gradient_splits<__nv_bfloat16>(args) * count * int64_t{sizeof(float)};
  }
  return 0;
}

cudaError_t launch_depthwise_weight_gradient(const WeightGradient& args, cudaStream_t stream) {
  if (!has_output(args.shape)) {
    const size_t bytes = args.shape.channels * kTaps * element_size(args.dtype);
    return bytes == 0 ? cudaSuccess : cudaMemsetAsync(args.grad_weight, 0, bytes, stream);
  }
  if (!fits(args.shape)) return cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::kFloat: return weight_gradient<float>(args, stream);
    case DType::kDouble: return weight_gradient<double>(args, stream);
    case DType::kHalf: return weight_gradient<__half>(args, stream);
    case DType::kBFloat16: return weight_gradient<__nv_bfloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyseg::atrous
