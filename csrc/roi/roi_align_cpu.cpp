// roi_align and multiscale_roi_align on the CPU: the boxes' levels and order, layouts, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "roi/roi_align_cpu_kernel.h"
#include "roi/roi_check.h"
#include "roi/roi_maps.h"

namespace pyseg::roi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const RoiKernelTable& roi_kernels() { return PYSEG_CPU_TABLE(roi_kernels); }

// The arguments as the kernels take them, and what they point into.
class Call {
 public:
  RoiArgs args{};

  // sizes: [N, C, H, W] or [N, C, D, H, W] of each map; maps: none, or as many.
  Call(const char* op, Element type, const std::vector<Ints>& sizes, const Tensors& maps, const Tensor& boxes,
       const Floats& scales, const Sampling& sampling, bool maximum, const std::optional<Pyramid>& pyramid)
      : op_(op), like_(boxes), levels_(sizes.size()) {
    PYSEG_CHECK(scales.size() == sizes.size(), op, ": spatial_scales must have an element for each of ", sizes.size(),
                " maps, got ", scales);
    for (size_t l = 0; l < sizes.size(); ++l) {
      check_scale(op, "spatial_scale", scales[l]);
      const Ints& size = sizes[l];
      const int64_t dims = int64_t(size.size()) - 2;
      RoiLevel& level = levels_[l];
      level = {};
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
    }
    args.type = type;
    args.levels = int64_t(sizes.size());
    args.level = levels_.data();
    args.images = sizes[0][0];
    args.channels = sizes[0][1];
    args.sampling = sampling;
    args.maximum = maximum;
    args.boxes = boxes.size(0);
    args.columns = boxes.size(1);
    const bool wide = type == Element::kDouble;
    boxes_ = torch::stable::contiguous(torch::stable::to(boxes, wide ? ScalarType::Double : ScalarType::Float));
    args.box = boxes_.data_ptr();
    if (wide) {
      arrange(static_cast<const double*>(args.box), pyramid);
    } else {
      arrange(static_cast<const float*>(args.box), pyramid);
    }
    args.allocate = [](void* context, int64_t bytes) { return static_cast<Call*>(context)->allocate(bytes); };
    args.context = this;
  }
  Call(const Call&) = delete;

  RoiLevel& level(int64_t l) { return levels_[l]; }
  Tensor new_boxes() const { return torch::stable::new_zeros(boxes_, boxes_.sizes()); }

  Workers workers() const {
    const double bins = double(args.sampling.bins[0]) * double(args.sampling.bins[1]) * double(args.sampling.bins[2]);
    return workers_for(4 * bins * double(args.boxes) * double(args.channels));
  }

 private:
  // Sorts the boxes by level, image and place: neighbours find each other's elements in the cache.
  template <typename A>
  void arrange(const A* box, const std::optional<Pyramid>& pyramid) {
    struct Key {
      int64_t group;
      A row, column;
      int64_t box;
    };
    constexpr A kBand = 16;  // elements
    const bool rotated = args.sampling.kind == BoxKind::kRotated;
    const int64_t dims = args.sampling.kind == BoxKind::kAligned3d ? 3 : 2;
    box_level_.resize(args.boxes);
    std::vector<Key> keys;
    keys.reserve(args.boxes);
    for (int64_t k = 0; k < args.boxes; ++k) {
      const A* row = box + k * args.columns;
      for (int64_t i = 0; i < args.columns; ++i)
        PYSEG_CHECK(std::isfinite(row[i]), op_, ": boxes must be finite, got ", row[i], " in row ", k);
      PYSEG_CHECK(row[0] >= 0 && row[0] < A(args.images), op_, ": boxes must have batch indices from 0 to ",
                  args.images - 1, ", got ", row[0], " in row ", k);
      const int level = pyramid ? pyramid_level(row, rotated, *pyramid) : 0;
      box_level_[k] = level < args.levels ? level : -1;
      if (box_level_[k] < 0) continue;
      const A y = rotated ? row[2] : (row[2] + row[2 + dims]) / 2, x = rotated ? row[1] : (row[1] + row[1 + dims]) / 2;
      keys.push_back({level * args.images + int64_t(row[0]), std::floor(y * A(levels_[level].scale) / kBand), x, k});
    }
    std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
      return std::tie(a.group, a.row, a.column, a.box) < std::tie(b.group, b.row, b.column, b.box);
    });
    group_.resize(args.levels * args.images + 1);
    for (const Key& key : keys) {
      order_.push_back(key.box);
      ++group_[key.group + 1];
    }
    for (size_t i = 1; i < group_.size(); ++i) group_[i] += group_[i - 1];
    args.box_level = box_level_.data();
    args.order = order_.data();
    args.group = group_.data();
  }

  // Not by many workers at once.
  void* allocate(int64_t bytes) { return scratch_.emplace_back(like_, bytes).data; }

  const char* op_;
  Tensor like_, boxes_;
  std::vector<RoiLevel> levels_;
  std::vector<int32_t> box_level_;
  std::vector<int64_t> order_, group_;
  std::vector<Workspace> scratch_;
};

