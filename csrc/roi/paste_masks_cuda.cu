// paste_masks on CUDA devices: checks, buffers, launches, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "common/cuda_launches.h"
#include "roi/paste_masks_cuda.cuh"
#include "roi/paste_masks_rle_cuda.cuh"
#include "roi/roi_check.h"

namespace pyseg::roi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostBlocks = int64_t{1} << 30;

unsigned blocks_for(int64_t threads) {
  return unsigned(std::min((threads + kPasteThreads - 1) / kPasteThreads, kMostBlocks));
}

// The arguments as the kernels take them, and what they point into.
class CudaPasteCall {
 public:
  CudaPaste args{};

  CudaPasteCall(const char* op, const Tensor& like, const Ints& masks, const Tensor& boxes, int64_t height,
                int64_t width, int64_t padding)
      : type_(check_floats(op, "masks", like)) {
    check_same_device(op, "boxes", boxes, like);
    wide_ = boxes.scalar_type() == ScalarType::Double;
    boxes_ = torch::stable::contiguous(wide_ ? boxes : torch::stable::to(boxes, ScalarType::Float));
    axes_ = torch::stable::new_empty(like, {2 * masks[0] * int64_t(sizeof(PasteAxis))}, ScalarType::Byte);
    args.boxes = boxes_.data_ptr();
    args.count = masks[0];
    args.mask_height = masks[1];
    args.mask_width = masks[2];
    args.padding = padding;
    args.height = height;
    args.width = width;
    args.rows = static_cast<PasteAxis*>(axes_.data_ptr());
    args.columns = args.rows + masks[0];
  }
  CudaPasteCall(const CudaPasteCall&) = delete;

  void plan(const CudaLaunches& launches) const {
    if (wide_) {
      paste_masks_plan<double><<<blocks_for(args.count), kPasteThreads, 0, launches.stream()>>>(args);
    } else {
      paste_masks_plan<float><<<blocks_for(args.count), kPasteThreads, 0, launches.stream()>>>(args);
    }
    launches.check(cudaGetLastError());
  }

  // Calls f.template operator()<T>() with the type of the masks.
  template <typename F>
  void with_type(const F& f) const {
    switch (type_) {
      case Element::kFloat: return f.template operator()<float>();
      case Element::kDouble: return f.template operator()<double>();
      case Element::kHalf: return f.template operator()<__half>();
      default: return f.template operator()<__nv_bfloat16>();
    }
  }

 private:
  Element type_;
  bool wide_;
  Tensor boxes_, axes_;
};

Tensor paste_masks_cuda(Tensor masks, Tensor boxes, int64_t height, int64_t width, double threshold, std::string output,
                        int64_t padding) {
  check_paste(kPaste, sizes_of(masks), boxes, height, width, padding);
  const PasteOutput kind = check_paste_output(output);
  const CudaLaunches launches(kPaste, masks);
  CudaPasteCall call(kPaste, masks, sizes_of(masks), boxes, height, width, padding);
  const Tensor dense = torch::stable::contiguous(masks);
  Tensor out = new_pasted(masks, height, width, kind);
  if (out.numel() == 0) return out;
  call.args.masks = dense.data_ptr();
  call.args.threshold = paste_threshold(masks, threshold);
  call.args.output = out.data_ptr();
  call.plan(launches);
  const bool packed = kind == PasteOutput::kPacked;
  const int64_t bytes = out.numel() * out.element_size();
  const auto blocks = blocks_for((bytes + (packed ? 3 : 15)) / (packed ? 4 : 16));
  call.with_type([&]<typename T>() {
    if (kind == PasteOutput::kValues) {
      paste_masks<T, PasteOutput::kValues><<<blocks, kPasteThreads, 0, launches.stream()>>>(call.args);
    } else if (packed) {
      paste_masks<T, PasteOutput::kPacked><<<blocks, kPasteThreads, 0, launches.stream()>>>(call.args);
    } else {
      paste_masks<T, PasteOutput::kBool><<<blocks, kPasteThreads, 0, launches.stream()>>>(call.args);
    }
  });
  launches.check(cudaGetLastError());
  return out;
}

Tensor paste_masks_backward_cuda(Tensor grad, Tensor boxes, int64_t mask_height, int64_t mask_width, int64_t padding) {
  const char* op = kPasteBackward;
  PYSEG_CHECK(grad.dim() == 3, op, ": grad must be [K, H, W], got ", grad.sizes());
  const Ints masks{grad.size(0), mask_height, mask_width};
  check_paste(op, masks, boxes, grad.size(1), grad.size(2), padding);
  const CudaLaunches launches(op, grad);
  CudaPasteCall call(op, grad, masks, boxes, grad.size(1), grad.size(2), padding);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_empty(grad, masks);
  if (out.numel() == 0) return out;
  call.args.grad = dense.data_ptr();
  call.args.grad_masks = out.data_ptr();
  call.plan(launches);
  call.with_type([&]<typename T>() {
    paste_masks_backward<T><<<blocks_for(out.numel() * kPasteWarp), kPasteThreads, 0, launches.stream()>>>(call.args);
  });
  launches.check(cudaGetLastError());
  return out;
}

// The sum of the sizes is data: waits for the device once.
std::tuple<Tensor, Tensor> paste_masks_rle_cuda(Tensor masks, Tensor boxes, int64_t height, int64_t width,
                                                double threshold, int64_t padding) {
  check_paste(kPasteRle, sizes_of(masks), boxes, height, width, padding);
  PYSEG_CHECK(masks.size(0) <= INT32_MAX, kPasteRle, ": masks must be fewer than 2^31, got ", masks.size(0));
  const CudaLaunches launches(kPasteRle, masks);
  CudaPasteCall call(kPasteRle, masks, sizes_of(masks), boxes, height, width, padding);
  Tensor sizes = torch::stable::new_empty(masks, {masks.size(0)}, ScalarType::Long);
  if (masks.size(0) == 0) return {torch::stable::new_empty(masks, {0}, ScalarType::Byte), sizes};
  const Tensor dense = torch::stable::contiguous(masks);
  call.args.masks = dense.data_ptr();
  call.args.threshold = paste_threshold(masks, threshold);
  call.plan(launches);
  const auto run = [&](uint8_t* bytes) {
    auto* const each = static_cast<int64_t*>(sizes.data_ptr());
    call.with_type([&]<typename T>() {
      paste_masks_rle<T><<<unsigned(masks.size(0)), kPasteThreads, 0, launches.stream()>>>(call.args, each, bytes);
    });
    launches.check(cudaGetLastError());
  };
  run(nullptr);
  std::vector<int64_t> counts(masks.size(0));
  launches.check(cudaMemcpyAsync(counts.data(), sizes.data_ptr(), counts.size() * sizeof(int64_t),
                                 cudaMemcpyDeviceToHost, launches.stream()));
  launches.check(cudaStreamSynchronize(launches.stream()));
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  Tensor bytes = torch::stable::new_empty(masks, {total}, ScalarType::Byte);
  run(static_cast<uint8_t*>(bytes.data_ptr()));
  return {bytes, sizes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks_cuda));
  m.impl("_paste_masks_backward", TORCH_BOX(&paste_masks_backward_cuda));
  m.impl("paste_masks_rle", TORCH_BOX(&paste_masks_rle_cuda));
}

}  // namespace pyseg::roi
