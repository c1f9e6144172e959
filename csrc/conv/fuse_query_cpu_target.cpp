// The CPU kernels of fuse_query for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "conv/cpu_fuse_query.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// Where pixels are scaled the elements are never of 16 bits.
template <typename F>
void with_wide_types(Element type, const F& f) {
  type == Element::kDouble ? f.template operator()<double>() : f.template operator()<float>();
}

void scale(const FuseQueryArgs& a, const Workers& workers) {
  with_wide_types(a.type, [&]<typename A>() { FuseQuery<A, A>(a).scale(workers); });
}

void add(const FuseQueryArgs& a, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { FuseQuery<T, A>(a).add(workers); });
}

int64_t gate_scratch(const FuseQueryArgs& a) {
  return with_types(a.type, [&]<typename T, typename A>() { return FuseQuery<T, A>(a).gate_scratch(); });
}

void gate(const FuseQueryArgs& a, void* scratch, const Workers& workers) {
  with_types(a.type, [&]<typename T, typename A>() { FuseQuery<T, A>(a).gate(scratch, workers); });
}

void project(const FuseQueryArgs& a, const Workers& workers) {
  with_wide_types(a.type, [&]<typename A>() { FuseQuery<A, A>(a).project(workers); });
}

}  // namespace

extern const FuseQueryKernelTable fuse_query_kernels;
const FuseQueryKernelTable fuse_query_kernels = {
    .scale = scale,
    .add = add,
    .gate_scratch = gate_scratch,
    .gate = gate,
    .project = project,
};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
