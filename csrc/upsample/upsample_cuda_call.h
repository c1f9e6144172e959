// The arguments of this family's CUDA kernels, their tables, and launches that several operators share. For .cu files.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cuda_launches.h"
#include "upsample/upsample_check.h"
#include "upsample/upsample_concat_cuda.cuh"

namespace pyseg::upsample {

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

inline unsigned grid_size(const char* op, int64_t blocks) {
  PYSEG_CHECK(blocks <= INT32_MAX, op, ": inputs must need fewer than 2^31 blocks of threads on CUDA devices, got ",
              blocks);
  return unsigned(blocks);
}

class CudaCall {
 public:
  CudaUpsampleArgs args{};
  bool last;

  // sizes: [N, C_i, H_i, W_i] of each map.
  CudaCall(const char* op, const Tensor& like, Element type, const std::vector<Ints>& sizes, int64_t height,
           int64_t width, bool channels_last, bool align, const std::optional<Floats>& factors)
      : last(channels_last), op_(op), type_(type) {
    PYSEG_CHECK(sizes.size() <= kMostMaps, op, ": inputs must be at most ", kMostMaps, " maps on CUDA devices, got ",
                sizes.size());
    args.images = sizes[0][0];
    args.height = height;
    args.width = width;
    args.maps = int(sizes.size());
    const int64_t tap_bytes = sizeof(CudaTap<double>);
    static_assert(sizeof(CudaTap<double>) == sizeof(CudaTap<float>));
    tables_ = torch::stable::new_empty(like, {args.maps * (height + width) * tap_bytes}, ScalarType::Byte);
    auto* table = static_cast<char*>(tables_.data_ptr());
    for (int l = 0; l < args.maps; ++l) {
      CudaMap& map = args.map[l];
      map.channels = sizes[l][1];
      map.height = sizes[l][2];
      map.width = sizes[l][3];
      map.first_channel = args.channels;
      args.channels += map.channels;
      map.row_axis = axis_of(map.height, height, align, factors ? (*factors)[0] : 0);
      map.column_axis = axis_of(map.width, width, align, factors ? (*factors)[1] : 0);
      map.copied_rows = is_copied(map.row_axis);
      map.copied_columns = is_copied(map.column_axis);
      map.rows = table;
      map.columns = table + height * tap_bytes;
      table += (height + width) * tap_bytes;
    }
  }
  CudaCall(const CudaCall&) = delete;

  void set_inputs(const Tensors& inputs) { point_at_inputs(inputs, last, args.map, &kept_); }
  Tensors new_gradients(const std::vector<Ints>& sizes, const Tensor& like) {
    return new_gradients_of(sizes, like, last, args.map);
  }

  void launch_taps(const CudaLaunches& launches) const {
    if (type_ == Element::kDouble) {
      launch_taps_of<double>(launches);
    } else {
      launch_taps_of<float>(launches);
    }
  }

  // A thread for each column and `vector` channels of a map, `strips` times an image.
  GridShape shape_of(const CudaMap& map, int64_t width, int vector, int64_t strips) const {
    const int64_t channels = (map.channels + vector - 1) / vector, items = channels * width;
    PYSEG_CHECK(items <= INT32_MAX - kThreadsOfBlock, op_, ": inputs must have fewer than 2^31 columns x channels on ",
                "CUDA devices, got ", items);
    const int64_t blocks = (items + kThreadsOfBlock - 1) / kThreadsOfBlock;
    return {unsigned(last ? channels : width), unsigned(items), unsigned(blocks), unsigned(strips)};
  }
  unsigned blocks_of(const GridShape& shape) const {
    return grid_size(op_, int64_t{shape.blocks} * shape.strips * args.images);
  }

  // The gradient of map l from one of its interpolation, [N, grad_channels, H, W].
  template <typename T, typename S>
  void launch_gather(int l, const S* grad, int64_t grad_channels, int64_t first_channel,
                     const CudaLaunches& launches) const {
    const CudaMap& map = args.map[l];
    if (map.channels == 0 || args.images == 0) return;
    constexpr int kVec = kVectorBytes / int(sizeof(S));
    const auto launch = [&](auto kernel, int vector) {
      const GridShape shape = shape_of(map, map.width, vector, map.height);
      kernel<<<blocks_of(shape), kThreadsOfBlock, 0, launches.stream()>>>(map, shape, grad, grad_channels,
                                                                          first_channel, args.height, args.width);
      launches.check(cudaGetLastError());
    };
    const bool whole = map.channels % kVec == 0 && grad_channels % kVec == 0 && first_channel % kVec == 0 &&
                       is_aligned(grad) && is_aligned(map.grad);
    if (!last) {
      launch(upsample_gather<T, S, false, 1>, 1);
    } else if (whole) {
      launch(upsample_gather<T, S, true, kVec>, kVec);
    } else {
      launch(upsample_gather<T, S, true, 1>, 1);
    }
  }

  static bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

 private:
  template <typename A>
  void launch_taps_of(const CudaLaunches& launches) const {
    TapTables<A> tables{};
    for (int l = 0; l < args.maps; ++l)
      for (const auto& [axis, taps] :
           {std::pair{args.map[l].row_axis, args.map[l].rows}, std::pair{args.map[l].column_axis, args.map[l].columns}})
        tables.table[tables.count++] = {axis, static_cast<CudaTap<A>*>(const_cast<void*>(taps))};
    const int64_t longest = std::max(args.height, args.width);
    const dim3 grid(grid_size(op_, (longest + kTapThreads - 1) / kTapThreads), unsigned(tables.count));
    upsample_taps<A><<<grid, kTapThreads, 0, launches.stream()>>>(tables);
    launches.check(cudaGetLastError());
  }

  const char* op_;
  Element type_;
  Tensor tables_;
  Tensors kept_;
};

}  // namespace pyseg::upsample
