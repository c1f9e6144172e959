// _mean_field on CUDA devices: checks, buffers, order of the launches, registration. Nothing here waits for the device.
#include "crf/mean_field_cuda.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>

#include "crf/crf_cuda.h"
#include "crf/gaussian_filter_cuda.h"

namespace pyseg::crf {
namespace {

using torch::stable::Tensor;

// All launches of one call, on rows of marginals [N * P, stride].
class MeanField {
 public:
  MeanField(const MeanFieldShape& shape, const Tensor& unary, double temperature)
      : launches_(kMeanField, unary),
        kept_(unary),
        shape_(shape),
        rows_{.float64 = unary.scalar_type() == ScalarType::Double, .channels = shape.classes},
        cooling_(1 / temperature) {
    unary_ = new_rows();
    marginals_ = new_rows();
    check(launch_pack(rows_, unary.data_ptr(), shape.images, shape.points, cooling_,
                      std::numeric_limits<double>::infinity(), unary_, stream()));
  }

  void start(const std::optional<Tensor>& initial) {
    if (initial)
      check(launch_pack(rows_, initial->data_ptr(), shape_.images, shape_.points, 1, 0, marginals_, stream()));
    else
      update();
  }

  void add_lattice(const Lattice& lattice, const Tensor& scale_in) {
    Splat s{};
    s.view = view_of(lattice, kept_);
    s.items = new_items(s.view, rows_.float64, kept_);
    check(launch_items(s.view, point_scale(scale_in), rows_.float64, s.items, stream()));
    s.table = kept_.numbers(s.view.vertices * rows_.stride(), rows_.float64);
    messages_.push_back({.rows = s.table,
                         .vertex = s.view.vertex,
                         .weight = s.view.weight,
                         .corners = s.view.corners,
                         .vertices = s.view.vertices,
                         .factor = blur_factor(s.view),
                         .scale = {},
                         .compatibility = nullptr,
                         .matrix = false});
    splats_.push_back(s);
  }

  // sigma: of shape.axes; radius likewise, 0 for an axis that is left as it is.
  void add_gaussian(const double* sigma, const int64_t* radius, const Tensor& scale_in) {
    void* const message = new_rows();
    std::vector<int> axes;
    for (int axis = 2; axis >= 0; --axis)
      if (radius[axis] > 0) axes.push_back(axis);
    if (axes.empty()) axes.push_back(2);  // for the scale
    const PointScale scale = point_scale(scale_in);
    const void* from = marginals_;
    int64_t left = int64_t(axes.size());
    if (left > 1 && scratch_ == nullptr) scratch_ = new_rows();
    for (const int axis : axes) {
      int64_t inner = rows_.stride();
      for (int other = axis + 1; other < 3; ++other) inner *= shape_.axes[other];
      void* const taps = kept_.numbers(radius[axis] + 1, rows_.float64);
      check(launch_gaussian_taps(sigma[axis], radius[axis], 1, rows_.float64, taps, stream()));
      void* const to = --left % 2 == 0 ? message : scratch_;
      passes_.push_back({.float64 = rows_.float64,
                         .outer = shape_.images * shape_.points * rows_.stride() / (shape_.axes[axis] * inner),
                         .length = shape_.axes[axis],
                         .inner = inner,
                         .radius = radius[axis],
                         .taps = taps,
                         .from = from,
                         .to = to,
                         .scale = from == marginals_ ? scale.data : nullptr,
                         .scale_run = rows_.stride(),
                         .scale_period = scale.image_stride == 0 ? shape_.points : shape_.images * shape_.points});
      from = to;
    }
    messages_.push_back({.rows = message,
                         .vertex = nullptr,
                         .weight = nullptr,
                         .corners = 0,
                         .vertices = 0,
                         .factor = 1,
                         .scale = {},
                         .compatibility = nullptr,
                         .matrix = false});
  }

  void set_message(size_t k, const Tensor& scale_out, const Tensor& compatibility) {
    Message& m = messages_[k];
    m.scale = point_scale(scale_out);
    m.matrix = compatibility.dim() == 2;
    void* const costs = kept_.numbers((m.matrix ? rows_.stride() : 1) * rows_.stride(), rows_.float64);
    check(launch_compatibility(rows_, kept_.read<void>(compatibility), m.matrix, cooling_, costs, stream()));
    m.compatibility = costs;
  }

