// Launches of the dense weight gradient: tensor cores or not, tile, splits.
#include "atrous_conv2d_wgrad_cuda.cuh"

#include <algorithm>
#include <iterator>

#include "atrous_conv2d_launch_cuda.h"

namespace pyseg::atrous {
namespace {

// About one wave of two blocks on each multiprocessor of a large GPU. More would only enlarge the workspace.
constexpr int64_t kEnoughBlocks = 256;
constexpr int kLeastSplitPixels = 128;

bool fits(const Shape& s) { return sizes_fit(s) && s.out_channels <= kMostTiles * kWgradPlainTile; }

// Both maps allow copies of `elements` channels together.
bool channels_travel(const WeightGradient& w, int elements) {
  const Shape& s = w.shape;
  const int bytes = std::min(elements * element_size(w.dtype), kVectorBytes);
  return s.channels % elements == 0 && s.out_channels % elements == 0 &&
         pixels_aligned(w.input, w.input_strides, s.batch, s.height, s.width, elements, bytes) &&
         pixels_aligned(w.grad_output, w.grad_output_strides, s.batch, s.out_height, s.out_width, elements, bytes);
}

struct Plan {
  bool tensor_cores;
  int tile;
  int64_t splits;
  WgradTap taps[kWgradTaps];
};

// Depends on the shapes, the alignment and `tensor_cores` alone, so that results do too.
Plan make_plan(const WeightGradient& w, bool tensor_cores) {
  const Shape& s = w.shape;
  Plan plan = {};
  plan.tensor_cores =
      tensor_cores && w.dtype != DType::kDouble && channels_travel(w, kVectorBytes / element_size(w.dtype));
  plan.tile = plan.tensor_cores && std::min(s.channels, s.out_channels) >= 128 ? 128 : 64;

  int64_t all_pixels = 0;
  for (int i = 0; i < kWgradTaps; ++i) {
    WgradTap& tap = plan.taps[i];
    const int64_t dy = i / 3 * s.dilation_h - s.pad_h, dx = i % 3 * s.dilation_w - s.pad_w;
    tap.top = static_cast<int>(std::max<int64_t>(0, -dy));
    tap.left = static_cast<int>(std::max<int64_t>(0, -dx));
    tap.height = static_cast<int>(std::max<int64_t>(0, std::min(s.out_height, s.height - dy) - tap.top));
    tap.width = static_cast<int>(std::max<int64_t>(0, std::min(s.out_width, s.width - dx) - tap.left));
    tap.pixels = static_cast<int>(s.batch * tap.height * tap.width);
    all_pixels += tap.pixels;
  }

  const int64_t tiles = ((s.channels + plan.tile - 1) / plan.tile) * ((s.out_channels + plan.tile - 1) / plan.tile);
  const int64_t wanted_splits = std::max<int64_t>(1, kEnoughBlocks / std::max<int64_t>(1, tiles));
  const int64_t split_pixels = std::max<int64_t>(kLeastSplitPixels, (all_pixels + wanted_splits - 1) / wanted_splits);
  constexpr int kStep = kWgradInnerBytes / 2;  // the most pixels that a kernel takes at once
  static_assert(kStep % kWgradPlainPixels == 0, "splits end where a step ends");
  for (WgradTap& tap : plan.taps) {
    tap.first_split = static_cast<int>(plan.splits);
    tap.splits = static_cast<int>((tap.pixels + split_pixels - 1) / split_pixels);
    if (tap.splits > 0) tap.split_pixels = ((tap.pixels + tap.splits - 1) / tap.splits + kStep - 1) / kStep * kStep;
    plan.splits += tap.splits;
  }
  return plan;
}

template <typename T, int kTile>
cudaError_t launch_tensor_cores(const WgradArgs<T>& args, dim3 grid, cudaStream_t stream) {
  using Tile = WgradTile<T, kTile>;
  const auto kernel = atrous_conv2d_wgrad_tensor_cores<T, kTile>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, Tile::kThreads, Tile::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t weight_gradient(const WeightGradient& w, bool tensor_cores, cudaStream_t stream) {
  const Shape& s = w.shape;
  const Plan plan = make_plan(w, tensor_cores);
  WgradArgs<T> args;
  args.input = static_cast<const T*>(w.input);
  args.grad_output = static_cast<const T*>(w.grad_output);
  args.partial = static_cast<Accumulator<T>*>(w.workspace);
  args.input_n = w.input_strides.n, args.input_h = w.input_strides.h, args.input_w = w.input_strides.w;
  args.grad_n = w.grad_output_strides.n, args.grad_h = w.grad_output_strides.h, args.grad_w = w.grad_output_strides.w;
  args.in_channels = static_cast<int>(s.channels);
  args.out_channels = static_cast<int>(s.out_channels);
  args.pad_h = static_cast<int>(s.pad_h);
  args.pad_w = static_cast<int>(s.pad_w);
  args.dilation_h = static_cast<int>(s.dilation_h);
  args.dilation_w = static_cast<int>(s.dilation_w);
  args.aligned = channels_travel(w, 4);
  std::copy(std::begin(plan.taps), std::end(plan.taps), args.taps);

  if (plan.splits > 0) {
    const dim3 grid(static_cast<unsigned>((s.channels + plan.tile - 1) / plan.tile),
                    static_cast<unsigned>((s.out_channels + plan.tile - 1) / plan.tile),
                    static_cast<unsigned>(plan.splits));
    cudaError_t error = cudaErrorInvalidValue;
    if constexpr (sizeof(T) <= 4) {
      if (plan.tensor_cores) {
        error = plan.tile == 128 ? launch_tensor_cores<T, 128>(args, grid, stream)
                                 : launch_tensor_cores<T, 64>(args, grid, stream);
      }
    }
    if (!plan.tensor_cores) {
      atrous_conv2d_wgrad_plain<T><<<grid, kWgradPlainThreads, 0, stream>>>(args);
      error = cudaGetLastError();
    }
    if (error != cudaSuccess) return error;
  }
  const int64_t count = s.channels * s.out_channels;
  const dim3 threads(kWgradReduceWeights, kWgradTaps);
  atrous_conv2d_wgrad_reduce<T>
      <<<static_cast<unsigned>((count + kWgradReduceWeights - 1) / kWgradReduceWeights), threads, 0, stream>>>(
          args, static_cast<T*>(w.grad_weight), count);
  return cudaGetLastError();
}

}  // namespace

int64_t dense_weight_gradient_workspace(const WeightGradient& args, bool tensor_cores) {
  if (!fits(args.shape)) return 0;
  return make_plan(args, tensor_cores).splits * args.shape.channels * args.shape.out_channels *
         int64_t{std::max(element_size(args.dtype), 4)};
}

cudaError_t launch_dense_weight_gradient(const WeightGradient& args, bool tensor_cores, cudaStream_t stream) {
  if (args.shape.channels == 0 || args.shape.out_channels == 0) return cudaSuccess;
  if (!fits(args.shape)) return cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::kFloat: return weight_gradient<float>(args, tensor_cores, stream);
    case DType::kDouble: return weight_gradient<double>(args, tensor_cores, stream);
    case DType::kHalf: return weight_gradient<__half>(args, tensor_cores, stream);
    case DType::kBFloat16: return weight_gradient<__nv_bfloat16>(args, tensor_cores, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyseg::atrous
