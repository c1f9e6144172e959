// Mean field of a dense CRF (Kraehenbuehl and Koltun 2011, algorithm 1) on the CPU, one image at a time.
//
// Marginals lie in rows, a pixel's classes side by side, in two arrays of which one is read while the other is written.
// An iteration is one pass over the image, in strips of columns. For four lines of a strip at a time: the Gaussian
// kernels' messages come from a ring of lines that were filtered along x, each when the pass reaches it; the lattices'
// messages are sliced from the tables that the last pass splatted and a blur between the passes finished; energies,
// softmax and the splat for the next iteration follow while the row is in registers. So an iteration reads the marginals,
// the unaries and the lattice's weights once and writes the marginals once.
//
// A strip is a band of the splat, or several are: results have the same bits for any number of threads.
#pragma once

#include <string.h>

#include "common/cpu_workers.h"
#include "crf/cpu_gaussian.h"
#include "crf/cpu_lattice_filter.h"
#include "crf/cpu_rows.h"
#include "crf/crf_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// Hands out parts of one allocation, aligned to cache lines; without memory it only counts.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename E>
  E* take(int64_t count) {
    char* const at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * int64_t(sizeof(E)) + 63) / 64 * 64;
    return reinterpret_cast<E*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <typename R>
class MeanField {
 public:
  using T = typename R::T;
  using V = typename R::V;
  static constexpr int kN = R::kN;

  static int64_t workspace(const R& rows, const MeanFieldArgs& a, int64_t workers) {
    return MeanField(rows, a, nullptr, {.count = workers, .run = nullptr}).bytes_;
  }

  // Without memory: only to know how much it takes.
  MeanField(const R& rows, const MeanFieldArgs& a, void* memory, const Workers& workers)
      : rows_(rows),
        args_(a),
        workers_(workers),
        stride_(rows.stride()),
        points_(a.axes[0] * a.axes[1] * a.axes[2]),
        kernels_(a.lattice_count + a.gaussian_count) {
    for (int64_t g = 0; g < a.gaussian_count; ++g) {
      margin_ = larger(margin_, a.radius[3 * g + 2]);
      line_radius_ = larger(line_radius_, a.radius[3 * g + 1]);
    }
    ring_lines_ = 2 * line_radius_ + kFirLines;
    const int64_t width = kRingBytes / int64_t(sizeof(T)) / (stride_ * ring_lines_) / kBlock * kBlock;
    strip_ = smaller(larger<int64_t>(a.axes[2], 1), larger(kBlock, width));
    Carver carver(memory);
    for (T*& marginals : marginals_) marginals = carver.take<T>(points_ * stride_ + kLinePad);
    unary_ = carver.take<T>(points_ * stride_ + kLinePad);
    zeros_ = carver.take<T>(zeros_size());
    nan_ = carver.take<bool>(workers.count);
    lattices_ = carver.take<VertexRows<R>>(a.lattice_count);
    kernel_ = carver.take<Kernel>(kernels_);
    for (int64_t k = 0; k < kernels_; ++k) {
      Kernel kernel{};
      kernel.compatibility = carver.take<T>(stride_ * (a.pairwise[k].matrix ? a.classes : 1));
      if (k >= a.lattice_count) {
        const int64_t* const radius = a.radius + 3 * (k - a.lattice_count);
        kernel.line_taps = carver.take<T>(spread_taps_size(larger<int64_t>(0, radius[1])));
        if (radius[0] > 0) {
          kernel.depth_taps = carver.take<T>(spread_taps_size(radius[0]));
          kernel.depth = carver.take<T>(points_ * stride_ + kLinePad);
        }
      }
      if (memory != nullptr) kernel_[k] = kernel;
    }
    for (int64_t worker = 0; worker < workers.count; ++worker) {
      const Own own = carve_own(carver);
      if (worker == 0) first_own_ = own;
      if (worker == 1) own_step_ = reinterpret_cast<char*>(own.line) - reinterpret_cast<char*>(first_own_.line);
    }
    int64_t tables = 0, bands = 1;
    for (int64_t image = 0; image < a.images; ++image) bands = larger(bands, image_bands(image));
    for (int64_t k = 0; k < a.lattice_count; ++k) tables += table_bytes(k, bands);
    tables_ = carver.take<char>(tables);
    bytes_ = carver.used();
    if (memory != nullptr) prepare();
  }

