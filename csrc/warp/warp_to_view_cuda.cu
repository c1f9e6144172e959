// warp_to_view and its gradient on CUDA devices: checks, buffers, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cub/device/device_radix_sort.cuh>

#include <bit>
#include <tuple>

#include "common/cuda_launches.h"
#include "warp/warp_to_view_check.h"
#include "warp/warp_to_view_cuda.cuh"

namespace pyseg::view {
namespace {

// Calls f.template operator()<T>() with the type of the elements.
template <typename F>
void with_element(Element type, const F& f) {
  switch (type) {
    case Element::kFloat: return f.template operator()<float>();
    case Element::kDouble: return f.template operator()<double>();
    case Element::kHalf: return f.template operator()<__half>();
    default: return f.template operator()<__nv_bfloat16>();
  }
}

unsigned grid_size(const char* op, int64_t blocks) {
  PYSEG_CHECK(blocks <= INT32_MAX, op, ": inputs must need fewer than 2^31 blocks of threads on CUDA devices, got ",
              blocks);
  return unsigned(blocks);
}

int64_t blocks_for(int64_t items) { return (items + kThreads - 1) / kThreads; }

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

CudaDepth depth_of(const Tensor& t) { return {t.numel() > 0 ? t.data_ptr() : nullptr, t.stride(0), is_double(t)}; }

Matrices matrices_of(const Tensor& t) { return {t.data_ptr(), is_double(t)}; }

// The arguments as the kernels take them, and the projections that they point to.
class CudaCall {
 public:
  CudaViews args;

  CudaCall(const char* op, const Geometry& g, int64_t channels, const CudaLaunches& launches)
      : args{.keys = g.keys,
             .views = g.views,
             .channels = channels,
             .key_width = g.key_width,
             .key_pixels = g.key_height * g.key_width,
             .visibility = g.visibility,
             .depth = depth_of(g.depth),
             .source_depth = depth_of(g.source_depth)},
        op_(op),
        projections_(
            torch::stable::new_empty(g.depth, {g.keys * g.views * int64_t(sizeof(Projection))}, ScalarType::Byte)) {
    auto* to = static_cast<Projection*>(projections_.data_ptr());
    args.projection = to;
    const int64_t images = g.keys * g.views;
    if (images == 0) return;
    view_projections<<<grid_size(op, blocks_for(images)), kThreads, 0, launches.stream()>>>(
        matrices_of(g.key_intrinsics), matrices_of(g.source_intrinsics), matrices_of(g.pose), images, g.views, to);
    launches.check(cudaGetLastError());
  }
  CudaCall(const CudaCall&) = delete;

  // f(grid, blocks) for threads for `items` of each of `images`, times chunks of channels.
  template <typename F>
  void launch(int64_t items, int64_t images, int64_t chunks, const CudaLaunches& launches, const F& f) const {
    const ViewGrid grid{unsigned(grid_size(op_, blocks_for(items))), unsigned(chunks)};
    f(grid, grid_size(op_, blocks_for(items) * chunks * images));
    launches.check(cudaGetLastError());
  }

