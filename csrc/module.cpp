// The extension module pyseg._C: build facts. Operators register themselves when it is loaded.
#include <pybind11/pybind11.h>

#include "common/cpu_capability.h"

PYBIND11_MODULE(_C, m) {
  m.attr("version") = PYSEG_VERSION;
  m.attr("torch_version") = PYSEG_TORCH_VERSION;  // built against; any later one serves
  m.attr("cxx_compiler") = PYSEG_CXX_COMPILER;
  m.attr("cuda_version") = PYSEG_CUDA_VERSION;  // of _C_cuda's compiler, empty where _C_cuda was not built
  m.def("cpu_capability", &pyseg::cpu_capability_name);
}
