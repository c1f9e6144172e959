// Checks of this family's arguments, the same on every device, and the tensors that its operators return. Messages name
// operator, argument, expected, got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "common/check.h"
#include "common/element.h"
#include "common/memory_format.h"
#include "common/tensor_arguments.h"
#include "warp/joint_warp_math.h"

namespace pyseg::warp {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kWarp = "joint_warp";
constexpr const char* kWarpBackward = "_joint_warp_backward";
constexpr int64_t kMostSide = int64_t{1} << 24;  // float holds these whole numbers

inline std::optional<Element> float_element(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::BFloat16: return Element::kBFloat16;
    default: return std::nullopt;
  }
}

inline Element check_floats(const char* op, const char* name, const Tensor& t) {
  const auto element = float_element(t);
  PYSEG_CHECK(element, op, ": ", name, " must be float32, float64, float16 or bfloat16, got ", dtype_name(t));
  return *element;
}

inline Element check_image(const Tensor& image) {
  const auto element = float_element(image);
  PYSEG_CHECK(element || image.scalar_type() == ScalarType::Byte, kWarp,
              ": image must be float32, float64, float16, bfloat16 or uint8, got ", dtype_name(image));
  return element.value_or(Element::kUInt8);
}

inline Border check_border(const char* op, const char* name, const std::string& border) {
  if (border == "reflect") return Border::kReflect;
  if (border == "replicate") return Border::kReplicate;
  PYSEG_CHECK(border == "constant", op, ": ", name, " must be reflect, replicate or constant, got ", border);
  return Border::kConstant;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  PYSEG_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
              " must be on the device of ", op == std::string(kWarp) ? "image" : "grad");
}

inline void check_sides(const char* op, const char* name, const Ints& sizes, size_t first) {
  for (size_t i = first; i < sizes.size(); ++i)
    PYSEG_CHECK(sizes[i] > 0 && sizes[i] <= kMostSide, op, ": ", name, " must have sides of 1 to 2^24, got ", sizes);
}

// [N, C, *S] of two or three axes; their number.
inline int check_map(const char* op, const char* name, const Tensor& t) {
  const Ints sizes = sizes_of(t);
  PYSEG_CHECK(sizes.size() == 4 || sizes.size() == 5, op, ": ", name, " must be [N, C, H, W] or [N, C, D, H, W], got ",
              sizes);
  check_sides(op, name, sizes, 2);
  return int(sizes.size()) - 2;
}

inline void check_size(const char* op, const char* name, const Ints& size, int dims) {
  PYSEG_CHECK(int(size.size()) == dims, op, ": ", name, " must be ", dims, " integers, got ", size);
  check_sides(op, name, size, 0);
}

inline ScalarType computed_in(Element type) {
  return type == Element::kDouble ? ScalarType::Double : ScalarType::Float;
}

// affine, displacement, gain, bias as the kernels take them: dense, of what is computed in.
struct Parameters {
  Tensor affine;
  OptionalTensor displacement, gain, bias;
};

inline Tensor dense_parameter(const char* op, const char* name, const Tensor& t, const Tensor& like, Element type) {
  check_floats(op, name, t);
  check_device(op, name, t, like);
  return torch::stable::contiguous(torch::stable::to(t, computed_in(type)));
}

