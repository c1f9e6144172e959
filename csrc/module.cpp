// The extension module pyseg._C: build facts. Operators register themselves when it is loaded.
#include <pybind11/pybind11.h>

#include "common/cpu_capability.h"
#include "conv/atrous_conv2d_plan.h"

namespace py = pybind11;

namespace {

// What atrous_conv2d does on the CPU with a shape.
py::dict atrous_conv2d_plan(int64_t n, int64_t c_in, int64_t h, int64_t w, int64_t c_out, int64_t pad_h, int64_t pad_w,
                            int64_t dil_h, int64_t dil_w, int kernel, int64_t groups, bool exact) {
  if (groups != 1) {
    py::dict result;
    result["path"] = "depthwise";
    result["reason"] = "groups = C_in = C_out";
    return result;
  }
  const auto plan = pyseg::plan_dense({n, c_in, h, w, c_out, pad_h, pad_w, dil_h, dil_w, kernel, exact});
  const auto tiles = [](const pyseg::AxisPlan& axis) {
    const char* const names[] = {"F(4,3)", "F(3,3)", "F(2,3)", "2-pixel phase"};
    py::dict counts;
    int64_t rest = 0;
    for (int kind = 0; kind < pyseg::kTileKinds; ++kind) {
      const int64_t count = int64_t(axis.first_output[kind].size());
      if (kind >= pyseg::kTaps) {
        rest += count;
      } else if (count > 0) {
        counts[names[kind]] = count;
      }
    }
    if (rest > 0) counts["single"] = rest;
    return counts;
  };
  py::dict result;
  result["path"] = plan->path == pyseg::DensePath::kWinograd ? "winograd" : "direct";
  result["reason"] = plan->reason;
  result["tiles"] = py::make_tuple(tiles(plan->y), tiles(plan->x));
  result["products"] = plan->products;
  result["taps"] = plan->taps;
  result["speedup"] = plan->cost > 0 ? plan->direct_cost / plan->cost : 1.;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = PYSEG_VERSION;
  m.attr("torch_version") = PYSEG_TORCH_VERSION;  // built against; any later one serves
  m.attr("cxx_compiler") = PYSEG_CXX_COMPILER;
  m.attr("cuda_version") = PYSEG_CUDA_VERSION;  // of _C_cuda's compiler, empty where _C_cuda was not built
  m.def("cpu_capability", &pyseg::cpu_capability_name);
  m.def("atrous_conv2d_plan", &atrous_conv2d_plan, py::arg("n"), py::arg("c_in"), py::arg("h"), py::arg("w"),
        py::arg("c_out"), py::arg("pad_h"), py::arg("pad_w"), py::arg("dil_h"), py::arg("dil_w"), py::arg("kernel"),
        py::arg("groups"), py::arg("exact"));
}
