// joint_warp and its gradient on CUDA devices: checks, buffers, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>

#include "common/cuda_launches.h"
#include "warp/joint_warp_backward_cuda.cuh"
#include "warp/joint_warp_check.h"

namespace pyseg::warp {
namespace {

constexpr int64_t kMostBlocks = INT32_MAX;
constexpr int64_t kMostShared = 48 << 10;

// Calls f.template operator()<T>() with the type of the elements.
template <typename F>
void with_floats(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f.template operator()<float>();
    case Element::kDouble: return f.template operator()<double>();
    case Element::kHalf: return f.template operator()<__half>();
    default: return f.template operator()<__nv_bfloat16>();
  }
}

unsigned grid_size(const char* op, int64_t blocks) {
  PYSEG_CHECK(blocks <= kMostBlocks, op, ": image must need fewer than 2^31 blocks of threads on CUDA devices, got ",
              blocks);
  return unsigned(blocks);
}

template <typename A, int kDims>
CudaGeometry<A, kDims> geometry_of(const char* op, int64_t images, const Ints& in, const Ints& out, const Parameters& p,
                                   double cubic) {
  CudaGeometry<A, kDims> g{};
  g.images = images;
  g.rows = g.grid_points = 1;
  for (int d = 0; d < kDims; ++d) {
    g.in[d] = in[d];
    g.out[d] = out[d];
    if (d < kDims - 1) g.rows *= out[d];
    const int64_t count = p.displacement ? p.displacement->size(2 + d) : 1;
    g.grid[d] = grid_axis<A>(count, out[d]);
    g.grid_points *= count;
  }
  g.row_tiles = (g.rows + kTileRows - 1) / kTileRows;
  g.column_tiles = (out[kDims - 1] + kTileColumns - 1) / kTileColumns;
  g.affine = static_cast<const A*>(p.affine.data_ptr());
  if (p.displacement) g.displacement = static_cast<const A*>(p.displacement->data_ptr());
  g.cubic = A(cubic);
  constexpr int64_t kMostPoints = kMostShared / (kTileRows * kDims * int64_t(sizeof(A)));
  PYSEG_CHECK(g.grid[kDims - 1].count <= kMostPoints && g.grid_points <= INT32_MAX, op,
              ": displacement must have at most ", kMostPoints, " control points along the last axis on CUDA devices, ",
              "got ", g.grid[kDims - 1].count);
  return g;
}

template <typename A, int kDims>
CudaAxes<A, kDims> axes_of(const Ints& in, Border border) {
  CudaAxes<A, kDims> axes{{}, border == Border::kReflect, border == Border::kConstant};
  for (int d = 0; d < kDims; ++d) axes.axis[d] = image_axis<A>(in[d], border);
  return axes;
}

template <typename A, int kDims>
unsigned tiles_of(const char* op, const CudaGeometry<A, kDims>& g) {
  return grid_size(op, g.images * g.row_tiles * g.column_tiles);
}

template <typename A, int kDims>
size_t shared_bytes(const CudaGeometry<A, kDims>& g) {
  return g.displacement == nullptr ? 0 : kTileRows * kDims * size_t(g.grid[kDims - 1].count) * sizeof(A);
}

// ---- forward ----

struct ForwardCall {
  const CudaLaunches& launches;
  const Parameters& parameters;
  int64_t images;
  Ints in, out;
  double cubic;
};

struct LabelCall {
  int element_size = 0;
  const Tensor* input = nullptr;
  const Tensor* output = nullptr;
  Border border = Border::kReflect;
  int64_t ignore_index = 0;
};

template <typename T, typename Output, int kDims>
void launch_forward(const ForwardCall& call, const Tensor& input, const Tensor& output, bool last, Border border,
                    double fill, bool factors, const LabelCall& labels) {
  using A = Accumulator<T>;
  const auto g = geometry_of<A, kDims>(kWarp, call.images, call.in, call.out, call.parameters, call.cubic);
  CudaMap<T, Output, kDims> map{};
  map.channels = input.size(1);
  map.input = static_cast<const T*>(input.data_ptr());
  map.image_stride = input.stride(0);
  map.channel_stride = input.stride(1);
  for (int d = 0; d < kDims; ++d) map.stride[d] = input.stride(2 + d);
  map.output = static_cast<Output*>(output.data_ptr());
  const DenseStrides to = dense_strides(map.channels, elements_of(call.out), last);
  map.output_image_stride = to.image;
  map.output_channel_stride = to.channel;
  map.output_step = to.step;
  map.axes = axes_of<A, kDims>(call.in, border);
  map.axes.constant = map.axes.constant && fill != 0;
  map.fill = A(fill);
  if (factors && call.parameters.gain) map.gain = static_cast<const A*>(call.parameters.gain->data_ptr());
  if (factors && call.parameters.bias) map.bias = static_cast<const A*>(call.parameters.bias->data_ptr());
  CudaLabels<A, kDims> nearest{};
  nearest.element_size = labels.element_size;
  if (labels.element_size > 0) {
    nearest.input = labels.input->data_ptr();
    nearest.image_stride = labels.input->stride(0);
    for (int d = 0; d < kDims; ++d) nearest.stride[d] = labels.input->stride(1 + d);
    nearest.output = labels.output->data_ptr();
    nearest.axes = axes_of<A, kDims>(call.in, labels.border);
    nearest.ignore_index = labels.ignore_index;
  }
  joint_warp_forward<T, Output, kDims>
      <<<tiles_of(kWarp, g), kTileThreads, shared_bytes(g), call.launches.stream()>>>(g, map, nearest);
  call.launches.check(cudaGetLastError());
}

template <int kDims>
void launch_typed(const ForwardCall& call, const Tensor& input, const Tensor& output, bool last, Border border,
                  double fill, bool factors, const LabelCall& labels) {
  if (input.scalar_type() != ScalarType::Byte) {
    with_floats(*float_element(input), [&]<typename T>() {
      launch_forward<T, T, kDims>(call, input, output, last, border, fill, factors, labels);
    });
  } else if (output.scalar_type() == ScalarType::Byte) {
    launch_forward<uint8_t, uint8_t, kDims>(call, input, output, last, border, fill, factors, labels);
  } else {
    launch_forward<uint8_t, float, kDims>(call, input, output, last, border, fill, factors, labels);
  }
}

std::tuple<Tensor, Tensor> joint_warp(Tensor image, OptionalTensor labels, Tensor affine, OptionalTensor displacement,
                                      OptionalTensor gain, OptionalTensor bias, Ints size, std::string border,
                                      double fill, std::string label_border, int64_t ignore_index, double cubic,
                                      bool float_output) {
  const WarpCall call =
      check_warp(image, labels, affine, displacement, gain, bias, size, border, label_border, ignore_index);
  const CudaLaunches launches(kWarp, image);
  const auto [output, label_output] = call.new_outputs(image, labels, size, float_output);
  const ForwardCall forward{launches, call.parameters, image.size(0), call.in, size, cubic};
  const auto launch = [&](const Tensor& from, const Tensor& to, bool last, Border b, double filled, bool factors,
                          const LabelCall& nearest) {
    if (call.dims == 2) {
      launch_typed<2>(forward, from, to, last, b, filled, factors, nearest);
    } else {
      launch_typed<3>(forward, from, to, last, b, filled, factors, nearest);
    }
  };
  LabelCall nearest;
  if (labels && !call.labels.soft && label_output.numel() > 0)
    nearest = {call.labels.element_size, &*labels, &label_output, call.label_border, ignore_index};
  if (output.numel() > 0 || nearest.element_size > 0)
    launch(image, output, is_last(image), call.border, fill, true, nearest);
  // Soft labels are an image of their own, at places of the same bits.
  if (labels && call.labels.soft && label_output.numel() > 0)
    launch(*labels, label_output, is_last(*labels), call.label_border, 0, false, {});
  return {output, label_output};
}

// ---- backward ----

template <typename T, int kDims>
void run_backward(const Tensor& grad, bool grad_last, const Tensor& output, bool last, const Parameters& p,
                  const Ints& in, const Ints& out, Border border, double cubic, const CudaLaunches& launches) {
  using A = Accumulator<T>;
  const char* op = kWarpBackward;
  const int64_t images = grad.size(0), channels = grad.size(1);
  CudaBackward<A, kDims> a{};
  a.axes = axes_of<A, kDims>(in, border);
  a.in_pixels = elements_of(in);
  a.out_pixels = elements_of(out);
  a.channels = channels;
  a.channel_groups = (channels + kGatherChannels - 1) / kGatherChannels;
  const DenseStrides from = dense_strides(channels, a.out_pixels, grad_last);
  a.grad_image_stride = from.image;
  a.grad_channel_stride = from.channel;
  a.grad_step = from.step;
  const DenseStrides to = dense_strides(channels, a.in_pixels, last);
  a.image_stride = to.image;
  a.channel_stride = to.channel;
  a.step = to.step;

  // Images at a time whose pixels and cells have numbers of 31 bits.
  const int64_t largest = std::max(a.in_pixels, a.out_pixels);
  PYSEG_CHECK(largest < INT32_MAX, op, ": images must have fewer than 2^31 - 1 elements on CUDA devices, got ",
              largest);
  const int64_t part = std::min(images, (INT32_MAX - 1) / largest), pixels = part * a.out_pixels;
  const auto ints = [&](int64_t count) { return torch::stable::new_empty(grad, {count}, ScalarType::Int); };
  const Tensor keys = ints(pixels), numbers = ints(pixels), sorted_keys = ints(pixels), sorted_numbers = ints(pixels);
  const Tensor starts = ints(part * a.in_pixels + 1);
  const Tensor places = torch::stable::new_empty(grad, {kDims * pixels}, computed_in(check_floats(op, "grad", grad)));
  const auto words = [](const Tensor& t) { return static_cast<uint32_t*>(t.data_ptr()); };
  a.places = static_cast<A*>(places.data_ptr());
  a.keys = words(keys);
  a.pixels = words(numbers);
  a.sorted_keys = words(sorted_keys);
  a.sorted_pixels = words(sorted_numbers);
  a.starts = words(starts);
  const auto sort = [&](void* temporary, size_t& bytes, int64_t count, int bits) {
    launches.check(cub::DeviceRadixSort::SortPairs(temporary, bytes, a.keys, words(sorted_keys), a.pixels,
                                                   words(sorted_numbers), int(count), 0, bits, launches.stream()));
  };
  size_t bytes = 0;
  sort(nullptr, bytes, pixels, 32);
  const Tensor temporary = torch::stable::new_empty(grad, {int64_t(bytes)}, ScalarType::Byte);

  for (int64_t first = 0; first < images; first += part) {
    auto g = geometry_of<A, kDims>(op, std::min(part, images - first), in, out, p, cubic);
    g.affine += first * kDims * (kDims + 1);
    if (g.displacement != nullptr) g.displacement += first * kDims * g.grid_points;
    a.geometry = g;
    a.grad = static_cast<const T*>(grad.data_ptr()) + first * a.grad_image_stride;
    a.grad_image = static_cast<T*>(output.data_ptr()) + first * a.image_stride;
    a.gain = p.gain ? static_cast<const A*>(p.gain->data_ptr()) + first * channels : nullptr;
    joint_warp_cells<A, kDims><<<tiles_of(op, g), kTileThreads, shared_bytes(g), launches.stream()>>>(a);
    launches.check(cudaGetLastError());
    const int64_t cells = g.images * a.in_pixels;
    int bits = 1;
    while (cells >> bits) ++bits;
    sort(temporary.data_ptr(), bytes, g.images * a.out_pixels, bits);
    const auto blocks = [&](int64_t threads) { return grid_size(op, (threads + kGatherThreads - 1) / kGatherThreads); };
    joint_warp_starts<A, kDims><<<blocks(cells + 1), kGatherThreads, 0, launches.stream()>>>(a);
    launches.check(cudaGetLastError());
    joint_warp_gather<T, kDims><<<blocks(cells * a.channel_groups), kGatherThreads, 0, launches.stream()>>>(a);
    launches.check(cudaGetLastError());
  }
}

Tensor joint_warp_backward(Tensor grad, Tensor affine, OptionalTensor displacement, OptionalTensor gain,
                           Ints image_size, std::string border, double cubic, bool channels_last) {
  const BackwardCall call = check_warp_backward(grad, affine, displacement, gain, image_size, border);
  const CudaLaunches launches(kWarpBackward, grad);
  const Tensor output =
      new_map(grad, grad.scalar_type(), map_size(grad.size(0), grad.size(1), image_size), channels_last);
  if (output.numel() == 0) return output;
  const bool grad_last = is_last(grad);
  const Tensor dense = torch::stable::contiguous(grad, map_format(call.dims, grad_last));
  with_floats(call.type, [&]<typename T>() {
    if (call.dims == 2) {
      run_backward<T, 2>(dense, grad_last, output, channels_last, call.parameters, image_size, call.out, call.border,
                         cubic, launches);
    } else {
      run_backward<T, 3>(dense, grad_last, output, channels_last, call.parameters, image_size, call.out, call.border,
                         cubic, launches);
    }
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("joint_warp", TORCH_BOX(&joint_warp));
  m.impl("_joint_warp_backward", TORCH_BOX(&joint_warp_backward));
}

}  // namespace pyseg::warp
