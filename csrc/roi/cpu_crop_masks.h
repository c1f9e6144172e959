// Crops of masks of bytes: RoIAlign of one channel, where elements along a row are lanes instead of channels.
#pragma once

#include <string.h>

#include "roi/cpu_roi_plan.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

// For each row of bins the rows of the mask that it reads are added up, then each bin adds up its columns.
inline void crop_masks(const RoiArgs& a, const Workers& workers) {
  const RoiLevel& level = a.level[0];
  const int64_t count = a.group[a.images], width = level.size[kX], height = a.sampling.bins[kY],
                bins = a.sampling.bins[kX];
  const Plans<float> plans(a, count, workers);
  float* const sums = static_cast<float*>(a.allocate(a.context, workers.count * width * int64_t(sizeof(float))));
  for_each_part(workers, count, [&](int64_t worker, int64_t first, int64_t last) {
    float* const sum = sums + worker * width;
    for (int64_t i = first; i < last; ++i) {
      const BoxPlan<float>& plan = plans[i];
      const int64_t index = int64_t(static_cast<const float*>(a.box)[plan.index * a.columns]);
      const auto* mask = static_cast<const uint8_t*>(level.input) + index * level.stride[0];
      float* const out = static_cast<float*>(a.output) + plan.index * height * bins;
      const int64_t begin = plan.region.first[kX], length = plan.region.last[kX] - begin + 1;
      for (int64_t y = 0; y < height; ++y) {
        const int32_t *rows = plan.begin[kY] + y, *columns = plan.begin[kX];
        if (length > 0) memset(sum + begin, 0, length * sizeof(float));
        for (int32_t t = rows[0]; t < rows[1]; ++t) {
          const uint8_t* row = mask + plan.taps[kY][t].at * width;
          const float weight = plan.taps[kY][t].weight;
          for (int64_t x = begin; x < begin + length; ++x) sum[x] += row[x] != 0 ? weight : 0.f;
        }
        for (int64_t x = 0; x < bins; ++x) {
          float total = 0;
          for (int32_t t = columns[x]; t < columns[x + 1]; ++t)
            total += plan.taps[kX][t].weight * sum[plan.taps[kX][t].at];
          out[y * bins + x] = total;
        }
      }
    }
  });
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
