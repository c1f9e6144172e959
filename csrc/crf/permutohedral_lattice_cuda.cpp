// permutohedral_lattice on CUDA devices: checks, buffers, order of the launches, registration.
#include "crf/permutohedral_lattice_cuda.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/cuda_launches.h"
#include "crf/crf_check.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

LatticePoints points_of(const Tensor& features, double scale) {
  return {.features = features.data_ptr(),
          .images = features.size(0),
          .points = features.size(2),
          .d = static_cast<int>(features.size(1)),
          .scale = scale,
          .float64 = features.scalar_type() == ScalarType::Double};
}

template <typename E>
E* data(const Tensor& t) {
  return static_cast<E*>(t.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> permutohedral_lattice(Tensor features, double scale,
                                                                                         int64_t max_vertices) {
  check_features(kLattice, features, scale);
  PYSEG_CHECK(max_vertices >= -1 && max_vertices < int64_t{1} << 31, kLattice,
              ": max_vertices must be -1 or from 0 to 2^31 - 1, got ", max_vertices);
  const CudaLaunches launches(kLattice, features);
  const cudaStream_t stream = launches.stream();
  const Tensor points = as_type(features, wide_type(features));
  const LatticePoints p = points_of(points, scale);
  const int64_t entries = p.entries();
  const int bits = key_bits(p.d, p.images);
  PYSEG_CHECK(bits <= 128, kLattice, ": features must be of fewer images for d = ", p.d, ", got ", features.sizes());
  const bool wide = bits > 64;

  // 1. Memory for the entries.
  const auto ints = [&](const Ints& sizes) { return torch::stable::new_empty(points, sizes, ScalarType::Int); };
  const auto words = [&](int64_t count) { return torch::stable::new_empty(points, {count}, ScalarType::Long); };
  const Tensor vertex = ints({p.images, p.points, p.corners()});
  const Tensor weight = torch::stable::new_empty(points, vertex.sizes());
  const Tensor entry = ints({entries}), count = ints({entries});
  Tensor offset = words(p.images + 1);
  int64_t vertices = max_vertices;
  SortedEntries sorted{.keys = {nullptr, nullptr}, .entry = data<int32_t>(entry), .count = data<int32_t>(count)};
  const Tensor low = words(entries), sorted_low = words(entries);
  const Tensor high = words(wide ? entries : 0), sorted_high = words(wide ? entries : 0);
  if (entries > 0) {
    size_t bytes = 0, count_bytes = 0;
    launches.check(launch_sort(nullptr, nullptr, nullptr, nullptr, 64, entries, nullptr, bytes, stream));
    launches.check(launch_count(p, sorted, nullptr, count_bytes, stream));
    bytes = std::max(bytes, count_bytes);
    const Tensor temporary = torch::stable::new_empty(points, {int64_t(bytes)}, ScalarType::Byte);
    const Tensor first_entry = ints({entries}), low_entry = ints({wide ? entries : 0});

    // 2. Keys, sorted: low words, then high ones.
    const Keys keys{data<uint64_t>(low), wide ? data<uint64_t>(high) : nullptr};
    launches.check(launch_simplices(p, weight.data_ptr(), keys, data<int32_t>(first_entry), stream));
    sorted.keys = {data<uint64_t>(sorted_low), wide ? data<uint64_t>(sorted_high) : nullptr};
    launches.check(launch_sort(keys.low, sorted.keys.low, data<int32_t>(first_entry),
                               wide ? data<int32_t>(low_entry) : sorted.entry, std::min(bits, 64), entries,
                               temporary.data_ptr(), bytes, stream));
    if (wide) {
      const Tensor gathered = words(entries);
      launches.check(launch_gather(keys.high, data<int32_t>(low_entry), data<uint64_t>(gathered), entries, stream));
      launches.check(launch_sort(data<uint64_t>(gathered), sorted.keys.high, data<int32_t>(low_entry), sorted.entry,
                                 bits - 64, entries, temporary.data_ptr(), bytes, stream));
      launches.check(launch_gather(keys.low, sorted.entry, sorted.keys.low, entries, stream));
    }

    // 3. The number of vertices: what the results' sizes depend on.
    launches.check(launch_count(p, sorted, temporary.data_ptr(), bytes, stream));
    if (max_vertices < 0) {
      int32_t all = 0;
      launches.check(cudaMemcpyAsync(&all, sorted.count + entries - 1, sizeof all, cudaMemcpyDeviceToHost, stream));
      launches.check(cudaStreamSynchronize(stream));
      vertices = all;
    }
  } else {
    torch::stable::zero_(offset);
    vertices = std::max<int64_t>(vertices, 0);
  }

  // 4. The vertices.
  Tensor row = ints({vertices + 1}), neighbour = ints({p.corners(), vertices, 2});
  Tensor key = torch::stable::new_empty(points, {vertices, p.d}, ScalarType::Short);
  if (entries == 0) {
    torch::stable::zero_(row);
    torch::stable::zero_(key);
    torch::stable::fill_(neighbour, -1);
  } else {
    const Tensor own_low = words(vertices), own_high = words(wide ? vertices : 0);
    const LatticeResult result{.vertex = data<int32_t>(vertex),
                               .weight = weight.data_ptr(),
                               .row = data<int32_t>(row),
                               .neighbour = data<int32_t>(neighbour),
                               .offset = data<int64_t>(offset),
                               .key = data<int16_t>(key),
                               .keys = {data<uint64_t>(own_low), wide ? data<uint64_t>(own_high) : nullptr},
                               .vertices = vertices};
    launches.check(launch_number(p, sorted, result, stream));
    if (vertices > 0) launches.check(launch_neighbours(p, result, stream));
  }
  return {vertex, weight, row, entry, neighbour, offset, key};
}

Tensor permutohedral_lattice_backward(Tensor grad_weight, Tensor features, double scale) {
  check_features(kLatticeBackward, features, scale);
  const ScalarType type = wide_type(features);
  check_like(kLatticeBackward, "grad_weight", grad_weight, type,
             {features.size(0), features.size(2), features.size(1) + 1}, features);
  const CudaLaunches launches(kLatticeBackward, features);
  const Tensor points = as_type(features, type), grad = torch::stable::contiguous(grad_weight);
  const Tensor out = torch::stable::new_empty(points, points.sizes());
  if (out.numel() > 0)
    launches.check(
        launch_lattice_backward(points_of(points, scale), grad.data_ptr(), out.data_ptr(), launches.stream()));
  return features.scalar_type() == type ? out : torch::stable::to(out, features.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("permutohedral_lattice", TORCH_BOX(&permutohedral_lattice));
  m.impl("_permutohedral_lattice_backward", TORCH_BOX(&permutohedral_lattice_backward));
}

}  // namespace pyseg::crf
