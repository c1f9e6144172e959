// Which of the compiled CPU targets runs on this machine.
#pragma once

namespace pyseg {

enum class CpuCapability { kBaseline, kAvx2, kAvx512 };

// The best target that the machine has, or the one that PYSEG_CPU_CAPABILITY names (throws if the machine lacks it).
CpuCapability cpu_capability();
const char* cpu_capability_name();

}  // namespace pyseg
