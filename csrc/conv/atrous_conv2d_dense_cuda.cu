// Dense atrous_conv2d on the tensor cores: which instance of the kernel runs.
#include <algorithm>

#include "common/cuda_device.h"
#include "conv/atrous_conv2d_cuda.h"
#include "conv/atrous_conv2d_dense_cuda.cuh"

namespace pyseg::atrous {
namespace {

using Tile128x128 = DenseTile<128, 128, 64, 32, 3>;
using Tile128x64 = DenseTile<128, 64, 64, 32, 4>;
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

template <typename T, typename Tile, int kAccess>
cudaError_t launch(const DenseParams<T>& p, cudaStream_t stream) {
  const int64_t blocks = (static_cast<int64_t>(p.first[3]) + Tile::kPixels - 1) / Tile::kPixels *
                         ((p.out_channels + Tile::kChannels - 1) / Tile::kChannels);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  atrous_conv2d_dense_kernel<T, Tile, kAccess><<<static_cast<unsigned>(blocks), Tile::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// The tile: as narrow as the output channels; among wide ones the largest that gives every multiprocessor a block.
template <typename T>
cudaError_t launch_tile(const DenseParams<T>& p, cudaStream_t stream) {
  if (p.out_channels <= 16) return launch<T, Tile128x16, 16>(p, stream);
  if (p.out_channels <= 32) return launch<T, Tile128x32, 16>(p, stream);
  const int64_t rows = (static_cast<int64_t>(p.first[3]) + 127) / 128, processors = multiprocessor_count();
  if (p.out_channels > 64 && rows * ((p.out_channels + 127) / 128) >= processors) {
    return launch<T, Tile128x128, 16>(p, stream);
  }
  if (rows * ((p.out_channels + 63) / 64) >= processors) return launch<T, Tile128x64, 16>(p, stream);
  return launch<T, Tile64x64, 16>(p, stream);
}

template <typename T>
cudaError_t launch_typed(const Forward& args, int64_t first_image, int64_t images, cudaStream_t stream) {
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

  // Input that allows no 16-byte copies (channels not a multiple of 8 or 4, odd slices) takes narrower ones.
  auto access = [&](int64_t bytes) {
    return multiple_of(bytes, p.input, in, sizeof(T)) && multiple_of(bytes, p.weight, {}, sizeof(T)) &&
           shape.channels * static_cast<int64_t>(sizeof(T)) % bytes == 0;
  };
  if (access(16)) return launch_tile<T>(p, stream);
  if constexpr (sizeof(T) == 2) {
    if (!access(4)) return launch<T, Tile64x64, 2>(p, stream);
  }
  return launch<T, Tile64x64, 4>(p, stream);
}

}  // namespace

cudaError_t launch_dense_tensor_cores(const Forward& args, cudaStream_t stream) {
  const Shape& s = args.shape;
  const int64_t pixels = s.out_height * s.out_width;
  if (s.batch * pixels * s.out_channels == 0) return cudaSuccess;
  // The kernel numbers pixels in 32 bits: larger batches go in parts.
  constexpr int64_t kMaxPixels = INT32_MAX;
  if (pixels > kMaxPixels) return cudaErrorInvalidValue;
  const int64_t images = kMaxPixels / pixels;
  for (int64_t first = 0; first < s.batch; first += images) {
    const int64_t count = std::min(images, s.batch - first);
    cudaError_t error = cudaErrorInvalidValue;
    if (args.dtype == DType::kHalf) error = launch_typed<__half>(args, first, count, stream);
    if (args.dtype == DType::kBFloat16) error = launch_typed<__nv_bfloat16>(args, first, count, stream);
    if (args.dtype == DType::kFloat) error = launch_typed<float>(args, first, count, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace pyseg::atrous
