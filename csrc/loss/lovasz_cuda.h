// The interface between lovasz_statistics on CUDA devices and the launchers of its kernels: plain data, torch-free.
#pragma once

#include "loss/segmentation_cuda.h"

namespace pyseg::loss {

// One class of images first..first + images - 1, and what is held for it: elements = images * pixels of everything.
struct LovaszPlane {
  int64_t first, images;
  int c;
  bool hinge;
  const void* most;   // [N, S]: softmax only, see launch_normalise
  const void* scale;  // [N, S]
  void* keys[2];      // bits of the errors, uint32_t or (float64) uint64_t; sorted into either
  uint32_t* pixels[2];
  int sorted;        // which of the two
  uint32_t* before;  // foreground elements up to and including the k-th error
  double* partial;   // [blocks of launch_slopes]
};

constexpr int kLovaszThreads = 256;

inline int64_t lovasz_blocks(int64_t elements) { return (elements + kLovaszThreads - 1) / kLovaszThreads; }

// The largest logit and 1 / the sum of exponentials of every pixel, once for all classes. [N, S] of the type computed
// in.
cudaError_t launch_normalise(const SegmentationArgs&, void* most, void* scale, cudaStream_t);
cudaError_t launch_keys(const SegmentationArgs&, const LovaszPlane&, cudaStream_t);
// bytes: of temporary memory, returned where it is null.
cudaError_t launch_sort(LovaszPlane&, bool wide, void* temporary, size_t& bytes, int64_t elements, cudaStream_t);
cudaError_t launch_slopes(const SegmentationArgs&, const LovaszPlane&, cudaStream_t);
// loss[plane] = sum of partial[plane, blocks]
cudaError_t launch_loss(const double* partial, double* loss, int64_t planes, int64_t blocks, cudaStream_t);

}  // namespace pyseg::loss
