// roi_align, multiscale_roi_align, their gradients and crop_masks on CUDA devices: checks, buffers, launches,
// registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cuda_launches.h"
#include "roi/roi_align_backward_cuda.cuh"
#include "roi/roi_align_cuda.cuh"
#include "roi/roi_check.h"
#include "roi/roi_maps.h"

namespace pyseg::roi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostInGrid = 65535;

// The arguments as the kernels take them, and what they point into.
class CudaCall {
 public:
  CudaRoiArgs args{};

  // sizes: [N, C, H, W] or [N, C, D, H, W] of each map; maps: none, or as many.
  CudaCall(const char* op, Element type, const std::vector<Ints>& sizes, const Tensors& maps, const Tensor& boxes,
           const Floats& scales, const Sampling& sampling, bool maximum, const std::optional<Pyramid>& pyramid) {
    PYSEG_CHECK(scales.size() == sizes.size(), op, ": spatial_scales must have an element for each of ", sizes.size(),
                " maps, got ", scales);
    PYSEG_CHECK(sizes.size() <= kMostLevels, op, ": features must be at most ", kMostLevels,
                " maps on CUDA devices, got ", sizes.size());
    for (size_t l = 0; l < sizes.size(); ++l) {
      check_scale(op, "spatial_scale", scales[l]);
      const Ints& size = sizes[l];
      const int64_t dims = int64_t(size.size()) - 2;
      CudaLevel& level = args.level[l];
      level.scale = scales[l];
      for (int axis = 0; axis < kAxes; ++axis)
        level.size[axis] = axis < kAxes - dims ? 1 : size[2 + axis - kAxes + dims];
      if (maps.empty()) continue;
      const Tensor& map = maps[l];
      level.input = map.data_ptr();
      level.stride[0] = map.stride(0);
      level.stride[1] = map.size(1) == 1 ? 1 : map.stride(1);
      for (int axis = 0; axis < kAxes; ++axis)
        level.stride[2 + axis] = axis < kAxes - dims ? 0 : map.stride(2 + axis - kAxes + dims);
      const int64_t bytes = map.element_size();
      level.vectors = level.stride[1] == 1 && reinterpret_cast<uintptr_t>(level.input) % kVectorBytes == 0;
      for (const int64_t stride : {level.stride[0], level.stride[2], level.stride[3], level.stride[4]})
        level.vectors = level.vectors && stride * bytes % kVectorBytes == 0;
    }
    args.levels = int(sizes.size());
    args.images = sizes[0][0];
    args.channels = sizes[0][1];
    args.sampling = sampling;
    args.maximum = maximum;
    args.boxes = boxes.size(0);
    args.columns = boxes.size(1);
    if (pyramid) {
      args.has_pyramid = true;
      args.pyramid = *pyramid;
    }
    wide_ = type == Element::kDouble;
    boxes_ = torch::stable::contiguous(torch::stable::to(boxes, wide_ ? ScalarType::Double : ScalarType::Float));
    args.box = boxes_.data_ptr();
    const int64_t bytes = wide_ ? sizeof(CudaPlan<double>) : sizeof(CudaPlan<float>);
    plans_ = torch::stable::new_empty(boxes, {args.boxes * bytes}, ScalarType::Byte);
    args.plans = plans_.data_ptr();
  }
  CudaCall(const CudaCall&) = delete;

  Tensor new_boxes() const { return torch::stable::new_empty(boxes_, boxes_.sizes()); }

  void plan(const CudaLaunches& launches) const {
    const auto blocks = unsigned((args.boxes + kPlanThreads - 1) / kPlanThreads);
    if (wide_) {
      roi_align_plan<double><<<blocks, kPlanThreads, 0, launches.stream()>>>(args);
    } else {
      roi_align_plan<float><<<blocks, kPlanThreads, 0, launches.stream()>>>(args);
    }
    launches.check(cudaGetLastError());
  }

 private:
  Tensor boxes_, plans_;
  bool wide_ = false;
};

