// Checks of the arguments of the crf family's operators, the same on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor_arguments.h"
#include "crf/permutohedral_math.h"

namespace pyseg::crf {

using torch::headeronly::ScalarType;

constexpr const char* kLattice = "permutohedral_lattice";
constexpr const char* kLatticeBackward = "_permutohedral_lattice_backward";
constexpr const char* kVertexKernel = "permutohedral_vertex_kernel";
constexpr const char* kFilter = "permutohedral_filter";
constexpr const char* kFilterBackward = "_permutohedral_filter_backward_weight";
constexpr const char* kGaussian = "gaussian_filter";
constexpr const char* kMeanField = "_mean_field";

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_floating(const char* op, const char* name, const torch::stable::Tensor& t) {
  PYSEG_CHECK(is_floating(t.scalar_type()), op, ": ", name, " must be float32, float64, float16 or bfloat16, got ",
              dtype_name(t));
}

// 16-bit values are computed in float32.
inline ScalarType wide_type(const torch::stable::Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Contiguous, of the given type.
inline torch::stable::Tensor as_type(const torch::stable::Tensor& t, ScalarType type) {
  return torch::stable::contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

inline void check_like(const char* op, const char* name, const torch::stable::Tensor& t, ScalarType type,
                       const Ints& sizes, const torch::stable::Tensor& device_of) {
  PYSEG_CHECK(t.scalar_type() == type, op, ": ", name, " must be torch.", torch::headeronly::toString(type), ", got ",
              dtype_name(t));
  PYSEG_CHECK(sizes_of(t) == sizes, op, ": ", name, " must be ", sizes, ", got ", t.sizes());
  PYSEG_CHECK(t.is_cuda() == device_of.is_cuda() && t.get_device_index() == device_of.get_device_index(), op, ": ",
              name, " must be on the device of the other tensors");
}

// Points: [N, d, P].
inline void check_features(const char* op, const torch::stable::Tensor& features, double scale) {
  check_floating(op, "features", features);
  PYSEG_CHECK(features.dim() == 3 && features.size(1) >= 1 && features.size(1) <= kMostFeatures, op,
              ": features must be [N, d, P] with d from 1 to ", kMostFeatures, ", got ", features.sizes());
  PYSEG_CHECK(scale > 0 && std::isfinite(scale), op, ": scale must be positive and finite, got ", scale);
  // Entries are counted in 32 bits.
  const double entries = double(features.size(0)) * double(features.size(2)) * double(features.size(1) + 1);
  PYSEG_CHECK(entries < double(int64_t{1} << 31), op, ": features must have N * P * (d + 1) below 2^31, got ",
              features.sizes());
}

[[noreturn]] inline void throw_overflow(const torch::stable::Tensor& features, double scale) {
  const int d = static_cast<int>(features.size(1));
  throw_error(kLattice, ": features must be finite and within about ",
              most_coordinate(d) / (scale * (d + 1) * std::sqrt(2. / 3) * std::sqrt(double(d) / (d + 1))),
              " standard deviations of zero for d = ", d,
              ", where coordinates of vertices fit 16 bits; got some beyond");
}

// The tensors of a lattice as an operator is given them.
struct Lattice {
  const torch::stable::Tensor &vertex, &weight, &row, &entry, &neighbour, &offset, &kernel_row, &kernel_vertex,
      &kernel_weight;
  int64_t images() const { return vertex.size(0); }
  int64_t points() const { return vertex.size(1); }
  int corners() const { return static_cast<int>(vertex.size(2)); }
  int64_t vertices() const { return neighbour.size(1); }
  bool has_kernel() const { return kernel_row.numel() > 0; }
};

inline void check_lattice(const char* op, const Lattice& l, ScalarType type) {
  const torch::stable::Tensor& vertex = l.vertex;
  PYSEG_CHECK(vertex.dim() == 3 && vertex.size(2) >= 2 && vertex.size(2) <= kMostFeatures + 1, op,
              ": vertex must be [N, P, d + 1] with d from 1 to ", kMostFeatures, ", got ", vertex.sizes());
  check_like(op, "vertex", vertex, ScalarType::Int, sizes_of(vertex), vertex);
  check_like(op, "weight", l.weight, type, sizes_of(vertex), vertex);
  PYSEG_CHECK(l.neighbour.dim() == 3, op, ": neighbour must be [d + 1, M, 2], got ", l.neighbour.sizes());
  const int64_t m = l.vertices();
  check_like(op, "neighbour", l.neighbour, ScalarType::Int, {vertex.size(2), m, 2}, vertex);
  check_like(op, "offset", l.offset, ScalarType::Long, {l.images() + 1}, vertex);
  const bool rows = vertex.is_cuda();
  check_like(op, "row", l.row, ScalarType::Int, {rows ? m + 1 : 0}, vertex);
  check_like(op, "entry", l.entry, ScalarType::Int, {rows ? vertex.numel() : 0}, vertex);
  check_like(op, "kernel_row", l.kernel_row, ScalarType::Long, {l.has_kernel() ? m + 1 : 0}, vertex);
  check_like(op, "kernel_vertex", l.kernel_vertex, ScalarType::Int, {l.kernel_vertex.numel()}, vertex);
  check_like(op, "kernel_weight", l.kernel_weight, type, {l.kernel_vertex.numel()}, vertex);
}

// values: [N, C, P] on the lattice's points.
inline void check_values(const char* op, const char* name, const torch::stable::Tensor& values, const Lattice& l) {
  check_floating(op, name, values);
  PYSEG_CHECK(values.dim() == 3 && values.size(0) == l.images() && values.size(2) == l.points(), op, ": ", name,
              " must be [", l.images(), ", C, ", l.points(), "], got ", values.sizes());
  check_like(op, name, values, values.scalar_type(), sizes_of(values), l.vertex);
}

// Of both directions of the filter: the type that it computes in.
inline ScalarType check_filter(const char* op, const torch::stable::Tensor& values, const Lattice& l) {
  check_floating(op, "values", values);
  const ScalarType type = wide_type(values);
  check_lattice(op, l, type);
  check_values(op, "values", values, l);
  return type;
}

inline ScalarType check_filter_backward(const torch::stable::Tensor& grad, const torch::stable::Tensor& values,
                                        const Lattice& l) {
  const ScalarType type = check_filter(kFilterBackward, values, l);
  check_values(kFilterBackward, "grad", grad, l);
  check_like(kFilterBackward, "grad", grad, values.scalar_type(), sizes_of(values), values);
  return type;
}

inline void check_vertex_kernel(const torch::stable::Tensor& key, const torch::stable::Tensor& offset, double scale,
                                double cutoff, double variance) {
  PYSEG_CHECK(key.dim() == 2 && key.size(1) >= 1 && key.size(1) <= kMostFeatures, kVertexKernel,
              ": key must be [M, d] with d from 1 to ", kMostFeatures, ", got ", key.sizes());
  check_like(kVertexKernel, "key", key, ScalarType::Short, sizes_of(key), key);
  PYSEG_CHECK(offset.dim() == 1 && offset.numel() >= 1, kVertexKernel, ": offset must be [N + 1], got ",
              offset.sizes());
  check_like(kVertexKernel, "offset", offset, ScalarType::Long, sizes_of(offset), key);
  PYSEG_CHECK(scale > 0.5 && std::isfinite(scale), kVertexKernel, ": scale must be above 1/2 and finite, got ", scale);
  PYSEG_CHECK(cutoff > 0 && cutoff < 1e4, kVertexKernel, ": cutoff must be from 0 to 10000, got ", cutoff);
  PYSEG_CHECK(variance > 0 && std::isfinite(variance), kVertexKernel, ": variance must be positive and finite, got ",
              variance);
  // Squared distances in units of the lattice are exact in float32 up to there.
  constexpr double kMostSquare = 1 << 24;
  const double reach = cutoff * scale * double(key.size(1) + 1);
  PYSEG_CHECK(reach * reach * 2 / 3 < kMostSquare, kVertexKernel, ": scale * cutoff * (d + 1) must be below 5016, got ",
              reach);
}

constexpr int kMostAxes = 3;
constexpr int64_t kMostTaps = 1 << 20;

// Taps beside the middle one.
inline int64_t gaussian_radius(const char* op, double sigma, double truncate) {
  PYSEG_CHECK(sigma >= 0 && std::isfinite(sigma), op, ": sigma must be finite and not negative, got ", sigma);
  PYSEG_CHECK(truncate > 0 && std::isfinite(truncate), op, ": truncate must be positive and finite, got ", truncate);
  PYSEG_CHECK(truncate * sigma < double(kMostTaps), op, ": truncate * sigma must be below ", kMostTaps, ", got ",
              truncate * sigma);
  return static_cast<int64_t>(truncate * sigma + 0.5);
}

// taps[0] is the middle one, taps[x] that at a distance of x.
inline std::vector<double> gaussian_taps(const char* op, double sigma, double truncate, bool normalize) {
  std::vector<double> taps(gaussian_radius(op, sigma, truncate) + 1, 1.);
  double sum = 1;
  for (size_t x = 1; x < taps.size(); ++x) {
    taps[x] = std::exp(-double(x) * double(x) / (2 * sigma * sigma));
    sum += 2 * taps[x];
  }
  if (normalize)
    for (double& tap : taps) tap /= sum;
  return taps;
}

inline void check_maps(const char* op, const char* name, const torch::stable::Tensor& maps) {
  check_floating(op, name, maps);
  PYSEG_CHECK(maps.dim() >= 3 && maps.dim() <= 2 + kMostAxes, op, ": ", name,
              " must be [N, C, *S] with S of 1 to 3 axes, got ", maps.sizes());
}

inline void check_gaussian(const torch::stable::Tensor& values, const std::vector<double>& sigma) {
  check_maps(kGaussian, "values", values);
  PYSEG_CHECK(int64_t(sigma.size()) == values.dim() - 2, kGaussian, ": sigma must have an element for each of the ",
              values.dim() - 2, " axes of values, got ", sigma);
}

// --- _mean_field

constexpr int kTensorsOfLattice = 9;

inline Lattice lattice_at(const std::vector<torch::stable::Tensor>& tensors, size_t k) {
  const torch::stable::Tensor* t = &tensors[k * kTensorsOfLattice];
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]};
}

struct MeanFieldShape {
  int64_t images, classes, points;
  int64_t axes[3];  // 1 before those that there are
  size_t lattices, gaussians;
};

inline MeanFieldShape check_mean_field(const torch::stable::Tensor& unary,
                                       const std::optional<torch::stable::Tensor>& initial, int64_t iterations,
                                       double temperature, const std::vector<torch::stable::Tensor>& lattices,
                                       const std::vector<double>& sigmas,
                                       const std::vector<torch::stable::Tensor>& scale_in,
                                       const std::vector<torch::stable::Tensor>& scale_out,
                                       const std::vector<torch::stable::Tensor>& compatibility) {
  check_maps(kMeanField, "unary", unary);
  const int64_t axes = unary.dim() - 2;
  MeanFieldShape s{
      .images = unary.size(0), .classes = unary.size(1), .points = 1, .axes = {1, 1, 1}, .lattices = 0, .gaussians = 0};
  for (int64_t i = 0; i < axes; ++i) {
    s.axes[3 - axes + i] = unary.size(2 + i);
    s.points *= unary.size(2 + i);
  }
  PYSEG_CHECK(s.classes >= 1, kMeanField, ": unary must have a class, got ", unary.sizes());
  if (initial) check_like(kMeanField, "initial", *initial, unary.scalar_type(), sizes_of(unary), unary);
  PYSEG_CHECK(iterations >= 0, kMeanField, ": iterations must not be negative, got ", iterations);
  // Its reciprocal is a float32, and so should energies be that are multiplied by it.
  PYSEG_CHECK(temperature >= 1e-30 && temperature <= 1e30, kMeanField, ": temperature must be from 1e-30 to 1e30, got ",
              temperature);
  PYSEG_CHECK(lattices.size() % kTensorsOfLattice == 0, kMeanField, ": lattices must be ", kTensorsOfLattice,
              " tensors each, got ", lattices.size());
  PYSEG_CHECK(sigmas.size() % axes == 0, kMeanField, ": sigmas must be ", axes, " for each kernel, got ",
              sigmas.size());
  s.lattices = lattices.size() / kTensorsOfLattice;
  s.gaussians = sigmas.size() / axes;
  const size_t kernels = s.lattices + s.gaussians;
  const ScalarType type = wide_type(unary);
  for (size_t k = 0; k < s.lattices; ++k) {
    const Lattice l = lattice_at(lattices, k);
    check_lattice(kMeanField, l, type);
    PYSEG_CHECK(l.images() == s.images && l.points() == s.points, kMeanField, ": vertex must be [", s.images, ", ",
                s.points, ", d + 1] for unary ", unary.sizes(), ", got ", l.vertex.sizes());
    check_like(kMeanField, "vertex", l.vertex, ScalarType::Int, sizes_of(l.vertex), unary);
  }
  PYSEG_CHECK(scale_in.size() == kernels && scale_out.size() == kernels && compatibility.size() == kernels, kMeanField,
              ": scale_in, scale_out and compatibility must have an element for each of ", kernels, " kernels, got ",
              scale_in.size(), ", ", scale_out.size(), " and ", compatibility.size());
  for (size_t k = 0; k < kernels; ++k) {
    for (const auto* scale : {&scale_in[k], &scale_out[k]}) {
      if (scale->dim() == 1 && scale->numel() == 0) continue;
      PYSEG_CHECK(scale->dim() == 2 && (scale->size(0) == 1 || scale->size(0) == s.images), kMeanField,
                  ": scale must be [N, P], [1, P] or [0], got ", scale->sizes());
      check_like(kMeanField, "scale", *scale, type, {scale->size(0), s.points}, unary);
    }
    const bool matrix = compatibility[k].dim() == 2;
    check_like(kMeanField, "compatibility", compatibility[k], type,
               matrix ? Ints{s.classes, s.classes} : Ints{s.classes}, unary);
  }
  return s;
}

}  // namespace pyseg::crf