// like: [N, C, *], of which the parameters' sizes follow.
inline Parameters check_parameters(const char* op, const Tensor& like, int dims, Element type, const Tensor& affine,
                                   const OptionalTensor& displacement, const OptionalTensor& gain,
                                   const OptionalTensor& bias) {
  const int64_t n = like.size(0);
  PYSEG_CHECK((sizes_of(affine) == Ints{n, dims, dims + 1}), op, ": affine must be ", Ints{n, dims, dims + 1}, ", got ",
              affine.sizes());
  Parameters p{dense_parameter(op, "affine", affine, like, type), {}, {}, {}};
  if (displacement) {
    const Ints sizes = sizes_of(*displacement);
    PYSEG_CHECK(int(sizes.size()) == dims + 2 && sizes[0] == n && sizes[1] == dims, op, ": displacement must be [", n,
                ", ", dims, "] and a grid of ", dims, " axes, got ", sizes);
    check_sides(op, "displacement", sizes, 2);
    p.displacement = dense_parameter(op, "displacement", *displacement, like, type);
  }
  const auto of_channels = [&](const char* name, const OptionalTensor& t, OptionalTensor& to) {
    if (!t) return;
    PYSEG_CHECK((sizes_of(*t) == Ints{n, like.size(1)}), op, ": ", name, " must be ", Ints{n, like.size(1)}, ", got ",
                t->sizes());
    to = dense_parameter(op, name, *t, like, type);
  };
  of_channels("gain", gain, p.gain);
  of_channels("bias", bias, p.bias);
  return p;
}

// ---- labels ----

struct LabelKind {
  bool soft;
  int element_size;
};

template <typename T>
bool fits(int64_t value) {
  return value >= int64_t(std::numeric_limits<T>::min()) && value <= int64_t(std::numeric_limits<T>::max());
}

inline LabelKind check_labels(const Tensor& labels, const Tensor& image, Border border, int64_t ignore_index) {
  check_device(kWarp, "labels", labels, image);
  const Ints sizes = sizes_of(labels);
  Ints expected = sizes_of(image);
  if (float_element(labels)) {
    const auto soft = image.scalar_type() == ScalarType::Byte ? ScalarType::Float : image.scalar_type();
    PYSEG_CHECK(labels.scalar_type() == soft, kWarp,
                ": labels of floating point must be of the image's dtype, float32 for uint8, got ", dtype_name(labels));
    expected[1] = sizes.size() == expected.size() ? sizes[1] : -1;
    PYSEG_CHECK(sizes == expected, kWarp, ": labels of floating point must be [N, K, *S] like the image's ",
                sizes_of(image), ", got ", sizes);
    return {true, 0};
  }
  expected.erase(expected.begin() + 1);
  PYSEG_CHECK(sizes == expected, kWarp, ": labels must be ", expected, ", got ", sizes);
  bool fitting = true;
  switch (labels.scalar_type()) {
    case ScalarType::Bool: fitting = ignore_index == 0 || ignore_index == 1; break;
    case ScalarType::Byte: fitting = fits<uint8_t>(ignore_index); break;
    case ScalarType::Char: fitting = fits<int8_t>(ignore_index); break;
    case ScalarType::Short: fitting = fits<int16_t>(ignore_index); break;
    case ScalarType::Int: fitting = fits<int32_t>(ignore_index); break;
    case ScalarType::Long: break;
    default: throw_error(kWarp, ": labels must be of integers, bool or floating point, got ", dtype_name(labels));
  }
  PYSEG_CHECK(fitting || border != Border::kConstant, kWarp, ": ignore_index must fit labels of ", dtype_name(labels),
              ", got ", ignore_index);
  return {false, int(labels.element_size())};
}

// ---- layouts ----

inline bool is_last(const Tensor& t) { return is_channels_last(t) || is_channels_last_3d(t); }

inline MemoryFormat map_format(int dims, bool last) {
  return !last ? MemoryFormat::Contiguous : dims == 3 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}
inline Tensor new_map(const Tensor& like, ScalarType type, const Ints& size, bool last) {
  return torch::stable::empty(size, type, std::nullopt, like.device(), std::nullopt,
                              map_format(int(size.size()) - 2, last));
}

inline Ints map_size(int64_t images, int64_t channels, const Ints& size) {
  Ints sizes{images, channels};
  sizes.insert(sizes.end(), size.begin(), size.end());
  return sizes;
}

inline int64_t elements_of(const Ints& size) {
  int64_t elements = 1;
  for (const int64_t side : size) elements *= side;
  return elements;
}