  // Whether there is no NaN in the unaries.
  bool run() {
    bool good = true;
    for (int64_t image = 0; image < args_.images; ++image) good &= run_image(image);
    return good;
  }

 private:
  static constexpr int64_t kBlock = 32;  // pixels of a line that are finished together
#ifndef AHEAD
#define AHEAD 500
#endif
  static constexpr int64_t kAhead = AHEAD;
  static constexpr int64_t kRingBytes = 192 * 1024;

  struct Kernel {
    T* compatibility;           // over the temperature: [stride], or [classes, stride], transposed
    T *line_taps, *depth_taps;  // as fir_lines reads them
    T* depth;                   // marginals filtered along z
  };

  // What a worker holds.
  struct Own {
    T* line;      // of marginals, to be filtered along x
    T* rings;     // of each Gaussian kernel, lines that were filtered along x
    T* messages;  // of each Gaussian kernel, [kFirLines, kBlock, stride]
    T* column;    // [axes[0], kBlock, stride], to be filtered along z
    T* rows;      // [kBlock, stride]
    T* message;   // [kBlock, stride], where compatibility is a matrix
    T* energy;    // [kBlock, stride]
  };

  // A part of the image: columns x0..x1 - 1 of lines line0..line1 - 1, which are counted over all z.
  struct Task {
    int64_t x0, x1, line0, line1;
  };

  R rows_;
  MeanFieldArgs args_;
  Workers workers_;
  int64_t stride_, points_, kernels_;
  int64_t margin_ = 0, line_radius_ = 0, ring_lines_, strip_, bytes_, own_step_ = 0;
  T* marginals_[2];  // [points, stride]
  T* unary_;         // [points, stride], over the temperature; infinite beyond the classes
  T* zeros_;         // a line of a strip
  bool* nan_;        // of each worker: whether it met one
  VertexRows<R>* lattices_;
  Kernel* kernel_;
  Own first_own_;
  char* tables_;

  int64_t classes() const { return args_.classes; }
  const int64_t* radius(int64_t g) const { return args_.radius + 3 * g; }
  int64_t line_radius(int64_t g) const { return larger<int64_t>(0, radius(g)[1]); }
  int64_t zeros_size() const { return larger(strip_, kBlock) * stride_ + kLinePad; }
  int64_t line_stride() const { return strip_ * stride_ + kLinePad; }
  int64_t ring_size() const { return ring_lines_ * line_stride(); }
  int64_t block_stride() const { return kBlock * stride_ + kLinePad; }

  Own carve_own(Carver& carver) const {
    Own own{};
    own.line = carver.take<T>(PaddedLine<T>::size(strip_ * stride_, margin_ * stride_));
    bool depth = false;
    for (int64_t g = 0; g < args_.gaussian_count; ++g) depth |= radius(g)[0] > 0;
    own.rings = carver.take<T>(args_.gaussian_count * ring_size());
    own.messages = carver.take<T>(args_.gaussian_count * kFirLines * block_stride());
    own.column = carver.take<T>(depth ? (args_.axes[0] + kFirLines) * block_stride() : 0);
    own.rows = carver.take<T>(kBlock * stride_);
    own.message = carver.take<T>(kBlock * stride_);
    own.energy = carver.take<T>(kBlock * stride_);
    return own;
  }
  Own own_of(int64_t worker) const {
    Own own = first_own_;
    T** const parts[] = {&own.line, &own.rings, &own.messages, &own.column, &own.rows, &own.message, &own.energy};
    for (T** p : parts) *p = reinterpret_cast<T*>(reinterpret_cast<char*>(*p) + worker * own_step_);
    return own;
  }

