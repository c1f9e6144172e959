// Checks of the arguments of valve_conv2d and region_gate, the same on every device, and the tensors that they return.
// Messages name operator, argument, expected, got.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/element.h"
#include "common/memory_format.h"
#include "common/tensor_arguments.h"
#include "conv/valve_conv2d_math.h"

namespace pyseg::valve {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr const char* kGate = "region_gate";
constexpr const char* kGateInPlace = "region_gate_";
constexpr const char* kGateBackward = "_region_gate_backward";
constexpr const char* kValve = "valve_conv2d";
constexpr const char* kValveBackward = "_valve_conv2d_backward";

constexpr int64_t kMaxCoordinate = int64_t{1} << 29;  // coordinates are 32-bit numbers on CUDA devices

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

struct Geometry {
  Ints stride, padding, dilation;
};

// The arguments of one call: what the kernels read, and the tensors that it lies in.
struct Call {
  Maps maps{};
  Element type{};
  std::vector<Tensor> kept;
};

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  PYSEG_CHECK(t.scalar_type() == first.scalar_type(), op, ": ", name, " must be ", dtype_name(first),
              " like the first argument, got ", dtype_name(t));
  PYSEG_CHECK(t.is_cuda() == first.is_cuda() && t.get_device_index() == first.get_device_index(), op, ": ", name,
              " must be on the device of the first argument");
}

inline void check_pair(const char* op, const std::string& name, const Ints& pair, int64_t least) {
  PYSEG_CHECK(
      pair.size() == 2 && pair[0] >= least && pair[1] >= least && pair[0] < kMaxCoordinate && pair[1] < kMaxCoordinate,
      op, ": ", name, " must be two integers from ", least, " to 2^29 - 1, got ", pair);
}

// `prefix`: of the names of the geometry's arguments.
inline Window window_of(const char* op, const char* map_name, const char* weight_name, const char* bias_name,
                        const std::string& prefix, const Tensor& map, const Tensor& weight, const OptTensor& bias,
                        const Geometry& g, const Tensor& first, std::vector<Tensor>* kept) {
  PYSEG_CHECK(map.dim() == 4, op, ": ", map_name, " must be [N, C, H, W], got ", map.sizes());
  check_like(op, map_name, map, first);
  PYSEG_CHECK(weight.dim() == 4 && weight.size(2) > 0 && weight.size(3) > 0 && weight.size(1) == map.size(1), op, ": ",
              weight_name, " must be [K, ", map.size(1), ", kH, kW] for ", map_name, " of ", map.size(1),
              " channels, got ", weight.sizes());
  check_like(op, weight_name, weight, first);
  check_pair(op, prefix + "stride", g.stride, 1);
  check_pair(op, prefix + "padding", g.padding, 0);
  check_pair(op, prefix + "dilation", g.dilation, 1);
  for (int d = 0; d < 4; ++d)
    PYSEG_CHECK(map.size(d) < kMaxCoordinate && weight.size(d) < kMaxCoordinate, op, ": ", map_name, " and ",
                weight_name, " must have sizes below 2^29, got ", map.sizes(), " and ", weight.sizes());
  Window w{};
  w.map = map.data_ptr();
  w.channels = map.size(1);
  w.height = map.size(2);
  w.width = map.size(3);
  w.image_stride = map.stride(0);
  w.channel_stride = map.stride(1);
  w.row_stride = map.stride(2);
  w.column_stride = map.stride(3);
  w.kernel_height = weight.size(2);
  w.kernel_width = weight.size(3);
  w.stride_y = g.stride[0];
  w.stride_x = g.stride[1];
  w.padding_y = g.padding[0];
  w.padding_x = g.padding[1];
  w.dilation_y = g.dilation[0];
  w.dilation_x = g.dilation[1];
  w.taps = w.channels * w.kernel_height * w.kernel_width;
  w.weight = kept->emplace_back(torch::stable::contiguous(weight)).data_ptr();
  if (bias) {
    check_like(op, bias_name, *bias, first);
    PYSEG_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": ", bias_name, " must be [", weight.size(0),
                "], got ", bias->sizes());
    w.bias = kept->emplace_back(torch::stable::contiguous(*bias)).data_ptr();
  }
  kept->push_back(map);
  return w;
}

