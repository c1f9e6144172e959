// Building lattices on the CPU, for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "crf/cpu_lattice.h"
#include "crf/cpu_vertex_kernel.h"
#include "crf/crf_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// Calls f.template operator()<d, T>().
template <typename T, typename F>
inline auto with_dimension(int d, const F& f) {
  switch (d) {
    case 1: return f.template operator()<1, T>();
    case 2: return f.template operator()<2, T>();
    case 3: return f.template operator()<3, T>();
    case 4: return f.template operator()<4, T>();
    case 5: return f.template operator()<5, T>();
    case 6: return f.template operator()<6, T>();
    case 7: return f.template operator()<7, T>();
    default: return f.template operator()<8, T>();
  }
}

template <typename F>
inline auto with_types(int d, bool float64, const F& f) {
  return float64 ? with_dimension<double>(d, f) : with_dimension<float>(d, f);
}

typedef unsigned __int128 WideKey;

// What lies behind LatticeBuild::state.
struct State {
  bool wide;
  void* builder;  // LatticeBuilder<d, T, WideKey or uint64_t>
};

template <int kD, typename T, typename Key>
LatticeBuild build(const LatticeArgs& a, int64_t parts, const KeyLayout* layouts, const Workers& workers) {
  auto* const builder = new (std::nothrow) LatticeBuilder<kD, T, Key>(a, parts);
  State* const state = new (std::nothrow) State{sizeof(Key) > 8, builder};
  if (builder != nullptr && state != nullptr && builder->build(layouts, workers))
    return {LatticeStatus::kGood, builder->vertices(), state};
  delete builder;
  delete state;
  return {LatticeStatus::kNoMemory, 0, nullptr};
}

LatticeBuild lattice_begin(const LatticeArgs& a, const Workers& workers) {
  return with_types(a.d, a.float64, [&]<int kD, typename T>() -> LatticeBuild {
    const int64_t parts = larger<int64_t>(1, a.images > 0 ? (workers.count + a.images - 1) / a.images : 1);
    Buffer<KeyLayout> layouts;
    Buffer<T> extremes;
    if (!layouts.grow(larger<int64_t>(1, a.images)) ||
        !extremes.grow(larger<int64_t>(1, a.images) * parts * 2 * (kD + 1)))
      return {LatticeStatus::kNoMemory, 0, nullptr};
    if (!key_layouts<kD, T>(a, parts, workers, layouts.data(), extremes.data()))
      return {LatticeStatus::kOverflow, 0, nullptr};
    bool wide = false;
    for (int64_t image = 0; image < a.images; ++image) wide |= layouts[image].total > 64;
    if constexpr (kD > 4)
      if (wide) return build<kD, T, WideKey>(a, parts, layouts.data(), workers);
    return build<kD, T, uint64_t>(a, parts, layouts.data(), workers);
  });
}

void lattice_finish(const LatticeArgs& a, const LatticeBuild& built, const LatticeOutput& out, const Workers& workers) {
  State* const state = static_cast<State*>(built.state);
  with_types(a.d, a.float64, [&]<int kD, typename T>() {
    const auto finish = [&](auto* builder) {
      builder->finish(out, workers);
      delete builder;
    };
    if (state->wide)
      finish(static_cast<LatticeBuilder<kD, T, WideKey>*>(state->builder));
    else
      finish(static_cast<LatticeBuilder<kD, T, uint64_t>*>(state->builder));
  });
  delete state;
}

void backward(const LatticeArgs& a, const void* grad_weight, void* grad_features, const Workers& workers) {
  with_types(a.d, a.float64, [&]<int kD, typename T>() {
    lattice_backward<kD, T>(a, static_cast<const T*>(grad_weight), static_cast<T*>(grad_features), workers);
  });
}

bool vertex_kernel_rows(const VertexKernelArgs& a, int64_t* row, const Workers& workers) {
  return VertexKernel(a).count(row, workers);
}

bool vertex_kernel(const VertexKernelArgs& a, const int64_t* row, int32_t* vertex, void* weight,
                   const Workers& workers) {
  if (a.float64) return VertexKernel(a).fill(row, vertex, static_cast<double*>(weight), workers);
  return VertexKernel(a).fill(row, vertex, static_cast<float*>(weight), workers);
}

}  // namespace

extern const LatticeKernels lattice_kernels;
const LatticeKernels lattice_kernels = {.begin = lattice_begin,
                                        .finish = lattice_finish,
                                        .backward = backward,
                                        .vertex_kernel_rows = vertex_kernel_rows,
                                        .vertex_kernel = vertex_kernel};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
