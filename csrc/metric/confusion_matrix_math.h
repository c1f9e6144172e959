// What host, CPU targets and CUDA kernels of confusion_matrix agree on. Free of torch.
#pragma once

#include <cstdint>

namespace pyseg::metric {

// The argmax of 16-bit logits counts classes in 16 bits, and cells of a matrix are counted in 32.
constexpr int64_t kMostClasses = 32767;

// On CUDA, where a check would have to wait for the device, a label outside of its range adds this to every cell of the
// matrix: no count reaches it, and sums of a few thousand matrices cannot turn positive again.
constexpr int64_t kPoison = -(int64_t{1} << 48);

enum class LabelType { kUInt8, kInt8, kInt16, kInt32, kInt64 };  // bool is kUInt8
enum class LogitType { kFloat, kDouble, kHalf, kBFloat16 };

// An element (image, class, pixel) of the logits at data[image * image_stride + class * class_stride + pixel *
// pixel_stride].
struct LogitStrides {
  int64_t image, cls, pixel;
};

struct ConfusionArgs {
  int64_t images, pixels;  // pixels of one image
  int classes;
  bool has_ignore;
  int64_t ignore_index;  // within the range of target's type
  const void* target;    // [images, pixels] contiguous
  LabelType target_type;
  bool from_logits;
  const void* prediction;  // labels [images, pixels] contiguous, or logits
  LabelType prediction_type;
  LogitType logit_type;
  LogitStrides strides;
  bool per_image;
  int64_t* matrix;  // [1 or images, classes, classes], zeros
};

}  // namespace pyseg::metric
