#include "common/cpu_capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyseg {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

CpuCapability detect() {
  __builtin_cpu_init();
  auto best = CpuCapability::kBaseline;
  if (__builtin_cpu_supports("x86-64-v3")) best = CpuCapability::kAvx2;
  if (__builtin_cpu_supports("x86-64-v4")) best = CpuCapability::kAvx512;
  const char* wanted = std::getenv("PYSEG_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < 3; ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    if (i > static_cast<int>(best)) {
      throw std::runtime_error("PYSEG_CPU_CAPABILITY=" + std::string(wanted) + ": this machine has only " +
                               kNames[static_cast<int>(best)]);
    }
    return static_cast<CpuCapability>(i);
  }
  throw std::runtime_error("PYSEG_CPU_CAPABILITY must be baseline, avx2 or avx512, got " + std::string(wanted));
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability chosen = detect();
  return chosen;
}

const char* cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

}  // namespace pyseg
