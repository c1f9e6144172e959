// Dense atrous_conv2d on the tensor cores: which instance of the kernel runs.
#include <algorithm>

#include "common/cuda_device.h"
#include "conv/atrous_conv2d_cuda.h"
#include "conv/atrous_conv2d_dense_cuda.cuh"

namespace pyseg::atrous {
namespace {

using Tile128x128 = DenseTile<128, 128, 64, 32, 3>;
using Tile128x64 = DenseTile<128, 64, 64, 32, 3>;
using Tile64x64 = DenseTile<64, 64, 32, 32, 4>;
using Tile128x32 = DenseTile<128, 32, 32, 32, 4>;
using Tile128x16 = DenseTile<128, 16, 32, 16, 4>;

// Strips narrower than this would save less than the blocks that straddle two of them cost.
constexpr int64_t kMinStripWidth = 4;

bool multiple_of(int64_t bytes, const void* pointer, const Strides& s, int element) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && s.n * element % bytes == 0 &&
         s.h * element % bytes == 0 && s.w * element % bytes == 0;
}

// The columns are cut where the left taps begin to hit the map and where the right taps cease to.
template <typename T>
void number_pixels(DenseParams<T>& p, const Shape& shape) {
  const int64_t width = shape.out_width;
  int64_t left = std::clamp<int64_t>(shape.pad_w, 0, width);
  int64_t right = std::clamp<int64_t>(shape.width + shape.pad_w - 2 * shape.dilation_w, 0, width);
  if (left > right) std::swap(left, right);
  if (left < kMinStripWidth) left = 0;
  if (width - right < kMinStripWidth) right = width;
  if (right - left < kMinStripWidth) right = left;
  const int64_t cuts[4] = {0, left, right, width};
  for (int s = 0; s < 4; ++s) {
    p.cut[s] = static_cast<int>(cuts[s]);
    p.first[s] = static_cast<uint32_t>(shape.batch * shape.out_height * cuts[s]);
  }
}

// Into how many parts C_in is split: enough for kBlocksPerProcessor blocks on each multiprocessor, of at least
// kMinSplitChunks iterations a tap each.
constexpr int kBlocksPerProcessor = 4;
constexpr int kMinSplitChunks = 4;

struct Plan {
  enum Tile { k128x128, k128x64, k64x64, k128x32, k128x16 } tile;
  int splits, channels_per_split;
};

// As narrow a tile as the output channels allow; among wide ones the largest that gives every multiprocessor a block. If
// none does, C_in is split.
Plan make_plan(const Shape& s, int element, int access, bool may_split) {
  const int64_t pixels = s.batch * s.out_height * s.out_width, processors = multiprocessor_count();
  auto tiles = [&](int64_t tile_pixels, int64_t tile_channels) {
    return (pixels + tile_pixels - 1) / tile_pixels * ((s.out_channels + tile_channels - 1) / tile_channels);
  };
  const int channels = static_cast<int>(s.channels), chunk = 64 / element;
  Plan plan{Plan::k64x64, 1, channels};
  if (access == 16 && s.out_channels <= 16) {
    plan.tile = Plan::k128x16;
  } else if (access == 16 && s.out_channels <= 32) {
    plan.tile = Plan::k128x32;
  } else if (access == 16 && s.out_channels > 64 && tiles(128, 128) >= processors) {
    plan.tile = Plan::k128x128;
  } else if (access == 16 && tiles(128, 64) >= processors) {
    plan.tile = Plan::k128x64;
  } else if (may_split && tiles(64, 64) < processors) {
    const int64_t wanted = processors * kBlocksPerProcessor / std::max<int64_t>(tiles(64, 64), 1);
    const int chunks = (channels + chunk - 1) / chunk;
    const int splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max(chunks / kMinSplitChunks, 1)));
    if (splits > 1) {
      plan.channels_per_split = (chunks + splits - 1) / splits * chunk;
      plan.splits = (channels + plan.channels_per_split - 1) / plan.channels_per_split;
    }
  }
  return plan;
}

// The widest copies from global to shared memory, in bytes, that the input and the weight allow.
int access_bytes(const Forward& args) {
  const int element = element_size(args.dtype);
  for (int bytes : {16, 4}) {
    if (multiple_of(bytes, args.input, args.input_strides, element) && multiple_of(bytes, args.weight, {}, element) &&
        args.shape.channels * element % bytes == 0) {
      return bytes;
    }
  }
  return 2;
}