// [N, K, H, W] of the convolution's output.
inline Ints output_size(const char* op, const char* map_name, const Tensor& map, const Tensor& weight,
                        const Geometry& g) {
  Ints size = {map.size(0), weight.size(0), 0, 0};
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = (weight.size(2 + d) - 1) * g.dilation[d] + 1, extent = map.size(2 + d) + 2 * g.padding[d];
    PYSEG_CHECK(extent >= reach, op, ": ", map_name, " with padding ", g.padding, " must reach over ", reach,
                " rows or columns of taps, got ", map.sizes());
    size[2 + d] = (extent - reach) / g.stride[d] + 1;
  }
  return size;
}

// ---- layouts ----

inline MemoryFormat format_of(bool last) { return last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }

inline Tensor new_map(const Tensor& like, const Ints& size, bool last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format_of(last));
}

// From a pixel to the next one.
inline int64_t pixel_stride(const Tensor& t) { return t.stride(t.size(3) > 1 ? 3 : 2); }

// Whether lines lie at even steps, their elements side by side.
inline bool has_lines(const Tensor& t, bool last) {
  const int64_t height = t.size(2), width = t.size(3);
  const bool even = width <= 1 || height <= 1 || t.stride(2) == width * t.stride(3);
  const bool side_by_side = last ? t.size(1) <= 1 || t.stride(1) == 1 : height * width <= 1 || pixel_stride(t) == 1;
  return even && side_by_side;
}

inline Lines lines_of(const Tensor& t, bool last) {
  return {t.data_ptr(), t.stride(0), last ? pixel_stride(t) : t.stride(1)};
}

// Of the memory between a tensor's first and last elements.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto begin = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()); };
  const auto end = [&](const Tensor& t) {
    int64_t last = 0;
    for (int d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return begin(t) + (last + 1) * t.element_size();
  };
  return begin(a) < end(b) && begin(b) < end(a);
}

// Of region_gate_, which reads its other arguments while it writes the features.
inline void check_in_place(const char* op, const Tensor& features, const Tensor& region, const Tensor& weight,
                           const OptTensor& bias, bool last) {
  const int64_t pixels = features.size(2) * features.size(3), image = features.size(1) * pixels;
  const Lines lines = lines_of(features, last);
  const bool dense = has_lines(features, last) && (features.size(0) <= 1 || lines.image_stride == image) &&
                     (last ? pixels <= 1 || lines.line_stride == features.size(1)
                           : features.size(1) <= 1 || lines.line_stride == pixels);
  PYSEG_CHECK(features.numel() == 0 || dense, op, ": features must be contiguous or channels_last, got strides ",
              features.strides());
  PYSEG_CHECK(!overlap(features, region), op, ": region must not overlap features");
  PYSEG_CHECK(!overlap(features, weight), op, ": weight must not overlap features");
  PYSEG_CHECK(!bias || !overlap(features, *bias), op, ": bias must not overlap features");
}

// The tensor itself where the kernels can take it, else a copy.
inline Lines kept_lines(const Tensor& t, bool last, std::vector<Tensor>* kept) {
  const Tensor& usable = kept->emplace_back(has_lines(t, last) ? t : torch::stable::contiguous(t, format_of(last)));
  return lines_of(usable, last);
}

// ---- calls ----

// Of region_gate and its variants: everything but what is written.
inline Call gate_call(const char* op, const Tensor& features, const Tensor& region, const Tensor& weight,
                      const OptTensor& bias, const Geometry& g, bool additive, bool relu) {
  Call call;
  call.type = element_of(op, "features", features);
  PYSEG_CHECK(features.dim() == 4, op, ": features must be [N, K, H, W], got ", features.sizes());
  Maps& m = call.maps;
  m.region = window_of(op, "region", "weight", "bias", "", region, weight, bias, g, features, &call.kept);
  const Ints size = output_size(op, "region", region, weight, g);
  PYSEG_CHECK(sizes_of(features) == size, op, ": features must be ", size,
              " like the output of the region's convolution, got ", features.sizes());
  m.images = size[0];
  m.channels = size[1];
  m.height = size[2];
  m.width = size[3];
  m.last = is_channels_last(features);
  m.additive = additive;
  m.relu = relu;
  if (features.numel() > 0) m.features = kept_lines(features, m.last, &call.kept);
  return call;
}

