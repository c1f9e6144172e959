// The interface between hausdorff_dt_cpu.cpp and its kernels, one table for each instruction set.
#pragma once

#include "loss/segmentation_cpu_kernel.h"

namespace pyseg {

// Predictions that are no class: the labels of pixels whose probabilities are all up to 0.5.
constexpr int kNoClass = 255;

struct HausdorffInput {
  SegmentationInput maps;  // labels of uint8
  const int64_t* classes;  // [chosen]
  int64_t chosen;
  int dims;  // of an image: 2 or 3
  int64_t sizes[3];
  double spacing[3];  // of D, H, W; 1 for the D of two dimensions
  bool one_sided;
};

struct HausdorffKernels {
  // Bytes of workspace: about 30 (float64: 50) for a pixel of one image, and what distance transforms need.
  int64_t (*workspace)(const HausdorffInput&, int64_t workers);
  // loss: [images, classes]; error: [images, classes, pixels], double for such logits, else float. Classes that were
  // not chosen are left alone.
  void (*run)(const HausdorffInput&, double* loss, void* error, const SegmentationRun&);
};

namespace baseline {
extern const HausdorffKernels hausdorff_kernels;
}
namespace avx2 {
extern const HausdorffKernels hausdorff_kernels;
}
namespace avx512 {
extern const HausdorffKernels hausdorff_kernels;
}

}  // namespace pyseg