  void iterate(int64_t iterations) {
    int64_t segments = 0, vertices = 0;
    for (const Splat& s : splats_) {
      segments = std::max(segments, segments_of(s.view));
      vertices = std::max(vertices, s.view.vertices);
    }
    const SplatCarry carry = new_carry(segments, rows_, kept_);
    void* const other = kept_.numbers(vertices * rows_.stride(), rows_.float64);
    for (int64_t i = 0; i < iterations; ++i) {
      for (const Splat& s : splats_)
        check(launch_vertices(s.view, rows_, s.items, carry, marginals_, false, s.table, other, stream()));
      for (const GaussianPass& pass : passes_) check(launch_gaussian_pass(pass, stream()));
      update();
    }
  }

  void finish(const Tensor& output) const {
    check(launch_unpack(rows_, marginals_, shape_.images, shape_.points, output.data_ptr(), stream()));
  }

 private:
  struct Splat {
    LatticeView view;
    SplatItems items;
    void* table;
  };

  CudaLaunches launches_;
  Kept kept_;
  MeanFieldShape shape_;
  Rows rows_;
  double cooling_;
  void *unary_ = nullptr, *marginals_ = nullptr, *scratch_ = nullptr;  // unary energies over the temperature
  std::vector<Splat> splats_;
  std::vector<GaussianPass> passes_;
  std::vector<Message> messages_;

  cudaStream_t stream() const { return launches_.stream(); }
  void check(cudaError_t error) const { launches_.check(error); }
  void* new_rows() { return kept_.numbers(shape_.images * shape_.points * rows_.stride(), rows_.float64); }

  PointScale point_scale(const Tensor& t) {
    if (t.numel() == 0) return {nullptr, 0};
    return {kept_.read<void>(t), t.size(0) == 1 ? 0 : shape_.points};
  }

  // Marginals from the messages. Energies on the way lie in the marginals' place.
  void update() const {
    Update a{.float64 = rows_.float64,
             .images = shape_.images,
             .points = shape_.points,
             .classes = shape_.classes,
             .messages = {},
             .count = 0,
             .energy = unary_,
             .to = marginals_,
             .softmax = false};
    size_t done = 0;
    do {
      a.count = static_cast<int>(std::min<size_t>(kMostMessages, messages_.size() - done));
      std::copy_n(messages_.begin() + int64_t(done), a.count, a.messages);
      done += a.count;
      a.softmax = done == messages_.size();
      check(launch_update(a, stream()));
      a.energy = marginals_;
    } while (done < messages_.size());
  }
};

Tensor mean_field(Tensor unary, std::optional<Tensor> initial, int64_t iterations, double temperature,
                  std::vector<Tensor> lattices, std::vector<double> sigmas, double truncate, bool /*coarse*/,
                  std::vector<Tensor> scale_in, std::vector<Tensor> scale_out, std::vector<Tensor> compatibility) {
  const MeanFieldShape shape =
      check_mean_field(unary, initial, iterations, temperature, lattices, sigmas, scale_in, scale_out, compatibility);
  PYSEG_CHECK(shape.images * shape.points < int64_t{1} << 31, kMeanField,
              ": unary must be of fewer than 2^31 points, got ", unary.sizes());
  const ScalarType type = wide_type(unary);
  const Tensor wide = as_type(unary, type);
  const Tensor output = torch::stable::new_empty(wide, wide.sizes());
  const int64_t axes = unary.dim() - 2;
  std::vector<int64_t> radius(3 * shape.gaussians, 0);
  std::vector<double> sigma(3 * shape.gaussians, 0);
  for (size_t i = 0; i < sigmas.size(); ++i) {
    const size_t at = 3 * (i / axes) + (3 - axes) + i % axes;
    radius[at] = gaussian_radius(kMeanField, sigmas[i], truncate);
    sigma[at] = sigmas[i];
  }
  if (output.numel() > 0) {
    std::optional<Tensor> start;
    if (initial) start = as_type(*initial, type);
    MeanField field(shape, wide, temperature);
    field.start(start);
    for (size_t k = 0; k < shape.lattices; ++k) field.add_lattice(lattice_at(lattices, k), scale_in[k]);
    for (size_t g = 0; g < shape.gaussians; ++g)
      field.add_gaussian(&sigma[3 * g], &radius[3 * g], scale_in[shape.lattices + g]);
    for (size_t k = 0; k < compatibility.size(); ++k) field.set_message(k, scale_out[k], compatibility[k]);
    field.iterate(iterations);
    field.finish(output);
  }
  return unary.scalar_type() == type ? output : torch::stable::to(output, unary.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyseg, CUDA, m) { m.impl("_mean_field", TORCH_BOX(&mean_field)); }

}  // namespace pyseg::crf
