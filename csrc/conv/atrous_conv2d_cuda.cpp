// atrous_conv2d on CUDA devices: checks, layouts, choice of the kernel, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/cuda_device.h"
#include "common/cuda_launches.h"
#include "common/memory_format.h"
#include "conv/atrous_conv2d_check.h"
#include "conv/atrous_conv2d_cuda.h"

namespace pyseg::atrous {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- Checks

DType dtype_of(const Tensor& t) {  // check_dtype has seen it
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat;
  }
}

Shape check_shape(const char* op, const Tensor& input, const Tensor& weight, const Ints& padding, const Ints& dilation,
                  int64_t groups) {
  const Ints out = check_convolution(op, input, weight, padding, dilation, groups);
  const Shape s{.batch = input.size(0),
                .channels = input.size(1),
                .height = input.size(2),
                .width = input.size(3),
                .out_channels = out[1],
                .out_height = out[2],
                .out_width = out[3],
                .pad_h = padding[0],
                .pad_w = padding[1],
                .dilation_h = dilation[0],
                .dilation_w = dilation[1]};
  // Kernels count channels, and the pixels of one map, in 32 bits, tiles at the end included.
  for (int64_t size : {s.channels, s.out_channels, s.height * s.width, s.out_height * s.out_width}) {
    PYSEG_CHECK(size < INT32_MAX - 1024, op, ": channels and pixels of a map must be below 2^31 - 1024, got ", size);
  }
  return s;
}

// --- Launching

bool uses_tensor_cores(DType dtype, bool allow_tf32) {
  const bool type_fits = dtype == DType::kHalf || dtype == DType::kBFloat16 || (dtype == DType::kFloat && allow_tf32);
  return type_fits && compute_capability() >= 80;
}

// Strides that a dimension of one element does not need become those of the wanted layout.
Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), t.stride(2), t.stride(3)};
}
Strides row_strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.size(3) == 1 ? 1 : t.stride(3)};
}

