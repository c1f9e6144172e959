// Checks of this family's arguments, the same on every device, and the tensors that its operators return. Messages name
// operator, argument, expected, got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/element.h"
#include "common/memory_format.h"
#include "common/tensor_arguments.h"
#include "upsample/upsample_math.h"

namespace pyseg::upsample {

using Floats = std::vector<double>;
using Tensors = std::vector<torch::stable::Tensor>;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kBilinear = "bilinear_upsample";
constexpr const char* kConcat = "upsample_concat";
constexpr const char* kConcatBackward = "_upsample_concat_backward";
constexpr const char* kDepthwise = "upsample_concat_depthwise";
constexpr const char* kDepthwiseBackward = "_upsample_concat_depthwise_backward";

inline Element check_floats(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::BFloat16: return Element::kBFloat16;
    default: throw_error(op, ": ", name, " must be float32, float64, float16 or bfloat16, got ", dtype_name(t));
  }
}

inline ScalarType computed_in(Element type) {
  return type == Element::kDouble ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  PYSEG_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
              " must be on the device of the inputs");
}

// Of a map, or of the output.
inline void check_side(const char* op, const char* name, int64_t height, int64_t width, const Ints& got) {
  constexpr int64_t kMost = int64_t{1} << 30;
  PYSEG_CHECK(height > 0 && width > 0, op, ": ", name, " must have positive H and W, got ", got);
  PYSEG_CHECK(height < kMost && width < kMost, op, ": ", name, " must have H and W below 2^30, got ", got);
}

inline void check_size(const char* op, const Ints& size) {
  PYSEG_CHECK(size.size() == 2, op, ": size must be two positive integers, got ", size);
  check_side(op, "size", size[0], size[1], size);
}

// Sizes [N, C_i, H_i, W_i] of each of the maps; their dtype.
inline Element check_inputs(const char* op, const char* name, const Tensors& inputs) {
  PYSEG_CHECK(!inputs.empty(), op, ": ", name, " must not be empty");
  const Element type = check_floats(op, name, inputs[0]);
  for (const Tensor& t : inputs) {
    const Ints size = sizes_of(t);
    PYSEG_CHECK(size.size() == 4, op, ": ", name, " must be [N, C, H, W], got ", size);
    PYSEG_CHECK(size[0] == inputs[0].size(0), op, ": ", name, " must have the same N, got ", size, " beside ",
                sizes_of(inputs[0]));
    PYSEG_CHECK(t.scalar_type() == inputs[0].scalar_type(), op, ": ", name, " must have one dtype, got ", dtype_name(t),
                " beside ", dtype_name(inputs[0]));
    check_side(op, name, size[2], size[3], size);
    check_same_device(op, name, t, inputs[0]);
  }
  return type;
}

inline void check_scale_factors(const char* op, const std::optional<Floats>& factors) {
  PYSEG_CHECK(!factors || (factors->size() == 2 && (*factors)[0] > 0 && (*factors)[1] > 0), op,
              ": scale_factors must be None or two positive numbers, got ", *factors);
}

inline Ints check_dilations(const char* op, const Ints& dilations) {
  bool positive = !dilations.empty() && dilations.size() <= kMostRates;
  for (const int64_t d : dilations) positive = positive && d > 0;
  PYSEG_CHECK(positive, op, ": dilations must be 1 to ", kMostRates, " positive integers, got ", dilations);
  return dilations;
}

// weight, scale or shift, as the kernels take it: dense, of what is computed in.
inline Tensor check_parameter(const char* op, const char* name, const Tensor& t, const Ints& expected,
                              const Tensor& input, Element type) {
  PYSEG_CHECK(sizes_of(t) == expected, op, ": ", name, " must be ", expected, ", got ", t.sizes());
  PYSEG_CHECK(t.scalar_type() == input.scalar_type() || t.scalar_type() == computed_in(type), op, ": ", name,
              " must be ", dtype_name(input), " like the inputs or what they are computed in, got ", dtype_name(t));
  check_same_device(op, name, t, input);
  return torch::stable::contiguous(torch::stable::to(t, computed_in(type)));
}

// The maps' own sizes in the arguments of a backward operator: [N, C_i, H_i, W_i], one after the other.
inline std::vector<Ints> check_sizes(const char* op, const Ints& sizes, const Tensor& grad) {
  PYSEG_CHECK(grad.dim() == 4 && !sizes.empty() && sizes.size() % 4 == 0, op,
              ": sizes must have four numbers for each map, got ", sizes);
  std::vector<Ints> each;
  int64_t channels = 0;
  for (size_t i = 0; i < sizes.size(); i += 4) {
    each.emplace_back(sizes.begin() + i, sizes.begin() + i + 4);
    check_side(op, "sizes", sizes[i + 2], sizes[i + 3], each.back());
    PYSEG_CHECK(sizes[i] == grad.size(0) && sizes[i + 1] >= 0, op, ": sizes must have N = ", grad.size(0), ", got ",
                sizes);
    channels += sizes[i + 1];
  }
  PYSEG_CHECK(channels == grad.size(1), op, ": grad must have ", channels, " channels, got ", grad.sizes());
  check_side(op, "grad", grad.size(2), grad.size(3), sizes_of(grad));
  return each;
}

