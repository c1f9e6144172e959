// fuse_query on CUDA devices: products by torch, launches of the passes around them, registration.
#include "conv/fuse_query_cuda.cuh"

#include <torch/csrc/stable/library.h>

#include "common/cuda_launches.h"
#include "conv/fuse_query_check.h"

namespace pyseg::fuse {
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

// The same where there is a scale, see check_scaled.
template <typename F>
void with_wide_element(Element type, const F& f) {
  type == Element::kDouble ? f.template operator()<double>() : f.template operator()<float>();
}

class Call {
 public:
  FuseSizes sizes;
  bool last;

  Call(const char* op, const Sizes& s, bool channels_last, const CudaLaunches& launches)
      : sizes{s.images,
              s.inputs,
              s.channels,
              s.pixels(),
              int(s.height),
              int(s.width),
              1. / double(s.height),
              1. / double(s.width)},
        last(channels_last),
        op_(op),
        launches_(launches) {
    constexpr int64_t kMost = int64_t{1} << 30;
    PYSEG_CHECK(s.height < kMost && s.width < kMost, op, ": input must have H and W below 2^30, got ", s.input());
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, Arguments... arguments) const {
    PYSEG_CHECK(blocks <= INT32_MAX, op_, ": input must need fewer than 2^31 blocks of threads on CUDA devices, got ",
                blocks);
    kernel<<<unsigned(blocks), threads, 0, launches_.stream()>>>(arguments...);
    launches_.check(cudaGetLastError());
  }

  template <typename T>
  void scale(const void* input, void* scale) const {
    using A = Accumulator<T>;
    const T* const x = static_cast<const T*>(input);
    A* const to = static_cast<A*>(scale);
    if (!last) {
      launch(fuse_query_scale_planes<T>, pixel_groups() * sizes.images, kDotThreads, sizes, unsigned(pixel_groups()), x,
             to);
    } else if (whole<T>(sizes.inputs, input)) {
      launch(fuse_query_scale_pixels<T, kWide<T>>, pixel_blocks(), kWarpsOfBlock, sizes, x, to);
    } else {
      launch(fuse_query_scale_pixels<T, 1>, pixel_blocks(), kWarpsOfBlock, sizes, x, to);
    }
  }

  template <typename T>
  void add(const void* offset, const void* coordinates, void* table, const void* scale, bool relu, void* output) const {
    using A = Accumulator<T>;
    const A* const numbers = static_cast<const A*>(table);
    launch(fuse_query_table<A>, parts_of(sizes.images * sizes.channels, kThreads), kThreads, sizes,
           static_cast<const A*>(offset), static_cast<const A*>(coordinates), static_cast<A*>(table));
    const auto run = [&]<int kVec>() {
      if (last) {
        const int64_t groups = channel_groups(kVec), parts = parts_of(sizes.pixels, kAddPixels);
        launch(fuse_query_add_pixels<T, kVec>, groups * parts * sizes.images, kWarpsOfBlock, sizes, unsigned(groups),
               unsigned(parts), numbers, static_cast<const A*>(scale), relu, static_cast<T*>(output));
        return;
      }
      const int64_t vectors = sizes.pixels / kVec;
      const int threads = vectors < kThreads ? int(parts_of(vectors, kWarp)) * kWarp : kThreads;
      const int64_t chunks = parts_of(vectors, threads);
      launch(fuse_query_add_planes<T, kVec>, chunks * sizes.images * sizes.channels, threads, sizes, unsigned(chunks),
             numbers, static_cast<const A*>(scale), relu, static_cast<T*>(output));
    };
    whole<T>(last ? sizes.channels : sizes.pixels, output) ? run.template operator()<kWide<T>>()
                                                           : run.template operator()<1>();
  }

  int64_t gate_parts() const { return parts_of(sizes.pixels, last ? kGatePixels : kPlanePart); }

  template <typename T>
  void gate(const void* grad, const void* output, const void* scale, void* gated, void* sums, void* grad_offset,
            void* grad_coordinates) const {
    using A = Accumulator<T>;
    const GateMaps<T> maps{static_cast<const T*>(grad), static_cast<const T*>(output), static_cast<const A*>(scale),
                           static_cast<T*>(gated)};
    const int64_t parts = gate_parts();
    const auto run = [&]<int kVec>() {
      if (last) {
        const int64_t groups = channel_groups(kVec);
        launch(fuse_query_gate_pixels<T, kVec>, groups * parts * sizes.images, kWarpsOfBlock, sizes, unsigned(groups),
               unsigned(parts), maps, static_cast<A*>(sums));
      } else {
        launch(fuse_query_gate_planes<T, kVec>, parts_of(sizes.images * sizes.channels * parts, kWarps), kThreads,
               sizes, unsigned(parts), maps, static_cast<A*>(sums));
      }
    };
    if (sizes.images > 0)
      whole<T>(last ? sizes.channels : sizes.pixels, grad, output, gated, scale) ? run.template operator()<kWide<T>>()
                                                                                 : run.template operator()<1>();
    launch(fuse_query_add_sums<A>, parts_of(sizes.channels, kWarp), kWarpsOfBlock, sizes, parts,
           static_cast<const A*>(sums), static_cast<A*>(grad_offset), static_cast<A*>(grad_coordinates));
  }

