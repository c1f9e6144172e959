// joint_warp and its gradient for one instruction set: compiled once per target, PYSEG_TARGET is its name.
//
// forward: threads take rows of the output, of all images. A row goes by in runs whose places are found once and serve
// all channels of the image, soft labels and labels. backward: threads take channels of an image, whose gradient is
// added up in a plane of scratch, pixel after pixel, so that sums have one order whatever the number of threads.
#include <string.h>

#include "warp/cpu_warp_places.h"
#include "warp/cpu_warp_sample.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// Calls f.template operator()<A, Index, kDims>().
template <typename F>
auto with_warp(const WarpGeometry& g, bool near, const F& f) {
  const auto with_index = [&]<typename A, typename Index>() {
    return g.dims == 2 ? f.template operator()<A, Index, 2>() : f.template operator()<A, Index, 3>();
  };
  if (g.wide) return with_index.template operator()<double, int64_t>();
  return near ? with_index.template operator()<float, int32_t>() : with_index.template operator()<float, int64_t>();
}

template <typename A, typename Index, int kDims>
class JointWarp {
 public:
  static int64_t scratch(const WarpArgs& a, int64_t workers) {
    return workers * PlacesOfRow<A, kDims>::scratch(a.geometry) * int64_t(sizeof(A));
  }

  JointWarp(const WarpArgs& a, void* scratch) : a_(a), g_(a.geometry), scratch_(static_cast<A*>(scratch)) {}

  void run(const Workers& workers) const {
    const int64_t rows = g_.images * rows_of_image<kDims>(g_);
    for_each_part(workers, rows, [&](int64_t worker, int64_t first, int64_t last) {
      PlacesOfRow<A, kDims> row_places(g_, scratch_ + worker * PlacesOfRow<A, kDims>::scratch(g_));
      for (int64_t r = first; r < last; ++r) {
        const WarpRow<kDims> row(g_, r);
        row_places.start(row);
        for (int64_t x = 0; x < g_.out[2]; x += kRun) {
          const int n = int(smaller<int64_t>(kRun, g_.out[2] - x));
          WarpPlaces<A, kDims> places;
          row_places.run(x, n, places);
          const int64_t pixel = (r - row.image * rows_of_image<kDims>(g_)) * g_.out[2] + x;
          for (int m = 0; m < a_.maps; ++m) warp_map(a_.map[m], places, row.image, pixel, n);
          if (a_.labels != nullptr) warp_labels(*a_.labels, places, row.image, pixel, n);
        }
      }
    });
  }

 private:
  void warp_map(const WarpMap& map, const WarpPlaces<A, kDims>& places, int64_t image, int64_t pixel, int n) const {
    WarpTaps<A, Index, kDims> taps;
    find_taps(g_, ImageAxes<A, kDims>(g_, map.border), map.stride, places, n, taps);
    if constexpr (kSame<A, double>) {
      return warp_channels<double, double>(map, taps, image, pixel, n);
    } else {
      switch (map.type) {
        case Element::kHalf: return warp_channels<Half, Half>(map, taps, image, pixel, n);
        case Element::kBFloat16: return warp_channels<BFloat16, BFloat16>(map, taps, image, pixel, n);
        case Element::kUInt8:
          if (map.output_type == Element::kUInt8) return warp_channels<uint8_t, uint8_t>(map, taps, image, pixel, n);
          return warp_channels<uint8_t, float>(map, taps, image, pixel, n);
        default: return warp_channels<float, float>(map, taps, image, pixel, n);
      }
    }
  }

  template <typename T, typename Output>
  void warp_channels(const WarpMap& map, const WarpTaps<A, Index, kDims>& taps, int64_t image, int64_t pixel,
                     int n) const {
    const T* const from = static_cast<const T*>(map.input) + image * map.image_stride;
    Output* const to = static_cast<Output*>(map.output) + image * map.output_image_stride + pixel * map.output_step;
    int64_t extent = 1;
    for (int d = 0; d < warp::kMostDims; ++d) extent += (g_.in[d] - 1) * map.stride[d];
    const A* const outside = map.border == Border::kConstant && map.fill != 0 ? taps.outside : nullptr;
    const auto of_channel = [&](const void* list, int64_t c, A otherwise) {
      return list != nullptr ? static_cast<const A*>(list)[image * map.channels + c] : otherwise;
    };
    for (int64_t c = 0; c < map.channels; ++c) {
      alignas(64) A value[kRun];
      sample(from + c * map.channel_stride, extent, taps, n, value);
      finish(outside, A(map.fill), of_channel(map.gain, c, A(1)), of_channel(map.bias, c, A(0)), n, value);
      write_run(value, n, to + c * map.output_channel_stride, map.output_step);
    }
  }

  void warp_labels(const WarpLabels& labels, const WarpPlaces<A, kDims>& places, int64_t image, int64_t pixel,
                   int n) const {
    alignas(64) Index index[kRun];
    find_nearest(ImageAxes<A, kDims>(g_, labels.border), labels.stride, places, n, index);
    const int64_t first = image * rows_of_image<kDims>(g_) * g_.out[2] + pixel;
    const auto copy = [&]<typename L>() {
      const L* const from = static_cast<const L*>(labels.input) + image * labels.image_stride;
      L* const to = static_cast<L*>(labels.output) + first;
      const L ignored = L(labels.ignore_index);
      for (int i = 0; i < n; ++i) {
        const L label = from[index[i] > 0 ? index[i] : Index(0)];
        to[i] = index[i] >= 0 ? label : ignored;
      }
    };
    switch (labels.element_size) {
      case 1: return copy.template operator()<uint8_t>();
      case 2: return copy.template operator()<uint16_t>();
      case 4: return copy.template operator()<uint32_t>();
      default: return copy.template operator()<uint64_t>();
    }
  }

