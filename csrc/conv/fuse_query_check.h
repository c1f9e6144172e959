// Checks of fuse_query's arguments and its matrix products, the same on every device. Messages name operator, argument,
// expected, got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/element.h"
#include "common/memory_format.h"
#include "common/tensor_arguments.h"
#include "conv/fuse_query_math.h"

namespace pyseg::fuse {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr const char* kFuseQuery = "fuse_query";
constexpr const char* kFuseQueryBackward = "_fuse_query_backward";

inline Element element_of(const char* op, const char* name, const Tensor& t) {
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

inline void check_tensor(const char* op, const char* name, const Tensor& t, const Ints& size, const Tensor& input) {
  PYSEG_CHECK(sizes_of(t) == size, op, ": ", name, " must be ", size, ", got ", t.sizes());
  PYSEG_CHECK(t.is_cuda() == input.is_cuda() && t.get_device_index() == input.get_device_index(), op, ": ", name,
              " must be on the device of input");
}
inline void check_like(const char* op, const char* name, const Tensor& t, const Ints& size, const Tensor& input) {
  check_tensor(op, name, t, size, input);
  PYSEG_CHECK(t.scalar_type() == input.scalar_type(), op, ": ", name, " must be ", dtype_name(input),
              " like input, got ", dtype_name(t));
}
// Of any floating point; as the kernels take it.
inline Tensor wide(const char* op, const char* name, const Tensor& t, const Ints& size, const Tensor& input,
                   Element type) {
  check_tensor(op, name, t, size, input);
  element_of(op, name, t);
  return torch::stable::contiguous(torch::stable::to(t, computed_in(type)));
}

// One over a norm, up to 1e12, times a gradient does not fit into 16 bits, nor does a product that is yet to be scaled.
inline void check_scaled(const char* op, const char* name, const Tensor& input, Element type) {
  PYSEG_CHECK(type == Element::kFloat || type == Element::kDouble, op, ": ", name,
              " needs an input of float32 or float64, got ", dtype_name(input));
}

// N, C, K, H, W of a call.
struct Sizes {
  int64_t images, inputs, channels, height, width;
  int64_t pixels() const { return height * width; }
  Ints input() const { return {images, inputs, height, width}; }
  Ints output() const { return {images, channels, height, width}; }
  Ints scale() const { return {images, height, width}; }
};

inline Sizes check_input(const char* op, const Tensor& input, const Tensor& weight) {
  PYSEG_CHECK(input.dim() == 4 && input.size(2) > 0 && input.size(3) > 0, op,
              ": input must be [N, C, H, W] with positive H and W, got ", input.sizes());
  const bool fits = weight.dim() == 2 && weight.size(1) == input.size(1);
  PYSEG_CHECK(fits, op, ": weight must be [K, ", input.size(1), "] for ", input.size(1), " channels of input, got ",
              weight.sizes());
  const Sizes sizes{input.size(0), input.size(1), weight.size(0), input.size(2), input.size(3)};
  check_like(op, "weight", weight, {sizes.channels, sizes.inputs}, input);
  return sizes;
}

inline Tensor dense(const Tensor& t, bool last) {
  return torch::stable::contiguous(t, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Tensor new_map(const Tensor& like, const Ints& size, bool last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// ---- the arguments of _fuse_query_backward ----

struct BackwardArguments {
  Element type;
  Sizes sizes;
  OptTensor scale;
};

inline BackwardArguments check_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                        const OptTensor& output, const OptTensor& scale) {
  const char* op = kFuseQueryBackward;
  BackwardArguments given{element_of(op, "input", input), check_input(op, input, weight), std::nullopt};
  check_like(op, "grad", grad, given.sizes.output(), input);
  if (output) check_like(op, "output", *output, given.sizes.output(), input);
  if (scale) check_scaled(op, "scale", input, given.type);
  if (scale) given.scale = wide(op, "scale", *scale, given.sizes.scale(), input, given.type);
  return given;
}

// ---- matrix products, all by torch ----

// [N * P, C] of a dense map in channels_last.
inline Tensor rows_of(const Tensor& map) {
  const Tensor planes = torch::stable::reshape(map, {map.size(0), map.size(1), map.size(2) * map.size(3)});
  return torch::stable::reshape(torch::stable::transpose(planes, 1, 2), {planes.size(0) * planes.size(2), map.size(1)});
}
// [N, C, P] of a dense contiguous one.
inline Tensor planes_of(const Tensor& map) {
  return torch::stable::reshape(map, {map.size(0), map.size(1), map.size(2) * map.size(3)});
}

// weight [K, C] times each pixel of a dense map [N, C, H, W], in its layout.
inline Tensor times_pixels(const Tensor& weight, const Tensor& map, bool last) {
  const int64_t images = map.size(0), channels = weight.size(0), height = map.size(2), width = map.size(3);
  if (!last) {
    const Tensor product = torch::stable::matmul(torch::stable::unsqueeze(weight, 0), planes_of(map));
    return torch::stable::reshape(product, {images, channels, height, width});
  }
  const Tensor product = torch::stable::matmul(rows_of(map), torch::stable::transpose(weight, 0, 1));
  const Tensor pixels = torch::stable::reshape(product, {images, height * width, channels});
  return torch::stable::reshape(torch::stable::transpose(pixels, 1, 2), {images, channels, height, width});
}

// The sum over the pixels of a[k] * b[c], [K, C], for dense maps [N, K, H, W] and [N, C, H, W]. Products of images are
// added up in float32 where elements are of 16 bits.
inline Tensor outer_product(const Tensor& a, const Tensor& b, bool last) {
  if (last) return torch::stable::matmul(torch::stable::transpose(rows_of(a), 0, 1), rows_of(b));
  const Tensor each = torch::stable::matmul(planes_of(a), torch::stable::transpose(planes_of(b), 1, 2));
  if (each.size(0) == 1) return torch::stable::select(each, 0, 0);
  const int64_t images[] = {0};
  return torch::stable::sum(each, images);
}

}  // namespace pyseg::fuse
