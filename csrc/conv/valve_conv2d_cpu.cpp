// valve_conv2d, region_gate and their gradients on the CPU: layouts, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "conv/valve_conv2d_check.h"
#include "conv/valve_conv2d_cpu_kernel.h"

namespace pyseg::valve {
namespace {

// Sums over pixels are cut into this many, added up in order, for any number of threads.
constexpr int64_t kMostParts = 32;
constexpr int64_t kLeastPixels = 1024;  // of a part

const ValveKernelTable& kernels() { return PYSEG_CPU_TABLE(valve_kernels); }

double outputs_of(const Maps& m) { return double(m.images) * double(m.channels) * double(m.height) * double(m.width); }

void run_forward(Call& call, const Tensor& output) {
  call.maps.output = lines_of(output, call.maps.last);
  const Workers workers = workers_for((double(columns_of(call.maps)) + 4.) * outputs_of(call.maps));
  const Workspace scratch(output, kernels().scratch(call.type, call.maps, false, workers.count));
  kernels().forward(call.type, call.maps, scratch.data, workers);
}

// Sums [columns, K], or none.
Tensor run_backward(Call& call, const Tensor& grad, bool need_sums) {
  Maps& m = call.maps;
  m.parts = std::clamp<int64_t>(m.images * m.height * m.width / kLeastPixels, 1, kMostParts);
  const Workers workers = workers_for((3. * double(columns_of(m)) + 8.) * outputs_of(m));
  const Tensor sums =
      torch::stable::new_empty(grad, {need_sums ? m.parts : 0, columns_of(m), m.channels}, computed_in(call.type));
  if (need_sums) m.sums = sums.data_ptr();
  const Workspace scratch(grad, kernels().scratch(call.type, m, true, workers.count));
  kernels().backward(call.type, m, scratch.data, workers);
  return need_sums ? torch::stable::select(sums, 0, 0) : sums;
}

Tensor region_gate(Tensor features, Tensor region, Tensor weight, OptTensor bias, Ints stride, Ints padding,
                   Ints dilation, bool additive, bool relu) {
  Call call = gate_call(kGate, features, region, weight, bias, {stride, padding, dilation}, additive, relu);
  const Tensor output = new_map(features, size_of(call.maps), call.maps.last);
  if (output.numel() > 0) run_forward(call, output);
  return output;
}

void region_gate_(Tensor features, Tensor region, Tensor weight, OptTensor bias, Ints stride, Ints padding,
                  Ints dilation, bool additive, bool relu) {
  Call call = gate_call(kGateInPlace, features, region, weight, bias, {stride, padding, dilation}, additive, relu);
  check_in_place(kGateInPlace, features, region, weight, bias, call.maps.last);
  if (features.numel() > 0) run_forward(call, features);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> region_gate_backward(Tensor grad, Tensor features, Tensor region,
                                                                Tensor weight, OptTensor bias, Ints stride,
                                                                Ints padding, Ints dilation, bool additive, bool relu,
                                                                bool need_features, bool need_region,
                                                                bool need_weight) {
  const char* op = kGateBackward;
  Call call = gate_call(op, features, region, weight, bias, {stride, padding, dilation}, additive, relu);
  GateGradients grads(op, grad, features, region, weight, need_features, need_region, need_weight, &call);
  if (!grads.wanted()) return grads.all();
  Maps& m = call.maps;
  const Tensor scattered = torch::stable::new_empty(
      grad, {need_region ? m.images : 0, m.region.taps, m.height * m.width}, computed_in(call.type));
  if (need_region) m.scattered = scattered.data_ptr();
  const Tensor sums = run_backward(call, grad, need_weight);
  if (need_region) {
    const Workers workers = workers_for(double(scattered.numel()));
    const Workspace scratch(grad, workers.count * m.region.width * int64_t(sizeof(double)));
    kernels().gather(call.type, m, grads.region.data_ptr(), scratch.data, workers);
  }
  if (need_weight) std::tie(grads.weight, grads.bias) = gradients_of(sums, 0, weight);
  return grads.all();
}

Tensor valve_conv2d(Tensor input, Tensor region, Tensor weight, OptTensor bias, Tensor valve_weight,
                    OptTensor valve_bias, Ints stride, Ints padding, Ints dilation, Ints valve_stride,
                    Ints valve_padding, Ints valve_dilation, bool additive, bool relu) {
  Call call = valve_call(kValve, input, region, weight, bias, valve_weight, valve_bias, {stride, padding, dilation},
                         {valve_stride, valve_padding, valve_dilation}, additive, relu);
  const Tensor output = new_map(input, size_of(call.maps), call.maps.last);
  if (output.numel() > 0) run_forward(call, output);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> valve_conv2d_backward(Tensor grad, Tensor input, Tensor region,
                                                                 Tensor weight, OptTensor bias, Tensor valve_weight,
                                                                 OptTensor valve_bias, Ints stride, Ints padding,
                                                                 Ints dilation, Ints valve_stride, Ints valve_padding,
                                                                 Ints valve_dilation, bool additive, bool relu) {
  const char* op = kValveBackward;
  Call call = valve_call(op, input, region, weight, bias, valve_weight, valve_bias, {stride, padding, dilation},
                         {valve_stride, valve_padding, valve_dilation}, additive, relu);
  take_grad(op, grad, input, &call);
  const Tensor sums = grad.numel() > 0 ? run_backward(call, grad, true)
                                       : torch::stable::new_zeros(grad, {columns_of(call.maps), call.maps.channels});
  return valve_gradients(sums, weight, valve_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("region_gate", TORCH_BOX(&region_gate));
  m.impl("region_gate_", TORCH_BOX(&region_gate_));
  m.impl("_region_gate_backward", TORCH_BOX(&region_gate_backward));
  m.impl("valve_conv2d", TORCH_BOX(&valve_conv2d));
  m.impl("_valve_conv2d_backward", TORCH_BOX(&valve_conv2d_backward));
}

}  // namespace pyseg::valve
