// atrous_conv2d on the CPU: layouts, dtypes, choice of the path, threads, registration.
//
// Dense convolutions run on channels_last maps: a contiguous map is transposed on the way in, and the result on the
// way out. 16-bit maps are converted to float32 and the result back: no arithmetic in 16 bits exists on most CPUs, and
// emulating it is many times slower.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "common/cpu_capability.h"
#include "common/memory_format.h"
#include "conv/atrous_conv2d_check.h"
#include "conv/atrous_conv2d_cpu_kernel.h"
#include "conv/atrous_conv2d_plan.h"

namespace pyseg::atrous {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- Kernels

const ConvKernelTable& kernel_table() { return PYSEG_CPU_TABLE(conv_kernels); }

template <typename T>
const ConvKernels<T>& kernels();
template <>
const ConvKernels<float>& kernels<float>() {
  return kernel_table().f32;
}
template <>
const ConvKernels<double>& kernels<double>() {
  return kernel_table().f64;
}

// --- Layouts and dtypes

Tensor new_map(const Tensor& like, const Ints& sizes, bool channels_last) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

bool is_16_bit(const Tensor& t) {
  return t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16;
}

Tensor widened(const Tensor& t) { return is_16_bit(t) ? torch::stable::to(t, ScalarType::Float) : t; }
OptTensor widened(const OptTensor& t) { return t ? OptTensor(widened(*t)) : t; }

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Strides of the layout wanted where the tensor's own say nothing, in a dimension of one element.
int64_t stride(const Tensor& t, int dim, int64_t unused) { return t.size(dim) == 1 ? unused : t.stride(dim); }
bool has_channels_together(const Tensor& t) { return stride(t, 1, 1) == 1; }
bool has_pixels_together(const Tensor& t) { return stride(t, 3, 1) == 1; }

// Images are contiguous in themselves, in either format; in a channel slice of a larger tensor there is a gap behind
// each.
template <typename T>
void transpose_map(const Tensor& from, const Tensor& to, bool to_channels_last) {
  const int64_t n = from.size(0), c = from.size(1), pixels = from.size(2) * from.size(3);
  const int64_t rows = to_channels_last ? c : pixels, columns = to_channels_last ? pixels : c;
  const Workers workers = workers_for(double(from.numel()));
  if (n == 1 || to.stride(0) == c * pixels) {
    kernels<T>().transpose(data<T>(from), data<T>(to), n, rows, columns, workers);
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    kernels<T>().transpose(data<T>(from) + i * c * pixels, data<T>(to) + i * to.stride(0), 1, rows, columns, workers);
}

bool has_planes_together(const Tensor& t) {
  const int64_t pixels = t.size(2) * t.size(3);
  return has_pixels_together(t) && stride(t, 2, t.size(3)) == t.size(3) && stride(t, 1, pixels) == pixels;
}

template <typename T>
Tensor channels_last_copy(const Tensor& t) {
  Tensor from = torch::stable::contiguous(t);
  Tensor copy = new_map(t, sizes_of(t), true);
  transpose_map<T>(from, copy, true);
  return copy;
}

// The map itself where its channels lie side by side, else a copy.
template <typename T>
Tensor as_channels_last(const Tensor& t) {
  return has_channels_together(t) ? t : channels_last_copy<T>(t);
}

Tensor as_contiguous_map(const Tensor& t) { return has_pixels_together(t) ? t : torch::stable::contiguous(t); }

template <typename T, typename U>
Map<T> map_of(const Tensor& t) {
  return {data<U>(t), t.stride(0), t.stride(2), t.stride(3)};
}

template <typename T, typename U>
DepthwiseMap<T> depthwise_map(const Tensor& t, bool channels_last) {
  if (channels_last) return {data<U>(t), t.stride(0), 1, t.stride(2), t.stride(3)};
  return {data<U>(t), t.stride(0), t.stride(1), t.stride(2), 1};
}

ConvGeometry geometry(const Tensor& input, const Ints& out, const Ints& padding, const Ints& dilation, int64_t kernel) {
  return {.n = input.size(0),
          .h = input.size(2),
          .w = input.size(3),
          .h_out = out[2],
          .w_out = out[3],
          .c_in = input.size(1),
          .c_out = out[1],
          .pad_h = padding[0],
          .pad_w = padding[1],
          .dil_h = dilation[0],
          .dil_w = dilation[1],
          .kernel = int(kernel)};
}

double multiply_adds(const ConvGeometry& g, bool dense) {
  return double(g.kernel * g.kernel) * double(g.n) * double(g.h_out) * double(g.w_out) * double(g.c_in) *
         (dense ? double(g.c_out) : 1.);
}

// A negative padding leaves out the map's border: the same as a smaller map without padding.
template <typename T, typename AnyMap>
void crop(ConvGeometry& g, AnyMap& x) {
  if (g.pad_h < 0) {
    x.data -= g.pad_h * x.row;
    g.h += 2 * g.pad_h;
    g.pad_h = 0;
  }
  if (g.pad_w < 0) {
    x.data -= g.pad_w * x.pixel;
    g.w += 2 * g.pad_w;
    g.pad_w = 0;
  }
}

std::shared_ptr<const DensePlan> plan_for(const ConvGeometry& g, bool exact) {
  return plan_dense({.n = g.n,
                     .c_in = g.c_in,
                     .h = g.h,
                     .w = g.w,
                     .c_out = g.c_out,
                     .pad_h = g.pad_h,
                     .pad_w = g.pad_w,
                     .dil_h = g.dil_h,
                     .dil_w = g.dil_w,
                     .kernel = g.kernel,
                     .exact = exact});
}

// scale and bias' = scale * bias + shift, so that the kernels apply y = scale * conv + bias'.
template <typename T>
struct Epilogue {
  std::vector<T> scale, shift;

  Epilogue(const OptTensor& b, const OptTensor& s, const OptTensor& t, int64_t channels) {
    const int64_t padded = (channels + 15) / 16 * 16;
    if (s) scale = values(*s, padded);
    if (t) shift = values(*t, padded);
    if (!b) return;
    const std::vector<T> bias = values(*b, padded);
    if (!t) shift.assign(padded, T(0));
    for (int64_t c = 0; c < channels; ++c) shift[c] += s ? scale[c] * bias[c] : bias[c];
  }
  const T* scale_or_null() const { return scale.empty() ? nullptr : scale.data(); }
  const T* shift_or_null() const { return shift.empty() ? nullptr : shift.data(); }

 private:
  static std::vector<T> values(const Tensor& t, int64_t padded) {
    std::vector<T> v(padded, T(0));
    for (int64_t c = 0; c < t.size(0); ++c) v[c] = data<T>(t)[c * t.stride(0)];
    return v;
  }
};

Tensor workspace(const Tensor& like, int64_t elements) { return torch::stable::new_empty(like, {elements}); }

// --- Dense

template <typename T>
Tensor pack_dense(const Weight<T>& weight, const Tensor& like, int64_t c_in, int64_t c_out, int64_t kernel) {
  const int64_t taps = kernel * kernel;
  Tensor packed = torch::stable::new_empty(like, {(c_out + 15) / 16, taps, c_in, 16});
  kernels<T>().pack(weight, c_in, c_out, int(taps), data<T>(packed),
                    workers_for(double(taps) * double(c_in) * double(c_out)));
  return packed;
}

// The weight of the forward pass; `adjoint`: of the input's gradient, turned by 180 degrees with in and out exchanged.
template <typename T>
Weight<T> weight_view(const Tensor& weight, bool adjoint) {
  Weight<T> w{nullptr, data<T>(weight), weight.stride(0), weight.stride(1), weight.stride(3)};
  if (adjoint) {
    std::swap(w.stride_out, w.stride_in);
    w.data += (weight.size(2) * weight.size(3) - 1) * w.stride_tap;
    w.stride_tap = -w.stride_tap;
  }
  return w;
}

// Taps must be evenly spaced in memory, as they are in both memory formats.
Tensor with_even_taps(const Tensor& weight) {
  return weight.size(2) == 1 || weight.stride(2) == 3 * weight.stride(3) ? weight : torch::stable::contiguous(weight);
}

template <typename T>
void run_dense(ConvGeometry g, const Tensor& input, Weight<T> weight, const Tensor& like, const Epilogue<T>& epilogue,
               bool relu, bool exact, const Tensor& out) {
  const Tensor x = as_channels_last<T>(input);
  const bool direct_out = has_channels_together(out);
  const Tensor y = direct_out ? out : new_map(out, sizes_of(out), true);
  DenseArgs<T> args{.g = g,
                    .x = map_of<const T, T>(x),
                    .y = map_of<T, T>(y),
                    .weight = weight,
                    .scale = epilogue.scale_or_null(),
                    .shift = epilogue.shift_or_null(),
                    .relu = relu,
                    .tiles_y = {},
                    .tiles_x = {}};
  crop<T>(args.g, args.x);
  const auto plan = plan_for(args.g, exact);
  const Workers workers = workers_for(multiply_adds(g, true));
  Tensor kept;  // what args points into
  if (plan->path == DensePath::kWinograd) {
    args.tiles_y = plan->y.view();
    args.tiles_x = plan->x.view();
    kept = workspace(like, kernels<T>().winograd_workspace(args, workers.count));
    kernels<T>().winograd(args, data<T>(kept), workers);
  } else {
    if (!args.weight.packed) {
      kept = pack_dense<T>(weight, like, g.c_in, g.c_out, g.kernel);
      args.weight.packed = data<T>(kept);
    }
    kernels<T>().direct(args, workers);
  }
  if (!direct_out) {
    if (has_planes_together(out)) {
      transpose_map<T>(y, out, false);
    } else {
      torch::stable::copy_(const_cast<Tensor&>(out), y);
    }
  }
}

template <typename T>
void run_dense_weight_grad(const ConvGeometry& g, const Tensor& input, const Tensor& grad, bool exact,
                           const Tensor& grad_weight) {
  const Tensor x = as_channels_last<T>(input), dy = as_channels_last<T>(grad);
  DenseWeightGradArgs<T> args{.g = g,
                              .x = map_of<const T, T>(x),
                              .grad = map_of<const T, T>(dy),
                              .grad_weight = data<T>(grad_weight),
                              .tiles_y = {},
                              .tiles_x = {}};
  const auto plan = plan_for(g, exact);
  const Workers workers = workers_for(multiply_adds(g, true));
  const ConvKernels<T>& k = kernels<T>();
  if (plan->path == DensePath::kWinograd) {
    args.tiles_y = plan->y.view();
    args.tiles_x = plan->x.view();
    const Tensor ws = workspace(x, k.winograd_weight_grad_workspace(args, workers.count));
    k.winograd_weight_grad(args, data<T>(ws), workers);
  } else {
    const Tensor ws = workspace(x, k.direct_weight_grad_workspace(args, workers.count));
    k.direct_weight_grad(args, data<T>(ws), workers);
  }
}

// --- Depthwise

// Taps of every channel in a row, times the epilogue's scale.
template <typename T>
std::vector<T> depthwise_weight(const Tensor& weight, const T* scale, bool adjoint) {
  std::vector<T> w(weight.size(0) * 9);
  for (int64_t c = 0; c < weight.size(0); ++c)
    for (int64_t t = 0; t < 9; ++t) {
      const T v = data<T>(weight)[c * weight.stride(0) + t / 3 * weight.stride(2) + t % 3 * weight.stride(3)];
      w[c * 9 + (adjoint ? 8 - t : t)] = scale ? v * scale[c] : v;
    }
  return w;
}

template <typename T>
void run_depthwise(const ConvGeometry& g, const Tensor& input, const std::vector<T>& weight, const T* shift, bool relu,
                   const Tensor& out) {
  const bool channels_last = out.size(1) > 1 && out.stride(1) == 1;
  const bool direct_out = channels_last || has_pixels_together(out);
  const Tensor x = channels_last ? as_channels_last<T>(input) : as_contiguous_map(input);
  const Tensor y = direct_out ? out : new_map(out, sizes_of(out), false);
  DepthwiseArgs<T> args{.g = g,
                        .channels_last = channels_last,
                        .x = depthwise_map<const T, T>(x, channels_last),
                        .y = depthwise_map<T, T>(y, channels_last),
                        .weight = weight.data(),
                        .shift = shift,
                        .relu = relu};
  crop<T>(args.g, args.x);
  const Workers workers = workers_for(4 * multiply_adds(g, false));
  const Tensor ws = workspace(x, kernels<T>().depthwise_workspace(args, workers.count));
  kernels<T>().depthwise(args, data<T>(ws), workers);
  if (!direct_out) torch::stable::copy_(const_cast<Tensor&>(out), y);
}

template <typename T>
void run_depthwise_weight_grad(const ConvGeometry& g, const Tensor& input, const Tensor& grad, bool channels_last,
                               const Tensor& grad_weight) {
  const bool last = channels_last && g.c_in > 1;
  const Tensor x = last ? as_channels_last<T>(input) : as_contiguous_map(input);
  const Tensor dy = last ? as_channels_last<T>(grad) : as_contiguous_map(grad);
  const DepthwiseWeightGradArgs<T> args{.g = g,
                                        .channels_last = last,
                                        .x = depthwise_map<const T, T>(x, last),
                                        .grad = depthwise_map<const T, T>(dy, last),
                                        .grad_weight = data<T>(grad_weight)};
  const Workers workers = workers_for(4 * multiply_adds(g, false));
  const Tensor ws = workspace(x, kernels<T>().depthwise_weight_grad_workspace(args, workers.count));
  kernels<T>().depthwise_weight_grad(args, data<T>(ws), workers);
}

// --- Operators

struct Forward {
  Tensor input, weight;
  OptTensor bias, scale, shift;
  Ints padding, dilation;
  int64_t groups;
  bool relu, exact;
  OptTensor packed;
};

Ints check_forward(const Forward& f) {
  const Ints out = check_convolution(kForward, f.input, f.weight, f.padding, f.dilation, f.groups);
  check_vector("bias", f.bias, f.input, out[1]);
  check_vector("scale", f.scale, f.input, out[1]);
  check_vector("shift", f.shift, f.input, out[1]);
  if (f.packed) {
    check_like(kForward, "packed", *f.packed, f.input);
    PYSEG_CHECK(f.groups == 1, kForward, ": packed must be None for groups other than 1, got groups = ", f.groups);
    const Ints expected{(out[1] + 15) / 16, f.weight.size(2) * f.weight.size(3), f.input.size(1), 16};
    PYSEG_CHECK(sizes_of(*f.packed) == expected && f.packed->is_contiguous(), kForward, ": packed must be contiguous ",
                expected, ", got ", f.packed->sizes());
  }
  return out;
}

template <typename T>
void run_forward(const Forward& f, const Tensor& out) {
  const ConvGeometry g = geometry(f.input, sizes_of(out), f.padding, f.dilation, f.weight.size(2));
  const Epilogue<T> epilogue(f.bias, f.scale, f.shift, g.c_out);
  if (f.groups == 1) {
    const Tensor weight = with_even_taps(f.weight);
    Weight<T> w = weight_view<T>(weight, false);
    if (f.packed) w.packed = data<T>(*f.packed);
    run_dense<T>(g, f.input, w, f.input, epilogue, f.relu, f.exact, out);
  } else {
    const std::vector<T> w = depthwise_weight<T>(f.weight, epilogue.scale_or_null(), false);
    run_depthwise<T>(g, f.input, w, epilogue.shift_or_null(), f.relu, out);
  }
}

// Without 16-bit types; out has the dtype of f.input.
void run_wide(const Forward& f, const Tensor& out) {
  if (out.numel() == 0) return;
  if (f.input.scalar_type() == ScalarType::Double) {
    run_forward<double>(f, out);
  } else {
    run_forward<float>(f, out);
  }
}

// The same for every dtype: 16-bit ones by way of float32.
void run_any(const Forward& f, Tensor& out) {
  if (!is_16_bit(f.input)) return run_wide(f, out);
  const Forward wide{widened(f.input), widened(f.weight), widened(f.bias),  widened(f.scale),
                     widened(f.shift), f.padding,         f.dilation,       f.groups,
                     f.relu,           f.exact,           widened(f.packed)};
  Tensor y = new_map(wide.input, sizes_of(out), is_channels_last(out));
  run_wide(wide, y);
  torch::stable::copy_(out, y);
}

Tensor atrous_conv2d(Tensor input, Tensor weight, OptTensor bias, OptTensor scale, OptTensor shift, Ints padding,
                     Ints dilation, int64_t groups, bool relu, bool exact, bool /*allow_tf32*/, OptTensor packed) {
  const Forward f{input, weight, bias, scale, shift, padding, dilation, groups, relu, exact, packed};
  const Ints sizes = check_forward(f);
  Tensor out = new_map(input, sizes, is_channels_last(input) || is_channels_last(weight));
  run_any(f, out);
  return out;
}

void atrous_conv2d_out(Tensor input, Tensor weight, OptTensor bias, OptTensor scale, OptTensor shift, Ints padding,
                       Ints dilation, int64_t groups, bool relu, bool exact, bool /*allow_tf32*/, OptTensor packed,
                       Tensor out) {
  const Forward f{input, weight, bias, scale, shift, padding, dilation, groups, relu, exact, packed};
  check_out(out, input, check_forward(f));
  run_any(f, out);
}

template <typename T>
void run_backward(const Tensor& grad, const Tensor& input, const Tensor& weight, const Ints& padding,
                  const Ints& dilation, int64_t groups, bool exact, const Tensor& grad_input, const Tensor& grad_weight,
                  bool channels_last) {
  const int64_t kernel = weight.size(2);
  const ConvGeometry g = geometry(input, sizes_of(grad), padding, dilation, kernel);
  if (grad_input.numel() > 0) {
    const Ints adjoint_padding{(kernel - 1) * dilation[0] - padding[0], (kernel - 1) * dilation[1] - padding[1]};
    const ConvGeometry adjoint = geometry(grad, sizes_of(input), adjoint_padding, dilation, kernel);
    if (groups == 1) {
      run_dense<T>(adjoint, grad, weight_view<T>(weight, true), grad, Epilogue<T>({}, {}, {}, g.c_in), false, exact,
                   grad_input);
    } else {
      run_depthwise<T>(adjoint, grad, depthwise_weight<T>(weight, nullptr, true), nullptr, false, grad_input);
    }
  }
  if (grad_weight.numel() > 0) {
    if (groups == 1) {
      run_dense_weight_grad<T>(g, input, grad, exact, grad_weight);
    } else {
      run_depthwise_weight_grad<T>(g, input, grad, channels_last, grad_weight);
    }
  }
}

std::tuple<Tensor, Tensor> atrous_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Ints padding,
                                                  Ints dilation, int64_t groups, bool exact, bool /*allow_tf32*/,
                                                  bool need_input, bool need_weight) {
  const Ints out = check_convolution(kBackward, input, weight, padding, dilation, groups);
  check_map(kBackward, "grad_output", grad_output, input, out);
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  const bool narrow = is_16_bit(input);
  const Tensor grad = widened(grad_output), x = widened(input), w = with_even_taps(widened(weight));
  Tensor grad_input = need_input ? new_map(x, sizes_of(x), channels_last) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, need_weight ? sizes_of(w) : Ints{0});
  if (grad.numel() == 0) {  // nothing came in
    if (grad_input.numel() > 0) torch::stable::zero_(grad_input);
    if (grad_weight.numel() > 0) torch::stable::zero_(grad_weight);
  } else if (x.scalar_type() == ScalarType::Double) {
    run_backward<double>(grad, x, w, padding, dilation, groups, exact, grad_input, grad_weight, channels_last);
  } else {
    run_backward<float>(grad, x, w, padding, dilation, groups, exact, grad_input, grad_weight, channels_last);
  }
  if (!narrow) return {grad_input, grad_weight};
  return {torch::stable::to(grad_input, input.scalar_type()), torch::stable::to(grad_weight, input.scalar_type())};
}