Tensor forward(const char* op, const char* name, const Tensors& maps, const Tensor& boxes, const Ints& output_size,
               const Floats& scales, int64_t sampling_ratio, bool aligned, const std::string& mode,
               const std::optional<Pyramid>& pyramid) {
  const Element type = check_maps(op, name, maps, boxes);
  const BoxKind kind = check_boxes(op, boxes, maps[0].dim() - 2);
  const Sampling sampling = check_sampling(op, kind, output_size, sampling_ratio, aligned);
  std::vector<Ints> sizes;
  bool last = false;
  for (const Tensor& map : maps) {
    sizes.push_back(sizes_of(map));
    last = last || is_last(map);
  }
  Call call(op, type, sizes, maps, boxes, scales, sampling, check_mode(op, mode), pyramid);
  Ints output_sizes{boxes.size(0), maps[0].size(1)};
  output_sizes.insert(output_sizes.end(), output_size.begin(), output_size.end());
  Tensor output = new_maps(maps[0], output_sizes, last);
  if (output.numel() == 0) return output;
  call.args.output = output.data_ptr();
  call.args.last = last;
  roi_kernels().forward(call.args, call.workers());
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

std::tuple<Tensors, Tensor> roi_align_backward(Tensor grad, Tensors features, Tensor boxes, Ints sizes,
                                               Ints channels_last, Floats spatial_scales, int64_t sampling_ratio,
                                               bool aligned, std::string mode, Floats pyramid, bool need_features,
                                               bool need_boxes) {
  const BackwardArguments checked = check_backward(grad, features, boxes, sizes, channels_last.size(), sampling_ratio,
                                                   aligned, mode, pyramid, need_boxes);
  const std::vector<Ints>& each = checked.sizes;
  Call call(kAlignBackward, checked.type, each, features, boxes, spatial_scales, checked.sampling, checked.maximum,
            checked.pyramid);
  Tensors grads;
  for (size_t l = 0; l < each.size(); ++l) {
    grads.push_back(need_features ? new_maps(grad, each[l], channels_last[l] != 0)
                                  : torch::stable::new_empty(grad, {0}));
    if (!need_features || grads[l].numel() == 0) continue;
    call.level(l).grad = grads[l].data_ptr();
    call.level(l).grad_last = channels_last[l] != 0;
  }
  Tensor grad_boxes = need_boxes ? call.new_boxes() : torch::stable::new_empty(boxes, {0});
  if (need_boxes) call.args.grad_boxes = grad_boxes.data_ptr();
  const bool last = is_dense_last(grad);
  const Tensor dense = last ? grad : torch::stable::contiguous(grad);
  call.args.grad_output = dense.data_ptr();
  call.args.last = last;
  if (each[0][1] > 0) roi_kernels().backward(call.args, call.workers());
  return {grads, need_boxes ? torch::stable::to(grad_boxes, boxes.scalar_type()) : grad_boxes};
}

Tensor crop_masks(Tensor masks, Tensor boxes, Ints size, int64_t sampling_ratio, bool aligned) {
  const Sampling sampling = check_crop(masks, boxes, size, sampling_ratio, aligned);
  const Tensor rows = torch::stable::contiguous(masks), maps = torch::stable::unsqueeze(rows, 1);
  Tensor output = torch::stable::new_empty(masks, {boxes.size(0), size[0], size[1]}, ScalarType::Float);
  if (output.numel() == 0) return output;
  Call call(kCrop, Element::kFloat, {sizes_of(maps)}, {maps}, boxes, {1.}, sampling, false, {});
  call.args.output = output.data_ptr();
  roi_kernels().crop(call.args, call.workers());
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("multiscale_roi_align", TORCH_BOX(&multiscale_roi_align));
  m.impl("_roi_align_backward", TORCH_BOX(&roi_align_backward));
  m.impl("crop_masks", TORCH_BOX(&crop_masks));
}

}  // namespace pyseg::roi
