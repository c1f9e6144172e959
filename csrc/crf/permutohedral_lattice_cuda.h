// The interface between permutohedral_lattice on CUDA devices and the launchers of its kernels: plain data, torch-free.
// T is double where float64 is set, else float.
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cstddef>
#include <cstdint>

namespace pyseg::crf {

struct LatticePoints {
  const void* features;  // [images, d, points]
  int64_t images, points;
  int d;
  double scale;
  bool float64;
  int64_t corners() const { return d + 1; }
  int64_t entries() const { return images * points * corners(); }
};

// How a vertex is packed: image | quotient of each of d coordinates by d + 1 | their common remainder, from the top.
constexpr int kCoordinates = 1 << 16;  // they are counted from -2^15
constexpr int quotient_bits(int d) { return std::bit_width(unsigned((kCoordinates - 1) / (d + 1))); }
constexpr int remainder_bits(int d) { return std::bit_width(unsigned(d)); }
constexpr int vertex_bits(int d) { return d * quotient_bits(d) + remainder_bits(d); }
// The image after the last one is that of points that are left out.
inline int key_bits(int d, int64_t images) { return vertex_bits(d) + std::bit_width(uint64_t(images)); }

// Keys of up to 128 bits.
struct Keys {
  uint64_t* low;
  uint64_t* high;  // null: 64 bits hold a whole key
};

// Entries sorted by key.
struct SortedEntries {
  Keys keys;       // [entries]
  int32_t* entry;  // [entries]: positions in weight
  int32_t* count;  // [entries]: vertices up to here
};

struct LatticeResult {
  int32_t* vertex;     // [images, points, d + 1]
  void* weight;        // [images, points, d + 1]
  int32_t* row;        // [vertices + 1]
  int32_t* neighbour;  // [d + 1, vertices, 2], -1 everywhere before launch_neighbours
  int64_t* offset;     // [images + 1]
  int16_t* key;        // [vertices, d]
  Keys keys;           // [vertices]
  int64_t vertices;    // the arrays' size
};

// Weights and packed keys of all entries, and their numbers in order.
cudaError_t launch_simplices(const LatticePoints&, void* weight, const Keys&, int32_t* entry, cudaStream_t);
// Stable. bytes: of temporary memory, returned where it is null.
cudaError_t launch_sort(const uint64_t* keys, uint64_t* sorted_keys, const int32_t* entry, int32_t* sorted_entry,
                        int bits, int64_t entries, void* temporary, size_t& bytes, cudaStream_t);
// to[k] = from[entry[k]]
cudaError_t launch_gather(const uint64_t* from, const int32_t* entry, uint64_t* to, int64_t entries, cudaStream_t);
// count = 1 where a vertex begins, then its prefix sum.
cudaError_t launch_count(const LatticePoints&, const SortedEntries&, void* temporary, size_t& bytes, cudaStream_t);
// All but neighbours and what lies beyond the last vertex.
cudaError_t launch_number(const LatticePoints&, const SortedEntries&, const LatticeResult&, cudaStream_t);
cudaError_t launch_neighbours(const LatticePoints&, const LatticeResult&, cudaStream_t);
// grad_weight [images, points, d + 1] -> grad_features [images, d, points].
cudaError_t launch_lattice_backward(const LatticePoints&, const void* grad_weight, void* grad_features, cudaStream_t);

}  // namespace pyseg::crf
