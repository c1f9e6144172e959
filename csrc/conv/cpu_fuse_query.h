// What fuse_query does around its matrix products, for one CPU target: a pass over the product that adds what vector
// and coordinates contribute (in place), one over its gradient that gates it and sums it up, and the two passes over a
// map's channels that normalising a pixel takes (scale and project, never of 16-bit elements). Each is bound by memory;
// 16-bit elements are converted in runs.
//
// Blocks and parts do not depend on the number of workers, so that neither does a bit of the results.
#pragma once

#include "common/cpu_convert.h"
#include "common/cpu_workers.h"
#include "conv/fuse_query_cpu_kernel.h"
#include "conv/fuse_query_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

template <typename A>
inline A sum_of(Vec<A> v) {
  A sum = v[0];
  for (int i = 1; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

// `count` elements as A: where they are, or converted in `stage`.
template <typename A, typename T>
inline const A* as_run(const T* from, A* stage, int64_t count) {
  if constexpr (kSame<T, A>) {
    return from;
  } else {
    convert_run(from, stage, count);
    return stage;
  }
}
// Where to write a run of A that ends up at `to`, and getting it there.
template <typename A, typename T>
inline A* target_run(T* to, A* stage) {
  if constexpr (kSame<T, A>) {
    return to;
  } else {
    return stage;
  }
}
template <typename A, typename T>
inline void finish_run(const A* stage, T* to, int64_t count) {
  if constexpr (!kSame<T, A>) narrow_run(stage, to, count);
}

template <typename T, typename A>
class FuseQuery {
 public:
  explicit FuseQuery(const FuseQueryArgs& a)
      : a_(a), pixels_(a.height * a.width), inverse_height_(A(1) / A(a.height)), inverse_width_(A(1) / A(a.width)) {}

  // One over the norm of each pixel.
  void scale(const Workers& workers) const {
    const T* const x = static_cast<const T*>(a_.input);
    A* const scale = static_cast<A*>(a_.scale);
    const auto set = [&](int64_t pixel, A square) { scale[pixel] = A(1) / larger(root(square), A(fuse::kLeastNorm)); };
    if (a_.last) {
      for_each_part(workers, a_.images * pixels_, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) set(p, dot(x + p * a_.inputs, x + p * a_.inputs));
      });
      return;
    }
    for_each_block(workers, [&](int64_t image, int64_t begin, int64_t count) {
      A squares[kDotBlock];
      dots(x + image * a_.inputs * pixels_ + begin, x + image * a_.inputs * pixels_ + begin, count, squares);
      for (int64_t i = 0; i < count; ++i) set(image * pixels_ + begin + i, squares[i]);
    });
  }

  // output = relu?(scale * output + offset + ramp).
  void add(const Workers& workers) const {
    if (a_.last) {
      with_switches([&]<bool kScaled, bool kRelu>() { add_to_pixels<kScaled, kRelu>(workers); });
    } else {
      with_switches([&]<bool kScaled, bool kRelu>() { add_to_planes<kScaled, kRelu>(workers); });
    }
  }

  // gated = scale * g with g = grad, or 0 where ReLU was at work; the sums of g, g * u and g * v over the pixels.
  void gate(void* scratch, const Workers& workers) const {
    A* const sums = static_cast<A*>(scratch);
    if (a_.last) {
      gate_pixels(sums, workers);
    } else {
      gate_planes(sums, workers);
    }
    add_sums(sums, workers);
  }
  int64_t gate_scratch() const { return a_.images * parts() * 3 * a_.channels * int64_t(sizeof(A)); }

  // grad_input -= x * scale^2 <x, grad_input>, pixel by pixel.
  void project(const Workers& workers) const {
    const T* const x = static_cast<const T*>(a_.input);
    T* const h = static_cast<T*>(a_.grad_input);
    if (a_.last) {
      for_each_part(workers, a_.images * pixels_, [&](int64_t, int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) project_pixel(x + p * a_.inputs, h + p * a_.inputs, scale_at(p));
      });
      return;
    }
    for_each_block(workers, [&](int64_t image, int64_t begin, int64_t count) {
      const int64_t start = image * a_.inputs * pixels_ + begin;
      A factors[kDotBlock];
      dots(x + start, h + start, count, factors);
      for (int64_t i = 0; i < count; ++i) factors[i] = factor_of(factors[i], scale_at(image * pixels_ + begin + i));
      for (int64_t c = 0; c < a_.inputs; ++c) {
        const T* const from = x + start + c * pixels_;
        T* const to = h + start + c * pixels_;
        for (int64_t i = 0; i < count; ++i) to[i] -= from[i] * factors[i];
      }
    });
  }

 private:
  static constexpr int64_t kBlock = 1024;    // pixels of a plane whose centres are at hand
  static constexpr int64_t kDotBlock = 512;  // pixels whose channels are summed up together
  static constexpr int64_t kRun = 512;       // channels of a pixel at a time
  static constexpr int64_t kPart = 256;      // pixels whose gradients are summed up by one worker
  static constexpr int kVectors = 4;         // of channels whose sums are in registers
  static constexpr int64_t kGroup = kVectors * kLanes<A>;

  // ---- dot products over channels ----

  // f(image, first pixel, pixels) for blocks of the pixels.
  template <typename F>
  void for_each_block(const Workers& workers, const F& f) const {
    const int64_t blocks = (pixels_ + kDotBlock - 1) / kDotBlock;
    for_each_part(workers, a_.images * blocks, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = i % blocks * kDotBlock;
        f(i / blocks, begin, smaller(kDotBlock, pixels_ - begin));
      }
    });
  }

  // Of `count` pixels side by side, whose channels are planes apart.
  void dots(const T* x, const T* y, int64_t count, A* sums) const {
    for (int64_t i = 0; i < count; ++i) sums[i] = 0;
    for (int64_t c = 0; c < a_.inputs; ++c)
      for (int64_t i = 0; i < count; ++i) sums[i] += x[c * pixels_ + i] * y[c * pixels_ + i];
  }

  // Of one pixel, whose channels lie side by side.
  A dot(const T* x, const T* y) const {
    A sum = 0;
    for (int64_t begin = 0; begin < a_.inputs; begin += kRun) {
      const int64_t count = smaller(kRun, a_.inputs - begin);
      const T* const left = x + begin;
      const T* const right = y + begin;
      Vec<A> sums[kVectors] = {};
      int64_t i = 0;
      for (; i + kGroup <= count; i += kGroup)
        for (int j = 0; j < kVectors; ++j) sums[j] += load(left + i + j * kLanes<A>) * load(right + i + j * kLanes<A>);
      for (; i + kLanes<A> <= count; i += kLanes<A>) sums[0] += load(left + i) * load(right + i);
      for (; i < count; ++i) sum += left[i] * right[i];
      sum += sum_of<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return sum;
  }

  // A norm below the least is taken for that, and has no gradient.
  static A factor_of(A dot, A scale) { return scale < A(1) / A(fuse::kLeastNorm) ? dot * scale * scale : A(0); }

  void project_pixel(const T* x, T* h, A scale) const {
    const A factor = factor_of(dot(x, h), scale);
    for (int64_t c = 0; c < a_.inputs; ++c) h[c] -= x[c] * factor;
  }

  // ---- the product ----

  A scale_at(int64_t pixel) const { return static_cast<const A*>(a_.scale)[pixel]; }

  template <typename F>
  void with_switches(const F& f) const {
    if (kSame<T, A> && a_.scale != nullptr) {
      a_.relu ? f.template operator()<true, true>() : f.template operator()<true, false>();
    } else {
      a_.relu ? f.template operator()<false, true>() : f.template operator()<false, false>();
    }
  }

  fuse::Ramp<A> ramp(int64_t k) const {
    const A* const weights = static_cast<const A*>(a_.coordinates) + k * fuse::kCoordinates;
    return fuse::ramp_of(weights, inverse_height_, inverse_width_);
  }
  A offset(int64_t plane) const { return static_cast<const A*>(a_.offset)[plane]; }

  // The centres of pixels side by side.
  void centres(int64_t begin, int64_t count, A* u, A* v) const {
    int64_t row = begin / a_.width, column = begin % a_.width;
    for (int64_t i = 0; i < count; ++i) {
      u[i] = fuse::centre_of(column, a_.width, inverse_width_);
      v[i] = fuse::centre_of(row, a_.height, inverse_height_);
      if (++column == a_.width) {
        column = 0;
        ++row;
      }
    }
  }

  template <bool kScaled, bool kRelu>
  void add_to_planes(const Workers& workers) const {
    for_each_part(workers, a_.images * a_.channels, [&](int64_t, int64_t first, int64_t last) {
      A u[kBlock], v[kBlock], stage[kBlock];
      for (int64_t begin = 0; begin < pixels_; begin += kBlock) {
        const int64_t count = smaller(kBlock, pixels_ - begin);
        centres(begin, count, u, v);
        for (int64_t plane = first; plane < last; ++plane) {
          const fuse::Ramp<A> slope = ramp(plane % a_.channels);
          const A constant = slope.constant + offset(plane);
          const A* const scale =
              kScaled ? static_cast<const A*>(a_.scale) + plane / a_.channels * pixels_ + begin : nullptr;
          T* const at = static_cast<T*>(a_.output) + plane * pixels_ + begin;
          const A* const from = as_run<A>(at, stage, count);
          A* const to = target_run(at, stage);
          for (int64_t i = 0; i < count; ++i) {
            const A added = constant + slope.column * u[i] + slope.row * v[i];
            const A value = kScaled ? from[i] * scale[i] + added : from[i] + added;
            to[i] = kRelu ? relu(value) : value;
          }
          finish_run(to, at, count);
        }
      }
    });
  }

  template <bool kScaled, bool kRelu>
  void add_to_pixels(const Workers& workers) const {
    for_each_part(workers, a_.images * a_.height, [&](int64_t, int64_t first, int64_t last) {
      fuse::Ramp<A> slopes[kRun];
      A constant[kRun], column[kRun], stage[kRun];
      for (int64_t k = 0; k < a_.channels; k += kRun) {
        const int64_t count = smaller(kRun, a_.channels - k);
        for (int64_t i = 0; i < count; ++i) {
          slopes[i] = ramp(k + i);
          column[i] = slopes[i].column;
        }
        for (int64_t row = first; row < last; ++row) {
          const A v = fuse::centre_of(row % a_.height, a_.height, inverse_height_);
          for (int64_t i = 0; i < count; ++i)
            constant[i] = offset(row / a_.height * a_.channels + k + i) + slopes[i].constant + slopes[i].row * v;
          for (int64_t j = 0; j < a_.width; ++j) {
            const A u = fuse::centre_of(j, a_.width, inverse_width_),
                    scale = kScaled ? scale_at(row * a_.width + j) : A(1);
            T* const at = static_cast<T*>(a_.output) + (row * a_.width + j) * a_.channels + k;
            const A* const from = as_run<A>(at, stage, count);
            A* const to = target_run(at, stage);
            for (int64_t i = 0; i < count; ++i) {
              const A added = constant[i] + column[i] * u;
              const A value = kScaled ? from[i] * scale + added : from[i] + added;
              to[i] = kRelu ? relu(value) : value;
            }
            finish_run(to, at, count);
          }
        }
      }
    });
  }

  // ---- its gradient ----

  int64_t parts() const { return a_.last ? (pixels_ + kPart - 1) / kPart : 1; }

  // [3, K] of a part of an image's pixels.
  A* sums_of(A* sums, int64_t image, int64_t part) const { return sums + (image * parts() + part) * 3 * a_.channels; }

  // Where the gradient passes: as in torch, a NaN is no reason to stop it.
  static Vec<A> gated(Vec<A> grad, Vec<A> output) { return output <= Vec<A>{} ? Vec<A>{} : grad; }
  static A gated(A grad, A output) { return output <= A(0) ? A(0) : grad; }

  void gate_planes(A* sums, const Workers& workers) const {
    for_each_part(workers, a_.images * a_.channels, [&](int64_t, int64_t first, int64_t last) {
      A u[kBlock], v[kBlock], stage_g[kBlock], stage_y[kBlock];
      for (int64_t begin = 0; begin < pixels_; begin += kBlock) {
        const int64_t count = smaller(kBlock, pixels_ - begin);
        centres(begin, count, u, v);
        for (int64_t plane = first; plane < last; ++plane) {
          const int64_t image = plane / a_.channels, at = plane * pixels_ + begin;
          const A* const g = as_run<A>(static_cast<const T*>(a_.grad) + at, stage_g, count);
          const A* const y = a_.relu ? as_run<A>(static_cast<const T*>(a_.output) + at, stage_y, count) : nullptr;
          T* const to = a_.gated != nullptr ? static_cast<T*>(a_.gated) + at : nullptr;
          A* const stored = to != nullptr ? target_run(to, stage_g) : nullptr;
          const A* const scale = a_.scale ? static_cast<const A*>(a_.scale) + image * pixels_ + begin : nullptr;
          const fuse::Ramp<A> sum = gate_run(g, y, scale, u, v, stored, count);
          if (to != nullptr) finish_run(stored, to, count);
          A* const total = sums_of(sums, image, 0) + plane % a_.channels;
          const A parts[3] = {sum.constant, sum.column, sum.row};
          for (int j = 0; j < 3; ++j) total[j * a_.channels] = (begin == 0 ? A(0) : total[j * a_.channels]) + parts[j];
        }
      }
    });
  }

  // y, scale and stored may be null.
  static fuse::Ramp<A> gate_run(const A* grad, const A* y, const A* scale, const A* u, const A* v, A* stored,
                                int64_t count) {
    Vec<A> constant{}, column{}, row{};
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) {
      Vec<A> g = load(grad + i);
      if (y != nullptr) g = gated(g, load(y + i));
      constant += g;
      column += g * load(u + i);
      row += g * load(v + i);
      if (stored != nullptr) store(stored + i, scale != nullptr ? g * load(scale + i) : g);
    }
    fuse::Ramp<A> sum{sum_of<A>(constant), sum_of<A>(column), sum_of<A>(row)};
    for (; i < count; ++i) {
      const A g = y != nullptr ? gated(grad[i], y[i]) : grad[i];
      sum.constant += g;
      sum.column += g * u[i];
      sum.row += g * v[i];
      if (stored != nullptr) stored[i] = scale != nullptr ? g * scale[i] : g;
    }
    return sum;
  }

  void gate_pixels(A* sums, const Workers& workers) const {
    for_each_part(workers, a_.images * parts(), [&](int64_t, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t image = i / parts(), begin = i % parts() * kPart, end = smaller(pixels_, begin + kPart);
        A* const to = sums_of(sums, image, i % parts());
        for (int64_t k = 0; k < a_.channels; k += kGroup)
          gate_group(image, begin, end, k, smaller(kGroup, a_.channels - k), to + k);
      }
    });
  }

  // `count` channels from k on of some pixels.
  void gate_group(int64_t image, int64_t begin, int64_t end, int64_t k, int64_t count, A* sums) const {
    A stage_g[kGroup] = {}, stage_y[kGroup] = {}, stage_to[kGroup];  // zeros where there are fewer channels
    Vec<A> constant[kVectors] = {}, column[kVectors] = {}, row[kVectors] = {};
    const bool whole = count == kGroup;
    const auto group_of = [&](const void* map, int64_t at, A* stage) {
      const T* const from = static_cast<const T*>(map) + at;
      if (whole) return as_run<A>(from, stage, kGroup);
      convert_run(from, stage, count);
      return static_cast<const A*>(stage);
    };
    int64_t i = begin / a_.width, j = begin % a_.width;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t pixel = image * pixels_ + p, at = pixel * a_.channels + k;
      const A u = fuse::centre_of(j, a_.width, inverse_width_), v = fuse::centre_of(i, a_.height, inverse_height_);
      const A scale = a_.scale != nullptr ? scale_at(pixel) : A(1);
      const A* const grad = group_of(a_.grad, at, stage_g);
      const A* const y = a_.relu ? group_of(a_.output, at, stage_y) : nullptr;
      for (int w = 0; w < kVectors; ++w) {
        Vec<A> g = load(grad + w * kLanes<A>);
        if (y != nullptr) g = gated(g, load(y + w * kLanes<A>));
        constant[w] += g;
        column[w] += g * u;
        row[w] += g * v;
        if (a_.gated != nullptr) store(stage_to + w * kLanes<A>, g * scale);
      }
      if (a_.gated != nullptr) narrow_run(stage_to, static_cast<T*>(a_.gated) + at, count);
      if (++j == a_.width) {
        j = 0;
        ++i;
      }
    }
    const auto put = [&](const Vec<A>(&from)[kVectors], A* to) {
      for (int64_t c = 0; c < count; ++c) to[c] = from[c / kLanes<A>][c % kLanes<A>];
    };
    put(constant, sums);
    put(column, sums + a_.channels);
    put(row, sums + 2 * a_.channels);
  }

  // The parts of each image, and the images, in their order.
  void add_sums(A* sums, const Workers& workers) const {
    for_each_part(workers, a_.channels, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        fuse::Ramp<A> total{};
        for (int64_t n = 0; n < a_.images; ++n) {
          A constant = 0;
          for (int64_t part = 0; part < parts(); ++part) {
            const A* const from = sums_of(sums, n, part) + k;
            constant += from[0];
            total.column += from[a_.channels];
            total.row += from[2 * a_.channels];
          }
          static_cast<A*>(a_.grad_offset)[n * a_.channels + k] = constant;
          total.constant += constant;
        }
        A* const to = static_cast<A*>(a_.grad_coordinates) + k * fuse::kCoordinates;
        fuse::coordinates_gradient(total, inverse_height_, inverse_width_, to);
      }
    });
  }

  const FuseQueryArgs& a_;
  const int64_t pixels_;
  const A inverse_height_, inverse_width_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
