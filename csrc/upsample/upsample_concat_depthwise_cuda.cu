// upsample_concat_depthwise and its gradient on CUDA devices: checks, buffers, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cuda_device.h"
#include "upsample/upsample_concat_depthwise_cuda.cuh"
#include "upsample/upsample_cuda_call.h"

namespace pyseg::upsample {
namespace {

const dim3 kThreads(kLanes, kWarps);

// Shared memory of a block: what all devices of the generation have, and from sm_80 on two blocks find room in.
constexpr int kSharedBytes75 = 64 * 1024, kSharedBytes80 = 80 * 1024;

// Calls f.template operator()<T, channels_last>().
template <typename F>
void with_layout(Element type, bool last, const F& f) {
  with_element(type, [&]<typename T>() {
    if (last) {
      f.template operator()<T, true>();
    } else {
      f.template operator()<T, false>();
    }
  });
}

CudaDepthwiseArgs depthwise_args(const CudaCall& call, const Ints& dilations) {
  CudaDepthwiseArgs d{};
  d.upsample = call.args;
  d.rates = int(dilations.size());
  for (int r = 0; r < d.rates; ++r) {
    d.row_dilation[r] = int(std::min(dilations[r], call.args.height));
    d.column_dilation[r] = int(std::min(dilations[r], call.args.width));
    d.row_reach = std::max(d.row_reach, d.row_dilation[r]);
    d.column_reach = std::max(d.column_reach, d.column_dilation[r]);
  }
  return d;
}

template <typename T, bool kLast>
void number_blocks(CudaDepthwiseArgs& d) {
  for (int l = 0; l < d.upsample.maps; ++l) {
    d.upsample.map[l].first_block = d.blocks;
    d.blocks += tiles_of(d.upsample.map[l].channels, Tile<T, kLast>::kChannels);
  }
}

// Launches `shared` where the tile with its surroundings fits into shared memory, otherwise `direct`.
template <typename T, bool kLast, typename Kernel>
void launch_tiles(const char* op, const CudaDepthwiseArgs& d, int64_t tiles_x, Kernel shared, Kernel direct,
                  const CudaLaunches& launches) {
  using Tiles = Tile<T, kLast>;
  const double bytes =
      (Tiles::kH + 2. * d.row_reach) * (Tiles::kW + 2. * d.column_reach) * Tiles::kChannels * sizeof(Accumulator<T>);
  cudaFuncAttributes attributes{};
  launches.check(cudaFuncGetAttributes(&attributes, shared));
  const int most = compute_capability() < 80 ? kSharedBytes75 : kSharedBytes80;
  const int own = int(attributes.sharedSizeBytes);
  const bool fits = bytes + own <= most;
  const Kernel kernel = fits ? shared : direct;
  const int64_t blocks = tiles_x * tiles_of(d.upsample.height, Tiles::kH) * d.blocks * d.upsample.images;
  if (fits)  // more than the 48 KB that need no leave
    launches.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - own));
  kernel<<<grid_size(op, blocks), kThreads, fits ? size_t(bytes) : 0, launches.stream()>>>(d);
  launches.check(cudaGetLastError());
}

Tensor upsample_concat_depthwise(Tensors inputs, Tensor weight, std::optional<Tensor> scale,
                                 std::optional<Tensor> shift, Ints size, Ints dilations, bool align_corners) {
  const char* op = kDepthwise;
  const Element type = check_inputs(op, "inputs", inputs);
  check_size(op, size);
  check_dilations(op, dilations);
  const CudaLaunches launches(op, inputs[0]);
  const std::vector<Ints> sizes = sizes_of_each(inputs);
  CudaCall call(op, inputs[0], type, sizes, size[0], size[1], any_channels_last(inputs), align_corners, {});
  const int64_t rates = int64_t(dilations.size()), channels = call.args.channels;
  const auto parameter = [&](const char* name, const Tensor& t, const Ints& expected) {
    return check_parameter(op, name, t, expected, inputs[0], type);
  };
  const Tensor filters = parameter("weight", weight, {rates, channels, 3, 3});
  std::optional<Tensor> scales, shifts;
  if (scale) scales = parameter("scale", *scale, {rates, channels});
  if (shift) shifts = parameter("shift", *shift, {rates, channels});
  const Tensor output = new_map(inputs[0], {rates * call.args.images, channels, size[0], size[1]}, call.last);
  const Tensor result = torch::stable::view(output, {rates, call.args.images, channels, size[0], size[1]});
  if (output.numel() == 0) return result;
  call.set_inputs(inputs);
  call.args.output = output.data_ptr();
  CudaDepthwiseArgs d = depthwise_args(call, dilations);
  d.weight = filters.data_ptr();
  d.scale = scales ? scales->data_ptr() : nullptr;
  d.shift = shifts ? shifts->data_ptr() : nullptr;
  call.launch_taps(launches);
  with_layout(type, call.last, [&]<typename T, bool kLast>() {
    number_blocks<T, kLast>(d);
    launch_tiles<T, kLast>(op, d, tiles_of(d.upsample.width, Tile<T, kLast>::kW),
                           upsample_depthwise_forward<T, kLast, true>, upsample_depthwise_forward<T, kLast, false>,
                           launches);
  });
  return result;
}

