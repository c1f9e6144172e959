// The interface to the kernels that permutohedral_filter and _mean_field share on CUDA devices: plain data, torch-free.
// T is double where float64 is set, else float.
//
// Points and vertices have rows: their channels side by side, padded with zeros to whole units of 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyseg::crf {

constexpr int kUnitBytes = 16;

struct Rows {
  bool float64;
  int64_t channels;
  int64_t lanes() const { return float64 ? 2 : 4; }  // channels of a unit
  int64_t units() const { return (channels + lanes() - 1) / lanes(); }
  int64_t stride() const { return units() * lanes(); }
};

struct LatticeView {
  int64_t images, points;
  int corners;
  int64_t vertices;
  const int32_t* vertex;      // [images, points, corners]
  const void* weight;         // [images, points, corners]
  const int32_t* row;         // [vertices + 1]
  const int32_t* entry;       // [images, points, corners]
  const int32_t* neighbour;   // [corners, vertices, 2]
  const int64_t* offset;      // [images + 1]
  const int64_t* kernel_row;  // [vertices + 1]; null: blur
  const int32_t* kernel_vertex;
  const void* kernel_weight;
  int64_t kernel_entries;
  int64_t entries;  // images * points * corners
};

// Entries are splatted in segments of this many, each by a few threads.
constexpr int64_t kSegment = 32;
inline int64_t segments_of(const LatticeView& l) { return (l.entries + kSegment - 1) / kSegment; }

// What splatting reads: the entries by vertex.
struct SplatItems {
  // [segments, kSegment], the last one need not be full.
  uint32_t* point;  // of all images; the top bit says that a vertex begins
  void* weight;
  int32_t* vertex;  // [segments]: that of the segment's first entry
};

// What splatting writes besides: sums of vertices that reach over segments.
struct SplatCarry {
  void* sums;     // [segments, 2, stride]: of the vertex that goes on from the segment before; of the one that goes on
  int32_t* open;  // [segments]: the vertex that begins here and goes on, or -1
};

// A factor of each point; null: 1.
struct PointScale {
  const void* data;  // [images or 1, points]
  int64_t image_stride;
};

// planes [images, channels, points] -> rows [images * points, stride], times `factor`; beyond the channels `pad`.
cudaError_t launch_pack(const Rows&, const void* planes, int64_t images, int64_t points, double factor, double pad,
                        void* rows, cudaStream_t);
cudaError_t launch_unpack(const Rows&, const void* rows, int64_t images, int64_t points, void* planes, cudaStream_t);

cudaError_t launch_items(const LatticeView&, const PointScale&, bool float64, const SplatItems&, cudaStream_t);
// Splat and blur, or the sparse product: rows [images * points, stride] -> table [vertices, stride]. other: like table.
cudaError_t launch_vertices(const LatticeView&, const Rows&, const SplatItems&, const SplatCarry&, const void* rows,
                            bool reverse, void* table, void* other, cudaStream_t);
// What the blur is multiplied by.
double blur_factor(const LatticeView&);
// planes [images, channels, points] = sum of weight * table[vertex], times the blur's factor
cudaError_t launch_slice(const LatticeView&, const Rows&, const void* table, void* planes, cudaStream_t);
// grad_weight = grad . of_values[vertex] + values . of_grad[vertex], times the blur's factor; grad, values: rows.
cudaError_t launch_weight_gradient(const LatticeView&, const Rows&, const void* values, const void* grad,
                                   const void* of_values, const void* of_grad, void* grad_weight, cudaStream_t);

}  // namespace pyseg::crf