template <typename T, typename Out, BoxKind kKind>
void launch_forward(const CudaRoiArgs& a, const CudaLaunches& launches) {
  const int64_t vector = sizeof(T) == 1 ? 1 : kVectorBytes / int64_t(sizeof(T));
  const int64_t items =
      a.sampling.bins[0] * a.sampling.bins[1] * a.sampling.bins[2] * ((a.channels + vector - 1) / vector);
  const int64_t parts = std::min((items + kForwardThreads - 1) / kForwardThreads, kMostInGrid);
  const dim3 grid(unsigned(a.boxes), unsigned(parts));
  roi_align_forward<T, Out, kKind><<<grid, kForwardThreads, 0, launches.stream()>>>(a);
  launches.check(cudaGetLastError());
}

// Calls f.template operator()<T, kind>() with the type of the maps and the kind of the boxes.
template <typename F>
void with_types(Element type, BoxKind kind, const F& f) {
  const auto with_kind = [&]<typename T>() {
    switch (kind) {
      case BoxKind::kAligned2d: return f.template operator()<T, BoxKind::kAligned2d>();
      case BoxKind::kRotated: return f.template operator()<T, BoxKind::kRotated>();
      case BoxKind::kAligned3d: return f.template operator()<T, BoxKind::kAligned3d>();
    }
  };
  switch (type) {
    case Element::kFloat: return with_kind.template operator()<float>();
    case Element::kDouble: return with_kind.template operator()<double>();
    case Element::kHalf: return with_kind.template operator()<__half>();
    default: return with_kind.template operator()<__nv_bfloat16>();
  }
}

void check_count(const char* op, const Tensor& boxes) {
  PYSEG_CHECK(boxes.size(0) <= INT32_MAX, op, ": boxes must be fewer than 2^31, got ", boxes.size(0));
}

Tensor forward(const char* op, const char* name, const Tensors& maps, const Tensor& boxes, const Ints& output_size,
               const Floats& scales, int64_t sampling_ratio, bool aligned, const std::string& mode,
               const std::optional<Pyramid>& pyramid) {
  const Element type = check_maps(op, name, maps, boxes);
  const BoxKind kind = check_boxes(op, boxes, maps[0].dim() - 2);
  check_count(op, boxes);
  const Sampling sampling = check_sampling(op, kind, output_size, sampling_ratio, aligned);
  const bool maximum = check_mode(op, mode);
  const CudaLaunches launches(op, maps[0]);
  std::vector<Ints> sizes;
  bool last = false;
  for (const Tensor& map : maps) {
    sizes.push_back(sizes_of(map));
    last = last || is_last(map);
  }
  CudaCall call(op, type, sizes, maps, boxes, scales, sampling, maximum, pyramid);
  Ints output_sizes{boxes.size(0), maps[0].size(1)};
  output_sizes.insert(output_sizes.end(), output_size.begin(), output_size.end());
  Tensor output = new_maps(maps[0], output_sizes, last);
  if (output.numel() == 0) return output;
  call.args.output = output.data_ptr();
  call.args.last = last;
  call.plan(launches);
  with_types(type, kind, [&]<typename T, BoxKind kKind>() { launch_forward<T, T, kKind>(call.args, launches); });
  return output;
}

Tensor roi_align(Tensor input, Tensor boxes, Ints output_size, double spatial_scale, int64_t sampling_ratio,
                 bool aligned, std::string mode) {
  return forward(kAlign, "input", {input}, boxes, output_size, {spatial_scale}, sampling_ratio, aligned, mode, {});
}

Tensor multiscale_roi_align(Tensors features, Tensor boxes, Ints output_size, Floats spatial_scales,
                            int64_t sampling_ratio, bool aligned, std::string mode, int64_t least_level,
                            int64_t most_level, double canonical_size, double canonical_level, Floats epsilon) {
  const Pyramid pyramid = check_pyramid(kMultiscale, least_level, most_level, canonical_size, canonical_level, epsilon);
  PYSEG_CHECK(features.empty() || features[0].dim() != 5, kMultiscale, ": features must be [N, C, H, W]");
  return forward(kMultiscale, "features", features, boxes, output_size, spatial_scales, sampling_ratio, aligned, mode,
                 pyramid);
}

template <typename T, BoxKind kKind>
void launch_grad_maps(const CudaRoiArgs& a, int64_t tiles, const CudaLaunches& launches) {
  const dim3 grid(unsigned(tiles), unsigned((a.channels + kTileChannels - 1) / kTileChannels));
  roi_align_grad_maps<T, kKind><<<grid, kTileChannels, 0, launches.stream()>>>(a);
  launches.check(cudaGetLastError());
}