 private:
  const char* op_;
  Tensor projections_;
};

std::tuple<Tensor, Tensor> warp_to_view(Tensor scores, Tensor depth, Tensor key_intrinsics, Tensor source_intrinsics,
                                        Tensor pose, std::optional<Tensor> source_depth, double absolute_tolerance,
                                        double relative_tolerance) {
  const Element type = check_floats(kWarp, "scores", scores);
  PYSEG_CHECK(scores.dim() == 4, kWarp, ": scores must be [N, C, H, W], got ", scores.sizes());
  const Geometry g =
      check_geometry(kWarp, scores, scores.size(0), scores.size(2), scores.size(3), depth, key_intrinsics,
                     source_intrinsics, pose, source_depth, absolute_tolerance, relative_tolerance);
  const CudaLaunches launches(kWarp, scores);
  const bool last = is_channels_last(scores);
  const int64_t channels = scores.size(1);
  Tensor output = new_map(scores, {g.keys, channels, g.key_height, g.key_width}, last);
  Tensor seen = torch::stable::new_empty(scores, {g.keys, g.key_height, g.key_width}, ScalarType::Byte);
  if (seen.numel() == 0) return {output, seen};
  CudaCall call(kWarp, g, channels, launches);
  CudaViews& a = call.args;
  const Tensor read = readable(scores, last);
  a.image_stride = read.stride(0);
  a.channel_stride = read.stride(1);
  a.row_stride = read.stride(2);
  a.column_stride = read.stride(3);
  const int64_t chunks = channels > 0 ? (channels + kChunk - 1) / kChunk : 1;  // without channels there are counts
  with_element(type, [&]<typename T>() {
    constexpr int kVec = kVectorBytes / int(sizeof(T));
    const auto* from = static_cast<const T*>(read.data_ptr());
    auto* to = static_cast<T*>(output.data_ptr());
    auto* count = static_cast<uint8_t*>(seen.data_ptr());
    bool whole = is_aligned(from) && channels % kVec == 0;
    for (const int64_t stride : {a.image_stride, a.row_stride, a.column_stride}) whole = whole && stride % kVec == 0;
    call.launch(a.key_pixels, a.keys, chunks, launches, [&](ViewGrid grid, unsigned blocks) {
      if (!last) {
        view_warp_planes<T><<<blocks, kThreads, 0, launches.stream()>>>(a, grid, from, to, count);
      } else if (whole) {
        view_warp_pixels<T, kVec><<<blocks, kThreads, 0, launches.stream()>>>(a, grid, from, to, count);
      } else {
        view_warp_pixels<T, 1><<<blocks, kThreads, 0, launches.stream()>>>(a, grid, from, to, count);
      }
    });
  });
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
  const CudaLaunches launches(kWarpBackward, grad);
  const int64_t channels = grad.size(1), images = g.keys * g.views;
  Tensor grad_scores = new_map(grad, {images, channels, height, width}, channels_last);
  if (grad_scores.numel() == 0) return grad_scores;
  CudaCall call(kWarpBackward, g, channels, launches);
  const CudaViews& a = call.args;
  const int64_t pixels = images * a.key_pixels, elements = images * height * width;
  PYSEG_CHECK(pixels < INT32_MAX && elements < INT32_MAX, kWarpBackward,
              ": grad and scores must have fewer than 2^31 pixels on CUDA devices, got ", pixels, " and ", elements);

  // 1. The pixels' cells, sorted.
  const int64_t weight_bytes = type == Element::kDouble ? sizeof(Weights<double>) : sizeof(Weights<float>);
  const Tensor words = torch::stable::new_empty(grad, {4 * pixels}, ScalarType::Int);
  Tensor rows = torch::stable::new_empty(grad, {2 * elements}, ScalarType::Int);
  const Tensor weights = torch::stable::new_empty(grad, {pixels * weight_bytes}, ScalarType::Byte);
  auto* word = static_cast<uint32_t*>(words.data_ptr());
  auto* row = static_cast<uint32_t*>(rows.data_ptr());
  launches.check(cudaMemsetAsync(row, 0, size_t(2 * elements) * sizeof(uint32_t), launches.stream()));
  const Tensor from = dense(grad, channels_last);

  with_element(type, [&]<typename T>() {
    using A = Accumulator<T>;
    const CellTable<A> table{.cell = word,
                             .sorted_cell = word + pixels,
                             .pixel = word + 2 * pixels,
                             .sorted_pixel = word + 3 * pixels,
                             .weights = static_cast<Weights<A>*>(weights.data_ptr()),
                             .first = row,
                             .last = row + elements,
                             .pixels = uint32_t(pixels),
                             .elements = uint32_t(elements)};
    const unsigned blocks = grid_size(kWarpBackward, blocks_for(pixels));
    view_cells<A><<<blocks, kThreads, 0, launches.stream()>>>(a, table);
    launches.check(cudaGetLastError());
    size_t bytes = 0;
    const auto sort = [&](void* temporary) {
      launches.check(cub::DeviceRadixSort::SortPairs(temporary, bytes, table.cell, table.sorted_cell, table.pixel,
                                                     table.sorted_pixel, int(pixels), 0,
                                                     int(std::bit_width(uint32_t(elements))), launches.stream()));
    };
    sort(nullptr);
    const Tensor temporary = torch::stable::new_empty(grad, {int64_t(bytes)}, ScalarType::Byte);
    sort(temporary.data_ptr());
    view_rows<A><<<blocks, kThreads, 0, launches.stream()>>>(table);
    launches.check(cudaGetLastError());

    // 2. What each element was read by.
    constexpr int kVec = kVectorBytes / int(sizeof(T));
    const auto* of = static_cast<const T*>(from.data_ptr());
    auto* to = static_cast<T*>(grad_scores.data_ptr());
    const int64_t size = height * width;
    if (!channels_last) {
      call.launch(size, images, (channels + kChunk - 1) / kChunk, launches, [&](ViewGrid grid, unsigned all) {
        view_gather_planes<T><<<all, kThreads, 0, launches.stream()>>>(a, grid, table, of, to);
      });
    } else if (is_aligned(of) && channels % kVec == 0) {
      call.launch(size * (channels / kVec), images, 1, launches, [&](ViewGrid grid, unsigned all) {
        view_gather_pixels<T, kVec><<<all, kThreads, 0, launches.stream()>>>(a, grid, table, of, to);
      });
    } else {
      call.launch(size * channels, images, 1, launches, [&](ViewGrid grid, unsigned all) {
        view_gather_pixels<T, 1><<<all, kThreads, 0, launches.stream()>>>(a, grid, table, of, to);
      });
    }
  });
  return grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("warp_to_view", TORCH_BOX(&warp_to_view));
  m.impl("_warp_to_view_backward", TORCH_BOX(&warp_to_view_backward));
}

}  // namespace pyseg::view
