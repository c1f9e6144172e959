// Distances to the nearest and the second nearest object. An element's two are among the two nearest of every row: of
// the others in a row both are nearer. So the passes are those of the distance transform with two candidates in place
// of one, each with its label; a scan outwards ends where no lane can improve its second.
#pragma once

#include "common/cpu_workers.h"
#include "distance/cpu_axis_pass.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// T: arithmetic; Out: the distances' type.
template <typename T, typename Out>
class TwoNearest {
  using L = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // labels in lanes as wide as the distances'
  using V = Lanes<T>;
  using VL = Lanes<L>;
  static constexpr int kLanesT = kLaneCount<T>;
  static constexpr bool kInteger = std::is_same_v<T, int32_t>;

  // The two nearest objects: squared distances, first <= second, and labels; none() and 0 where there is none.
  struct Planes {
    T *first, *second;
    L *first_label, *second_label;
  };

  struct Lane {
    V first, second;
    VL first_label, second_label;

    // Takes in an object's candidate. A label is in one of the two places only, with its smaller distance.
    void insert(V distance, VL label) {
      const auto is_other = label != first_label;
      const auto to_first = distance < first, to_second = (distance < second) & is_other;
      const auto moves_on = to_first & is_other;  // what was first is second now
      second = moves_on ? first : to_second ? distance : second;
      second_label = moves_on ? first_label : to_second ? label : second_label;
      first = to_first ? distance : first;
      first_label = to_first ? label : first_label;
    }
  };

 public:
  static int64_t workspace(const TwoNearestArgs& a, int64_t workers) {
    return image_bytes(a) + workers * worker_bytes(a);
  }

  TwoNearest(const TwoNearestArgs& a, void* workspace, const Workers& workers)
      : a_(a), workers_(workers), workspace_(static_cast<char*>(workspace)), plane_(a.h * a.w) {
    planes_ = carve(workspace_, a.d * plane_);
  }

