// Launch of the dense convolution without tensor cores.
#include "atrous_conv2d_plain_cuda.cuh"

#include <algorithm>

#include "atrous_conv2d_launch_cuda.h"

namespace pyseg::atrous {
namespace {

bool fits(const Shape& s) { return sizes_fit(s) && s.out_channels <= kMostTiles * kPlainTile; }

template <typename T>
cudaError_t dense_plain(const Forward& f, cudaStream_t stream) {
  const Shape& s = f.shape;
  PlainArgs<T> args;
  args.input = static_cast<const T*>(f.input);
  args.weight = static_cast<const T*>(f.weight);
  args.output = static_cast<T*>(f.output);
  args.bias = static_cast<const T*>(f.epilogue.bias);
  args.scale = static_cast<const T*>(f.epilogue.scale);
  args.shift = static_cast<const T*>(f.epilogue.shift);
  args.input_strides = f.input_strides;
  args.output_strides = f.output_strides;
  args.in_channels = static_cast<int>(s.channels);
  args.out_channels = static_cast<int>(s.out_channels);
  args.height = static_cast<int>(s.height);
  args.width = static_cast<int>(s.width);
  args.out_height = static_cast<int>(s.out_height);
  args.out_width = static_cast<int>(s.out_width);
  args.pad_h = static_cast<int>(s.pad_h);
  args.pad_w = static_cast<int>(s.pad_w);
  args.dilation_h = static_cast<int>(s.dilation_h);
  args.dilation_w = static_cast<int>(s.dilation_w);
  args.pixels = static_cast<int>(s.batch * s.out_height * s.out_width);
  args.relu = f.epilogue.relu;
  constexpr int kBytes = std::min<int>(4 * sizeof(T), kVectorBytes);  // of one access of load_quad
  args.input_aligned =
      s.channels % 4 == 0 && pixels_aligned(f.input, f.input_strides, s.batch, s.height, s.width, 4, kBytes);
  args.weight_aligned = s.channels % 4 == 0 && is_aligned(f.weight, kBytes);
  args.output_aligned = s.out_channels % 4 == 0 &&
                        pixels_aligned(f.output, f.output_strides, s.batch, s.out_height, s.out_width, 4, kBytes);

  const dim3 grid(static_cast<unsigned>((args.pixels + kPlainTile - 1) / kPlainTile),
                  static_cast<unsigned>((s.out_channels + kPlainTile - 1) / kPlainTile));
  if (f.output_strides.c == 1 && s.out_channels > 1) {
    atrous_conv2d_plain<T, false><<<grid, kPlainThreads, 0, stream>>>(args);
  } else {
    atrous_conv2d_plain<T, true><<<grid, kPlainThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_dense_plain(const Forward& args, cudaStream_t stream) {
  const Shape& s = args.shape;
  if (s.batch == 0 || s.out_channels == 0 || s.out_height <= 0 || s.out_width <= 0) return cudaSuccess;
  if (!fits(s)) return cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::kFloat: return dense_plain<float>(args, stream);
    case DType::kDouble: return dense_plain<double>(args, stream);
    case DType::kHalf: return dense_plain<__half>(args, stream);
    case DType::kBFloat16: return dense_plain<__nv_bfloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyseg::atrous