  // Tasks go down a strip, then to the next one.
  int64_t lines() const { return args_.axes[0] * args_.axes[1]; }
  int64_t strips() const { return (args_.axes[2] + strip_ - 1) / strip_; }
  int64_t tasks_of_strip() const {
    constexpr int64_t kTasks = 8, kLeastLines = 24;  // each task filters a halo of lines along x once more
    return larger<int64_t>(1, smaller((kTasks + strips() - 1) / strips(), lines() / kLeastLines));
  }
  Task task(int64_t i) const {
    const int64_t strip = i / tasks_of_strip(), part = i % tasks_of_strip();
    return {strip * strip_, smaller(args_.axes[2], (strip + 1) * strip_), lines() * part / tasks_of_strip(),
            lines() * (part + 1) / tasks_of_strip()};
  }
  // Each band of the splat, of one or several tasks, is one worker's.
  int64_t image_bands(int64_t image) const {
    int64_t bands = strips() * tasks_of_strip();
    for (int64_t k = 0; k < args_.lattice_count; ++k) {
      const LatticeInput& l = args_.lattices[k];
      bands = smaller(bands, band_count(points_, l.corners, l.offset[image + 1] - l.offset[image]));
    }
    return bands;
  }
  int64_t table_bytes(int64_t k, int64_t bands) const {
    return (VertexRows<R>::workspace(rows_, bands, most_vertices(args_.lattices[k], args_.images)) + 63) / 64 * 64;
  }

  void prepare() {
    const T cooling = T(1 / args_.temperature);
    memset(zeros_, 0, size_t(zeros_size()) * sizeof(T));
    for (int64_t k = 0; k < kernels_; ++k) {
      const PairwiseInput& pairwise = args_.pairwise[k];
      const T* const from = static_cast<const T*>(pairwise.compatibility);
      T* const to = kernel_[k].compatibility;
      memset(to, 0, size_t(stride_ * (pairwise.matrix ? classes() : 1)) * sizeof(T));
      for (int64_t c = 0; c < classes(); ++c) {
        if (!pairwise.matrix) to[c] = from[c] * cooling;
        for (int64_t other = 0; pairwise.matrix && other < classes(); ++other)
          to[other * stride_ + c] = from[c * classes() + other] * cooling;
      }
      if (k < args_.lattice_count) continue;
      const int64_t g = k - args_.lattice_count;
      const T one = 1;
      spread_taps(radius(g)[1] < 0 ? &one : static_cast<const T*>(args_.taps[3 * g + 1]), line_radius(g),
                  kernel_[k].line_taps);
      if (radius(g)[0] > 0) spread_taps(static_cast<const T*>(args_.taps[3 * g]), radius(g)[0], kernel_[k].depth_taps);
    }
  }

  static T scale_at(const ScaleInput& scale, int64_t image, int64_t point) {
    return scale.data == nullptr ? T(1) : static_cast<const T*>(scale.data)[image * scale.image_stride + point];
  }

  bool run_image(int64_t image) {
    const int64_t bands = image_bands(image);
    char* tables = tables_;
    for (int64_t k = 0; k < args_.lattice_count; ++k) {
      lattices_[k] =
          VertexRows<R>(rows_, ImageLattice<T>(args_.lattices[k], image, points_), bands, reinterpret_cast<T*>(tables));
      lattices_[k].clear(workers_);
      tables += table_bytes(k, bands);
    }
    for (int64_t worker = 0; worker < workers_.count; ++worker) nan_[worker] = false;
    const bool any = args_.iterations > 0;
    each_task(bands, [&](int64_t band, int64_t worker, const Own& own, const Task& task) {
      for (int64_t line = task.line0; line < task.line1; ++line)
        for (int64_t x = task.x0; x < task.x1; x += kBlock)
          nan_[worker] |= start(image, band, own, line * args_.axes[2] + x, smaller(kBlock, task.x1 - x), any);
    });
    for (int64_t i = 0; i < args_.iterations; ++i) {
      for (int64_t k = 0; k < args_.lattice_count; ++k) lattices_[k].blur(false, workers_);
      for (int64_t g = 0; g < args_.gaussian_count; ++g)
        if (radius(g)[0] > 0) filter_depth(image, g, marginals_[i % 2]);
      const bool last = i + 1 == args_.iterations;
      each_task(bands, [&](int64_t band, int64_t, const Own& own, const Task& task) {
        update(image, band, own, task, marginals_[i % 2], marginals_[(i + 1) % 2], last);
      });
    }
    for (int64_t worker = 0; worker < workers_.count; ++worker)
      if (nan_[worker]) return false;
    return true;
  }

