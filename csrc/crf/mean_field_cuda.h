// The interface between _mean_field on CUDA devices and the launchers of its kernels: torch-free. T is double where
// float64 is set, else float.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "crf/lattice_rows_cuda.h"

namespace pyseg::crf {

// What one kernel of the CRF tells each point.
struct Message {
  const void* rows;       // [vertices, stride], or without a lattice [images * points, stride]
  const int32_t* vertex;  // [images, points, corners], or null
  const void* weight;
  int corners;
  int64_t vertices;
  double factor;
  PointScale scale;
  const void* compatibility;  // over the temperature: [1, stride], or [stride, stride], transposed
  bool matrix;
};

constexpr int kMostMessages = 8;  // of one launch

struct Update {
  bool float64;
  int64_t images, points, classes;
  Message messages[kMostMessages];
  int count;
  const void* energy;  // [images * points, stride]
  void* to;            // may be `energy`
  bool softmax;        // to = softmax(-energy), else the energy itself
};

cudaError_t launch_update(const Update&, cudaStream_t);
// compatibility [classes] or [classes, classes] -> Message::compatibility
cudaError_t launch_compatibility(const Rows&, const void* compatibility, bool matrix, double factor, void* to,
                                 cudaStream_t);

}  // namespace pyseg::crf
