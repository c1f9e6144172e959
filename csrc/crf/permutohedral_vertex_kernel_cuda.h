// The interface between permutohedral_vertex_kernel on CUDA devices and the launchers of its kernels: torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace pyseg::crf {

struct VertexKernelTask {
  const int16_t* key;     // [vertices, d]
  const int64_t* offset;  // [images + 1]
  int64_t images, vertices;
  int d;
  int64_t limit;    // of squared distances, in units of the lattice
  double exponent;  // of a weight, for each of them
  int32_t* box;     // [tiles, 2, d + 2]
};

int64_t box_elements(int64_t vertices, int d);
// row [vertices + 1]. bytes: of temporary memory, returned where it is null.
cudaError_t launch_vertex_kernel_rows(const VertexKernelTask&, int64_t* row, void* temporary, size_t& bytes,
                                      cudaStream_t);
// vertex, weight: [row[vertices]]; T is double where float64 is set, else float.
cudaError_t launch_vertex_kernel(const VertexKernelTask&, int64_t* row, int32_t* vertex, void* weight, bool float64,
                                 cudaStream_t);

}  // namespace pyseg::crf
