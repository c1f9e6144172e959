// fuse_query on the CPU: products by torch, the passes around them by the kernels, registration.
#include <torch/csrc/stable/library.h>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "conv/fuse_query_check.h"
#include "conv/fuse_query_cpu_kernel.h"

namespace pyseg::fuse {
namespace {

const FuseQueryKernelTable& kernels() { return PYSEG_CPU_TABLE(fuse_query_kernels); }

FuseQueryArgs arguments(Element type, const Sizes& sizes, bool last) {
  FuseQueryArgs a{};
  a.type = type;
  a.last = last;
  a.images = sizes.images;
  a.inputs = sizes.inputs;
  a.channels = sizes.channels;
  a.height = sizes.height;
  a.width = sizes.width;
  return a;
}

// In multiply-adds, for a pass over a map of this many channels.
Workers workers_of(const Sizes& sizes, int64_t channels) {
  return workers_for(4. * double(sizes.images) * double(channels) * double(sizes.pixels()));
}

std::tuple<Tensor, Tensor> fuse_query(Tensor input, Tensor weight, Tensor offset, Tensor coordinates, bool normalize,
                                      bool relu) {
  const char* op = kFuseQuery;
  const Element type = element_of(op, "input", input);
  const Sizes sizes = check_input(op, input, weight);
  if (normalize) check_scaled(op, "normalize", input, type);
  const Tensor offsets = wide(op, "offset", offset, {sizes.images, sizes.channels}, input, type);
  const Tensor weights = wide(op, "coordinates", coordinates, {sizes.channels, kCoordinates}, input, type);
  FuseQueryArgs a = arguments(type, sizes, is_channels_last(input));
  const Tensor x = dense(input, a.last);
  Tensor scale = torch::stable::new_empty(input, normalize ? sizes.scale() : Ints{0}, computed_in(type));
  Tensor output = times_pixels(weight, x, a.last);
  a.relu = relu;
  a.offset = offsets.data_ptr();
  a.coordinates = weights.data_ptr();
  a.output = output.data_ptr();
  if (normalize && scale.numel() > 0) {
    a.input = x.data_ptr();
    a.scale = scale.data_ptr();
    kernels().scale(a, workers_of(sizes, sizes.inputs));
  }
  if (output.numel() > 0) kernels().add(a, workers_of(sizes, sizes.channels));
  return {output, scale};
}

Gradients fuse_query_backward(Tensor grad, Tensor input, Tensor weight, OptTensor output, OptTensor scale,
                              bool need_input, bool need_weight) {
  const BackwardArguments given = check_backward(grad, input, weight, output, scale);
  const Sizes& sizes = given.sizes;
  FuseQueryArgs a = arguments(given.type, sizes, is_channels_last(input));
  const Tensor g = dense(grad, a.last), x = dense(input, a.last), y = output ? dense(*output, a.last) : g;
  // What was neither gated nor scaled is the product's gradient already.
  const Tensor gated = output || scale ? new_map(g, sizes.output(), a.last) : g;
  Tensor grad_offset = torch::stable::new_empty(grad, {sizes.images, sizes.channels}, computed_in(given.type));
  Tensor grad_coordinates = torch::stable::new_empty(grad, {sizes.channels, kCoordinates}, computed_in(given.type));
  a.relu = output.has_value();
  a.grad = g.data_ptr();
  a.output = y.data_ptr();
  a.scale = given.scale ? given.scale->data_ptr() : nullptr;
  a.gated = output || scale ? gated.data_ptr() : nullptr;
  a.grad_offset = grad_offset.data_ptr();
  a.grad_coordinates = grad_coordinates.data_ptr();
  const Workspace scratch(grad, kernels().gate_scratch(a));
  kernels().gate(a, scratch.data, workers_of(sizes, sizes.channels));

  Tensor grad_weight = need_weight ? outer_product(gated, x, a.last) : torch::stable::new_empty(grad, {0});
  if (!need_input) return {torch::stable::new_empty(grad, {0}), grad_weight, grad_offset, grad_coordinates};
  Tensor grad_input = times_pixels(torch::stable::transpose(weight, 0, 1), gated, a.last);
  if (scale && grad_input.numel() > 0) {
    a.input = x.data_ptr();
    a.grad_input = grad_input.data_ptr();
    kernels().project(a, workers_of(sizes, sizes.inputs));
  }
  return {grad_input, grad_weight, grad_offset, grad_coordinates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("fuse_query", TORCH_BOX(&fuse_query));
  m.impl("_fuse_query_backward", TORCH_BOX(&fuse_query_backward));
}

}  // namespace pyseg::fuse