// Strides of [N, C, *S] tensors, the last d of three axes at the end.
struct MapStrides {
  int64_t image, channel, axis[kMostDims];
};
inline MapStrides strides_of(const Tensor& t) {
  MapStrides s{t.stride(0), t.stride(1), {}};
  const int dims = int(t.dim()) - 2;
  for (int d = 0; d < dims; ++d) s.axis[kMostDims - dims + d] = t.stride(2 + d);
  return s;
}

// Of a new map, dense in one of the two memory formats: from image to image, channel to channel, pixel to pixel.
struct DenseStrides {
  int64_t image, channel, step;
};
inline DenseStrides dense_strides(int64_t channels, int64_t pixels, bool last) {
  return {channels * pixels, last ? 1 : pixels, last ? channels : 1};
}

// From the first element of an image to its last.
inline int64_t reach_of(const Tensor& t, int first_axis) {
  int64_t reach = 0;
  for (int d = first_axis; d < int(t.dim()); ++d) reach += (t.size(d) - 1) * t.stride(d);
  return reach;
}

// Fills the last entries of arrays of three axes; the others are 1.
inline void set_axes(const Ints& size, int64_t* to) {
  const int dims = int(size.size());
  for (int d = 0; d < kMostDims; ++d) to[d] = d < kMostDims - dims ? 1 : size[d - (kMostDims - dims)];
}

// ---- calls ----

struct WarpCall {
  Element type;
  int dims;
  Ints in;
  Border border, label_border;
  Parameters parameters;
  LabelKind labels;

  // The image and the labels, [0] where there are none.
  std::tuple<Tensor, Tensor> new_outputs(const Tensor& image, const OptionalTensor& given, const Ints& size,
                                         bool float_output) const {
    const bool to_float = type == Element::kUInt8 && float_output;
    Tensor output = new_map(image, to_float ? ScalarType::Float : image.scalar_type(),
                            map_size(image.size(0), image.size(1), size), is_last(image));
    if (!given) return {output, torch::stable::new_empty(image, {0})};
    if (labels.soft)
      return {output,
              new_map(*given, given->scalar_type(), map_size(given->size(0), given->size(1), size), is_last(*given))};
    Ints sizes{image.size(0)};
    sizes.insert(sizes.end(), size.begin(), size.end());
    return {output, torch::stable::new_empty(*given, sizes)};
  }
};

inline WarpCall check_warp(const Tensor& image, const OptionalTensor& labels, const Tensor& affine,
                           const OptionalTensor& displacement, const OptionalTensor& gain, const OptionalTensor& bias,
                           const Ints& size, const std::string& border, const std::string& label_border,
                           int64_t ignore_index) {
  WarpCall call{};
  call.type = check_image(image);
  call.dims = check_map(kWarp, "image", image);
  call.in.assign(image.sizes().begin() + 2, image.sizes().end());
  check_size(kWarp, "size", size, call.dims);
  call.border = check_border(kWarp, "border", border);
  call.label_border = check_border(kWarp, "label_border", label_border);
  call.parameters = check_parameters(kWarp, image, call.dims, call.type, affine, displacement, gain, bias);
  if (labels) call.labels = check_labels(*labels, image, call.label_border, ignore_index);
  return call;
}

struct BackwardCall {
  Element type;
  int dims;
  Ints out;
  Border border;
  Parameters parameters;
};

inline BackwardCall check_warp_backward(const Tensor& grad, const Tensor& affine, const OptionalTensor& displacement,
                                        const OptionalTensor& gain, const Ints& image_size, const std::string& border) {
  const char* op = kWarpBackward;
  const Element type = check_floats(op, "grad", grad);
  const int dims = check_map(op, "grad", grad);
  check_size(op, "image_size", image_size, dims);
  const Border outside = check_border(op, "border", border);
  return {type, dims, Ints(grad.sizes().begin() + 2, grad.sizes().end()), outside,
          check_parameters(op, grad, dims, type, affine, displacement, gain, {})};
}

}  // namespace pyseg::warp