template <typename T, BoxKind kKind>
void launch_grad_boxes(const CudaRoiArgs& a, const CudaLaunches& launches) {
  roi_align_grad_boxes<T, kKind><<<unsigned(a.boxes), kBoxThreads, 0, launches.stream()>>>(a);
  launches.check(cudaGetLastError());
}

std::tuple<Tensors, Tensor> roi_align_backward(Tensor grad, Tensors features, Tensor boxes, Ints sizes,
                                               Ints channels_last, Floats spatial_scales, int64_t sampling_ratio,
                                               bool aligned, std::string mode, Floats pyramid, bool need_features,
                                               bool need_boxes) {
  const char* op = kAlignBackward;
  const BackwardArguments checked = check_backward(grad, features, boxes, sizes, channels_last.size(), sampling_ratio,
                                                   aligned, mode, pyramid, need_boxes);
  check_same_device(op, "boxes", boxes, grad);
  for (const Tensor& map : features) check_same_device(op, "features", map, grad);
  check_count(op, boxes);
  PYSEG_CHECK(grad.size(1) <= kMostInGrid * kTileChannels, op, ": grad must have at most ", kMostInGrid * kTileChannels,
              " channels on CUDA devices, got ", grad.size(1));
  const CudaLaunches launches(op, grad);
  CudaCall call(op, checked.type, checked.sizes, features, boxes, spatial_scales, checked.sampling, checked.maximum,
                checked.pyramid);
  Tensors grads;
  int64_t tiles = 0;
  for (size_t l = 0; l < checked.sizes.size(); ++l) {
    grads.push_back(need_features ? new_maps(grad, checked.sizes[l], channels_last[l] != 0)
                                  : torch::stable::new_empty(grad, {0}));
    CudaLevel& level = call.args.level[l];
    level.first_tile = tiles;
    level.grad_last = channels_last[l] != 0;
    if (need_features && grads[l].numel() > 0) {
      level.grad = grads[l].data_ptr();
      tiles += call.args.images * level.size[kZ] * ((level.size[kY] + kTile - 1) / kTile) *
               ((level.size[kX] + kTile - 1) / kTile);
    }
  }
  PYSEG_CHECK(tiles <= INT32_MAX, op, ": features must have fewer than 2^31 tiles of ", kTile, " x ", kTile,
              " elements on CUDA devices, got ", tiles);
  Tensor grad_boxes = need_boxes ? call.new_boxes() : torch::stable::new_empty(boxes, {0});
  const bool last = is_dense_last(grad);
  const Tensor dense = last ? grad : torch::stable::contiguous(grad);
  call.args.grad_output = dense.data_ptr();
  call.args.last = last;
  call.args.grad_boxes = grad_boxes.data_ptr();
  if (boxes.size(0) > 0) call.plan(launches);
  with_types(checked.type, checked.kind, [&]<typename T, BoxKind kKind>() {
    if (tiles > 0) launch_grad_maps<T, kKind>(call.args, tiles, launches);
    if (need_boxes && boxes.size(0) > 0) launch_grad_boxes<T, kKind>(call.args, launches);
  });
  return {grads, need_boxes ? torch::stable::to(grad_boxes, boxes.scalar_type()) : grad_boxes};
}

Tensor crop_masks(Tensor masks, Tensor boxes, Ints size, int64_t sampling_ratio, bool aligned) {
  const Sampling sampling = check_crop(masks, boxes, size, sampling_ratio, aligned);
  check_count(kCrop, boxes);
  const CudaLaunches launches(kCrop, masks);
  const Tensor maps = torch::stable::unsqueeze(masks, 1);
  Tensor output = torch::stable::new_empty(masks, {boxes.size(0), size[0], size[1]}, ScalarType::Float);
  if (output.numel() == 0) return output;
  CudaCall call(kCrop, Element::kFloat, {sizes_of(maps)}, {maps}, boxes, {1.}, sampling, false, {});
  call.args.output = output.data_ptr();
  call.plan(launches);
  launch_forward<uint8_t, float, BoxKind::kAligned2d>(call.args, launches);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align));
  m.impl("_roi_align_backward", TORCH_BOX(&roi_align_backward));
  m.impl("crop_masks", TORCH_BOX(&crop_masks));
}

}  // namespace pyseg::roi
