// The CPU kernels of atrous_conv2d for one instruction set: compiled once per target, PYSEG_TARGET is its name.
#include "conv/atrous_conv2d_cpu_kernel.h"
#include "conv/cpu_dense_weight_grad.h"
#include "conv/cpu_depthwise.h"
#include "conv/cpu_direct.h"
#include "conv/cpu_transpose.h"
#include "conv/cpu_winograd.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

template <typename T>
void pack(const Weight<T>& weight, int64_t c_in, int64_t c_out, int taps, T* packed, const Workers& workers) {
  for_each_part(workers, (c_out + kPanel - 1) / kPanel, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      pack_panel(weight, c_out, p, 0, c_in, taps, packed + p * taps * c_in * kPanel, c_in * kPanel);
  });
}

template <typename T>
constexpr ConvKernels<T> kernels() {
  ConvKernels<T> k{};
  k.pack = pack<T>;
  k.direct = [](const DenseArgs<T>& a, const Workers& w) { Direct<T>(a, w).run(); };
  k.winograd_workspace = [](const DenseArgs<T>& a, int64_t workers) { return Winograd<T>::workspace(a, workers); };
  k.winograd = [](const DenseArgs<T>& a, T* ws, const Workers& w) { Winograd<T>(a, ws, w).run(); };
  k.direct_weight_grad_workspace = [](const DenseWeightGradArgs<T>& a, int64_t workers) {
    return DirectWeightGrad<T>::workspace(a, workers);
  };
  k.direct_weight_grad = [](const DenseWeightGradArgs<T>& a, T* ws, const Workers& w) {
    DirectWeightGrad<T>(a, ws, w).run();
  };
  k.winograd_weight_grad_workspace = [](const DenseWeightGradArgs<T>& a, int64_t workers) {
    return WinogradWeightGrad<T>::workspace(a, workers);
  };
  k.winograd_weight_grad = [](const DenseWeightGradArgs<T>& a, T* ws, const Workers& w) {
    WinogradWeightGrad<T>(a, ws, w).run();
  };
  k.depthwise_workspace = depthwise_workspace_size<T>;
  k.depthwise = depthwise<T>;
  k.depthwise_weight_grad_workspace = depthwise_weight_grad_workspace_size<T>;
  k.depthwise_weight_grad = depthwise_weight_grad<T>;
  k.transpose = transpose<T>;
  return k;
}

}  // namespace

extern const ConvKernelTable conv_kernels;
const ConvKernelTable conv_kernels = {kernels<float>(), kernels<double>()};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
