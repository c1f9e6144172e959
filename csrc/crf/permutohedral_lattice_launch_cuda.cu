// Launches of permutohedral_lattice's kernels, CUB's sort and prefix sum among them.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "crf/permutohedral_lattice_cuda.cuh"

namespace pyseg::crf {
namespace {

unsigned blocks_for(int64_t elements, int threads) { return static_cast<unsigned>((elements + threads - 1) / threads); }

// Calls f.template operator()<d>().
template <typename F>
void with_dimension(int d, const F& f) {
  switch (d) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

// Calls f.template operator()<d, T>().
template <typename F>
cudaError_t with_types(const LatticePoints& p, const F& f) {
  with_dimension(p.d, [&]<int kD>() {
    if (p.float64)
      f.template operator()<kD, double>();
    else
      f.template operator()<kD, float>();
  });
  return cudaGetLastError();
}

template <typename T>
FeatureScales<T> scales_of(const LatticePoints& p) {
  FeatureScales<T> scales = {};
  for (int i = 0; i < p.d; ++i) scales.of[i] = T(feature_scale(p.d, i, p.scale));
  return scales;
}

}  // namespace

cudaError_t launch_simplices(const LatticePoints& p, void* weight, const Keys& keys, int32_t* entry,
                             cudaStream_t stream) {
  return with_types(p, [&]<int kD, typename T>() {
    lattice_simplices_kernel<kD, T><<<blocks_for(p.images * p.points, kSimplexThreads), kSimplexThreads, 0, stream>>>(
        p, scales_of<T>(p), static_cast<T*>(weight), keys, entry);
  });
}

cudaError_t launch_sort(const uint64_t* keys, uint64_t* sorted_keys, const int32_t* entry, int32_t* sorted_entry,
                        int bits, int64_t entries, void* temporary, size_t& bytes, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, sorted_keys, entry, sorted_entry,
                                         static_cast<int>(entries), 0, bits, stream);
}

cudaError_t launch_gather(const uint64_t* from, const int32_t* entry, uint64_t* to, int64_t entries,
                          cudaStream_t stream) {
  lattice_gather_kernel<<<blocks_for(entries, kEntryThreads), kEntryThreads, 0, stream>>>(from, entry, to, entries);
  return cudaGetLastError();
}

cudaError_t launch_count(const LatticePoints& p, const SortedEntries& sorted, void* temporary, size_t& bytes,
                         cudaStream_t stream) {
  const int entries = static_cast<int>(p.entries());
  if (temporary != nullptr) {
    lattice_heads_kernel<<<blocks_for(entries, kEntryThreads), kEntryThreads, 0, stream>>>(
        sorted.keys, p.images, vertex_bits(p.d), entries, sorted.count);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cub::DeviceScan::InclusiveSum(temporary, bytes, sorted.count, sorted.count, entries, stream);
}

cudaError_t launch_number(const LatticePoints& p, const SortedEntries& sorted, const LatticeResult& result,
                          cudaStream_t stream) {
  return with_types(p, [&]<int kD, typename T>() {
    lattice_number_kernel<kD, T>
        <<<blocks_for(p.entries(), kEntryThreads), kEntryThreads, 0, stream>>>(p.images, p.entries(), sorted, result);
  });
}

cudaError_t launch_neighbours(const LatticePoints& p, const LatticeResult& result, cudaStream_t stream) {
  const size_t bytes = size_t(p.corners()) * size_t(result.vertices) * 2 * sizeof(int32_t);
  if (const cudaError_t error = cudaMemsetAsync(result.neighbour, -1, bytes, stream); error != cudaSuccess)
    return error;
  with_dimension(p.d, [&]<int kD>() {
    lattice_neighbours_kernel<kD>
        <<<blocks_for(result.vertices, kEntryThreads), kEntryThreads, 0, stream>>>(p.images, result);
  });
  return cudaGetLastError();
}

cudaError_t launch_lattice_backward(const LatticePoints& p, const void* grad_weight, void* grad_features,
                                    cudaStream_t stream) {
  return with_types(p, [&]<int kD, typename T>() {
    lattice_backward_kernel<kD, T><<<blocks_for(p.images * p.points, kSimplexThreads), kSimplexThreads, 0, stream>>>(
        p, scales_of<T>(p), static_cast<const T*>(grad_weight), static_cast<T*>(grad_features));
  });
}

}  // namespace pyseg::crf
