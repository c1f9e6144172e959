// The CPU kernels of non-maximum suppression for one instruction set: compiled once per target, PYSEG_TARGET is its
// name.
//
// Boxes come by falling score; each that is not removed removes those after it that overlap it by more than the
// threshold. A block of boxes is settled one by one; then all vectors of boxes behind it are compared with those of the
// block that stay, the vector's coordinates in registers. Threads take groups, or such vectors of a single group.
// Compiled without fused operations (CMakeLists.txt): results equal torchvision's to the last bit.
#include "roi/nms_cpu_kernel.h"

#include "common/cpu_workers.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kBlock = 256;

template <typename A>
class Nms {
  using V = Vec<A>;
  static constexpr int64_t kLane = kLanes<A>;

 public:
  explicit Nms(const NmsArgs& a)
      : a_(a), box_(static_cast<const A*>(a.coordinates)), removed_(static_cast<A*>(a.removed)) {}

  void run(const Workers& workers) const {
    if (a_.groups == 1) return settle(0, workers);
    const Workers alone{1, workers.run};
    for_each_part(workers, a_.groups, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) settle(group, alone);
    });
  }

 private:
  void settle(int64_t group, const Workers& workers) const {
    const int64_t last = a_.begin[group] + a_.count[group], padded = a_.begin[group + 1];
    int64_t kept[kBlock];
    for (int64_t begin = a_.begin[group]; begin < last; begin += kBlock) {
      const int64_t end = smaller(begin + kBlock, padded);
      int64_t number = 0;
      for (int64_t i = begin; i < smaller(end, last); ++i) {
        if (removed_[i] != A(0)) continue;
        kept[number++] = i;
        for (int64_t j = i / kLane * kLane; j < end; j += kLane) remove(j, i + 1, &i, 1);
      }
      for_each_part(workers, (padded - end) / kLane, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t v = first; v < last; ++v) remove(end + v * kLane, 0, kept, number);
      });
    }
  }

  const A* row(int i) const { return box_ + i * a_.total; }

  // Sets removed_ of boxes j .. j + kLane - 1, but none before `from`, that one of the `number` boxes overlaps.
  void remove(int64_t j, int64_t from, const int64_t* boxes, int64_t number) const {
    const V x1 = load(row(0) + j), y1 = load(row(1) + j), x2 = load(row(2) + j), y2 = load(row(3) + j);
    const V area = load(row(4) + j), zero{}, one = broadcast<A>(A(1)), threshold = broadcast<A>(A(a_.threshold));
    V removed = load(removed_ + j);
    for (int64_t n = 0; n < number; ++n) {
      const int64_t i = boxes[n];
      const V left = broadcast<A>(row(0)[i]), top = broadcast<A>(row(1)[i]), right = broadcast<A>(row(2)[i]),
              bottom = broadcast<A>(row(3)[i]);
      const V width = (x2 < right ? x2 : right) - (x1 < left ? left : x1);
      const V height = (y2 < bottom ? y2 : bottom) - (y1 < top ? top : y1);
      const V overlap = (width < zero ? zero : width) * (height < zero ? zero : height);
      const V together = broadcast<A>(row(4)[i]) + area - overlap;
      removed = overlap / together > threshold ? one : removed;
    }
    if (j >= from) return store(removed_ + j, removed);
    for (int64_t lane = 0; lane < kLane; ++lane)
      if (j + lane >= from) removed_[j + lane] = removed[lane];
  }

  const NmsArgs& a_;
  const A* const box_;
  A* const removed_;
};

void suppress(const NmsArgs& a, const Workers& workers) {
  if (a.float64) {
    Nms<double>(a).run(workers);
  } else {
    Nms<float>(a).run(workers);
  }
}

}  // namespace

extern const NmsKernelTable nms_kernels;
const NmsKernelTable nms_kernels = {.suppress = suppress};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
