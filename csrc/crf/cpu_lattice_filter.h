// Splat, blur and slice on rows (Adams, Baek, Davis 2010, section 3).
//
// Splatting walks the pixels, in order, and adds to the rows of their vertices, which stay in the cache. It is done in
// bands of pixels whose number depends on the lattice only; each has sums of its own, which are added in the order of
// the bands: results have the same bits for any number of threads.
#pragma once

#include "common/cpu_workers.h"
#include "crf/cpu_rows.h"
#include "crf/crf_cpu_kernel.h"
#include "crf/permutohedral_math.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// One image's part of a lattice.
template <typename T>
struct ImageLattice {
  const int32_t* vertex;  // [points, corners], counted over all images as in `first`
  const T* weight;        // [points, corners]
  int corners;
  int64_t first, vertices;
  const int32_t* neighbour;  // [corners, all vertices, 2]
  int64_t all_vertices;
  const int64_t* kernel_row;
  const int32_t* kernel_vertex;
  const T* kernel_weight;

  ImageLattice(const LatticeInput& l, int64_t image, int64_t points)
      : vertex(l.vertex + image * points * l.corners),
        weight(static_cast<const T*>(l.weight) + image * points * l.corners),
        corners(l.corners),
        first(l.offset[image]),
        vertices(l.offset[image + 1] - l.offset[image]),
        neighbour(l.neighbour),
        all_vertices(l.vertices),
        kernel_row(l.kernel_row),
        kernel_vertex(l.kernel_vertex),
        kernel_weight(static_cast<const T*>(l.kernel_weight)) {}
};

// Of one image; `most` for any image.
inline int64_t band_count(int64_t points, int corners, int64_t vertices) {
  constexpr int64_t kMostBands = 64;
  // Adding up the bands' sums must cost little beside splatting.
  const int64_t bands = points * corners / (16 * larger<int64_t>(1, vertices));
  return points < 2048 ? 1 : smaller(kMostBands, larger<int64_t>(2, bands));
}

inline int64_t most_vertices(const LatticeInput& l, int64_t images) {
  int64_t most = 0;
  for (int64_t n = 0; n < images; ++n) most = larger(most, l.offset[n + 1] - l.offset[n]);
  return most;
}

// The rows of an image's vertices: `bands` sums and two tables, with a row of zeros before each, which is the neighbour
// that a vertex lacks.
template <typename R>
class VertexRows {
 public:
  using T = typename R::T;
  using V = typename R::V;
  static constexpr int kN = R::kN;

  static int64_t workspace(const R& rows, int64_t bands, int64_t vertices) {
    return (bands + 2) * (vertices + 1) * pitch_of(rows) * int64_t(sizeof(T));
  }

  VertexRows(const R& rows, const ImageLattice<T>& lattice, int64_t bands, T* memory)
      : rows_(rows),
        lattice_(lattice),
        bands_(bands),
        pitch_(pitch_of(rows)),
        table_size_((lattice.vertices + 1) * pitch_) {
    for (int i = 0; i < 2; ++i) tables_[i] = memory + i * table_size_ + pitch_;
    sums_ = memory + 2 * table_size_ + pitch_;
  }

  // Before the first splat.
  void clear(const Workers& workers) {
    for_each_part(workers, bands_, [&](int64_t, int64_t begin, int64_t end) {
      __builtin_memset(sums_ - pitch_ + begin * table_size_, 0, size_t((end - begin) * table_size_) * sizeof(T));
    });
    for (T* table : tables_) __builtin_memset(table - pitch_, 0, size_t(pitch_) * sizeof(T));
  }

  // Adds the rows of `count` points, times scale(i), to those of their vertices.
  template <typename Scale>
  void splat(int64_t band, int64_t point, int64_t count, const T* row, const Scale& scale) const {
    switch (lattice_.corners) {
      case 3: return splat_simplices<3>(band, point, count, row, scale);
      case 4: return splat_simplices<4>(band, point, count, row, scale);
      case 5: return splat_simplices<5>(band, point, count, row, scale);
      case 6: return splat_simplices<6>(band, point, count, row, scale);
      default: return splat_simplices<0>(band, point, count, row, scale);
    }
  }

