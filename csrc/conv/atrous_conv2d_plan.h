// Which algorithm a dense 3x3 or 1x1 atrous convolution on the CPU uses for a shape, and why: the cost model.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "conv/atrous_conv2d_math.h"

namespace pyseg {

struct DenseShape {
  int64_t n, c_in, h, w, c_out;
  int64_t pad_h, pad_w, dil_h, dil_w;
  int kernel;  // 3 or 1
  bool exact;  // no Winograd

  int64_t h_out() const { return h + 2 * pad_h - (kernel - 1) * dil_h; }
  int64_t w_out() const { return w + 2 * pad_w - (kernel - 1) * dil_w; }
  bool operator==(const DenseShape&) const = default;
};

// The tiles of one axis, by kind.
struct AxisPlan {
  std::array<std::vector<int32_t>, kTileKinds> first_output;
  int64_t products = 0;  // per line across the axis
  AxisTiles view() const;
};

enum class DensePath { kDirect, kWinograd };

struct DensePlan {
  DensePath path;
  AxisPlan y, x;             // empty for the direct path
  int64_t taps;              // pairs of output pixel and tap inside the map, per image
  int64_t products;          // pixel products that the chosen path multiplies, per image
  double direct_cost, cost;  // estimated cycles of an AVX2 core with float32
  std::string reason;
};

// Cuts the outputs of one axis into the cheapest tiles among `allowed` (bit per kind F4..E2; tap sets always).
AxisPlan plan_axis(int64_t size, int64_t padding, int64_t dilation, unsigned allowed);

// The plan for a shape; the last few are remembered.
std::shared_ptr<const DensePlan> plan_dense(const DenseShape& shape);

}  // namespace pyseg
