// valve_conv2d, region_gate and their gradients on CUDA devices: checks, buffers, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "common/cuda_launches.h"
#include "conv/valve_conv2d_check.h"
#include "conv/valve_conv2d_cuda.cuh"

namespace pyseg::valve {
namespace {

constexpr int64_t kMostParts = 512;  // blocks that share the sums of a tile of channels: several for a multiprocessor

// Calls f.template operator()<T>().
template <typename F>
void with_element(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f.template operator()<float>();
    case Element::kDouble: return f.template operator()<double>();
    case Element::kHalf: return f.template operator()<__half>();
    default: return f.template operator()<__nv_bfloat16>();
  }
}

unsigned grid_size(const char* op, int64_t blocks) {
  PYSEG_CHECK(blocks <= INT32_MAX, op, ": maps must need fewer than 2^31 blocks of threads on CUDA devices, got ",
              blocks);
  return unsigned(blocks);
}

template <typename T>
int64_t channel_tiles_of(const Maps& m) {
  return tiles_of(m.channels, m.last ? Tile<T>::kN : Tile<T>::kM);
}
template <typename T>
int64_t pixel_tiles_of(const Maps& m) {
  return m.images * tiles_of(m.height * m.width, m.last ? Tile<T>::kM : Tile<T>::kN);
}

void run_forward(const char* op, Call& call, const Tensor& output) {
  Maps& m = call.maps;
  m.output = lines_of(output, m.last);
  const CudaLaunches launches(op, output);
  with_element(call.type, [&]<typename T>() {
    const unsigned blocks = grid_size(op, channel_tiles_of<T>(m) * pixel_tiles_of<T>(m));
    valve_forward<T><<<blocks, kThreads, shared_bytes<T>(columns_of(m), false), launches.stream()>>>(m);
    launches.check(cudaGetLastError());
  });
}

// Sums [columns, K], or none; of_region (may be null): the region's gradient.
Tensor run_backward(const char* op, Call& call, const Tensor& grad, bool need_sums, Tensor* of_region) {
  Maps& m = call.maps;
  const CudaLaunches launches(op, grad);
  const int64_t columns = columns_of(m);
  const Tensor totals = torch::stable::new_empty(grad, {need_sums ? columns : 0, m.channels}, computed_in(call.type));
  with_element(call.type, [&]<typename T>() {
    using A = Accumulator<T>;
    const int64_t channel_tiles = channel_tiles_of<T>(m);
    m.parts = std::min(kMostParts, pixel_tiles_of<T>(m));
    const int64_t chunks = need_sums ? tiles_of(columns, Tile<T>::kChunk) : 1, size = columns * m.channels;
    const Tensor sums = torch::stable::new_empty(totals, {need_sums ? m.parts : 0, size});
    if (need_sums) m.sums = sums.data_ptr();
    const Tensor scattered =
        torch::stable::new_empty(totals, {of_region ? channel_tiles : 0, m.images, m.region.taps, m.height * m.width});
    if (of_region) m.scattered = scattered.data_ptr();
    const dim3 grid(grid_size(op, channel_tiles * m.parts), unsigned(chunks));
    valve_backward<T><<<grid, kThreads, shared_bytes<T>(columns, true), launches.stream()>>>(m);
    launches.check(cudaGetLastError());
    if (need_sums) {
      const unsigned blocks = grid_size(op, tiles_of(size, kThreads));
      valve_add_sums<A><<<blocks, kThreads, 0, launches.stream()>>>(static_cast<const A*>(m.sums), m.parts, size,
                                                                    static_cast<A*>(totals.data_ptr()));
      launches.check(cudaGetLastError());
    }
    if (of_region && of_region->numel() > 0) {
      const unsigned blocks = grid_size(op, tiles_of(of_region->numel(), kThreads));
      valve_gather_region<T>
          <<<blocks, kThreads, 0, launches.stream()>>>(m, channel_tiles, static_cast<T*>(of_region->data_ptr()));
      launches.check(cudaGetLastError());
    }
  });
  return totals;
}

Tensor region_gate(Tensor features, Tensor region, Tensor weight, OptTensor bias, Ints stride, Ints padding,
                   Ints dilation, bool additive, bool relu) {
  Call call = gate_call(kGate, features, region, weight, bias, {stride, padding, dilation}, additive, relu);
  const Tensor output = new_map(features, size_of(call.maps), call.maps.last);
  if (output.numel() > 0) run_forward(kGate, call, output);
  return output;
}

void region_gate_(Tensor features, Tensor region, Tensor weight, OptTensor bias, Ints stride, Ints padding,
                  Ints dilation, bool additive, bool relu) {
  Call call = gate_call(kGateInPlace, features, region, weight, bias, {stride, padding, dilation}, additive, relu);
  check_in_place(kGateInPlace, features, region, weight, bias, call.maps.last);
  if (features.numel() > 0) run_forward(kGateInPlace, call, features);
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
  const Tensor sums = run_backward(op, call, grad, need_weight, need_region ? &grads.region : nullptr);
  if (need_weight) std::tie(grads.weight, grads.bias) = gradients_of(sums, 0, weight);
  return grads.all();
}

Tensor valve_conv2d(Tensor input, Tensor region, Tensor weight, OptTensor bias, Tensor valve_weight,
                    OptTensor valve_bias, Ints stride, Ints padding, Ints dilation, Ints valve_stride,
                    Ints valve_padding, Ints valve_dilation, bool additive, bool relu) {
  Call call = valve_call(kValve, input, region, weight, bias, valve_weight, valve_bias, {stride, padding, dilation},
                         {valve_stride, valve_padding, valve_dilation}, additive, relu);
  const Tensor output = new_map(input, size_of(call.maps), call.maps.last);
  if (output.numel() > 0) run_forward(kValve, call, output);
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
  const Tensor sums = grad.numel() > 0 ? run_backward(op, call, grad, true, nullptr)
                                       : torch::stable::new_zeros(grad, {columns_of(call.maps), call.maps.channels});
  return valve_gradients(sums, weight, valve_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("region_gate", TORCH_BOX(&region_gate));
  m.impl("region_gate_", TORCH_BOX(&region_gate_));
  m.impl("_region_gate_backward", TORCH_BOX(&region_gate_backward));
  m.impl("valve_conv2d", TORCH_BOX(&valve_conv2d));
  m.impl("_valve_conv2d_backward", TORCH_BOX(&valve_conv2d_backward));
}

}  // namespace pyseg::valve