template <typename T, typename Tile, int kAccess>
cudaError_t launch(const DenseParams<T>& p, const Plan& plan, cudaStream_t stream) {
  const int64_t blocks = (static_cast<int64_t>(p.first[3]) + Tile::kPixels - 1) / Tile::kPixels *
                         ((p.out_channels + Tile::kChannels - 1) / Tile::kChannels);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), plan.splits);
  atrous_conv2d_dense_kernel<T, Tile, kAccess><<<grid, Tile::kThreads, 0, stream>>>(p);
  if (plan.splits > 1) {
    const uint32_t outputs = p.first[3] * p.out_channels;
    atrous_conv2d_dense_finish_kernel<T>
        <<<(outputs + kFinishThreads - 1) / kFinishThreads, kFinishThreads, 0, stream>>>(p, plan.splits);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_typed(const Forward& args, int64_t first_image, int64_t images, void* workspace,
                         cudaStream_t stream) {
  Shape shape = args.shape;
  shape.batch = images;
  const Strides &in = args.input_strides, &out = args.output_strides;
  DenseParams<T> p{};
  p.input = static_cast<const T*>(args.input) + first_image * in.n;
  p.weight = static_cast<const T*>(args.weight);
  p.bias = static_cast<const T*>(args.epilogue.bias);
  p.scale = static_cast<const T*>(args.epilogue.scale);
  p.shift = static_cast<const T*>(args.epilogue.shift);
  p.output = static_cast<T*>(args.output) + first_image * out.n;
  p.relu = args.epilogue.relu;
  p.vector_stores = out.c == 1 && multiple_of(16, p.output, out, sizeof(T));
  p.channels = static_cast<int>(shape.channels);
  p.out_channels = static_cast<int>(shape.out_channels);
  p.height = static_cast<int>(shape.height);
  p.width = static_cast<int>(shape.width);
  p.out_height = static_cast<int>(shape.out_height);
  p.pad_h = shape.pad_h;
  p.pad_w = shape.pad_w;
  p.dilation_h = shape.dilation_h;
  p.dilation_w = shape.dilation_w;
  p.in_n = in.n;
  p.in_h = in.h;
  p.in_w = in.w;
  p.out_n = out.n;
  p.out_c = out.c;
  p.out_h = out.h;
  p.out_w = out.w;
  for (int tap = 0; tap < 9; ++tap) {
    p.tap_offset[tap] = tap / 3 * shape.dilation_h * in.h + tap % 3 * shape.dilation_w * in.w;
  }
  number_pixels(p, shape);
  const int access = access_bytes(args);
  const Plan plan = make_plan(shape, sizeof(T), access, workspace != nullptr);
  p.partial = plan.splits > 1 ? static_cast<float*>(workspace) : nullptr;
  p.channels_per_split = plan.channels_per_split;

  if constexpr (sizeof(T) == 2) {
    if (access == 2) return launch<T, Tile64x64, 2>(p, plan, stream);
  }
  if (access == 4) return launch<T, Tile64x64, 4>(p, plan, stream);
  switch (plan.tile) {
    case Plan::k128x128: return launch<T, Tile128x128, 16>(p, plan, stream);
    case Plan::k128x64: return launch<T, Tile128x64, 16>(p, plan, stream);
    case Plan::k64x64: return launch<T, Tile64x64, 16>(p, plan, stream);
    case Plan::k128x32: return launch<T, Tile128x32, 16>(p, plan, stream);
    case Plan::k128x16: return launch<T, Tile128x16, 16>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

// The kernel numbers pixels in 32 bits: larger batches go in parts of so many images.
int64_t images_at_once(const Shape& s) { return INT32_MAX / std::max<int64_t>(s.out_height * s.out_width, 1); }

}  // namespace

int64_t dense_tensor_cores_workspace(const Forward& args) {
  const Shape& s = args.shape;
  if (s.batch > images_at_once(s)) return 0;
  const Plan plan = make_plan(s, element_size(args.dtype), access_bytes(args), true);
  if (plan.splits == 1) return 0;
  return plan.splits * s.batch * s.out_height * s.out_width * s.out_channels * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_dense_tensor_cores(const Forward& args, void* workspace, cudaStream_t stream) {
  const Shape& s = args.shape;
  if (s.batch * s.out_height * s.out_width * s.out_channels == 0) return cudaSuccess;
  const int64_t images = images_at_once(s);
  for (int64_t first = 0; first < s.batch; first += images) {
    const int64_t count = std::min(images, s.batch - first);
    cudaError_t error = cudaErrorInvalidValue;
    if (args.dtype == DType::kHalf) error = launch_typed<__half>(args, first, count, workspace, stream);
    if (args.dtype == DType::kBFloat16) error = launch_typed<__nv_bfloat16>(args, first, count, workspace, stream);
    if (args.dtype == DType::kFloat) error = launch_typed<float>(args, first, count, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace pyseg::atrous
