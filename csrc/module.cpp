// The extension module pyseg._C: build facts and plans. Operators register themselves when it is loaded.
#include <pybind11/pybind11.h>

#include "common/cpu_capability.h"

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", [] { return pyseg::cpu_capability_name(); });
}