template <typename T>
Tensor pack_as(const Tensor& weight) {
  return pack_dense<T>(weight_view<T>(weight, false), weight, weight.size(1), weight.size(0), weight.size(2));
}

Tensor atrous_conv2d_pack(Tensor weight) {
  check_weight(kPack, weight);
  check_dtype(kPack, "weight", weight);
  const Tensor w = with_even_taps(widened(weight));
  const Tensor packed = w.scalar_type() == ScalarType::Double ? pack_as<double>(w) : pack_as<float>(w);
  return is_16_bit(weight) ? torch::stable::to(packed, weight.scalar_type()) : packed;
}

Tensor to_channels_last(Tensor input) {
  const ScalarType type = input.scalar_type();
  PYSEG_CHECK(input.dim() == 4, kToChannelsLast, ": input must be [N, C, H, W], got ", input.sizes());
  PYSEG_CHECK(type == ScalarType::Float || type == ScalarType::Double, kToChannelsLast,
              ": input must be float32 or float64, got torch.", torch::headeronly::toString(type));
  if (input.numel() == 0) return new_map(input, sizes_of(input), true);
  return type == ScalarType::Double ? channels_last_copy<double>(input) : channels_last_copy<float>(input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("atrous_conv2d", TORCH_BOX(&atrous_conv2d));
  m.impl("atrous_conv2d_out", TORCH_BOX(&atrous_conv2d_out));
  m.impl("_atrous_conv2d_backward", TORCH_BOX(&atrous_conv2d_backward));
  m.impl("_atrous_conv2d_pack", TORCH_BOX(&atrous_conv2d_pack));
  m.impl("_to_channels_last", TORCH_BOX(&to_channels_last));
}

}  // namespace pyseg::atrous