// ---- layouts ----

inline bool any_channels_last(const Tensors& inputs) {
  for (const Tensor& t : inputs)
    if (is_channels_last(t)) return true;
  return false;
}

inline MemoryFormat format_of(bool last) { return last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }

// [N, C, H, W].
inline Tensor new_map(const Tensor& like, const Ints& size, bool last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format_of(last));
}

// The tensor itself where its channels, or else its columns, lie side by side.
inline Tensor in_layout(const Tensor& t, bool last) {
  const int d = last ? 1 : 3;
  return t.stride(d) == 1 || t.size(d) == 1 ? t : torch::stable::contiguous(t, format_of(last));
}

inline Tensor dense(const Tensor& t, bool last) { return torch::stable::contiguous(t, format_of(last)); }

inline std::vector<Ints> sizes_of_each(const Tensors& tensors) {
  std::vector<Ints> sizes;
  for (const Tensor& t : tensors) sizes.push_back(sizes_of(t));
  return sizes;
}

// Points the kernels' maps at the inputs, or at copies in the layout, which are `kept`.
template <typename Map>
void point_at_inputs(const Tensors& inputs, bool last, Map* maps, Tensors* kept) {
  for (size_t l = 0; l < inputs.size(); ++l) {
    const Tensor& t = kept->emplace_back(in_layout(inputs[l], last));
    Map& map = maps[l];
    map.input = t.data_ptr();
    map.image_stride = t.stride(0);
    map.channel_stride = map.channels == 1 ? 1 : t.stride(1);
    map.row_stride = t.stride(2);
    map.column_stride = map.width == 1 ? 1 : t.stride(3);
  }
}

// New tensors for the gradients of maps of these sizes, of the dtype and device of `like`; points the maps at them.
template <typename Map>
Tensors new_gradients_of(const std::vector<Ints>& sizes, const Tensor& like, bool last, Map* maps) {
  Tensors grads;
  for (size_t l = 0; l < sizes.size(); ++l) maps[l].grad = grads.emplace_back(new_map(like, sizes[l], last)).data_ptr();
  return grads;
}

// Without elements: gradients that are not wanted.
inline Tensors empty_like_each(const Tensors& inputs) {
  Tensors empty;
  for (const Tensor& t : inputs) empty.push_back(torch::stable::new_empty(t, {0}));
  return empty;
}

// [R, N, C, H, W] as [R * N, C, H, W], each image dense in the layout.
inline Tensor dense_rates(const Tensor& t, bool last) {
  return dense(torch::stable::reshape(t, {t.size(0) * t.size(1), t.size(2), t.size(3), t.size(4)}), last);
}

// ---- the arguments of _upsample_concat_depthwise_backward ----

struct DepthwiseBackwardArguments {
  Element type;
  std::vector<Ints> sizes;
  Tensor weight;
};

inline DepthwiseBackwardArguments check_depthwise_backward(const Tensor& grad, const Tensors& inputs,
                                                           const Tensor& weight, const Ints& dilations) {
  const char* op = kDepthwiseBackward;
  const Element type = check_inputs(op, "inputs", inputs);
  check_dilations(op, dilations);
  std::vector<Ints> sizes;
  int64_t channels = 0;
  for (const Tensor& t : inputs) channels += sizes.emplace_back(sizes_of(t))[1];
  const int64_t rates = int64_t(dilations.size());
  PYSEG_CHECK(grad.dim() == 5 && grad.size(0) == rates && grad.size(1) == sizes[0][0] && grad.size(2) == channels, op,
              ": grad must be ", Ints{rates, sizes[0][0], channels}, " and H, W, got ", grad.sizes());
  PYSEG_CHECK(grad.scalar_type() == inputs[0].scalar_type(), op, ": grad must be ", dtype_name(inputs[0]),
              " like the inputs, got ", dtype_name(grad));
  check_side(op, "grad", grad.size(3), grad.size(4), sizes_of(grad));
  check_same_device(op, "grad", grad, inputs[0]);
  return {type, sizes, check_parameter(op, "weight", weight, {rates, channels, 3, 3}, inputs[0], type)};
}

}  // namespace pyseg::upsample
