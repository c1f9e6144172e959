// The arguments of this family's CPU kernels, and the tables that they point into.
#pragma once

#include <vector>

#include "common/cpu_capability.h"
#include "upsample/upsample_check.h"
#include "upsample/upsample_cpu_kernel.h"

namespace pyseg::upsample {

inline const UpsampleKernelTable& upsample_kernels() { return PYSEG_CPU_TABLE(upsample_kernels); }

class CpuCall {
 public:
  UpsampleArgs args{};

  // sizes: [N, C_i, H_i, W_i] of each map.
  CpuCall(Element type, const std::vector<Ints>& sizes, int64_t height, int64_t width, bool last, bool align,
          const std::optional<Floats>& factors)
      : maps_(sizes.size()) {
    args.type = type;
    args.images = sizes[0][0];
    args.height = height;
    args.width = width;
    args.maps = int64_t(sizes.size());
    args.map = maps_.data();
    args.last = last;
    taps_.reserve(2 * sizes.size());
    for (size_t l = 0; l < sizes.size(); ++l) {
      UpsampleMap& map = maps_[l];
      map = {};
      map.channels = sizes[l][1];
      map.height = sizes[l][2];
      map.width = sizes[l][3];
      map.first_channel = args.channels;
      args.channels += map.channels;
      map.rows = taps(map.height, height, align, factors ? (*factors)[0] : 0, &map.copied_rows);
      map.columns = taps(map.width, width, align, factors ? (*factors)[1] : 0, &map.copied_columns);
    }
  }
  CpuCall(const CpuCall&) = delete;

  void set_inputs(const Tensors& inputs) { point_at_inputs(inputs, args.last, maps_.data(), &kept_); }
  Tensors new_gradients(const std::vector<Ints>& sizes, const Tensor& like) {
    return new_gradients_of(sizes, like, args.last, maps_.data());
  }

  Workers workers() const {
    return workers_for(4. * double(args.images) * double(args.channels) * double(args.height) * double(args.width));
  }

 private:
  const Tap* taps(int64_t in, int64_t out, bool align, double factor, bool* copied) {
    const Axis axis = axis_of(in, out, align, factor);
    *copied = is_copied(axis);
    std::vector<Tap>& list = taps_.emplace_back(out);
    for (int64_t i = 0; i < out; ++i) list[i] = tap_of(axis, i);
    return list.data();
  }

  std::vector<UpsampleMap> maps_;
  std::vector<std::vector<Tap>> taps_;
  Tensors kept_;
};

}  // namespace pyseg::upsample
