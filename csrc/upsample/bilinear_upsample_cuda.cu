// bilinear_upsample, upsample_concat and their gradient on CUDA devices: checks, buffers, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "upsample/upsample_cuda_call.h"

namespace pyseg::upsample {
namespace {

template <typename T>
void launch_forward(const CudaCall& call, int l, T* output, const CudaLaunches& launches) {
  const CudaUpsampleArgs& a = call.args;
  const CudaMap& map = a.map[l];
  if (map.channels == 0) return;
  constexpr int kVec = kVectorBytes / int(sizeof(T));
  bool whole = map.channels % kVec == 0 && map.first_channel % kVec == 0 && a.channels % kVec == 0 &&
               CudaCall::is_aligned(map.input) && CudaCall::is_aligned(output);
  for (const int64_t stride : {map.image_stride, map.row_stride, map.column_stride})
    whole = whole && (stride % kVec == 0);
  const auto launch = [&](auto kernel, int vector) {
    const GridShape shape = call.shape_of(map, a.width, vector, (a.height + kStrip - 1) / kStrip);
    kernel<<<call.blocks_of(shape), kThreadsOfBlock, 0, launches.stream()>>>(map, shape, a.channels, a.height, a.width,
                                                                             output);
    launches.check(cudaGetLastError());
  };
  if (!call.last) {
    launch(upsample_forward<T, false, 1>, 1);
  } else if (whole) {
    launch(upsample_forward<T, true, kVec>, kVec);
  } else {
    launch(upsample_forward<T, true, 1>, 1);
  }
}

Tensor forward(const char* op, const char* name, const Tensors& inputs, const Ints& size, bool align,
               const std::optional<Floats>& factors) {
  const Element type = check_inputs(op, name, inputs);
  check_size(op, size);
  check_scale_factors(op, factors);
  const CudaLaunches launches(op, inputs[0]);
  const std::vector<Ints> sizes = sizes_of_each(inputs);
  CudaCall call(op, inputs[0], type, sizes, size[0], size[1], any_channels_last(inputs), align, factors);
  const CudaUpsampleArgs& a = call.args;
  Tensor output = new_map(inputs[0], {a.images, a.channels, a.height, a.width}, call.last);
  if (output.numel() == 0) return output;
  call.set_inputs(inputs);
  call.launch_taps(launches);
  with_element(type, [&]<typename T>() {
    for (int l = 0; l < a.maps; ++l) launch_forward(call, l, static_cast<T*>(output.data_ptr()), launches);
  });
  return output;
}

Tensor bilinear_upsample(Tensor input, Ints size, bool align_corners, std::optional<Floats> scale_factors) {
  return forward(kBilinear, "input", {input}, size, align_corners, scale_factors);
}

Tensor upsample_concat(Tensors inputs, Ints size, bool align_corners) {
  return forward(kConcat, "inputs", inputs, size, align_corners, {});
}

Tensors upsample_concat_backward(Tensor grad, Ints sizes, bool channels_last, bool align_corners,
                                 std::optional<Floats> scale_factors) {
  const char* op = kConcatBackward;
  const Element type = check_floats(op, "grad", grad);
  const std::vector<Ints> each = check_sizes(op, sizes, grad);
  check_scale_factors(op, scale_factors);
  const CudaLaunches launches(op, grad);
  CudaCall call(op, grad, type, each, grad.size(2), grad.size(3), channels_last, align_corners, scale_factors);
  Tensors grads = call.new_gradients(each, grad);
  if (grad.numel() == 0) return grads;
  const Tensor from = dense(grad, channels_last);
  call.launch_taps(launches);
  with_element(type, [&]<typename T>() {
    for (int l = 0; l < call.args.maps; ++l)
      call.launch_gather<T>(l, static_cast<const T*>(from.data_ptr()), call.args.channels,
                            call.args.map[l].first_channel, launches);
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("bilinear_upsample", TORCH_BOX(&bilinear_upsample));
  m.impl("upsample_concat", TORCH_BOX(&upsample_concat));
  m.impl("_upsample_concat_backward", TORCH_BOX(&upsample_concat_backward));
}

}  // namespace pyseg::upsample
