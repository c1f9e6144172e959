// The passes put together: rows, then columns, then the first of three axes; threads over planes and strips.
#pragma once

#include "common/cpu_workers.h"
#include "distance/cpu_axis_pass.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// T: arithmetic; G: of distances along rows; Out: the distances' type.
template <typename T, typename G, typename Out>
class Transform {
 public:
  // Between the second and the third pass squares lie in the result's own memory, if they fit it.
  static constexpr bool kInPlace = sizeof(T) == sizeof(Out);

  static int64_t workspace(const DistanceArgs& a, int64_t workers) {
    return shared_bytes(a, workers) + workers * worker_bytes(a, workers);
  }

  Transform(const DistanceArgs& a, void* workspace, const Workers& workers)
      : a_(a), workers_(workers), workspace_(static_cast<char*>(workspace)), plane_(a.h * a.w) {
    if (a.dims == 3) squares_ = kInPlace ? static_cast<T*>(a.output) : reinterpret_cast<T*>(workspace_);
  }

  void run() const {
    const int64_t planes = a_.n * a_.d;
    if (by_plane(a_, workers_.count)) {
      for_each_part(workers_, planes, [&](int64_t worker, int64_t first, int64_t last) {
        char* scratch = worker_scratch(worker);
        G* g = reinterpret_cast<G*>(scratch);
        scratch += g_bytes(a_);
        for (int64_t p = first; p < last; ++p) {
          rows(p, 0, a_.h, g, scratch);
          if (lacks_background(g)) {
            fill(p);
          } else {
            columns(p, 0, strips(a_.w), g, scratch);
          }
        }
      });
    } else {
      G* g = reinterpret_cast<G*>(workspace_ + squares_bytes(a_));
      for (int64_t p = 0; p < planes; ++p) {
        for_each_part(workers_, a_.h, [&](int64_t worker, int64_t first, int64_t last) {
          rows(p, first, last, g, worker_scratch(worker));
        });
        for_each_part(workers_, strips(a_.w), [&](int64_t worker, int64_t first, int64_t last) {
          columns(p, first, last, g, worker_scratch(worker));
        });
      }
    }
    if (a_.dims == 3) {
      for_each_part(workers_, a_.n * strips(plane_),
                    [&](int64_t worker, int64_t first, int64_t last) { depth(first, last, worker_scratch(worker)); });
    }
  }

 private:
  using Columns = AxisPass<T, G, Out>;
  using Depth = AxisPass<T, T, Out>;

  static int64_t strips(int64_t columns) { return (columns + kStrip - 1) / kStrip; }
  // Whole planes for each worker stay in its cache; single ones are shared out.
  static bool by_plane(const DistanceArgs& a, int64_t workers) { return a.n * a.d >= workers; }
  static int64_t g_bytes(const DistanceArgs& a) { return a.h * row_stride(a.w) * static_cast<int64_t>(sizeof(G)); }
  static int64_t squares_bytes(const DistanceArgs& a) {
    return a.dims == 3 && !kInPlace ? row_stride(a.n * a.d * a.h * a.w * static_cast<int64_t>(sizeof(T))) : 0;
  }
  static int64_t shared_bytes(const DistanceArgs& a, int64_t workers) {
    return squares_bytes(a) + (by_plane(a, workers) ? 0 : g_bytes(a));
  }
  static int64_t worker_bytes(const DistanceArgs& a, int64_t workers) {
    const bool labels = distance::compares_labels(a.mode);
    int64_t most = larger(RowPass<G>::workspace(a.w), Columns::workspace(a.h, labels, a.indices != nullptr));
    if (by_plane(a, workers)) most += g_bytes(a);
    if (a.dims == 3) most = larger(most, Depth::workspace(a.d, labels, a.indices != nullptr));
    return most;
  }

  char* worker_scratch(int64_t worker) const {
    return workspace_ + shared_bytes(a_, workers_.count) + worker * worker_bytes(a_, workers_.count);
  }

  // Rows first .. last - 1 of a plane.
  void rows(int64_t plane, int64_t first, int64_t last, G* g, void* scratch) const {
    RowPass<G> pass(a_, scratch);
    for (int64_t y = first; y < last; ++y) pass.run(plane * a_.h + y, g + y * row_stride(a_.w));
  }

  // Whether no element of a map of two axes is background: the long scans for it would find nothing. A row without
  // source says so in each of its elements.
  bool lacks_background(const G* g) const {
    if (a_.dims == 3 || a_.indices != nullptr || distance::compares_labels(a_.mode)) return false;
    for (int64_t y = 0; y < a_.h; ++y)
      if (g[y * row_stride(a_.w)] != kNoSource<G>) return false;
    return true;
  }
  void fill(int64_t plane) const {
    Out* out = static_cast<Out*>(a_.output) + plane * plane_;
    for (int64_t i = 0; i < plane_; ++i) out[i] = Out(__builtin_inf());
  }

  // Strips first .. last - 1 of a plane.
  void columns(int64_t plane, int64_t first, int64_t last, const G* g, void* scratch) const {
    const int64_t components = a_.dims * a_.d * plane_, image = plane / a_.d;
    const AxisView view{.rows = a_.h,
                        .columns = a_.w,
                        .source_stride = row_stride(a_.w),
                        .stride = a_.w,
                        .first = plane * plane_,
                        .spacing = a_.spacing[1],
                        .last = a_.dims == 2,
                        .first_index = image * components + plane % a_.d * plane_,
                        .component_stride = a_.d * plane_};
    Columns pass(a_, view, g, a_.dims == 2 ? a_.output : squares_, scratch);
    for (int64_t s = first; s < last; ++s) pass.run(s * kStrip);
  }

  // Strips first .. last - 1 of the images' planes, along the first axis; every column is read before it is written.
  void depth(int64_t first, int64_t last, void* scratch) const {
    const int64_t per_image = strips(plane_), image_size = a_.d * plane_;
    for (int64_t s = first; s < last; ++s) {
      const int64_t image = s / per_image;
      const AxisView view{.rows = a_.d,
                          .columns = plane_,
                          .source_stride = plane_,
                          .stride = plane_,
                          .first = image * image_size,
                          .spacing = a_.spacing[0],
                          .last = true,
                          .first_index = image * a_.dims * image_size,
                          .component_stride = image_size};
      Depth pass(a_, view, squares_ + image * image_size, a_.output, scratch);
      pass.run(s % per_image * kStrip);
    }
  }

  const DistanceArgs& a_;
  const Workers& workers_;
  char* workspace_;
  const int64_t plane_;
  T* squares_ = nullptr;  // [N, D, H, W]
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
