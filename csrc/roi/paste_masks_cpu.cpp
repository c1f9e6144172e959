// paste_masks on the CPU: where the boxes lie, workspace, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "common/cpu_capability.h"
#include "common/cpu_workspace.h"
#include "roi/paste_masks_cpu_kernel.h"
#include "roi/roi_check.h"

namespace pyseg::roi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const PasteKernelTable& paste_kernels() { return PYSEG_CPU_TABLE(paste_kernels); }

// The arguments as the kernels take them, and what they point into.
class PasteCall {
 public:
  PasteArgs args{};

  PasteCall(const char* op, const Tensor& like, const Ints& masks, const Tensor& boxes, int64_t height, int64_t width,
            int64_t padding)
      : like_(like), rows_(masks[0]), columns_(masks[0]) {
    args.type = check_floats(op, "masks", like);
    check_same_device(op, "boxes", boxes, like);
    args.count = masks[0];
    args.mask_height = masks[1];
    args.mask_width = masks[2];
    args.padding = padding;
    args.height = height;
    args.width = width;
    if (boxes.scalar_type() == ScalarType::Double) {
      place<double>(op, torch::stable::contiguous(boxes));
    } else {
      place<float>(op, torch::stable::contiguous(torch::stable::to(boxes, ScalarType::Float)));
    }
    args.rows = rows_.data();
    args.columns = columns_.data();
  }

  // f(workspace, workers)
  template <typename F>
  void run(const F& f) const {
    const double image = double(args.height) * double(args.width);
    Workers workers = workers_for(double(args.count) * image);
    workers.count = std::min(workers.count, args.count);
    const Workspace workspace(like_, paste_kernels().workspace(args, workers.count));
    f(workspace.data, workers);
  }

 private:
  template <typename A>
  void place(const char* op, const Tensor& boxes) {
    const A* box = static_cast<const A*>(boxes.data_ptr());
    for (int64_t k = 0; k < args.count; ++k, box += 4) {
      for (int i = 0; i < 4; ++i)
        PYSEG_CHECK(std::isfinite(box[i]), op, ": boxes must be finite, got ", box[i], " in row ", k);
      rows_[k] = paste_axis(box[1], box[3], args.mask_width, args.padding, args.height);
      columns_[k] = paste_axis(box[0], box[2], args.mask_width, args.padding, args.width);
    }
  }

  const Tensor& like_;
  std::vector<PasteAxis> rows_, columns_;
};

Tensor paste_masks(Tensor masks, Tensor boxes, int64_t height, int64_t width, double threshold, std::string output,
                   int64_t padding) {
  check_paste(kPaste, sizes_of(masks), boxes, height, width, padding);
  const PasteOutput kind = check_paste_output(output);
  PasteCall call(kPaste, masks, sizes_of(masks), boxes, height, width, padding);
  const Tensor dense = torch::stable::contiguous(masks);
  Tensor out = new_pasted(masks, height, width, kind);
  if (out.numel() == 0) return out;
  call.args.masks = dense.data_ptr();
  call.args.threshold = paste_threshold(masks, threshold);
  call.args.output = kind;
  call.run([&](void* workspace, const Workers& workers) {
    paste_kernels().paste(call.args, out.data_ptr(), workspace, workers);
  });
  return out;
}

Tensor paste_masks_backward(Tensor grad, Tensor boxes, int64_t mask_height, int64_t mask_width, int64_t padding) {
  const char* op = kPasteBackward;
  PYSEG_CHECK(grad.dim() == 3, op, ": grad must be [K, H, W], got ", grad.sizes());
  const Ints masks{grad.size(0), mask_height, mask_width};
  check_paste(op, masks, boxes, grad.size(1), grad.size(2), padding);
  PasteCall call(op, grad, masks, boxes, grad.size(1), grad.size(2), padding);
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::new_empty(grad, masks);
  if (out.numel() == 0) return out;
  call.run([&](void* workspace, const Workers& workers) {
    paste_kernels().backward(call.args, dense.data_ptr(), out.data_ptr(), workspace, workers);
  });
  return out;
}

// Buffers of malloc, freed whatever happens.
struct Runs {
  explicit Runs(int64_t count) : each(count) {}
  ~Runs() {
    for (PasteRuns& runs : each) std::free(runs.data);
  }
  Runs(const Runs&) = delete;
  std::vector<PasteRuns> each;
};

std::tuple<Tensor, Tensor> paste_masks_rle(Tensor masks, Tensor boxes, int64_t height, int64_t width, double threshold,
                                           int64_t padding) {
  check_paste(kPasteRle, sizes_of(masks), boxes, height, width, padding);
  PasteCall call(kPasteRle, masks, sizes_of(masks), boxes, height, width, padding);
  const Tensor dense = torch::stable::contiguous(masks);
  call.args.masks = dense.data_ptr();
  call.args.threshold = paste_threshold(masks, threshold);
  Runs runs(masks.size(0));
  if (masks.size(0) > 0) {
    call.run([&](void* workspace, const Workers& workers) {
      paste_kernels().run_lengths(call.args, runs.each.data(), workspace, workers);
    });
  }
  Tensor sizes = torch::stable::new_empty(masks, {masks.size(0)}, ScalarType::Long);
  int64_t total = 0;
  for (int64_t k = 0; k < masks.size(0); ++k) {
    PYSEG_CHECK(!runs.each[k].failed, kPasteRle, ": out of memory");
    static_cast<int64_t*>(sizes.data_ptr())[k] = runs.each[k].size;
    total += runs.each[k].size;
  }
  Tensor bytes = torch::stable::new_empty(masks, {total}, ScalarType::Byte);
  auto* to = static_cast<uint8_t*>(bytes.data_ptr());
  for (const PasteRuns& one : runs.each) {
    if (one.size > 0) std::memcpy(to, one.data, one.size);
    to += one.size;
  }
  return {bytes, sizes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("paste_masks", TORCH_BOX(&paste_masks));
  m.impl("_paste_masks_backward", TORCH_BOX(&paste_masks_backward));
  m.impl("paste_masks_rle", TORCH_BOX(&paste_masks_rle));
}

}  // namespace pyseg::roi