std::tuple<Tensors, Tensor, Tensor> upsample_concat_depthwise_backward(Tensor grad, Tensors inputs, Tensor weight,
                                                                       Ints dilations, bool align_corners,
                                                                       bool need_inputs, bool need_weight) {
  const char* op = kDepthwiseBackward;
  const DepthwiseBackwardArguments checked = check_depthwise_backward(grad, inputs, weight, dilations);
  const CudaLaunches launches(op, grad);
  const int64_t rates = int64_t(dilations.size()), height = grad.size(3), width = grad.size(4);
  CudaCall call(op, grad, checked.type, checked.sizes, height, width, any_channels_last(inputs), align_corners, {});
  CudaUpsampleArgs& a = call.args;
  Tensors grads = need_inputs ? call.new_gradients(checked.sizes, grad) : empty_like_each(inputs);
  const bool empty = grad.numel() == 0;
  const auto new_sums = [&](const Ints& size) {
    const Ints wanted = need_weight ? size : Ints{0};
    return empty ? torch::stable::new_zeros(checked.weight, wanted) : torch::stable::new_empty(checked.weight, wanted);
  };
  Tensor of_weight = new_sums({rates, a.channels, 3, 3}), of_shift = new_sums({rates, a.channels});
  if (empty || !(need_inputs || need_weight)) return {grads, of_weight, of_shift};
  const Tensor from = dense_rates(grad, call.last);
  a.grad = from.data_ptr();
  call.set_inputs(inputs);
  Tensors kept;
  for (int l = 0; need_inputs && l < a.maps; ++l) {
    CudaMap& map = a.map[l];
    if (map.copied_rows && map.copied_columns) continue;
    map.interpolated_grad =
        kept.emplace_back(new_map(checked.weight, {a.images, map.channels, height, width}, call.last)).data_ptr();
  }
  CudaDepthwiseArgs d = depthwise_args(call, dilations);
  d.weight = checked.weight.data_ptr();
  call.launch_taps(launches);
  with_layout(checked.type, call.last, [&]<typename T, bool kLast>() {
    using A = Accumulator<T>;
    using Tiles = Tile<T, kLast>;
    number_blocks<T, kLast>(d);
    if (need_inputs) {
      launch_tiles<T, kLast>(op, d, tiles_of(width, Tiles::kW), upsample_depthwise_grad_maps<T, kLast, true>,
                             upsample_depthwise_grad_maps<T, kLast, false>, launches);
      for (int l = 0; l < a.maps; ++l)
        if (a.map[l].interpolated_grad)
          call.launch_gather<T>(l, static_cast<const A*>(a.map[l].interpolated_grad), a.map[l].channels, 0, launches);
    }
    if (!need_weight) return;
    const int64_t parts = a.images * tiles_of(height, Tiles::kH), size = rates * (kTaps + 1) * a.channels;
    const Tensor sums = torch::stable::new_empty(checked.weight, {parts, size});
    d.sums = sums.data_ptr();
    launch_tiles<T, kLast>(op, d, 1, upsample_depthwise_grad_weights<T, kLast, true>,
                           upsample_depthwise_grad_weights<T, kLast, false>, launches);
    const unsigned blocks = grid_size(op, (size + kAddThreads - 1) / kAddThreads);
    upsample_depthwise_add_sums<A><<<blocks, kAddThreads, 0, launches.stream()>>>(
        static_cast<const A*>(sums.data_ptr()), parts, rates, a.channels, static_cast<A*>(of_weight.data_ptr()),
        static_cast<A*>(of_shift.data_ptr()));
    launches.check(cudaGetLastError());
  });
  return {grads, of_weight, of_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("upsample_concat_depthwise", TORCH_BOX(&upsample_concat_depthwise));
  m.impl("_upsample_concat_depthwise_backward", TORCH_BOX(&upsample_concat_depthwise_backward));
}

}  // namespace pyseg::upsample
