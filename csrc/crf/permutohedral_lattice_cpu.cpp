// permutohedral_lattice on the CPU: outputs, threads, registration.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "crf/crf_cpu.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

constexpr double kWorkPerPoint = 100;  // in the multiply-adds that workers_for counts

LatticeArgs args_of(const Tensor& features, double scale) {
  return {.features = features.data_ptr(),
          .images = features.size(0),
          .points = features.size(2),
          .d = static_cast<int>(features.size(1)),
          .scale = scale,
          .float64 = features.scalar_type() == ScalarType::Double,
          .vertex = nullptr,
          .weight = nullptr};
}

Workers workers_of(const LatticeArgs& a) { return workers_for(kWorkPerPoint * double(a.images) * double(a.points)); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> permutohedral_lattice(Tensor features, double scale,
                                                                                         int64_t max_vertices) {
  check_features(kLattice, features, scale);
  PYSEG_CHECK(max_vertices >= -1 && max_vertices < int64_t{1} << 31, kLattice,
              ": max_vertices must be -1 or from 0 to 2^31 - 1, got ", max_vertices);
  const Tensor points = as_type(features, wide_type(features));
  const int64_t corners = points.size(1) + 1;
  Tensor vertex = torch::stable::new_empty(points, {points.size(0), points.size(2), corners}, ScalarType::Int);
  Tensor weight = torch::stable::new_empty(points, vertex.sizes());
  LatticeArgs args = args_of(points, scale);
  args.vertex = static_cast<int32_t*>(vertex.data_ptr());
  args.weight = weight.data_ptr();
  const Workers workers = workers_of(args);
  const LatticeBuild build = lattice_kernels().begin(args, workers);
  if (build.status == LatticeStatus::kOverflow) throw_overflow(points, scale);
  PYSEG_CHECK(build.status == LatticeStatus::kGood, kLattice, ": out of memory for the vertices of features ",
              features.sizes());
  const int64_t rows = max_vertices < 0 ? build.vertices : std::max(max_vertices, build.vertices);
  Tensor neighbour = torch::stable::new_empty(points, {corners, rows, 2}, ScalarType::Int);
  Tensor offset = torch::stable::new_empty(points, {points.size(0) + 1}, ScalarType::Long);
  Tensor key = torch::stable::new_empty(points, {rows, points.size(1)}, ScalarType::Short);
  lattice_kernels().finish(args, build,
                           {.neighbour = static_cast<int32_t*>(neighbour.data_ptr()),
                            .offset = static_cast<int64_t*>(offset.data_ptr()),
                            .key = static_cast<int16_t*>(key.data_ptr()),
                            .rows = rows},
                           workers);
  PYSEG_CHECK(max_vertices < 0 || rows == max_vertices, kLattice, ": max_vertices must be at least ", build.vertices,
              ", got ", max_vertices);
  const auto none = [&] { return torch::stable::new_empty(points, {0}, ScalarType::Int); };
  return {vertex, weight, none(), none(), neighbour, offset, key};
}

Tensor permutohedral_lattice_backward(Tensor grad_weight, Tensor features, double scale) {
  check_features(kLatticeBackward, features, scale);
  const ScalarType type = wide_type(features);
  const Tensor points = as_type(features, type);
  check_like(kLatticeBackward, "grad_weight", grad_weight, type, {points.size(0), points.size(2), points.size(1) + 1},
             points);
  const Tensor grad = torch::stable::contiguous(grad_weight);
  Tensor out = torch::stable::new_empty(points, points.sizes());
  const LatticeArgs args = args_of(points, scale);
  if (out.numel() > 0) lattice_kernels().backward(args, grad.data_ptr(), out.data_ptr(), workers_of(args));
  return features.scalar_type() == type ? out : torch::stable::to(out, features.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> permutohedral_vertex_kernel(Tensor key, Tensor offset, double scale, double cutoff,
                                                               double variance, bool float64) {
  check_vertex_kernel(key, offset, scale, cutoff, variance);
  const Tensor keys = torch::stable::contiguous(key), offsets = torch::stable::contiguous(offset);
  const int64_t* const first = static_cast<const int64_t*>(offsets.data_ptr());
  for (int64_t n = 0; n < offset.numel(); ++n)
    PYSEG_CHECK((n == 0 ? first[n] == 0 : first[n] >= first[n - 1]) && first[n] <= key.size(0), kVertexKernel,
                ": offset must ascend from 0 to at most ", key.size(0), ", got ", first[n]);
  const VertexKernelArgs args{.key = static_cast<const int16_t*>(keys.data_ptr()),
                              .offset = first,
                              .images = offset.numel() - 1,
                              .vertices = first[offset.numel() - 1],
                              .d = static_cast<int>(key.size(1)),
                              .scale = scale,
                              .cutoff = cutoff,
                              .variance = variance,
                              .float64 = float64};
  const Workers workers = workers_for(double(args.vertices) * double(args.vertices));
  Tensor row = torch::stable::new_empty(key, {key.size(0) + 1}, ScalarType::Long);
  int64_t* const rows = static_cast<int64_t*>(row.data_ptr());
  const auto check_memory = [&](bool good) {
    PYSEG_CHECK(good, kVertexKernel, ": out of memory for the vertices of key ", key.sizes());
  };
  check_memory(lattice_kernels().vertex_kernel_rows(args, rows, workers));
  for (int64_t v = args.vertices; v < key.size(0); ++v) rows[v + 1] = rows[v];
  const int64_t entries = rows[key.size(0)];
  Tensor vertex = torch::stable::new_empty(key, {entries}, ScalarType::Int);
  Tensor weight = torch::stable::new_empty(key, {entries}, float64 ? ScalarType::Double : ScalarType::Float);
  check_memory(lattice_kernels().vertex_kernel(args, rows, static_cast<int32_t*>(vertex.data_ptr()), weight.data_ptr(),
                                               workers));
  return {row, vertex, weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("permutohedral_lattice", TORCH_BOX(&permutohedral_lattice));
  m.impl("_permutohedral_lattice_backward", TORCH_BOX(&permutohedral_lattice_backward));
  m.impl("permutohedral_vertex_kernel", TORCH_BOX(&permutohedral_vertex_kernel));
}

}  // namespace pyseg::crf
