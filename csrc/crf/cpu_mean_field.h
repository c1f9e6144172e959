// Mean field of a dense CRF (Kraehenbuehl and Koltun 2011, algorithm 1) on the CPU, one image at a time.
//
// Marginals lie in rows, a pixel's classes side by side. An iteration is one pass over the image, in strips of columns, a
// line of up to kBlock pixels at a time: lattices' messages are sliced from the tables that the last pass splatted and a
// blur between the passes finished, those of Gaussian kernels come from a grid that was filtered between the passes; then
// energies, softmax, and what the next iteration's lattices and grids need of the new marginals, which are stored nowhere.
//
// A grid has a node for each pixel, or (`coarse`, for Gaussian kernels that are wide enough) for each 2 x 2 pixels of a
// plane. A coarse grid is filled and read by tents of two nodes' width, whose variance the taps between them lack. A
// pixel's tent reaches over the border of its strip, so each task has a tile of its own; tiles are added up in a fixed
// order, as are the bands of the splat: results have the same bits for any number of threads.
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
    Carver carver(memory);
    unary_ = carver.take<T>(points_ * stride_);
    nan_ = carver.take<bool>(workers.count);
    lattices_ = carver.take<VertexRows<R>>(a.lattice_count);
    compatibility_ = carver.take<T*>(kernels_);
    for (int64_t k = 0; k < kernels_; ++k) {
      T* const own = carver.take<T>(stride_ * (a.pairwise[k].matrix ? a.classes : 1));
      if (memory != nullptr) compatibility_[k] = own;
    }
    grids_ = carver.take<Grid>(a.gaussian_count);
    int64_t most = 0, longest = 0, margin = 0;
    for (int64_t g = 0; g < a.gaussian_count; ++g) {
      Grid grid = grid_of(g);
      for (int axis = 0; axis < 2; ++axis) grid.taps[axis] = carver.take<T>(spread_taps_size(grid.radius[axis]));
      grid.nodes = carver.take<T>(grid.size() + kLinePad);
      grid.tiles = grid.coarse ? carver.take<T>(task_count() * tile_size()) : nullptr;
      most = larger(most, grid.size());
      longest = larger(longest, grid.row_stride);
      margin = larger(margin, grid.radius[2]);
      if (memory != nullptr) grids_[g] = grid;
    }
    scratch_[0] = carver.take<T>(most + kLinePad);
    scratch_[1] = carver.take<T>(a.axes[0] > 1 ? most + kLinePad : 0);
    zeros_ = carver.take<T>(longest + kLinePad);
    zeros_size_ = longest + kLinePad;
    line_size_ = PaddedLine<T>::size(longest, margin * stride_);
    line_margin_ = margin * stride_;
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
  static constexpr int64_t kStrip = 96;  // columns of a task: few enough for its lattice vertices to stay in the cache
  static constexpr int64_t kNodeBlock = 64;            // nodes of a row that are filtered together along the other axes
  static constexpr int64_t kEdge = 4;                  // pixels of zeros before and after a block, for the tents
  static constexpr T kNear = T(0.75), kFar = T(0.25);  // a tent's weights, at distances of half a pixel and of 3/2

  // Where a Gaussian kernel's input and its message lie: [axes, stride], with padded rows.
  struct Grid {
    bool coarse;
    int64_t axes[3], radius[3], row_stride;
    T* taps[2];  // of z and y, as fir_lines reads them
    T* nodes;
    T* tiles;  // coarse: of each task
    int64_t size() const { return axes[0] * axes[1] * row_stride; }
  };

  // What a worker holds.
  struct Own {
    T* line;      // a row of nodes with zeros around it
    T* result;    // [kFirLines, kNodeBlock, stride]
    T* messages;  // [kBlock, stride]
    T* message;   // [kBlock, stride], where compatibility is a matrix
    T* nodes;     // [kBlock / 2 + 2, stride]
    T* rows;      // [kBlock, stride]
    T* scaled;    // [kEdge + kBlock + kEdge, stride], zero before and after the block
    T* energy;    // [kBlock, stride]
  };

  // A part of the image: planes z0..z1 - 1, lines y0..y1 - 1 of these, columns x0..x1 - 1. y0 and x0 are even.
  struct Task {
    int64_t index, z0, z1, y0, y1, x0, x1;
  };

  R rows_;
  MeanFieldArgs args_;
  Workers workers_;
  int64_t stride_, points_, kernels_;
  int64_t zeros_size_, line_size_, line_margin_, bytes_, own_step_ = 0;
  T* unary_;   // [points, stride], over the temperature; infinite beyond the classes
  bool* nan_;  // of each worker: whether it met one
  VertexRows<R>* lattices_;
  T** compatibility_;  // over the temperature: [stride], or [classes, stride], transposed
  Grid* grids_;
  T* scratch_[2];  // like the largest grid; the second one for volumes
  T* zeros_;       // a row of nodes
  Own first_own_;
  char* tables_;

  int64_t classes() const { return args_.classes; }
  static int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step; }

  Grid grid_of(int64_t g) const {
    Grid grid{};
    grid.coarse = args_.coarse[g];
    for (int axis = 0; axis < 3; ++axis) {
      const bool halved = grid.coarse && axis > 0;
      grid.axes[axis] = halved ? coarse_nodes(args_.axes[axis]) : args_.axes[axis];
      // Along an axis of one element only the middle tap counts, which is one.
      grid.radius[axis] = args_.axes[axis] == 1 ? 0 : larger<int64_t>(0, args_.radius[3 * g + axis]);
    }
    grid.row_stride = up(grid.axes[2] * stride_, kLinePad) * kLinePad;
    return grid;
  }
  // Node i lies between the pixels 2 i - 2 and 2 i - 1: there is one before the first pixel and one behind the last.
  static int64_t coarse_nodes(int64_t pixels) { return up(pixels, 2) + 2; }

  // Tasks go down a strip, then to the next one.
  int64_t strips() const { return up(args_.axes[2], kStrip); }
  int64_t parts() const {
    constexpr int64_t kTasks = 8;
    const int64_t wanted = up(kTasks, larger<int64_t>(1, strips()));
    return larger<int64_t>(1, smaller(wanted, args_.axes[0] > 1 ? args_.axes[0] : args_.axes[1] / 24));
  }
  int64_t task_count() const { return strips() * parts(); }
  Task task(int64_t i) const {
    const int64_t x0 = i / parts() * kStrip, part = i % parts(), depth = args_.axes[0], height = args_.axes[1];
    Task task{i, 0, depth, 0, height, x0, smaller(args_.axes[2], x0 + kStrip)};
    if (depth > 1) {
      task.z0 = depth * part / parts();
      task.z1 = depth * (part + 1) / parts();
    } else {
      task.y0 = height * part / parts() / 2 * 2;
      task.y1 = part + 1 == parts() ? height : height * (part + 1) / parts() / 2 * 2;
    }
    return task;
  }
  // A task's nodes of a coarse grid, from that before its first line and column to that behind its last ones.
  int64_t tile_rows() const {
    return args_.axes[0] > 1 ? coarse_nodes(args_.axes[1]) : coarse_nodes(up(args_.axes[1], parts()) + 2);
  }
  int64_t tile_row_size() const { return coarse_nodes(smaller(kStrip, args_.axes[2])) * stride_; }
  int64_t tile_size() const {
    return (args_.axes[0] > 1 ? up(args_.axes[0], parts()) : 1) * tile_rows() * tile_row_size();
  }
  T* tile_row(const Grid& grid, const Task& task, int64_t z, int64_t row) const {
    return grid.tiles + task.index * tile_size() + ((z - task.z0) * tile_rows() + row) * tile_row_size();
  }

  Own carve_own(Carver& carver) const {
    const int64_t block = kBlock * stride_;
    return {.line = carver.take<T>(line_size_),
            .result = carver.take<T>(kFirLines * kNodeBlock * stride_),
            .messages = carver.take<T>(block),
            .message = carver.take<T>(block),
            .nodes = carver.take<T>((kBlock / 2 + 2) * stride_),
            .rows = carver.take<T>(block),
            .scaled = carver.take<T>(block + 2 * kEdge * stride_),
            .energy = carver.take<T>(block)};
  }
  Own own_of(int64_t worker) const {
    Own own = first_own_;
    T** const parts[] = {&own.line,  &own.result, &own.messages, &own.message,
                         &own.nodes, &own.rows,   &own.scaled,   &own.energy};
    for (T** p : parts) *p = reinterpret_cast<T*>(reinterpret_cast<char*>(*p) + worker * own_step_);
    return own;
  }

  // Each band of the splat, of one or several tasks, is one worker's.
  int64_t image_bands(int64_t image) const {
    int64_t bands = task_count();
    for (int64_t k = 0; k < args_.lattice_count; ++k) {
      const LatticeInput& l = args_.lattices[k];
      bands = smaller(bands, band_count(points_, l.corners, l.offset[image + 1] - l.offset[image]));
    }
    return bands;
  }
  int64_t table_bytes(int64_t k, int64_t bands) const {
    return up(VertexRows<R>::workspace(rows_, bands, most_vertices(args_.lattices[k], args_.images)), 64) * 64;
  }

  void prepare() {
    const T cooling = T(1 / args_.temperature);
    memset(zeros_, 0, size_t(zeros_size_) * sizeof(T));
    for (int64_t worker = 0; worker < workers_.count; ++worker) {
      const Own own = own_of(worker);
      memset(own.scaled, 0, size_t(kEdge * stride_) * sizeof(T));
      memset(own.line, 0, size_t(line_size_) * sizeof(T));
    }
    for (int64_t k = 0; k < kernels_; ++k) {
      const PairwiseInput& pairwise = args_.pairwise[k];
      const T* const from = static_cast<const T*>(pairwise.compatibility);
      T* const to = compatibility_[k];
      memset(to, 0, size_t(stride_ * (pairwise.matrix ? classes() : 1)) * sizeof(T));
      for (int64_t c = 0; c < classes(); ++c) {
        if (!pairwise.matrix) to[c] = from[c] * cooling;
        for (int64_t other = 0; pairwise.matrix && other < classes(); ++other)
          to[other * stride_ + c] = from[c * classes() + other] * cooling;
      }
    }
    for (int64_t g = 0; g < args_.gaussian_count; ++g)
      for (int axis = 0; axis < 2; ++axis) spread_taps(taps(g, axis), grids_[g].radius[axis], grids_[g].taps[axis]);
  }

  const T* taps(int64_t g, int axis) const {
    static constexpr T kOne = 1;
    return args_.radius[3 * g + axis] < 0 ? &kOne : static_cast<const T*>(args_.taps[3 * g + axis]);
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
    each_block(bands, [&](const Place& at, const Own& own) { start(at, own, image, args_.iterations == 0); });
    for (int64_t i = 0; i < args_.iterations; ++i) {
      for (int64_t k = 0; k < args_.lattice_count; ++k) lattices_[k].blur(false, workers_);
      for (int64_t g = 0; g < args_.gaussian_count; ++g) filter_grid(g);
      const bool last = i + 1 == args_.iterations;
      each_block(bands, [&](const Place& at, const Own& own) { update(at, own, image, last); });
    }
    for (int64_t worker = 0; worker < workers_.count; ++worker)
      if (nan_[worker]) return false;
    return true;
  }

  // `count` pixels of a line, the first of them number `point` of the image.
  struct Place {
    Task task;
    int64_t band, worker, z, y, x, point, count;
  };

  // Calls f(place, own) for every block of every task, those of a band in order and by one worker.
  template <typename F>
  void each_block(int64_t bands, const F& f) const {
    for_each_part(workers_, bands, [&](int64_t worker, int64_t begin, int64_t end) {
      const Own own = own_of(worker);
      for (int64_t band = begin; band < end; ++band)
        for (int64_t i = task_count() * band / bands; i < task_count() * (band + 1) / bands; ++i) {
          const Task t = task(i);
          for (int64_t g = 0; g < args_.gaussian_count; ++g)
            if (grids_[g].coarse) memset(tile_row(grids_[g], t, t.z0, 0), 0, size_t(tile_size()) * sizeof(T));
          for (int64_t z = t.z0; z < t.z1; ++z)
            for (int64_t y = t.y0; y < t.y1; ++y)
              for (int64_t x = t.x0; x < t.x1; x += kBlock)
                f(Place{t, band, worker, z, y, x, (z * args_.axes[1] + y) * args_.axes[2] + x,
                        smaller(kBlock, t.x1 - x)},
                  own);
        }
    });
  }

  // Lines of memory that will be read soon, which lie too far apart for the hardware to see them coming.
  static void prefetch(const T* p, int64_t count) {
    for (int64_t e = 0; e < count; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + e);
  }

  // Reads unaries and initial marginals.
  void start(const Place& at, const Own& own, int64_t image, bool last) const {
    const int64_t first = image * classes() * points_ + at.point, elements = at.count * stride_;
    T* const unary = unary_ + at.point * stride_;
    T* const rows = own.rows;
    pack_rows(rows_, static_cast<const T*>(args_.unary) + first, points_, classes(), at.count, unary,
              T(__builtin_inf()));
    const T cooling = T(1 / args_.temperature);
    bool nan = false;
    for (int64_t e = 0; e < elements; ++e) {
      unary[e] *= cooling;
      nan |= unary[e] != unary[e];
    }
    nan_[at.worker] |= nan;
    if (args_.initial != nullptr) {
      pack_rows(rows_, static_cast<const T*>(args_.initial) + first, points_, classes(), at.count, rows, T(0));
    } else {
      memcpy(own.energy, unary, size_t(elements) * sizeof(T));
      softmax(own.energy, at.count, rows);
    }
    finish(at, own, image, last);
  }

  // An iteration of a block. One loop for each step: what depends on a row takes long, and a short loop keeps many rows in
  // flight.
  void update(const Place& at, const Own& own, int64_t image, bool last) const {
    const int64_t elements = at.count * stride_, next = at.point + args_.axes[2];
    const T* const unary = unary_ + at.point * stride_;
    prefetch(unary_ + next * stride_, elements);
    for (int64_t k = 0; k < args_.lattice_count; ++k) lattices_[k].prefetch(next, at.count);
    if (kernels_ == 0) memcpy(own.energy, unary, size_t(elements) * sizeof(T));
    for (int64_t k = 0; k < kernels_; ++k) {
      const T* const gaussian = k < args_.lattice_count ? nullptr : read_grid(grids_[k - args_.lattice_count], at, own);
      add_kernel(image, k, at.point, at.count, gaussian, k == 0 ? unary : own.energy, own);
    }
    softmax(own.energy, at.count, own.rows);
    finish(at, own, image, last);
  }

  // New marginals are in own.rows: hands them to the next iteration's lattices and grids, or out.
  void finish(const Place& at, const Own& own, int64_t image, bool last) const {
    const T* const rows = own.rows;
    if (last) {
      unpack_rows(rows_, rows, points_, classes(), at.count,
                  static_cast<T*>(args_.output) + image * classes() * points_ + at.point);
      return;
    }
    for (int64_t k = 0; k < kernels_; ++k) {
      const ScaleInput scale = args_.pairwise[k].scale_in;
      if (k < args_.lattice_count)
        lattices_[k].splat(at.band, at.point, at.count, rows,
                           [&](int64_t i) { return scale_at(scale, image, at.point + i); });
      else
        fill_grid(grids_[k - args_.lattice_count], at, own, scale, image);
    }
  }

  // The marginals of a block, scaled, into a grid or, by tents, into a task's tile of a coarse one.
  void fill_grid(const Grid& grid, const Place& at, const Own& own, const ScaleInput& scale, int64_t image) const {
    const int64_t stride = stride_;
    T* const to = grid.coarse ? own.scaled + kEdge * stride
                              : grid.nodes + (at.z * grid.axes[1] + at.y) * grid.row_stride + at.x * stride;
    for (int64_t i = 0; i < at.count; ++i) {
      const T s = scale_at(scale, image, at.point + i);
      for (int64_t e = i * stride; e < (i + 1) * stride; e += R::kLane) R::store(to + e, R::load(own.rows + e) * s);
    }
    if (!grid.coarse) return;
    memset(to + at.count * stride, 0, size_t(kEdge * stride) * sizeof(T));
    const int64_t first = (at.x - at.task.x0) / 2 * stride, row = (at.y - at.task.y0) / 2 + 1;
    T* const near = tile_row(grid, at.task, at.z, row) + first;
    T* const far = tile_row(grid, at.task, at.z, at.y % 2 == 0 ? row - 1 : row + 1) + first;
    for (int64_t k = 0; k < up(at.count, 2) + 2; ++k) {  // node k lies between the block's pixels 2 k - 2 and 2 k - 1
      const T* const p = to + (2 * k - 3) * stride;
      for (int64_t e = 0; e < stride; e += R::kLane) {
        const V sum = (R::load(p + e) + R::load(p + 3 * stride + e)) * kFar +
                      (R::load(p + stride + e) + R::load(p + 2 * stride + e)) * kNear;
        const int64_t node = k * stride + e;
        R::store(near + node, R::load(near + node) + sum * kNear);
        R::store(far + node, R::load(far + node) + sum * kFar);
      }
    }
  }

  // The message of a Gaussian kernel for a block: [count, stride].
  const T* read_grid(const Grid& grid, const Place& at, const Own& own) const {
    const int64_t stride = stride_;
    const auto row_at = [&](int64_t row, int64_t column) {
      return grid.nodes + (at.z * grid.axes[1] + row) * grid.row_stride + column * stride;
    };
    if (!grid.coarse) return row_at(at.y, at.x);
    const int64_t row = at.y / 2 + 1, nodes = up(at.count, 2) + 2;
    const T* const near = row_at(row, at.x / 2);
    const T* const far = row_at(at.y % 2 == 0 ? row - 1 : row + 1, at.x / 2);
    for (int64_t e = 0; e < nodes * stride; e += R::kLane)
      R::store(own.nodes + e, R::load(near + e) * kNear + R::load(far + e) * kFar);
    for (int64_t i = 0; i < at.count; ++i) {
      const T* const a = own.nodes + (i / 2 + 1) * stride;
      const T* const b = a + (i % 2 == 0 ? -stride : stride);
      for (int64_t e = 0; e < stride; e += R::kLane)
        R::store(own.messages + i * stride + e, R::load(a + e) * kNear + R::load(b + e) * kFar);
    }
    return own.messages;
  }

  // The message on a grid: its rows filtered along x, z and y.
  void filter_grid(int64_t g) const {
    const Grid& grid = grids_[g];
    const int64_t elements = grid.axes[2] * stride_, rows = grid.axes[0] * grid.axes[1];
    for_each_part(workers_, rows, [&](int64_t worker, int64_t begin, int64_t end) {
      const PaddedLine<T> padded(own_of(worker).line, line_margin_);
      T* const line = padded.data();
      for (int64_t row = begin; row < end; ++row) {
        if (grid.coarse)
          add_tiles(grid, row / grid.axes[1], row % grid.axes[1], line);
        else
          memcpy(line, grid.nodes + row * grid.row_stride, size_t(elements) * sizeof(T));
        memset(line + elements, 0, size_t(grid.radius[2] * stride_) * sizeof(T));
        fir_shifted(line, stride_, taps(g, 2), grid.radius[2], elements, scratch_[0] + row * grid.row_stride);
      }
    });
    T* from = scratch_[0];
    if (grid.radius[0] > 0) {
      filter_rows(grid, 0, from, scratch_[1]);
      from = scratch_[1];
    }
    filter_rows(grid, 1, from, grid.nodes);
  }

  // A row of a coarse grid, from the tiles that have a part of it.
  void add_tiles(const Grid& grid, int64_t z, int64_t row, T* line) const {
    memset(line, 0, size_t(grid.axes[2] * stride_) * sizeof(T));
    for (int64_t i = 0; i < task_count(); ++i) {
      const Task t = task(i);
      const int64_t of_tile = row - t.y0 / 2;
      if (z < t.z0 || z >= t.z1 || of_tile < 0 || of_tile >= coarse_nodes(t.y1 - t.y0)) continue;
      const T* const from = tile_row(grid, t, z, of_tile);
      T* const to = line + t.x0 / 2 * stride_;
      for (int64_t e = 0; e < coarse_nodes(t.x1 - t.x0) * stride_; e += R::kLane)
        R::store(to + e, R::load(to + e) + R::load(from + e));
    }
  }

  // Along z (axis 0) or y (1).
  void filter_rows(const Grid& grid, int axis, const T* from, T* to) const {
    const int64_t length = grid.axes[axis], other = grid.axes[1 - axis], radius = grid.radius[axis];
    const int64_t step = grid.row_stride * (axis == 0 ? grid.axes[1] : 1);
    const int64_t other_step = grid.row_stride * (axis == 0 ? 1 : grid.axes[1]);
    const int64_t block = kNodeBlock * stride_, blocks = up(grid.axes[2] * stride_, block);
    for_each_part(workers_, other * blocks, [&](int64_t worker, int64_t begin, int64_t end) {
      T* const result = own_of(worker).result;
      for (int64_t at = begin; at < end; ++at) {
        const int64_t column = at % blocks * block, count = smaller(block, grid.row_stride - column);
        const int64_t first = at / blocks * other_step + column;
        for (int64_t i = 0; i < length; i += kFirLines) {
          const auto line = [&](int64_t k) {
            const int64_t source = i + k - radius;
            return source < 0 || source >= length ? zeros_ : from + first + source * step;
          };
          T* const own = to + first + i * step;
          if (i + kFirLines <= length) {
            fir_lines(line, grid.taps[axis], radius, count, own, step);
            continue;
          }
          fir_lines(line, grid.taps[axis], radius, count, result, block);
          for (int64_t j = 0; j < length - i; ++j)
            memcpy(own + j * step, result + j * block, size_t(count) * sizeof(T));
        }
      }
    });
  }

  // to[i] = softmax(-energy[i]), rows of `count` points; overwrites the energies.
  void softmax(T* energy, int64_t count, T* to) const {
    for (int64_t i = 0; i < count; ++i, energy += stride_, to += stride_) {
      V least = R::load(energy);
      for (int64_t e = R::kLane; e < stride_; e += R::kLane) least = row_min(least, R::load(energy + e));
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

  // own.energy = base + compatibility * message of `count` points. gaussian: the message's rows of a Gaussian kernel.
  void add_kernel(int64_t image, int64_t k, int64_t point, int64_t count, const T* gaussian, const T* base,
                  const Own& own) const {
    const int64_t stride = stride_;
    const bool matrix = args_.pairwise[k].matrix;
    const ScaleInput scale_out = args_.pairwise[k].scale_out;
    T* const to = matrix ? own.message : own.energy;
    const T* const factor = compatibility_[k];
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
