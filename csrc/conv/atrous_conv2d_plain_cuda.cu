// Launch of the dense convolution without tensor cores.
#include "atrous_conv2d_plain_cuda.cuh"

namespace pyseg::atrous {
namespace {

constexpr int64_t kMostSize = int64_t{1} << 28;  // sums of a few sizes, paddings and dilations fit an int
constexpr int64_t kMostPixels = int64_t{1} << 30;
constexpr int64_t kMostTiles = 65535;  // grid y

bool fits(const Shape& s) {
  for (int64_t size : {s.batch, s.channels, s.height, s.width, s.out_channels, s.out_height, s.out_width, s.dilation_h,
                       s.dilation_w, s.pad_h < 0 ? -s.pad_h : s.pad_h, s.pad_w < 0 ? -s.pad_w : s.pad_w}) {
    if (size > kMostSize) return false;
  }
  return s.out_height * s.out_width <= kMostPixels && s.batch * s.out_height * s.out_width <= kMostPixels &&
         s.out_channels <= kMostTiles * kPlainTile;
}

template <typename T>
bool aligned(const void* data) {
  constexpr uintptr_t kBytes = sizeof(T) == 2 ? 8 : kVectorBytes;  // what load_quad reads at once
  return reinterpret_cast<uintptr_t>(data) % kBytes == 0;
}

template <typename T>
bool map_aligned(const void* data, const Strides& strides, int64_t channels, int64_t batch, int64_t height,
                 int64_t width) {
  return channels % 4 == 0 && aligned<T>(data) && (batch <= 1 || strides.n % 4 == 0) &&
         (height <= 1 || strides.h % 4 == 0) && (width <= 1 || strides.w % 4 == 0);
}

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
  args.input_aligned = map_aligned<T>(f.input, f.input_strides, s.channels, s.batch, s.height, s.width);
  args.weight_aligned = s.channels % 4 == 0 && aligned<T>(f.weight);
  args.output_aligned = map_aligned<T>(f.output, f.output_strides, s.out_channels, s.batch, s.out_height, s.out_width);

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