  void run() const {
    for (int64_t image = 0; image < a_.n; ++image) {
      const int objects = count_objects(a_.labels + image * a_.d * plane_, a_.d * plane_);
      for_each_part(workers_, a_.d * a_.h, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) find_in_row(image, row);
      });
      const int64_t strips = (a_.w + kLanesT - 1) / kLanesT;
      for_each_part(workers_, a_.d * strips, [&](int64_t worker, int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s)
          find_along_axis(image, worker, objects, a_.h, a_.w, s / strips * plane_, s % strips * kLanesT, a_.spacing[1],
                          a_.d == 1);
      });
      if (a_.d == 1) continue;
      for_each_part(workers_, (plane_ + kLanesT - 1) / kLanesT, [&](int64_t worker, int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s)
          find_along_axis(image, worker, objects, a_.d, plane_, 0, s * kLanesT, a_.spacing[0], true);
      });
    }
  }

 private:
  static Planes carve(char* at, int64_t count) {
    const int64_t step = row_stride(count * static_cast<int64_t>(sizeof(T)));
    return {reinterpret_cast<T*>(at), reinterpret_cast<T*>(at + step), reinterpret_cast<L*>(at + 2 * step),
            reinterpret_cast<L*>(at + 3 * step)};
  }
  static int64_t carved(int64_t count) { return 4 * row_stride(count * static_cast<int64_t>(sizeof(T))); }
  static int64_t image_bytes(const TwoNearestArgs& a) { return carved(a.d * a.h * a.w); }
  static int64_t worker_bytes(const TwoNearestArgs& a) { return carved(kLanesT * larger(a.h, a.d)); }

  // 0, 1, or 2 for more: a scan for an object that does not exist would not end early.
  static int count_objects(const int32_t* labels, int64_t count) {
    int32_t one = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (labels[i] == 0 || labels[i] == one) continue;
      if (one != 0) return 2;
      one = labels[i];
    }
    return one != 0;
  }

  T square(int64_t steps, double spacing) const {
    if constexpr (kInteger) return static_cast<T>(steps * steps);
    const T distance = static_cast<T>(steps) * static_cast<T>(spacing);
    return distance * distance;
  }

  // The last objects seen on the way along a row.
  struct Seen {
    L label = 0, other = 0;  // of the last element with an object, and of the last one with another object than that
    int64_t at = 0, other_at = 0;

    void see(L l, int64_t x) {
      if (l == 0) return;
      if (l != label) {
        other = label;
        other_at = at;
        label = l;
      }
      at = x;
    }
  };

  void find_in_row(int64_t image, int64_t row) const {
    const int32_t* labels = a_.labels + (image * a_.d * a_.h + row) * a_.w;
    const int64_t at = row * a_.w;
    T *first = planes_.first + at, *second = planes_.second + at;
    L *first_label = planes_.first_label + at, *second_label = planes_.second_label + at;
    Seen seen;
    const auto distance = [&](L label, int64_t steps) { return label ? square(steps, a_.spacing[2]) : none<T>(); };
    for (int64_t x = 0; x < a_.w; ++x) {
      seen.see(labels[x], x);
      first[x] = distance(seen.label, x - seen.at);
      second[x] = distance(seen.other, x - seen.other_at);
      first_label[x] = seen.label;
      second_label[x] = seen.other;
    }
    seen = {};
    for (int64_t x = a_.w - 1; x >= 0; --x) {
      seen.see(labels[x], x);
      const T distances[2] = {distance(seen.label, seen.at - x), distance(seen.other, seen.other_at - x)};
      const L found[2] = {seen.label, seen.other};
      for (int c = 0; c < 2; ++c) {
        if (found[c] == first_label[x]) {
          first[x] = smaller(first[x], distances[c]);
        } else if (distances[c] < first[x]) {
          second[x] = first[x];
          second_label[x] = first_label[x];
          first[x] = distances[c];
          first_label[x] = found[c];
        } else if (distances[c] < second[x]) {
          second[x] = distances[c];
          second_label[x] = found[c];
        }
      }
    }
  }

  // kLanesT columns of `rows` rows that are `stride` elements apart.
  void find_along_axis(int64_t image, int64_t worker, int objects, int64_t rows, int64_t stride, int64_t start,
                       int64_t column, double spacing, bool last) const {
    const Planes in = carve(workspace_ + image_bytes(a_) + worker * worker_bytes(a_), rows * kLanesT);
    const int64_t count = smaller(int64_t{kLanesT}, stride - column);
    const bool exact = fits_float(a_.d, a_.h, a_.w);
    for (int64_t y = 0; y < rows; ++y) {
      const int64_t at = start + y * stride + column;
      for (int64_t i = 0; i < kLanesT; ++i) {
        const int64_t from = at + smaller(i, count - 1);  // lanes that do not exist repeat the last one
        in.first[y * kLanesT + i] = planes_.first[from];
        in.second[y * kLanesT + i] = planes_.second[from];
        in.first_label[y * kLanesT + i] = planes_.first_label[from];
        in.second_label[y * kLanesT + i] = planes_.second_label[from];
      }
    }
    for (int64_t y = 0; y < rows; ++y) {
      Lane best = load(in, y);
      for (int64_t k = 1; k < rows && objects > 0; ++k) {
        const T far = square(k, spacing);
        if (!any_above<T>(objects > 1 ? best.second : best.first, far)) break;
        if (y - k < 0 && y + k >= rows) break;
        for (const int64_t i : {y - k, y + k}) {
          if (i < 0 || i >= rows) continue;
          const V candidate = load_lanes(in.first + i * kLanesT) + far;
          if (!any_lane(candidate < best.second)) continue;
          best.insert(candidate, load_lanes(in.first_label + i * kLanesT));
          best.insert(load_lanes(in.second + i * kLanesT) + far, load_lanes(in.second_label + i * kLanesT));
        }
      }
      if (last) {
        const int64_t at = image * a_.d * plane_ + start + y * stride + column;
        convert_squares<T>(best.first, count, a_.squared, exact, static_cast<Out*>(a_.first) + at);
        convert_squares<T>(best.second, count, a_.squared, exact, static_cast<Out*>(a_.second) + at);
      } else {
        const int64_t at = start + y * stride + column;
        for (int64_t i = 0; i < count; ++i) {
          planes_.first[at + i] = best.first[i];
          planes_.second[at + i] = best.second[i];
          planes_.first_label[at + i] = best.first_label[i];
          planes_.second_label[at + i] = best.second_label[i];
        }
      }
    }
  }

  static Lane load(const Planes& p, int64_t y) {
    return {load_lanes(p.first + y * kLanesT), load_lanes(p.second + y * kLanesT),
            load_lanes(p.first_label + y * kLanesT), load_lanes(p.second_label + y * kLanesT)};
  }

  const TwoNearestArgs& a_;
  const Workers& workers_;
  char* workspace_;
  const int64_t plane_;
  Planes planes_;  // [D, H, W]
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