  const WarpArgs& a_;
  const WarpGeometry& g_;
  A* const scratch_;
};

template <typename A, typename Index, int kDims>
class JointWarpBackward {
 public:
  static int64_t scratch(const WarpBackwardArgs& a, int64_t workers) {
    return workers * of_worker(a.geometry) * int64_t(sizeof(A));
  }

  JointWarpBackward(const WarpBackwardArgs& a, void* scratch)
      : a_(a), g_(a.geometry), scratch_(static_cast<A*>(scratch)) {}

  void run(const Workers& workers) const {
    for_each_part(workers, g_.images * a_.channels, [&](int64_t worker, int64_t first, int64_t last) {
      A* const plane = scratch_ + worker * of_worker(g_);
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t image = unit / a_.channels, channel = unit % a_.channels;
        memset(plane, 0, elements(g_) * sizeof(A));
        with_types(a_.type, [&]<typename T, typename C>() {
          if constexpr (kSame<A, C>) {
            add_up<T>(image, channel, plane, plane + round_up(elements(g_), kLine));
            T* const to = static_cast<T*>(a_.grad_image) + image * a_.image_stride + channel * a_.channel_stride;
            for (int64_t i = 0; i < elements(g_); ++i) to[i * a_.step] = narrowed<T>(plane[i]);
          }
        });
      }
    });
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);
  static int64_t elements(const WarpGeometry& g) { return g.in[0] * g.in[1] * g.in[2]; }
  static int64_t of_worker(const WarpGeometry& g) {
    return round_up(elements(g), kLine) + PlacesOfRow<A, kDims>::scratch(g);
  }

  template <typename T>
  void add_up(int64_t image, int64_t channel, A* plane, A* scratch) const {
    PlacesOfRow<A, kDims> row_places(g_, scratch);
    const ImageAxes<A, kDims> axes(g_, a_.border);
    const int64_t stride[warp::kMostDims] = {g_.in[1] * g_.in[2], g_.in[2], 1}, rows = rows_of_image<kDims>(g_);
    const A gain = a_.gain != nullptr ? static_cast<const A*>(a_.gain)[image * a_.channels + channel] : A(1);
    const T* const grad =
        static_cast<const T*>(a_.grad) + image * a_.grad_image_stride + channel * a_.grad_channel_stride;
    for (int64_t r = 0; r < rows; ++r) {
      const WarpRow<kDims> row(g_, image * rows + r);
      row_places.start(row);
      const T* from = grad;
      for (int d = 0; d < kDims - 1; ++d) from += row.outer[d] * a_.grad_stride[warp::kMostDims - kDims + d];
      for (int64_t x = 0; x < g_.out[2]; x += kRun) {
        const int n = int(smaller<int64_t>(kRun, g_.out[2] - x));
        WarpPlaces<A, kDims> places;
        row_places.run(x, n, places);
        WarpTaps<A, Index, kDims> taps;
        find_taps(g_, axes, stride, places, n, taps);
        alignas(64) A values[kRun];
        for (int i = 0; i < n; ++i) values[i] = A(widen(from[(x + i) * a_.grad_stride[2]])) * gain;
        scatter(values, taps, n, plane);
      }
    }
  }

  const WarpBackwardArgs& a_;
  const WarpGeometry& g_;
  A* const scratch_;
};

bool is_near(const WarpBackwardArgs& a) {
  return a.geometry.in[0] * a.geometry.in[1] * a.geometry.in[2] < (int64_t{1} << 31);
}

int64_t forward_scratch(const WarpArgs& a, int64_t workers) {
  return with_warp(a.geometry, a.near, [&]<typename A, typename Index, int kDims>() {
    return JointWarp<A, Index, kDims>::scratch(a, workers);
  });
}

void forward(const WarpArgs& a, void* scratch, const Workers& workers) {
  with_warp(a.geometry, a.near,
            [&]<typename A, typename Index, int kDims>() { JointWarp<A, Index, kDims>(a, scratch).run(workers); });
}

int64_t backward_scratch(const WarpBackwardArgs& a, int64_t workers) {
  return with_warp(a.geometry, is_near(a), [&]<typename A, typename Index, int kDims>() {
    return JointWarpBackward<A, Index, kDims>::scratch(a, workers);
  });
}

void backward(const WarpBackwardArgs& a, void* scratch, const Workers& workers) {
  with_warp(a.geometry, is_near(a), [&]<typename A, typename Index, int kDims>() {
    JointWarpBackward<A, Index, kDims>(a, scratch).run(workers);
  });
}

}  // namespace

extern const WarpKernelTable warp_kernels;
const WarpKernelTable warp_kernels = {
    .forward_scratch = forward_scratch,
    .forward = forward,
    .backward_scratch = backward_scratch,
    .backward = backward,
};

}  // namespace PYSEG_TARGET
}  // namespace pyseg
