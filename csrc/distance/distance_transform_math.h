// What host and device code of distance_transform share: modes and the choice of the arithmetic. Torch-free. Functions
// are static: units for different instruction sets must not share one.
#pragma once

#include <cstdint>

namespace pyseg::distance {

enum class Mode {
  kMask,     // distance to the nearest zero
  kSigned,   // and minus the distance to the nearest nonzero where the element is zero
  kLabels,   // distance to the nearest element of another value
  kObjects,  // the same, but 0 where the element is zero
};

// All modes but the plain mask compare neighbours with each other, not with zero.
static constexpr bool compares_labels(Mode mode) { return mode != Mode::kMask; }

// Squared distances are integers where spacing is 1. Below kMostInt they, and kNoneInt (no source in reach) plus one of
// them, fit an int32; float64 holds larger ones exactly.
constexpr int32_t kMostInt = 1 << 29;
constexpr int32_t kNoneInt = 1 << 30;

enum class Arithmetic { kInt32, kFloat, kDouble };

// float32 counts positions along an axis exactly up to 2^24.
static constexpr Arithmetic arithmetic_for(const int64_t (&sizes)[3], const double (&spacing)[3], bool float64) {
  const bool unit = spacing[0] == 1 && spacing[1] == 1 && spacing[2] == 1;
  double longest = 0;
  for (const int64_t size : sizes) longest += double(size) * double(size);
  if (unit) return longest < kMostInt ? Arithmetic::kInt32 : Arithmetic::kDouble;
  return float64 || longest >= double(int64_t{1} << 48) ? Arithmetic::kDouble : Arithmetic::kFloat;
}

}  // namespace pyseg::distance
