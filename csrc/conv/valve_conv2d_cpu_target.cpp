// The CPU kernels of valve_conv2d and region_gate for one instruction set: compiled once per target.
#include "conv/cpu_valve.h"
#include "conv/valve_conv2d_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

int64_t scratch(Element type, const Maps& m, bool backward, int64_t workers) {
  return with_types(type, [&]<typename T, typename A>() { return Valve<T, A>(m, backward, nullptr).scratch(workers); });
}

void forward(Element type, const Maps& m, void* scratch, const Workers& workers) {
  with_types(type, [&]<typename T, typename A>() { Valve<T, A>(m, false, scratch).forward(workers); });
}

void backward(Element type, const Maps& m, void* scratch, const Workers& workers) {
  with_types(type, [&]<typename T, typename A>() { Valve<T, A>(m, true, scratch).backward(workers); });
}

void gather(Element type, const Maps& m, void* region_grad, void* scratch, const Workers& workers) {
  with_types(type, [&]<typename T, typename A>() {
    gather_region(m, static_cast<T*>(region_grad), static_cast<A*>(scratch), workers);
  });
}

}  // namespace

extern const ValveKernelTable valve_kernels;
const ValveKernelTable valve_kernels = {
    .scratch = scratch,
    .forward = forward,
    .backward = backward,
    .gather = gather,
};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