  // Adds up what was splatted, blurs it and clears the sums for the next time.
  void blur(bool reverse, const Workers& workers) {
    const int64_t stride = rows_.stride(), pitch = pitch_of(rows_);
    for_each_part(workers, lattice_.vertices, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v)
        for (int64_t e = v * pitch; e < v * pitch + stride; e += R::kLane) {
          V sum = R::load(sums_ + e);
          R::store(sums_ + e, V{});
          for (int64_t band = 1; band < bands_; ++band) {
            T* const from = sums_ + band * table_size_ + e;
            sum += R::load(from);
            R::store(from, V{});
          }
          R::store(tables_[0] + e, sum);
        }
    });
    if (lattice_.kernel_row != nullptr) return product(workers);
    const int corners = lattice_.corners;
    for (int pass = 0; pass < corners; ++pass) {
      const int32_t* const neighbour =
          lattice_.neighbour + 2 * (reverse ? corners - 1 - pass : pass) * lattice_.all_vertices;
      const T outer = pass == corners - 1 ? T(crf::blur_scale(corners - 1)) : T(1), half = outer / 2;
      const T* const from = tables_[0];
      T* const to = tables_[1];
      for_each_part(workers, lattice_.vertices, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t v = begin; v < end; ++v) {
          const int32_t* const next = neighbour + 2 * (lattice_.first + v);
          // -1 leads to the row of zeros.
          const T* const a = from + (next[0] < 0 ? -1 : next[0] - lattice_.first) * pitch;
          const T* const b = from + (next[1] < 0 ? -1 : next[1] - lattice_.first) * pitch;
          for (int64_t e = 0; e < stride; e += R::kLane)
            R::store(to + v * pitch + e,
                     R::load(from + v * pitch + e) * outer + (R::load(a + e) + R::load(b + e)) * half);
        }
      });
      swap_tables();
    }
  }

  // f(i, chunk, sum): the rows of the simplices of `count` points, weighted, in chunks.
  template <typename F>
  void slice(int64_t point, int64_t count, const F& f) const {
    const int64_t pitch = pitch_of(rows_);
    const int corners = lattice_.corners;
    const T* const table = tables_[0] - lattice_.first * pitch;
    const int32_t* vertex = lattice_.vertex + point * corners;
    const T* weight = lattice_.weight + point * corners;
    for (int64_t i = 0; i < count; ++i, vertex += corners, weight += corners)
      for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk) {
        V sum[kN];
        for (int j = 0; j < kN; ++j) sum[j] = V{};
        for (int c = 0; c < corners; ++c) {
          const T* const from = table + vertex[c] * pitch + chunk * R::kChunk;
          const T w = weight[c];
          for (int j = 0; j < kN; ++j) sum[j] += R::load(from + j * R::kLane) * w;
        }
        f(i, chunk, sum);
      }
  }

  void prefetch(int64_t point, int64_t count) const {
    for (int64_t e = 0; e < count * lattice_.corners; e += 16) {
      __builtin_prefetch(lattice_.vertex + point * lattice_.corners + e);
      __builtin_prefetch(lattice_.weight + point * lattice_.corners + e);
    }
  }

  // The row of a vertex, counted over all images, after `blur`.
  const T* blurred(int64_t vertex) const { return tables_[0] + (vertex - lattice_.first) * pitch_; }
  const ImageLattice<T>& lattice() const { return lattice_; }

 private:
  R rows_;
  ImageLattice<T> lattice_;
  int64_t bands_, pitch_, table_size_;
  T* tables_[2];
  T* sums_;

  // From a row to the next: vectors must not lie across two cache lines, for what was just stored is loaded again.
  static int64_t pitch_of(const R& rows) {
    if constexpr (R::kSingle) return R::kChunk == 24 ? 32 : R::kChunk;
    return rows.stride();
  }

  // kCorners: of a simplex, 0 for any number. Neighbouring points have vertices in common, so a row is often loaded right
  // after it was stored. Each corner has a load of its own in the unrolled loop, which the processor learns to hold back
  // for the one store that it depends on; a loop's only load would wait for every store.
  template <int kCorners, typename Scale>
  void splat_simplices(int64_t band, int64_t point, int64_t count, const T* row, const Scale& scale) const {
    // In variables of its own: for all the compiler knows, what is stored below may be a member.
    const int64_t stride = rows_.stride(), pitch = pitch_of(rows_);
    const int corners = kCorners > 0 ? kCorners : lattice_.corners;
    T* const sums = sums_ + band * table_size_ - lattice_.first * pitch;
    const int32_t* vertex = lattice_.vertex + point * corners;
    const T* weight = lattice_.weight + point * corners;
    for (int64_t i = 0; i < count; ++i, row += stride, vertex += corners, weight += corners)
      for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk) {
        const T s = scale(i);
        V v[kN];
        for (int j = 0; j < kN; ++j) v[j] = R::load(row + chunk * R::kChunk + j * R::kLane) * s;
        if constexpr (kCorners > 0) {
          T* to[kCorners];
          V sum[kCorners][kN];
#pragma GCC unroll 6
          for (int c = 0; c < kCorners; ++c) {
            to[c] = sums + vertex[c] * pitch + chunk * R::kChunk;
            for (int j = 0; j < kN; ++j) sum[c][j] = R::load(to[c] + j * R::kLane) + v[j] * weight[c];
          }
#pragma GCC unroll 6
          for (int c = 0; c < kCorners; ++c)
            for (int j = 0; j < kN; ++j) R::store(to[c] + j * R::kLane, sum[c][j]);
        } else {
          for (int c = 0; c < corners; ++c) {
            T* const to = sums + vertex[c] * pitch + chunk * R::kChunk;
            for (int j = 0; j < kN; ++j) R::store(to + j * R::kLane, R::load(to + j * R::kLane) + v[j] * weight[c]);
          }
        }
      }
  }

  void swap_tables() {
    T* const table = tables_[0];
    tables_[0] = tables_[1];
    tables_[1] = table;
  }

  void product(const Workers& workers) {
    const int64_t pitch = pitch_of(rows_);
    for_each_part(workers, lattice_.vertices, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        const int64_t first = lattice_.kernel_row[lattice_.first + v],
                      last = lattice_.kernel_row[lattice_.first + v + 1];
        for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk) {
          const T* const from = tables_[0] - lattice_.first * pitch + chunk * R::kChunk;
          V sum[kN];
          for (int j = 0; j < kN; ++j) sum[j] = V{};
          for (int64_t at = first; at < last; ++at) {
            const T* const row = from + lattice_.kernel_vertex[at] * pitch;
            const T w = lattice_.kernel_weight[at];
            for (int j = 0; j < kN; ++j) sum[j] += R::load(row + j * R::kLane) * w;
          }
          for (int j = 0; j < kN; ++j) R::store(tables_[1] + v * pitch + chunk * R::kChunk + j * R::kLane, sum[j]);
        }
      }
    });
    swap_tables();
  }
};

