// bilinear_upsample, upsample_concat and their gradient on the CPU: layouts, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/cpu_workspace.h"
#include "upsample/upsample_cpu_call.h"

namespace pyseg::upsample {
namespace {

Tensor forward(const char* op, const char* name, const Tensors& inputs, const Ints& size, bool align,
               const std::optional<Floats>& factors) {
  const Element type = check_inputs(op, name, inputs);
  check_size(op, size);
  check_scale_factors(op, factors);
  const std::vector<Ints> sizes = sizes_of_each(inputs);
  CpuCall call(type, sizes, size[0], size[1], any_channels_last(inputs), align, factors);
  UpsampleArgs& a = call.args;
  Tensor output = new_map(inputs[0], {a.images, a.channels, a.height, a.width}, a.last);
  if (output.numel() == 0) return output;
  call.set_inputs(inputs);
  a.output = output.data_ptr();
  const Workers workers = call.workers();
  const Workspace scratch(output, upsample_kernels().concat_scratch(a, workers.count));
  upsample_kernels().concat(a, scratch.data, workers);
  return output;
}

Tensor bilinear_upsample(Tensor input, Ints size, bool align_corners, std::optional<Floats> scale_factors) {
  return forward(kBilinear, "input", {input}, size, align_corners, scale_factors);
}

Tensor upsample_concat(Tensors inputs, Ints size, bool align_corners) {
  return forward(kConcat, "inputs", inputs, size, align_corners, {});
}

Tensors upsample_concat_backward(Tensor grad, Ints sizes, bool channels_last, bool align_corners,
                                 std::optional<Floats> scale_factors) {
  const Element type = check_floats(kConcatBackward, "grad", grad);
  const std::vector<Ints> each = check_sizes(kConcatBackward, sizes, grad);
  check_scale_factors(kConcatBackward, scale_factors);
  CpuCall call(type, each, grad.size(2), grad.size(3), channels_last, align_corners, scale_factors);
  UpsampleArgs& a = call.args;
  Tensors grads = call.new_gradients(each, grad);
  if (grad.numel() == 0) return grads;
  const Tensor from = dense(grad, channels_last);
  a.grad = from.data_ptr();
  const Workers workers = call.workers();
  const Workspace scratch(grad, upsample_kernels().concat_scratch(a, workers.count));
  upsample_kernels().concat_backward(a, scratch.data, workers);
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("bilinear_upsample", TORCH_BOX(&bilinear_upsample));
  m.impl("upsample_concat", TORCH_BOX(&upsample_concat));
  m.impl("_upsample_concat_backward", TORCH_BOX(&upsample_concat_backward));
}

}  // namespace pyseg::upsample
