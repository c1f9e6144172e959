// atrous_conv2d on the CPU: checks, threading, registration.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace pyseg {
namespace {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor call(const char* name, const char* overload, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor aten_conv(const Tensor& x, const Tensor& w, const OptTensor& b, const Ints& padding, const Ints& dilation,
                 int64_t groups) {
  Ints one{1, 1}, zero{0, 0};
  std::array<StableIValue, 9> s{from(x),    from(w),     from(b),    from(one), from(padding), from(dilation),
                                from(false), from(zero), from(groups)};
  return call("aten::convolution", "", s.data());
}

Tensor forward(Tensor input, Tensor weight, OptTensor bias, OptTensor scale, OptTensor shift, Ints padding,
               Ints dilation, int64_t groups, bool relu, bool exact, bool allow_tf32, OptTensor packed) {
  Tensor y = aten_conv(input, weight, bias, padding, dilation, groups);
  Ints bc{1, -1, 1, 1};
  auto bcast = [&](const Tensor& t) {
    std::array<StableIValue, 2> s{from(t), from(bc)};
    return call("aten::view", "", s.data());
  };
  if (scale) {
    std::array<StableIValue, 2> s{from(y), from(bcast(*scale))};
    y = call("aten::mul", "Tensor", s.data());
  }
  if (shift) {
    std::array<StableIValue, 3> s{from(y), from(bcast(*shift)), StableIValue{0}};
    double one = 1;
    (void)one;
    std::array<StableIValue, 2> m{from(bcast(*shift)), from(torch::stable::empty_like(y))};
    Tensor e = call("aten::expand_as", "", m.data());
    std::array<StableIValue, 2> n{from(y), from(e)};
    std::vector<Tensor> pair{y, e};
    y = torch::stable::subtract(y, torch::stable::subtract(torch::stable::subtract(e, e), e));
  }
  if (relu) {
    std::array<StableIValue, 1> s{from(y)};
    y = call("aten::relu", "", s.data());
  }
  return y;
}

void forward_out(Tensor input, Tensor weight, OptTensor bias, OptTensor scale, OptTensor shift, Ints padding,
                 Ints dilation, int64_t groups, bool relu, bool exact, bool allow_tf32, OptTensor packed, Tensor out) {
  Tensor y = forward(input, weight, bias, scale, shift, padding, dilation, groups, relu, exact, allow_tf32, packed);
  torch::stable::copy_(out, y);
}

Tensor flipped_transposed(const Tensor& w, int64_t groups) {
  Ints d{2, 3};
  std::array<StableIValue, 2> s{from(w), from(d)};
  Tensor f = call("aten::flip", "", s.data());
  return groups == 1 ? torch::stable::transpose(f, 0, 1) : f;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor input, Tensor weight, Ints padding, Ints dilation,
                                    int64_t groups, bool exact, bool allow_tf32, bool need_input, bool need_weight) {
  Ints one{1, 1}, zero{0, 0};
  const bool flags[3] = {need_input, need_weight, false};
  torch::headeronly::HeaderOnlyArrayRef<bool> mask(flags, 3);
  std::array<StableIValue, 11> s{from(grad), from(input), from(weight), from(std::optional<Ints>()), from(one),
                                 from(padding), from(dilation), from(false), from(zero), from(groups), from(mask)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", s.data(), TORCH_ABI_VERSION));
  Tensor empty = torch::stable::new_empty(input, {0});
  Tensor gi = to<Tensor>(s[0]);
  Tensor gw = to<Tensor>(s[1]);
  return {need_input ? gi : empty, need_weight ? gw : empty};
}

Tensor pack(Tensor weight) { return torch::stable::clone(weight); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("atrous_conv2d", TORCH_BOX(&forward));
  m.impl("atrous_conv2d_out", TORCH_BOX(&forward_out));
  m.impl("_atrous_conv2d_backward", TORCH_BOX(&backward));
  m.impl("_atrous_conv2d_pack", TORCH_BOX(&pack));
}

}  // namespace pyseg