constexpr int64_t kPointBlock = 64;  // points whose rows a worker holds at a time

// permutohedral_filter and its gradient with respect to the weights, up to kMostOneChunk channels at a time.
template <typename R>
class LatticeFilter {
 public:
  using T = typename R::T;

  static int64_t workspace(const R& rows, const FilterArgs& a, int64_t workers) {
    const int64_t vertices = most_vertices(a.lattice, a.images);
    const int64_t bands = most_bands(a);
    const int64_t tables = VertexRows<R>::workspace(rows, bands, vertices) * (a.grad == nullptr ? 1 : 2);
    return tables + 2 * workers * kPointBlock * rows.stride() * int64_t(sizeof(T));
  }

  LatticeFilter(const R& rows, const FilterArgs& a, void* workspace, const Workers& workers)
      : rows_(rows), args_(a), workers_(workers), blocks_(static_cast<T*>(workspace)) {
    tables_ = blocks_ + 2 * workers.count * kPointBlock * rows.stride();
  }

  void run(int64_t first_channel, int64_t channels) {
    for (int64_t image = 0; image < args_.images; ++image)
      args_.grad == nullptr ? forward(image, first_channel, channels) : backward(image, first_channel, channels);
  }

 private:
  R rows_;
  FilterArgs args_;
  Workers workers_;
  T *blocks_, *tables_;

  static int64_t bands_of(const FilterArgs& a, int64_t image) {
    return band_count(a.points, a.lattice.corners, a.lattice.offset[image + 1] - a.lattice.offset[image]);
  }
  static int64_t most_bands(const FilterArgs& a) {
    int64_t most = 1;
    for (int64_t image = 0; image < a.images; ++image) most = larger(most, bands_of(a, image));
    return most;
  }
  const T* plane(const void* data, int64_t image, int64_t channel) const {
    return static_cast<const T*>(data) + (image * args_.channels + channel) * args_.points;
  }
  T* block(int64_t worker, int which) const { return blocks_ + (2 * worker + which) * kPointBlock * rows_.stride(); }