  // Calls f(band, worker, own, task) for every task, those of a band in order and by one worker.
  template <typename F>
  void each_task(int64_t bands, const F& f) const {
    const int64_t tasks = strips() * tasks_of_strip();
    for_each_part(workers_, bands, [&](int64_t worker, int64_t begin, int64_t end) {
      const Own own = own_of(worker);
      for (int64_t band = begin; band < end; ++band)
        for (int64_t i = tasks * band / bands; i < tasks * (band + 1) / bands; ++i) f(band, worker, own, task(i));
    });
  }

  // Reads unaries and initial marginals: whether there is a NaN.
  bool start(int64_t image, int64_t band, const Own& own, int64_t point, int64_t count, bool splat) const {
    const int64_t first = image * classes() * points_ + point;
    T* const unary = unary_ + point * stride_;
    pack_rows(rows_, static_cast<const T*>(args_.unary) + first, points_, classes(), count, unary, T(__builtin_inf()));
    const T cooling = T(1 / args_.temperature);
    for (int64_t e = 0; e < count * stride_; ++e) unary[e] *= cooling;
    bool nan = false;
    for (int64_t e = 0; e < count * stride_; ++e) nan |= unary[e] != unary[e];
    T* const rows = marginals_[0] + point * stride_;
    if (args_.initial != nullptr)
      pack_rows(rows_, static_cast<const T*>(args_.initial) + first, points_, classes(), count, rows, T(0));
    if (args_.initial == nullptr) {
      memcpy(own.energy, unary, size_t(count * stride_) * sizeof(T));
      softmax(own.energy, count, rows);
    }
    if (splat) splat_rows(image, band, point, rows, count);
    if (!splat) unpack_rows(rows_, rows, points_, classes(), count, static_cast<T*>(args_.output) + first);
    return nan;
  }

