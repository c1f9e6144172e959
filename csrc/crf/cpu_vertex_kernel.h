// The sparse product between the vertices of a lattice that stands in for its blur: exp(-r^2 / (2 v)) for all pairs of
// an image's vertices with r <= cutoff.
//
// Squared distances are integers in units of the lattice, so weights come from a table. Every vertex is compared with all
// others of its image, a vector at a time: vertices in the order of their first coordinate bound the search.
#pragma once

#include <math.h>

#include "common/cpu_workers.h"
#include "common/simd.h"
#include "crf/crf_cpu_kernel.h"
#include "crf/permutohedral_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

class VertexKernel {
 public:
  explicit VertexKernel(const VertexKernelArgs& a) : args_(a) {
    const double period = a.scale * (a.d + 1);
    unit_ = period * period * 2 / 3;  // one squared standard deviation
    limit_ = int64_t(a.cutoff * a.cutoff * unit_);
    variance_ = 1 - 1 / (4 * a.scale * a.scale);
  }

  void count(int64_t* row, const Workers& workers) const {
    row[0] = 0;
    each(workers, [&](int64_t v, int64_t first, int64_t last) {
      int64_t found = 0;
      scan(v, first, last, [&](int64_t, int64_t) { ++found; });
      row[v + 1] = found;
    });
    for (int64_t v = 0; v < args_.vertices; ++v) row[v + 1] += row[v];
  }

  template <typename T>
  void fill(const int64_t* row, int32_t* vertex, T* weight, const Workers& workers) const {
    each(workers, [&](int64_t v, int64_t first, int64_t last) {
      int64_t at = row[v];
      scan(v, first, last, [&](int64_t other, int64_t square) {
        vertex[at] = int32_t(other);
        weight[at++] = T(::exp(-double(square) / (2 * variance_ * unit_)));
      });
    });
  }

 private:
  VertexKernelArgs args_;
  double unit_, variance_;
  int64_t limit_;

  template <typename F>
  void each(const Workers& workers, const F& f) const {
    for_each_part(workers, args_.vertices, [&](int64_t, int64_t begin, int64_t end) {
      int64_t image = 0;
      for (int64_t v = begin; v < end; ++v) {
        while (v >= args_.offset[image + 1]) ++image;
        f(v, args_.offset[image], args_.offset[image + 1]);
      }
    });
  }

  template <typename F>
  void scan(int64_t v, int64_t first, int64_t last, const F& f) const {
    const int d = args_.d;
    const int16_t* const own = args_.key + v * d;
    for (int64_t other = first; other < last; ++other) {
      const int16_t* const key = args_.key + other * d;
      int64_t square = 0, sum = 0;
      for (int i = 0; i < d; ++i) {
        const int64_t step = key[i] - own[i];
        square += step * step;
        sum += step;
      }
      square += sum * sum;
      if (square <= limit_) f(other, square);
    }
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