  // Calls f(point, count) for the blocks of points begin..end - 1.
  template <typename F>
  static void each_block(int64_t begin, int64_t end, const F& f) {
    for (int64_t point = begin; point < end; point += kPointBlock) f(point, smaller(kPointBlock, end - point));
  }

  VertexRows<R> filtered(const void* values, bool reverse, int64_t image, int64_t first_channel, int64_t channels,
                         T* memory) {
    const ImageLattice<T> lattice(args_.lattice, image, args_.points);
    const int64_t bands = bands_of(args_, image);
    VertexRows<R> vertices(rows_, lattice, bands, memory);
    vertices.clear(workers_);
    for_each_part(workers_, bands, [&](int64_t worker, int64_t begin, int64_t end) {
      T* const own = block(worker, 0);
      for (int64_t band = begin; band < end; ++band)
        each_block(args_.points * band / bands, args_.points * (band + 1) / bands, [&](int64_t point, int64_t count) {
          pack_rows(rows_, plane(values, image, first_channel) + point, args_.points, channels, count, own, T(0));
          vertices.splat(band, point, count, own, [](int64_t) { return T(1); });
        });
    });
    vertices.blur(reverse, workers_);
    return vertices;
  }

  void forward(int64_t image, int64_t first_channel, int64_t channels) {
    const VertexRows<R> vertices = filtered(args_.values, args_.reverse, image, first_channel, channels, tables_);
    for_each_part(workers_, args_.points, [&](int64_t worker, int64_t begin, int64_t end) {
      T* const own = block(worker, 0);
      each_block(begin, end, [&](int64_t point, int64_t count) {
        vertices.slice(point, count, [&](int64_t i, int64_t chunk, const typename R::V(&sum)[R::kN]) {
          for (int j = 0; j < R::kN; ++j) R::store(own + i * rows_.stride() + chunk * R::kChunk + j * R::kLane, sum[j]);
        });
        T* const to = const_cast<T*>(plane(args_.output, image, first_channel)) + point;
        unpack_rows(rows_, own, args_.points, channels, count, to);
      });
    });
  }

  // grad_weight of a corner = grad . (B S values)[vertex] + values . (B^T S grad)[vertex], summed over the channels.
  void backward(int64_t image, int64_t first_channel, int64_t channels) {
    const int64_t vertex_count = args_.lattice.offset[image + 1] - args_.lattice.offset[image];
    const int64_t bytes = VertexRows<R>::workspace(rows_, bands_of(args_, image), vertex_count);
    const VertexRows<R> of_values = filtered(args_.values, args_.reverse, image, first_channel, channels, tables_);
    const VertexRows<R> of_grad =
        filtered(args_.grad, !args_.reverse, image, first_channel, channels, tables_ + bytes / int64_t(sizeof(T)));
    const ImageLattice<T>& lattice = of_values.lattice();
    T* const to = static_cast<T*>(args_.grad_weight) + image * args_.points * lattice.corners;
    for_each_part(workers_, args_.points, [&](int64_t worker, int64_t begin, int64_t end) {
      T *const values = block(worker, 0), *const grads = block(worker, 1);
      each_block(begin, end, [&](int64_t point, int64_t count) {
        pack_rows(rows_, plane(args_.values, image, first_channel) + point, args_.points, channels, count, values,
                  T(0));
        pack_rows(rows_, plane(args_.grad, image, first_channel) + point, args_.points, channels, count, grads, T(0));
        for (int64_t i = 0; i < count; ++i)
          for (int c = 0; c < lattice.corners; ++c) {
            const int64_t at = (point + i) * lattice.corners + c;
            const T *const a = of_values.blurred(lattice.vertex[at]), *const b = of_grad.blurred(lattice.vertex[at]);
            typename R::V sum{};
            for (int64_t e = 0; e < rows_.stride(); e += R::kLane)
              sum += R::load(grads + i * rows_.stride() + e) * R::load(a + e) +
                     R::load(values + i * rows_.stride() + e) * R::load(b + e);
            to[at] = (first_channel == 0 ? T(0) : to[at]) + reduce_sum(sum);
          }
      });
    });
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
