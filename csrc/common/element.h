// dtypes for code that knows nothing of torch.
#pragma once

#include <cstdint>

namespace pyseg {

// bool counts as kUInt8.
enum class Element : uint8_t { kFloat, kDouble, kHalf, kBFloat16, kUInt8, kInt8, kInt16, kInt32, kInt64 };

}  // namespace pyseg