  template <typename T>
  void project(const void* input, const void* scale, void* grad) const {
    const T* const x = static_cast<const T*>(input);
    const auto* const factors = static_cast<const Accumulator<T>*>(scale);
    T* const h = static_cast<T*>(grad);
    if (!last) {
      launch(fuse_query_project_planes<T>, pixel_groups() * sizes.images, kDotThreads, sizes, unsigned(pixel_groups()),
             x, factors, h);
    } else if (whole<T>(sizes.inputs, input, grad)) {
      launch(fuse_query_project_pixels<T, kWide<T>>, pixel_blocks(), kWarpsOfBlock, sizes, x, factors, h);
    } else {
      launch(fuse_query_project_pixels<T, 1>, pixel_blocks(), kWarpsOfBlock, sizes, x, factors, h);
    }
  }

 private:
  static constexpr dim3 kWarpsOfBlock{kWarp, kWarps, 1};
  static constexpr dim3 kDotThreads{kWarp, kDotWarps, 1};

  static int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
  int64_t channel_groups(int vector) const { return parts_of(sizes.channels, kWarp * vector); }
  int64_t pixel_groups() const { return parts_of(sizes.pixels, kWarp); }
  int64_t pixel_blocks() const { return parts_of(sizes.images * sizes.pixels, kWarps); }

  // Whether runs of this many elements are runs of aligned vectors in all of the maps (of which some may be null).
  template <typename T, typename... Maps>
  static bool whole(int64_t run, const Maps*... maps) {
    return run % kWide<T> == 0 && ((reinterpret_cast<uintptr_t>(maps) % atrous::kVectorBytes == 0) && ...);
  }

  const char* op_;
  const CudaLaunches& launches_;
};

std::tuple<Tensor, Tensor> fuse_query(Tensor input, Tensor weight, Tensor offset, Tensor coordinates, bool normalize,
                                      bool relu) {
  const char* op = kFuseQuery;
  const Element type = element_of(op, "input", input);
  const Sizes sizes = check_input(op, input, weight);
  if (normalize) check_scaled(op, "normalize", input, type);
  const Tensor offsets = wide(op, "offset", offset, {sizes.images, sizes.channels}, input, type);
  const Tensor weights = wide(op, "coordinates", coordinates, {sizes.channels, kCoordinates}, input, type);
  const CudaLaunches launches(op, input);
  const Call call(op, sizes, is_channels_last(input), launches);
  const Tensor x = dense(input, call.last);
  Tensor scale = torch::stable::new_empty(input, normalize ? sizes.scale() : Ints{0}, computed_in(type));
  Tensor table = torch::stable::new_empty(input, {sizes.images + 2, sizes.channels}, computed_in(type));
  Tensor output = times_pixels(weight, x, call.last);
  const bool scaled = normalize && scale.numel() > 0;
  if (scaled) with_wide_element(type, [&]<typename T>() { call.scale<T>(x.data_ptr(), scale.data_ptr()); });
  with_element(type, [&]<typename T>() {
    if (output.numel() > 0)
      call.add<T>(offsets.data_ptr(), weights.data_ptr(), table.data_ptr(), scaled ? scale.data_ptr() : nullptr, relu,
                  output.data_ptr());
  });
  return {output, scale};
}

Gradients fuse_query_backward(Tensor grad, Tensor input, Tensor weight, OptTensor output, OptTensor scale,
                              bool need_input, bool need_weight) {
  const char* op = kFuseQueryBackward;
  const BackwardArguments given = check_backward(grad, input, weight, output, scale);
  const Sizes& sizes = given.sizes;
  const CudaLaunches launches(op, input);
  const Call call(op, sizes, is_channels_last(input), launches);
  const Tensor g = dense(grad, call.last), x = dense(input, call.last), y = output ? dense(*output, call.last) : g;
  // What was neither gated nor scaled is the product's gradient already.
  const bool changed = output || scale;
  const Tensor gated = changed ? new_map(g, sizes.output(), call.last) : g;
  const ScalarType type = computed_in(given.type);
  Tensor grad_offset = torch::stable::new_empty(grad, {sizes.images, sizes.channels}, type);
  Tensor grad_coordinates = torch::stable::new_empty(grad, {sizes.channels, kCoordinates}, type);
  Tensor sums = torch::stable::new_empty(grad, {sizes.images, call.gate_parts(), 3, sizes.channels}, type);
  const void* const factors = given.scale ? given.scale->data_ptr() : nullptr;
  if (sizes.channels > 0)
    with_element(given.type, [&]<typename T>() {
      call.gate<T>(g.data_ptr(), output ? y.data_ptr() : nullptr, factors, changed ? gated.data_ptr() : nullptr,
                   sums.data_ptr(), grad_offset.data_ptr(), grad_coordinates.data_ptr());
    });

  Tensor grad_weight = need_weight ? outer_product(gated, x, call.last) : torch::stable::new_empty(grad, {0});
  if (!need_input) return {torch::stable::new_empty(grad, {0}), grad_weight, grad_offset, grad_coordinates};
  Tensor grad_input = times_pixels(torch::stable::transpose(weight, 0, 1), gated, call.last);
  if (scale && grad_input.numel() > 0)
    with_wide_element(given.type, [&]<typename T>() { call.project<T>(x.data_ptr(), factors, grad_input.data_ptr()); });
  return {grad_input, grad_weight, grad_offset, grad_coordinates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("fuse_query", TORCH_BOX(&fuse_query));
  m.impl("_fuse_query_backward", TORCH_BOX(&fuse_query_backward));
}

}  // namespace pyseg::fuse
