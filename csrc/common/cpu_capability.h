// Which of the compiled CPU targets runs on this machine.
#pragma once

namespace pyseg {

enum class CpuCapability { kBaseline, kAvx2, kAvx512 };

// The best target that the machine has, or the one that PYSEG_CPU_CAPABILITY names (throws if the machine lacks it).
CpuCapability cpu_capability();
const char* cpu_capability_name();

// Of one thing that every target has, the one of the target that runs.
template <typename T>
const T& of_cpu_target(const T& baseline, const T& avx2, const T& avx512) {
  switch (cpu_capability()) {
    case CpuCapability::kAvx512: return avx512;
    case CpuCapability::kAvx2: return avx2;
    case CpuCapability::kBaseline: break;
  }
  return baseline;
}

// The table of kernels `name` of the target that runs. A macro, since the targets' namespaces differ and only x86 has
// them all.
#if defined(PYSEG_X86_TARGETS)
#define PYSEG_CPU_TABLE(name) ::pyseg::of_cpu_target(baseline::name, avx2::name, avx512::name)
#else
#define PYSEG_CPU_TABLE(name) baseline::name
#endif

}  // namespace pyseg
