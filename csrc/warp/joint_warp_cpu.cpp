// joint_warp and its gradient on the CPU: arguments, workspace, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "warp/joint_warp_check.h"
#include "warp/joint_warp_cpu_kernel.h"

namespace pyseg::warp {
namespace {

const WarpKernelTable& warp_kernels() { return PYSEG_CPU_TABLE(warp_kernels); }

WarpGeometry geometry_of(Element type, int64_t images, const Ints& in, const Ints& out, const Parameters& p,
                         double cubic) {
  WarpGeometry g{};
  g.wide = type == Element::kDouble;
  g.dims = int(in.size());
  g.images = images;
  set_axes(in, g.in);
  set_axes(out, g.out);
  set_axes(Ints(in.size(), 1), g.grid);
  g.affine = p.affine.data_ptr();
  if (p.displacement) {
    set_axes(Ints(p.displacement->sizes().begin() + 2, p.displacement->sizes().end()), g.grid);
    g.displacement = p.displacement->data_ptr();
  }
  g.cubic = cubic;
  return g;
}

WarpMap map_of(const Tensor& input, Element type, const Tensor& output, bool last, Border border, double fill) {
  WarpMap map{};
  map.type = type;
  map.output_type = output.scalar_type() == ScalarType::Byte ? Element::kUInt8
                    : type == Element::kUInt8                ? Element::kFloat
                                                             : type;
  map.channels = input.size(1);
  map.input = input.data_ptr();
  const MapStrides from = strides_of(input);
  map.image_stride = from.image;
  map.channel_stride = from.channel;
  std::copy(from.axis, from.axis + kMostDims, map.stride);
  map.output = output.data_ptr();
  const int64_t pixels = output.numel() / (output.size(0) * output.size(1));
  const DenseStrides to = dense_strides(output.size(1), pixels, last);
  map.output_image_stride = to.image;
  map.output_channel_stride = to.channel;
  map.output_step = to.step;
  map.border = border;
  map.fill = fill;
  return map;
}

std::tuple<Tensor, Tensor> joint_warp(Tensor image, OptionalTensor labels, Tensor affine, OptionalTensor displacement,
                                      OptionalTensor gain, OptionalTensor bias, Ints size, std::string border,
                                      double fill, std::string label_border, int64_t ignore_index, double cubic,
                                      bool float_output) {
  const WarpCall call =
      check_warp(image, labels, affine, displacement, gain, bias, size, border, label_border, ignore_index);
  const auto [output, label_output] = call.new_outputs(image, labels, size, float_output);
  const Parameters& p = call.parameters;
  const int64_t n = image.size(0);

  WarpArgs a{};
  a.geometry = geometry_of(call.type, n, call.in, size, p, cubic);
  WarpMap maps[2];
  a.map = maps;
  a.near = true;
  const auto add_map = [&](const Tensor& from, Element element, const Tensor& to, bool channels_last, Border b,
                           double filled) {
    if (to.numel() == 0) return;
    maps[a.maps++] = map_of(from, element, to, channels_last, b, filled);
    a.near = a.near && reach_of(from, 2) < INT32_MAX;
  };
  add_map(image, call.type, output, is_last(image), call.border, fill);
  if (a.maps > 0) {
    maps[0].gain = p.gain ? p.gain->data_ptr() : nullptr;
    maps[0].bias = p.bias ? p.bias->data_ptr() : nullptr;
  }
  WarpLabels nearest{};
  if (labels && call.labels.soft) {
    add_map(*labels, *float_element(*labels), label_output, is_last(*labels), call.label_border, 0);
  } else if (labels && label_output.numel() > 0) {
    nearest.element_size = call.labels.element_size;
    nearest.input = labels->data_ptr();
    nearest.image_stride = labels->stride(0);
    for (int d = 0; d < call.dims; ++d) nearest.stride[kMostDims - call.dims + d] = labels->stride(1 + d);
    nearest.output = label_output.data_ptr();
    nearest.border = call.label_border;
    nearest.ignore_index = ignore_index;
    a.labels = &nearest;
    a.near = a.near && reach_of(*labels, 1) < INT32_MAX;
  }
  if (a.maps == 0 && a.labels == nullptr) return {output, label_output};
  int64_t channels = labels ? 1 : 0;
  for (int m = 0; m < a.maps; ++m) channels += maps[m].channels;
  const Workers workers = workers_for(double(n * elements_of(size)) * (40. + 10. * double(channels)));
  const Workspace scratch(image, warp_kernels().forward_scratch(a, workers.count));
  warp_kernels().forward(a, scratch.data, workers);
  return {output, label_output};
}

Tensor joint_warp_backward(Tensor grad, Tensor affine, OptionalTensor displacement, OptionalTensor gain,
                           Ints image_size, std::string border, double cubic, bool channels_last) {
  const BackwardCall call = check_warp_backward(grad, affine, displacement, gain, image_size, border);
  Tensor output = new_map(grad, grad.scalar_type(), map_size(grad.size(0), grad.size(1), image_size), channels_last);
  if (output.numel() == 0) return output;

  WarpBackwardArgs a{};
  a.geometry = geometry_of(call.type, grad.size(0), image_size, call.out, call.parameters, cubic);
  a.type = call.type;
  a.channels = grad.size(1);
  a.grad = grad.data_ptr();
  const MapStrides from = strides_of(grad);
  a.grad_image_stride = from.image;
  a.grad_channel_stride = from.channel;
  std::copy(from.axis, from.axis + kMostDims, a.grad_stride);
  a.grad_image = output.data_ptr();
  const DenseStrides to = dense_strides(a.channels, elements_of(image_size), channels_last);
  a.image_stride = to.image;
  a.channel_stride = to.channel;
  a.step = to.step;
  a.border = call.border;
  a.gain = call.parameters.gain ? call.parameters.gain->data_ptr() : nullptr;
  Workers workers = workers_for(double(grad.numel()) * 50.);
  workers.count = std::min(workers.count, grad.size(0) * grad.size(1));
  const Workspace scratch(grad, warp_kernels().backward_scratch(a, workers.count));
  warp_kernels().backward(a, scratch.data, workers);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("joint_warp", TORCH_BOX(&joint_warp));
  m.impl("_joint_warp_backward", TORCH_BOX(&joint_warp_backward));
}

}  // namespace pyseg::warp
