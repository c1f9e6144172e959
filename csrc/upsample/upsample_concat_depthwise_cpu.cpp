// upsample_concat_depthwise and its gradient on the CPU: layouts, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/cpu_workspace.h"
#include "upsample/upsample_cpu_call.h"

namespace pyseg::upsample {
namespace {

Workers workers_of(const UpsampleDepthwiseArgs& d, double passes) {
  const UpsampleArgs& a = d.upsample;
  return workers_for(passes * 9. * double(d.rates) * double(a.images) * double(a.channels) * double(a.height) *
                     double(a.width));
}

Tensor upsample_concat_depthwise(Tensors inputs, Tensor weight, std::optional<Tensor> scale,
                                 std::optional<Tensor> shift, Ints size, Ints dilations, bool align_corners) {
  const Element type = check_inputs(kDepthwise, "inputs", inputs);
  check_size(kDepthwise, size);
  check_dilations(kDepthwise, dilations);
  const std::vector<Ints> sizes = sizes_of_each(inputs);
  CpuCall call(type, sizes, size[0], size[1], any_channels_last(inputs), align_corners, {});
  UpsampleDepthwiseArgs d{};
  const int64_t rates = int64_t(dilations.size()), channels = call.args.channels;
  const auto parameter = [&](const char* name, const Tensor& t, const Ints& expected) {
    return check_parameter(kDepthwise, name, t, expected, inputs[0], type);
  };
  const Tensor filters = parameter("weight", weight, {rates, channels, 3, 3});
  d.weight = filters.data_ptr();
  std::optional<Tensor> scales, shifts;
  if (scale) d.scale = scales.emplace(parameter("scale", *scale, {rates, channels})).data_ptr();
  if (shift) d.shift = shifts.emplace(parameter("shift", *shift, {rates, channels})).data_ptr();

  UpsampleArgs& a = call.args;
  const Tensor output = new_map(inputs[0], {rates * a.images, channels, a.height, a.width}, a.last);
  const Tensor result = torch::stable::view(output, {rates, a.images, channels, a.height, a.width});
  if (output.numel() == 0) return result;
  call.set_inputs(inputs);
  a.output = output.data_ptr();
  d.upsample = a;
  d.rates = rates;
  d.dilation = dilations.data();
  const Workers workers = workers_of(d, 1);
  const Workspace scratch(output, upsample_kernels().depthwise_scratch(d, workers.count));
  upsample_kernels().depthwise(d, scratch.data, workers);
  return result;
}

std::tuple<Tensors, Tensor, Tensor> upsample_concat_depthwise_backward(Tensor grad, Tensors inputs, Tensor weight,
                                                                       Ints dilations, bool align_corners,
                                                                       bool need_inputs, bool need_weight) {
  const DepthwiseBackwardArguments checked = check_depthwise_backward(grad, inputs, weight, dilations);
  const int64_t rates = int64_t(dilations.size());
  CpuCall call(checked.type, checked.sizes, grad.size(3), grad.size(4), any_channels_last(inputs), align_corners, {});
  UpsampleArgs& a = call.args;
  Tensors grads = need_inputs ? call.new_gradients(checked.sizes, grad) : empty_like_each(inputs);
  Tensor of_weight = torch::stable::new_zeros(checked.weight, need_weight ? Ints{rates, a.channels, 3, 3} : Ints{0});
  Tensor of_shift = torch::stable::new_zeros(checked.weight, need_weight ? Ints{rates, a.channels} : Ints{0});
  if (grad.numel() == 0 || !(need_inputs || need_weight)) return {grads, of_weight, of_shift};
  const Tensor from = dense_rates(grad, a.last);
  a.grad = from.data_ptr();
  call.set_inputs(inputs);
  UpsampleDepthwiseArgs d{};
  d.upsample = a;
  d.rates = rates;
  d.dilation = dilations.data();
  d.weight = checked.weight.data_ptr();
  const Workers workers = workers_of(d, 2);
  const int64_t bytes = upsample_kernels().depthwise_backward_scratch(d, workers.count);
  const Workspace scratch(grad, bytes);
  Tensor sums = torch::stable::new_empty(checked.weight, {need_weight ? a.images : 0, rates, a.channels, 10});
  if (need_weight) d.sums = sums.data_ptr();
  upsample_kernels().depthwise_backward(d, scratch.data, workers);
  if (need_weight) {
    const Tensor total = torch::stable::select(sums, 0, 0);
    const Tensor taps = torch::stable::narrow(const_cast<Tensor&>(total), 2, 0, 9);
    torch::stable::copy_(of_weight, torch::stable::reshape(taps, {rates, a.channels, 3, 3}));
    torch::stable::copy_(of_shift, torch::stable::select(total, 2, 9));
  }
  return {grads, of_weight, of_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("upsample_concat_depthwise", TORCH_BOX(&upsample_concat_depthwise));
  m.impl("_upsample_concat_depthwise_backward", TORCH_BOX(&upsample_concat_depthwise_backward));
}

}  // namespace pyseg::upsample
