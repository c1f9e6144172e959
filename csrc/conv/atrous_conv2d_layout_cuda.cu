// Launchers of atrous_conv2d's rearrangements.
#include "conv/atrous_conv2d_cuda.h"
#include "conv/atrous_conv2d_layout_cuda.cuh"

namespace pyseg::atrous {
namespace {

// Calls launch(Bits{}) with the unsigned integer of the element's size.
template <typename Launch>
cudaError_t by_element_size(DType dtype, Launch launch) {
  switch (element_size(dtype)) {
    case 2: return launch(uint16_t{});
    case 4: return launch(uint32_t{});
    default: return launch(uint64_t{});
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

cudaError_t launch_copy_map(const void* from, Strides from_strides, void* to, Strides to_strides, int64_t batch,
                            int64_t channels, int64_t height, int64_t width, DType dtype, cudaStream_t stream) {
  const int64_t blocks = batch * ceil_div(channels, kMapTile) * ceil_div(height * width, kMapTile);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || channels > INT32_MAX - kMapTile || height * width > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  return by_element_size(dtype, [&](auto bits) {
    using Bits = decltype(bits);
    copy_map_kernel<<<static_cast<unsigned>(blocks), dim3(kMapTile, kMapTileRows), 0, stream>>>(
        static_cast<const Bits*>(from), from_strides, static_cast<Bits*>(to), to_strides, static_cast<int>(channels),
        static_cast<uint32_t>(height * width), static_cast<uint32_t>(width));
    return cudaGetLastError();
  });
}

cudaError_t launch_pack_weight(const void* weight, WeightStrides strides, int64_t out_channels, int64_t in_channels,
                               DType dtype, bool for_input_gradient, void* packed, cudaStream_t stream) {
  if (out_channels * in_channels == 0) return cudaSuccess;
  return by_element_size(dtype, [&](auto bits) {
    using Bits = decltype(bits);
    const int64_t tile = kWeightTile<Bits>;
    const int64_t blocks = ceil_div(out_channels, tile) * ceil_div(in_channels, tile);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    auto kernel = for_input_gradient ? pack_weight_kernel<Bits, true> : pack_weight_kernel<Bits, false>;
    kernel<<<static_cast<unsigned>(blocks), kPackThreads, 0, stream>>>(
        static_cast<const Bits*>(weight), strides, out_channels, in_channels, static_cast<Bits*>(packed));
    return cudaGetLastError();
  });
}

}  // namespace pyseg::atrous
