// warp_to_view and its gradient on the CPU: projections, layouts, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "warp/warp_to_view_check.h"
#include "warp/warp_to_view_cpu_kernel.h"

namespace pyseg::view {
namespace {

const ViewWarpKernelTable& kernels() { return PYSEG_CPU_TABLE(view_warp_kernels); }

Tensor doubles(const Tensor& t) { return torch::stable::to(t, ScalarType::Double); }

std::vector<Projection> projections_of(const Geometry& g) {
  const Tensor key = doubles(g.key_intrinsics), source = doubles(g.source_intrinsics), pose = doubles(g.pose);
  const auto* keys = static_cast<const double*>(key.data_ptr());
  const auto* sources = static_cast<const double*>(source.data_ptr());
  const auto* poses = static_cast<const double*>(pose.data_ptr());
  std::vector<Projection> projections;
  for (int64_t n = 0; n < g.keys * g.views; ++n)
    projections.push_back(projection_of(keys + n / g.views * 9, sources + n * 9, poses + n * 16));
  return projections;
}

ViewDepth depth_of(const Tensor& t) { return {t.numel() > 0 ? t.data_ptr() : nullptr, t.stride(0), is_double(t)}; }

ViewWarpArgs args_of(const Geometry& g, Element type, int64_t channels, bool last,
                     const std::vector<Projection>& projections) {
  ViewWarpArgs a{};
  a.type = type;
  a.keys = g.keys;
  a.views = g.views;
  a.channels = channels;
  a.key_height = g.key_height;
  a.key_width = g.key_width;
  a.visibility = g.visibility;
  a.projection = projections.data();
  a.depth = depth_of(g.depth);
  a.source_depth = depth_of(g.source_depth);
  a.last = last;
  return a;
}

// A pixel takes about as long as 20 multiply-adds, and 4 a channel.
Workers workers_of(const ViewWarpArgs& a) {
  return workers_for((20. + 4. * double(a.channels)) * double(a.keys) * double(a.views) * double(a.key_height) *
                     double(a.key_width));
}

std::tuple<Tensor, Tensor> warp_to_view(Tensor scores, Tensor depth, Tensor key_intrinsics, Tensor source_intrinsics,
                                        Tensor pose, std::optional<Tensor> source_depth, double absolute_tolerance,
                                        double relative_tolerance) {
  const Element type = check_floats(kWarp, "scores", scores);
  PYSEG_CHECK(scores.dim() == 4, kWarp, ": scores must be [N, C, H, W], got ", scores.sizes());
  const Geometry g =
      check_geometry(kWarp, scores, scores.size(0), scores.size(2), scores.size(3), depth, key_intrinsics,
                     source_intrinsics, pose, source_depth, absolute_tolerance, relative_tolerance);
  const bool last = is_channels_last(scores);
  const int64_t channels = scores.size(1);
  Tensor output = new_map(scores, {g.keys, channels, g.key_height, g.key_width}, last);
  Tensor seen = torch::stable::new_empty(scores, {g.keys, g.key_height, g.key_width}, ScalarType::Byte);
  if (seen.numel() == 0) return {output, seen};
  const std::vector<Projection> projections = projections_of(g);
  ViewWarpArgs a = args_of(g, type, channels, last, projections);
  const Tensor from = readable(scores, last);
  a.scores = from.data_ptr();
  a.image_stride = from.stride(0);
  a.channel_stride = from.stride(1);
  a.row_stride = from.stride(2);
  a.column_stride = from.stride(3);
  a.output = output.data_ptr();
  a.seen = static_cast<uint8_t*>(seen.data_ptr());
  const Workers workers = workers_of(a);
  const Workspace scratch(scores, kernels().forward_scratch(a, workers.count));
  kernels().forward(a, scratch.data, workers);
  return {output, seen};
}

Tensor warp_to_view_backward(Tensor grad, Tensor depth, Tensor key_intrinsics, Tensor source_intrinsics, Tensor pose,
                             std::optional<Tensor> source_depth, int64_t height, int64_t width, bool channels_last,
                             double absolute_tolerance, double relative_tolerance) {
  const Element type = check_floats(kWarpBackward, "grad", grad);
  PYSEG_CHECK(pose.dim() == 3, kWarpBackward, ": pose must be [N, 4, 4], got ", pose.sizes());
  const Geometry g = check_geometry(kWarpBackward, grad, pose.size(0), height, width, depth, key_intrinsics,
                                    source_intrinsics, pose, source_depth, absolute_tolerance, relative_tolerance);
  check_grad(grad, g);
  const int64_t channels = grad.size(1);
  Tensor grad_scores = new_map(grad, {g.keys * g.views, channels, height, width}, channels_last);
  if (grad_scores.numel() == 0) return grad_scores;
  const std::vector<Projection> projections = projections_of(g);
  const Tensor from = dense(grad, channels_last);
  ViewWarpArgs a = args_of(g, type, channels, channels_last, projections);
  a.grad = from.data_ptr();
  a.grad_scores = grad_scores.data_ptr();
  const Workers workers = workers_of(a);
  const Workspace scratch(grad, kernels().backward_scratch(a, workers.count));
  kernels().backward(a, scratch.data, workers);
  return grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("warp_to_view", TORCH_BOX(&warp_to_view));
  m.impl("_warp_to_view_backward", TORCH_BOX(&warp_to_view_backward));
}

}  // namespace pyseg::view
