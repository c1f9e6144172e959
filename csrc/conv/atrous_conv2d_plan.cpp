#include "conv/atrous_conv2d_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <list>
#include <mutex>

namespace pyseg {
namespace {

constexpr unsigned kWinogradKinds = 4;  // F4, F3, F2, E2

// Cycles on one Zen 3 core (AVX2, float32), fitted to measurements of the stages of cpu_winograd.h and cpu_direct.h.
constexpr double kProductsPerCycle = 16 * 0.93;  // two fused multiply-adds of 8 lanes
constexpr double kCyclesPerRegisterTile = 40;    // 6 rows of 16 sums: addresses, loading and storing the sums
constexpr double kCyclesPerTap = 15;             // the same, per tap of the direct path: its six row pointers
constexpr double kCyclesPerTile = 350;           // a Winograd tile's addresses in both transforms
constexpr double kCyclesPerValue = 6;            // of a transform, per product and vector of 8 channels
constexpr double kCyclesPerWeight = 5;           // the weight transform, per functional pair and vector of 8 weights

struct Cost {
  double cycles;
  int64_t products;
};

double padded_channels(const DenseShape& s) { return double((s.c_out + 15) / 16 * 16); }

Cost winograd_cost(const DenseShape& s, const AxisPlan& y, const AxisPlan& x) {
  double rows[kFunctionals][kFunctionals] = {};
  double products = 0, tiles_in_all = 0;
  for (int ky = 0; ky < kTileKinds; ++ky) {
    for (int kx = 0; kx < kTileKinds; ++kx) {
      const double tiles = double(y.first_output[ky].size()) * x.first_output[kx].size();
      const TileSpec &a = kTileSpecs[ky], &b = kTileSpecs[kx];
      products += tiles * a.products * b.products;
      tiles_in_all += tiles;
      for (int i = 0; i < a.products; ++i)
        for (int j = 0; j < b.products; ++j) rows[a.functional[i]][b.functional[j]] += tiles;
    }
  }
  const double k = double(s.c_in), n = padded_channels(s);
  const double steps = std::ceil(k / kChannelBlock);
  double cycles = 0;
  for (auto& line : rows) {
    for (double r : line) {
      if (r == 0) continue;
      const double register_tiles = std::ceil(r * s.n / 6) * n / 16;
      cycles += register_tiles * (6 * 16 * k / kProductsPerCycle + steps * kCyclesPerRegisterTile);
      cycles += k * n / 8 * kCyclesPerWeight;
    }
  }
  cycles += tiles_in_all * s.n * kCyclesPerTile + products * s.n * (k + n) / 8 * kCyclesPerValue;
  return {cycles, int64_t(products)};
}

double direct_cost(const DenseShape& s, int64_t taps) {
  const double pixels = double(s.h_out()) * double(s.w_out()) * s.n, k = double(s.c_in);
  const double steps = std::ceil(k * taps / std::max(1., double(s.h_out()) * s.w_out()) / kDirectTerms);
  const double register_tiles = padded_channels(s) / 16 / 6;
  return register_tiles * (double(taps) * s.n * (6 * 16 * k / kProductsPerCycle + kCyclesPerTap) +
                           pixels * steps * kCyclesPerRegisterTile);
}

int64_t taps_inside(int64_t size, int64_t padding, int64_t dilation, int kernel) {
  int64_t taps = 0;
  const int64_t out = size + 2 * padding - (kernel - 1) * dilation;
  for (int k = 0; k < kernel; ++k) {
    const int64_t first = std::max<int64_t>(0, padding - k * dilation);
    const int64_t last = std::min(out, size + padding - k * dilation);
    taps += std::max<int64_t>(0, last - first);
  }
  return taps;
}

std::shared_ptr<const DensePlan> make_plan(const DenseShape& s) {
  auto plan = std::make_shared<DensePlan>();
  plan->taps = taps_inside(s.h, s.pad_h, s.dil_h, s.kernel) * taps_inside(s.w, s.pad_w, s.dil_w, s.kernel);
  plan->direct_cost = direct_cost(s, plan->taps);
  plan->path = DensePath::kDirect;
  plan->cost = plan->direct_cost;
  plan->products = plan->taps;
  if (s.kernel == 1) {
    plan->reason = "1x1: one matrix product";
    return plan;
  }
  if (s.exact) {
    plan->reason = "exact=True forbids Winograd";
    return plan;
  }
  constexpr int64_t kLongestAxis = 1 << 16;  // planning longer ones would take longer than it saves
  if (std::max(s.h_out(), s.w_out()) > kLongestAxis) {
    plan->reason = "an axis longer than 65536";
    return plan;
  }
  std::vector<AxisPlan> ys, xs;
  for (unsigned allowed = 0; allowed < (1u << kWinogradKinds); ++allowed) {
    ys.push_back(plan_axis(s.h, s.pad_h, s.dil_h, allowed));
    xs.push_back(plan_axis(s.w, s.pad_w, s.dil_w, allowed));
  }
  int best_y = -1, best_x = -1;
  for (int i = 0; i < int(ys.size()); ++i) {
    for (int j = 0; j < int(xs.size()); ++j) {
      const Cost c = winograd_cost(s, ys[i], xs[j]);
      if (c.cycles < plan->cost) {
        plan->cost = c.cycles;
        plan->products = c.products;
        best_y = i;
        best_x = j;
      }
    }
  }
  char text[200];
  if (best_y >= 0) {
    plan->path = DensePath::kWinograd;
    plan->y = std::move(ys[best_y]);
    plan->x = std::move(xs[best_x]);
    std::snprintf(text, sizeof text, "%lld products instead of %lld taps inside the map, estimated %.2f times faster",
                  (long long)plan->products, (long long)plan->taps, plan->direct_cost / plan->cost);
  } else {
    std::snprintf(text, sizeof text,
                  "transforms would cost more than the products they save (%lld taps inside the map)",
                  (long long)plan->taps);
  }
  plan->reason = text;
  return plan;
}

}  // namespace

AxisTiles AxisPlan::view() const {
  AxisTiles v{};
  for (int k = 0; k < kTileKinds; ++k) {
    v.count[k] = int32_t(first_output[k].size());
    v.first_output[k] = first_output[k].data();
  }
  return v;
}

AxisPlan plan_axis(int64_t size, int64_t padding, int64_t dilation, unsigned allowed) {
  AxisPlan plan;
  const int64_t out = size + 2 * padding - 2 * dilation;
  std::vector<double> cost;
  std::vector<int> kind;
  for (int64_t phase = 0; phase < std::min(dilation, out); ++phase) {
    const int64_t n = (out - phase + dilation - 1) / dilation;
    const auto inside = [&](int64_t v) {
      const int64_t p = phase - padding + v * dilation;
      return 0 <= p && p < size;
    };
    // Cheapest cover of the outputs u..n-1, from the last one backwards.
    cost.assign(n + 1, 0);
    kind.assign(n, 0);
    for (int64_t u = n - 1; u >= 0; --u) {
      const int mask = inside(u) | inside(u + 1) << 1 | inside(u + 2) << 2;
      kind[u] = kTaps + mask;
      cost[u] = kTileSpecs[kind[u]].products + cost[u + 1];
      for (int k = 0; k < int(kWinogradKinds); ++k) {
        const TileSpec& t = kTileSpecs[k];
        if (!(allowed >> k & 1) || u + t.outputs > n) continue;
        if (k == kE2 && (inside(u) || inside(u + 3))) continue;
        if (t.products + cost[u + t.outputs] < cost[u]) {
          kind[u] = k;
          cost[u] = t.products + cost[u + t.outputs];
        }
      }
    }
    for (int64_t u = 0; u < n; u += kTileSpecs[kind[u]].outputs) {
      plan.first_output[kind[u]].push_back(int32_t(phase + u * dilation));
      plan.products += kTileSpecs[kind[u]].products;
    }
  }
  return plan;
}

std::shared_ptr<const DensePlan> plan_dense(const DenseShape& shape) {
  constexpr size_t kRemembered = 64;
  static std::mutex mutex;
  static std::list<std::pair<DenseShape, std::shared_ptr<const DensePlan>>> recent;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto it = recent.begin(); it != recent.end(); ++it) {
      if (it->first == shape) {
        recent.splice(recent.begin(), recent, it);
        return it->second;
      }
    }
  }
  auto plan = make_plan(shape);
  std::lock_guard<std::mutex> lock(mutex);
  recent.emplace_front(shape, plan);
  if (recent.size() > kRemembered) recent.pop_back();
  return plan;
}

}  // namespace pyseg