Tensor new_map(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

void copy_map(const CudaLaunches& launches, const Tensor& from, const Tensor& to, DType dtype) {
  auto strides = [](const Tensor& t) -> Strides { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; };
  launches.check(launch_copy_map(from.data_ptr(), strides(from), to.data_ptr(), strides(to), from.size(0), from.size(1),
                                 from.size(2), from.size(3), dtype, launches.stream()));
}

// The map itself where its channels lie side by side, else a copy.
Tensor as_channels_last(const CudaLaunches& launches, const Tensor& t, DType dtype) {
  if (strides_of(t).c == 1) return t;
  Tensor copy = new_map(t, t.size(0), t.size(1), t.size(2), t.size(3), true);
  copy_map(launches, t, copy, dtype);
  return copy;
}

Tensor as_rows(const CudaLaunches& launches, const Tensor& t, DType dtype) {
  if (row_strides_of(t).w == 1) return t;
  Tensor copy = new_map(t, t.size(0), t.size(1), t.size(2), t.size(3), false);
  copy_map(launches, t, copy, dtype);
  return copy;
}

// A vector of the epilogue, contiguous; none stays none.
OptTensor as_contiguous(const CudaLaunches& launches, const OptTensor& t, DType dtype) {
  if (!t || t->size(0) <= 1 || t->stride(0) == 1) return t;
  Tensor copy = torch::stable::new_empty(*t, {t->size(0)});
  launches.check(launch_copy_map(t->data_ptr(), {0, t->stride(0), 0, 0}, copy.data_ptr(), {0, 1, 0, 0}, 1, t->size(0),
                                 1, 1, dtype, launches.stream()));
  return copy;
}

Tensor as_contiguous_weight(const CudaLaunches& launches, const Tensor& weight, DType dtype) {
  if (weight.is_contiguous()) return weight;
  Tensor copy = torch::stable::new_empty(weight, weight.sizes());
  copy_map(launches, weight, copy, dtype);
  return copy;
}

Tensor pack_weight(const CudaLaunches& launches, const Tensor& weight, DType dtype, bool for_input_gradient) {
  const int64_t k = weight.size(0), c = weight.size(1);
  Tensor packed = for_input_gradient ? torch::stable::new_empty(weight, {3, 3, c, k})
                                     : torch::stable::new_empty(weight, {3, 3, k, c});
  const WeightStrides strides{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  launches.check(launch_pack_weight(weight.data_ptr(), strides, k, c, dtype, for_input_gradient, packed.data_ptr(),
                                    launches.stream()));
  return packed;
}

// weight: packed [3, 3, C_out, C_in]; input of any strides.
void run_dense(const CudaLaunches& launches, const Shape& shape, DType dtype, const Tensor& input, const Tensor& packed,
               const Epilogue& epilogue, bool allow_tf32, const Tensor& out) {
  const Tensor x = as_channels_last(launches, input, dtype);
  const Forward args{.shape = shape,
                     .dtype = dtype,
                     .input = x.data_ptr(),
                     .input_strides = strides_of(x),
                     .weight = packed.data_ptr(),
                     .output = out.data_ptr(),
                     .output_strides = {out.stride(0), out.stride(1), out.stride(2), out.stride(3)},
                     .epilogue = epilogue};
  if (uses_tensor_cores(dtype, allow_tf32)) {
    const Tensor workspace = new_workspace(x, dense_tensor_cores_workspace(args));
    launches.check(launch_dense_tensor_cores(args, workspace.data_ptr(), launches.stream()));
  } else {
    launches.check(launch_dense_plain(args, launches.stream()));
  }
}

// weight: [C, 1, 3, 3] of any strides; input of any strides, brought to the output's layout.
void run_depthwise(const CudaLaunches& launches, const Shape& shape, DType dtype, const Tensor& input,
                   const Tensor& weight, bool flip, const Epilogue& epilogue, const Tensor& out) {
  const Tensor w = as_contiguous_weight(launches, weight, dtype);
  const bool channels_last = out.stride(1) == 1 && out.size(1) > 1;
  const bool rows = !channels_last && row_strides_of(out).w == 1;
  // An output that is neither gets its values by a copy.
  const Tensor y =
      channels_last || rows ? out : new_map(out, out.size(0), out.size(1), out.size(2), out.size(3), false);
  const Tensor x = channels_last ? as_channels_last(launches, input, dtype) : as_rows(launches, input, dtype);
  const Forward args{.shape = shape,
                     .dtype = dtype,
                     .input = x.data_ptr(),
                     .input_strides = channels_last ? strides_of(x) : row_strides_of(x),
                     .weight = w.data_ptr(),
                     .output = y.data_ptr(),
                     .output_strides = channels_last ? strides_of(y) : row_strides_of(y),
                     .epilogue = epilogue};
  launches.check(launch_depthwise_forward(args, flip, launches.stream()));
  if (!channels_last && !rows) copy_map(launches, y, out, dtype);
}

// --- Operators

struct ForwardInputs {
  Tensor input, weight;
  OptTensor bias, scale, shift, packed;
  int64_t groups;
  bool relu, allow_tf32;
};

void run_forward(const ForwardInputs& in, const Shape& shape, const Tensor& out) {
  if (out.numel() == 0) return;
  const DType dtype = dtype_of(in.input);
  const CudaLaunches launches(kForward, in.input);
  const OptTensor bias = as_contiguous(launches, in.bias, dtype), scale = as_contiguous(launches, in.scale, dtype),
                  shift = as_contiguous(launches, in.shift, dtype);
  const Epilogue epilogue{.bias = bias ? bias->data_ptr() : nullptr,
                          .scale = scale ? scale->data_ptr() : nullptr,
                          .shift = shift ? shift->data_ptr() : nullptr,
                          .relu = in.relu};
  if (in.groups == 1) {
    const Tensor packed = in.packed ? *in.packed : pack_weight(launches, in.weight, dtype, false);
    run_dense(launches, shape, dtype, in.input, packed, epilogue, in.allow_tf32, out);
  } else {
    run_depthwise(launches, shape, dtype, in.input, in.weight, false, epilogue, out);
  }
}

Shape check_forward(const ForwardInputs& in, const Ints& padding, const Ints& dilation) {
  const Shape shape = check_shape(kForward, in.input, in.weight, padding, dilation, in.groups);
  check_vector("bias", in.bias, in.input, shape.out_channels);
  check_vector("scale", in.scale, in.input, shape.out_channels);
  check_vector("shift", in.shift, in.input, shape.out_channels);
  if (in.packed) {
    const Tensor& p = *in.packed;
    check_like(kForward, "packed", p, in.input);
    PYSEG_CHECK(in.groups == 1, kForward, ": packed must be None for groups other than 1, got groups = ", in.groups);
    PYSEG_CHECK(p.dim() == 4 && p.size(0) == 3 && p.size(1) == 3 && p.size(2) == shape.out_channels &&
                    p.size(3) == shape.channels && p.is_contiguous(),
                kForward, ": packed must be contiguous [3, 3, C_out, C_in] = [3, 3, ", shape.out_channels, ", ",
                shape.channels, "], got ", p.sizes());
  }
  return shape;
}

Tensor atrous_conv2d(Tensor input, Tensor weight, OptTensor bias, OptTensor scale, OptTensor shift, Ints padding,
                     Ints dilation, int64_t groups, bool relu, bool /*exact: no Winograd here*/, bool allow_tf32,
                     OptTensor packed) {
  const ForwardInputs in{input, weight, bias, scale, shift, packed, groups, relu, allow_tf32};
  const Shape s = check_forward(in, padding, dilation);
  Tensor out = new_map(input, s.batch, s.out_channels, s.out_height, s.out_width,
                       is_channels_last(input) || is_channels_last(weight));
  run_forward(in, s, out);
  return out;
}

void atrous_conv2d_out(Tensor input, Tensor weight, OptTensor bias, OptTensor scale, OptTensor shift, Ints padding,
                       Ints dilation, int64_t groups, bool relu, bool /*exact*/, bool allow_tf32, OptTensor packed,
                       Tensor out) {
  const ForwardInputs in{input, weight, bias, scale, shift, packed, groups, relu, allow_tf32};
  const Shape s = check_forward(in, padding, dilation);
  check_out(out, input, {s.batch, s.out_channels, s.out_height, s.out_width});
  run_forward(in, s, out);
}

std::tuple<Tensor, Tensor> atrous_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Ints padding,
                                                  Ints dilation, int64_t groups, bool /*exact*/, bool allow_tf32,
                                                  bool need_input, bool need_weight) {
  const Shape s = check_shape(kBackward, input, weight, padding, dilation, groups);
  check_map(kBackward, "grad_output", grad_output, input, {s.batch, s.out_channels, s.out_height, s.out_width});
  const DType dtype = dtype_of(input);
  const CudaLaunches launches(kBackward, input);
  const bool dense = groups == 1;
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  Tensor grad = grad_output;
  if (dense) grad = as_channels_last(launches, grad, dtype);

  Tensor grad_input = need_input ? new_map(input, s.batch, s.channels, s.height, s.width, channels_last)
                                 : torch::stable::new_empty(input, {0});
  if (grad_input.numel() > 0) {
    // The convolution of grad_output with the weight turned by 180 degrees and transposed.
    const Shape transposed{.batch = s.batch,
                           .channels = s.out_channels,
                           .height = s.out_height,
                           .width = s.out_width,
                           .out_channels = s.channels,
                           .out_height = s.height,
                           .out_width = s.width,
                           .pad_h = 2 * s.dilation_h - s.pad_h,
                           .pad_w = 2 * s.dilation_w - s.pad_w,
                           .dilation_h = s.dilation_h,
                           .dilation_w = s.dilation_w};
    if (dense) {
      run_dense(launches, transposed, dtype, grad, pack_weight(launches, weight, dtype, true), {}, allow_tf32,
                grad_input);
    } else {
      run_depthwise(launches, transposed, dtype, grad, weight, true, {}, grad_input);
    }
  }

  Tensor grad_weight =
      need_weight ? torch::stable::new_empty(weight, weight.sizes()) : torch::stable::new_empty(weight, {0});
  if (grad_weight.numel() > 0) {
    const bool last = dense || channels_last;
    const Tensor x = last ? as_channels_last(launches, input, dtype) : as_rows(launches, input, dtype);
    const Tensor g = last ? as_channels_last(launches, grad, dtype) : as_rows(launches, grad, dtype);
    WeightGradient args{.shape = s,
                        .dtype = dtype,
                        .input = x.data_ptr(),
                        .input_strides = last ? strides_of(x) : row_strides_of(x),
                        .grad_output = g.data_ptr(),
                        .grad_output_strides = last ? strides_of(g) : row_strides_of(g),
                        .grad_weight = grad_weight.data_ptr(),
                        .workspace = nullptr};
    const bool tensor_cores = uses_tensor_cores(dtype, allow_tf32);
    const int64_t bytes =
        dense ? dense_weight_gradient_workspace(args, tensor_cores) : depthwise_weight_gradient_workspace(args);
    const Tensor workspace = new_workspace(input, bytes);
    args.workspace = workspace.data_ptr();
    launches.check(dense ? launch_dense_weight_gradient(args, tensor_cores, launches.stream())
                         : launch_depthwise_weight_gradient(args, launches.stream()));
  }
  return {grad_input, grad_weight};
}

Tensor atrous_conv2d_pack(Tensor weight) {
  check_weight(kPack, weight);
  check_dtype(kPack, "weight", weight);
  const DType dtype = dtype_of(weight);
  return pack_weight(CudaLaunches(kPack, weight), weight, dtype, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("atrous_conv2d", TORCH_BOX(&atrous_conv2d));
  m.impl("atrous_conv2d_out", TORCH_BOX(&atrous_conv2d_out));
  m.impl("_atrous_conv2d_backward", TORCH_BOX(&atrous_conv2d_backward));
  m.impl("_atrous_conv2d_pack", TORCH_BOX(&atrous_conv2d_pack));
}

}  // namespace pyseg::atrous