inline Call valve_call(const char* op, const Tensor& input, const Tensor& region, const Tensor& weight,
                       const OptTensor& bias, const Tensor& valve_weight, const OptTensor& valve_bias,
                       const Geometry& image, const Geometry& valve, bool additive, bool relu) {
  Call call;
  call.type = element_of(op, "input", input);
  Maps& m = call.maps;
  m.image = window_of(op, "input", "weight", "bias", "", input, weight, bias, image, input, &call.kept);
  m.region = window_of(op, "region", "valve_weight", "valve_bias", "valve_", region, valve_weight, valve_bias, valve,
                       input, &call.kept);
  const Ints size = output_size(op, "input", input, weight, image);
  const Ints gate = output_size(op, "region", region, valve_weight, valve);
  PYSEG_CHECK(size == gate, op, ": region and valve_weight must give ", size, " like input and weight, got ", gate);
  m.images = size[0];
  m.channels = size[1];
  m.height = size[2];
  m.width = size[3];
  m.last = is_channels_last(input) || is_channels_last(weight);
  m.additive = additive;
  m.relu = relu;
  return call;
}

inline Ints size_of(const Maps& m) { return {m.images, m.channels, m.height, m.width}; }

inline void take_grad(const char* op, const Tensor& grad, const Tensor& first, Call* call) {
  check_like(op, "grad", grad, first);
  PYSEG_CHECK(sizes_of(grad) == size_of(call->maps), op, ": grad must be ", size_of(call->maps), ", got ",
              grad.sizes());
  if (grad.numel() > 0) call->maps.grad = kept_lines(grad, call->maps.last, &call->kept);
}

// weight [K, C, kH, kW] and bias [K] out of the sums [columns, K], of which they are the ones from `first` on.
inline std::tuple<Tensor, Tensor> gradients_of(const Tensor& sums, int64_t first, const Tensor& weight) {
  const int64_t taps = weight.size(1) * weight.size(2) * weight.size(3);
  const Tensor own = torch::stable::narrow(const_cast<Tensor&>(sums), 0, first, taps + 1);
  Tensor of_weight = torch::stable::new_empty(weight, sizes_of(weight));
  Tensor of_bias = torch::stable::new_empty(weight, {weight.size(0)});
  if (weight.numel() > 0) {
    const Tensor taps_first = torch::stable::narrow(const_cast<Tensor&>(own), 0, 0, taps);
    Tensor flat = torch::stable::view(of_weight, {weight.size(0), taps});
    torch::stable::copy_(flat, torch::stable::transpose(taps_first, 0, 1));
  }
  torch::stable::copy_(of_bias, torch::stable::select(own, 0, taps));
  return {of_weight, of_bias};
}

// _valve_conv2d_backward's results out of the sums of both windows.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> valve_gradients(const Tensor& sums, const Tensor& weight,
                                                                  const Tensor& valve_weight) {
  const auto [of_valve, of_valve_bias] = gradients_of(sums, 0, valve_weight);
  const int64_t valve_taps = valve_weight.size(1) * valve_weight.size(2) * valve_weight.size(3);
  const auto [of_weight, of_bias] = gradients_of(sums, valve_taps + 1, weight);
  return {of_weight, of_bias, of_valve, of_valve_bias};
}

// The results of _region_gate_backward, to begin with zeros or nothing; checks grad and points the call at it and at the
// features' gradient.
struct GateGradients {
  GateGradients(const char* op, const Tensor& grad, const Tensor& of, const Tensor& of_region, const Tensor& of_weight,
                bool need_features, bool need_region, bool need_weight, Call* call)
      : features(need_features ? new_map(of, size_of(call->maps), call->maps.last)
                               : torch::stable::new_empty(of, Ints{0})),
        region(torch::stable::new_zeros(of_region, need_region ? sizes_of(of_region) : Ints{0})),
        weight(torch::stable::new_zeros(of_weight, need_weight ? sizes_of(of_weight) : Ints{0})),
        bias(torch::stable::new_zeros(of_weight, Ints{need_weight ? call->maps.channels : 0})),
        wanted_(grad.numel() > 0 && (need_features || need_region || need_weight)) {
    take_grad(op, grad, of, call);
    if (wanted_ && need_features) call->maps.features_grad = lines_of(features, call->maps.last);
  }
  bool wanted() const { return wanted_; }
  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {features, region, weight, bias}; }

  Tensor features, region, weight, bias;

 private:
  const bool wanted_;
};

}  // namespace pyseg::valve