  // to[i] = softmax(-energy[i]), rows of `count` points; overwrites the energies.
  void softmax(T* energy, int64_t count, T* to) const {
    for (int64_t i = 0; i < count; ++i, energy += stride_, to += stride_) {
      V least = R::load(energy);
      for (int64_t e = R::kLane; e < stride_; e += R::kLane) {
        const V v = R::load(energy + e);
        least = v < least ? v : least;
      }
      const T bottom = reduce_min(least);
      V sum{}, exps[kN];
      for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk)
        for (int j = 0; j < kN; ++j) {
          T* const at = energy + chunk * R::kChunk + j * R::kLane;
          exps[j] = row_exp(bottom - R::load(at));
          if constexpr (!R::kSingle) R::store(at, exps[j]);
          sum += exps[j];
        }
      const T scale = 1 / reduce_sum(sum);
      for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk)
        for (int j = 0; j < kN; ++j) {
          const int64_t e = chunk * R::kChunk + j * R::kLane;
          R::store(to + e, (R::kSingle ? exps[j] : R::load(energy + e)) * scale);
        }
    }
  }

  void splat_rows(int64_t image, int64_t band, int64_t point, const T* rows, int64_t count) const {
    for (int64_t k = 0; k < args_.lattice_count; ++k) {
      const ScaleInput scale_in = args_.pairwise[k].scale_in;
      lattices_[k].splat(band, point, count, rows, [&](int64_t i) { return scale_at(scale_in, image, point + i); });
    }
  }

  // Marginals filtered along z.
  void filter_depth(int64_t image, int64_t g, const T* marginals) const {
    const Kernel& kernel = kernel_[args_.lattice_count + g];
    const ScaleInput& scale = args_.pairwise[args_.lattice_count + g].scale_in;
    const int64_t depth = args_.axes[0], plane = args_.axes[1] * args_.axes[2];
    const int64_t r = radius(g)[0], blocks = (plane + kBlock - 1) / kBlock;
    for_each_part(workers_, blocks, [&](int64_t worker, int64_t begin, int64_t end) {
      T* const column = own_of(worker).column;
      T* const results = column + depth * block_stride();
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlock, count = smaller(kBlock, plane - first);
        for (int64_t z = 0; z < depth; ++z)
          copy_scaled(scale, image, z * plane + first, count, marginals, column + z * block_stride());
        for (int64_t z = 0; z < depth; z += kFirLines) {
          const auto line = [&](int64_t k) {
            const int64_t from = z + k - r;
            return from < 0 || from >= depth ? zeros_ : column + from * block_stride();
          };
          fir_lines(line, kernel.depth_taps, r, count * stride_, results, block_stride());
          for (int64_t i = 0; i < smaller<int64_t>(kFirLines, depth - z); ++i)
            memcpy(kernel.depth + ((z + i) * plane + first) * stride_, results + i * block_stride(),
                   size_t(count * stride_) * sizeof(T));
        }
      }
    });
  }

  // to[i] = scale * marginals of the points point..point + count - 1
  void copy_scaled(const ScaleInput& scale, int64_t image, int64_t point, int64_t count, const T* marginals,
                   T* to) const {
    const T* const from = marginals + point * stride_;
    if (scale.data == nullptr) {
      memcpy(to, from, size_t(count * stride_) * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const T s = scale_at(scale, image, point + i);
      for (int64_t e = 0; e < stride_; e += R::kLane)
        R::store(to + i * stride_ + e, R::load(from + i * stride_ + e) * s);
    }
  }

  void update(int64_t image, int64_t band, const Own& own, const Task& task, const T* from, T* to, bool last) const {
    const int64_t height = args_.axes[1], width = args_.axes[2];
    for (int64_t line = task.line0; line < task.line1;) {
      // Down one plane.
      const int64_t z = line / height, end = smaller(height, task.line1 - z * height);
      int64_t y = line - z * height;
      line = z * height + end;
      int64_t filled = larger<int64_t>(0, y - line_radius_);
      for (; y < end; y += kFirLines) {
        const int64_t count = smaller<int64_t>(kFirLines, end - y);
        for (; filled < smaller(height, y + count + line_radius_); ++filled)
          fill_rings(image, own, task, z, filled, from);
        for (int64_t x = task.x0; x < task.x1; x += kBlock) {
          const int64_t columns = smaller(kBlock, task.x1 - x);
          for (int64_t g = 0; g < args_.gaussian_count; ++g) {
            const T* const ring = own.rings + g * ring_size();
            const auto ring_line = [&](int64_t k) -> const T* {
              const int64_t source = y + k - line_radius(g);
              if (source < 0 || source >= height) return zeros_;
              return ring + source % ring_lines_ * line_stride() + (x - task.x0) * stride_;
            };
            fir_lines(ring_line, kernel_[args_.lattice_count + g].line_taps, line_radius(g), columns * stride_,
                      own.messages + g * kFirLines * block_stride(), block_stride());
          }
          for (int64_t i = 0; i < count; ++i)
            finish(image, band, own, (z * height + y + i) * width + x, columns, own.messages + i * block_stride(), to,
                   last);
        }
      }
    }
  }

  // Filters one line along x, for each Gaussian kernel.
  void fill_rings(int64_t image, const Own& own, const Task& task, int64_t z, int64_t y, const T* marginals) const {
    const int64_t width = args_.axes[2], line = (z * args_.axes[1] + y) * width;
    for (int64_t g = 0; g < args_.gaussian_count; ++g) {
      const int64_t r = larger<int64_t>(0, radius(g)[2]);
      const Kernel& kernel = kernel_[args_.lattice_count + g];
      const ScaleInput& scale = args_.pairwise[args_.lattice_count + g].scale_in;
      const ScaleInput none{};
      const int64_t first = larger<int64_t>(0, task.x0 - r), last = smaller(width, task.x1 + r);
      const PaddedLine<T> padded(own.line, margin_ * stride_);
      T* const data = padded.data();  // of column x0
      const int64_t before = (first - (task.x0 - r)) * stride_, after = (task.x1 + r - last) * stride_;
      memset(data - r * stride_, 0, size_t(before) * sizeof(T));
      copy_scaled(kernel.depth == nullptr ? scale : none, image, line + first, last - first,
                  kernel.depth == nullptr ? marginals : kernel.depth, data + (first - task.x0) * stride_);
      memset(data + (last - task.x0) * stride_, 0, size_t(after) * sizeof(T));
      prefetch(marginals + (line + width + first) * stride_, (last - first) * stride_);
      const T one = 1;
      fir_shifted(data, stride_, radius(g)[2] < 0 ? &one : static_cast<const T*>(args_.taps[3 * g + 2]), r,
                  (task.x1 - task.x0) * stride_, own.rings + g * ring_size() + y % ring_lines_ * line_stride());
    }
  }

  // Lines of memory that will be read soon, which lie too far apart for the hardware to see them coming.
  static void prefetch(const T* p, int64_t count) {
    for (int64_t e = 0; e < count; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + e);
  }

  // Energies, marginals and what the next iteration's lattices need of `count` points. One loop for each: what depends on
  // a row takes long, and a short loop keeps many rows in flight.
  void finish(int64_t image, int64_t band, const Own& own, int64_t point, int64_t count, const T* messages, T* to,
              bool last) const {
    prefetch(unary_ + (point + kAhead) * stride_, count * stride_);
    for (int64_t k = 0; k < args_.lattice_count; ++k) lattices_[k].prefetch(point + kAhead, count);
    if (kernels_ == 0) memcpy(own.energy, unary_ + point * stride_, size_t(count * stride_) * sizeof(T));
    for (int64_t k = 0; k < kernels_; ++k)
      add_kernel(image, k, point, count, messages + (k - args_.lattice_count) * kFirLines * block_stride(),
                 k == 0 ? unary_ + point * stride_ : own.energy, own);
    T* const rows = last ? own.rows : to + point * stride_;
    softmax(own.energy, count, rows);
    if (last)
      unpack_rows(rows_, rows, points_, classes(), count,
                  static_cast<T*>(args_.output) + image * classes() * points_ + point);
    else
      splat_rows(image, band, point, rows, count);
  }

  // own.energy = base + compatibility * message of `count` points. gaussian: the message's rows of a Gaussian kernel.
  void add_kernel(int64_t image, int64_t k, int64_t point, int64_t count, const T* gaussian, const T* base,
                  const Own& own) const {
    const int64_t stride = stride_;
    const bool matrix = args_.pairwise[k].matrix;
    const ScaleInput scale_out = args_.pairwise[k].scale_out;
    T* const to = matrix ? own.message : own.energy;
    const T* const factor = kernel_[k].compatibility;
    const auto receive = [&](int64_t i, int64_t chunk, const V(&message)[kN]) {
      const T scale = scale_at(scale_out, image, point + i);
      for (int j = 0; j < kN; ++j) {
        const int64_t e = chunk * R::kChunk + j * R::kLane;
        const V m = message[j] * scale;
        R::store(to + i * stride + e, matrix ? m : R::load(base + i * stride + e) + m * R::load(factor + e));
      }
    };
    if (k < args_.lattice_count) {
      lattices_[k].slice(point, count, receive);
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk) {
          V message[kN];
          for (int j = 0; j < kN; ++j) message[j] = R::load(gaussian + i * stride + chunk * R::kChunk + j * R::kLane);
          receive(i, chunk, message);
        }
    }
    if (!matrix) return;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t chunk = 0; chunk < rows_.chunks(); ++chunk) {
        const int64_t at = i * stride + chunk * R::kChunk;
        V sum[kN];
        for (int j = 0; j < kN; ++j) sum[j] = R::load(base + at + j * R::kLane);
        for (int64_t c = 0; c < classes(); ++c) {
          const T* const column = factor + c * stride + chunk * R::kChunk;
          const T m = own.message[i * stride + c];
          for (int j = 0; j < kN; ++j) sum[j] += R::load(column + j * R::kLane) * m;
        }
        for (int j = 0; j < kN; ++j) R::store(own.energy + at + j * R::kLane, sum[j]);
      }
  }
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
