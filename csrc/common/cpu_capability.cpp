#include "common/cpu_capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyseg {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

CpuCapability best_of_this_machine() {
#ifdef PYSEG_X86_TARGETS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return CpuCapability::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return CpuCapability::kAvx2;
  if (!__builtin_cpu_supports("x86-64-v2")) {
    throw std::runtime_error("this processor lacks x86-64-v2 (SSE4.2), which the CPU kernels need");
  }
#endif
  return CpuCapability::kBaseline;
}

CpuCapability detect() {
  const auto best = best_of_this_machine();
  const char* wanted = std::getenv("PYSEG_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < 3; ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    if (i > static_cast<int>(best)) {
      throw std::runtime_error("PYSEG_CPU_CAPABILITY=" + std::string(wanted) + ": the best that this machine has is " +
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
