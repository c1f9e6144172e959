// Winograd path of the dense atrous convolution: see atrous_conv2d_math.h for the tiles.
//
//   1. weights   U[f][panel][k][16] = G_f w, for every pair f of functionals (one per axis) that some tile uses
//   2. inputs    V[row][k]: the values of each tile; the rows of one pair f lie together, whatever kinds of tile they
//                come from, so that small maps still make matrices with many rows
//   3. products  M[row][n] (+)= V[row][:] U[f], one matrix product per pair f
//   4. outputs   A^T M A, scale, shift, ReLU, stored to the map
//
// The phases of a dilated convolution are index arithmetic in 2 and 4: nothing is copied to make them.
// Stages are blocked so that V and M stay in a cache: in L2 with a block per worker where U is small (few channels), else in
// L3 with all workers on one stage of a large block, 256 input and 256 output channels at a time. The weights are transformed
// in every call: that takes less time than reading transformed ones (4 times the bytes) from memory.
// Every sum runs in an order that does not depend on the number of workers.
#pragma once

#include "common/cpu_workers.h"
#include "conv/atrous_conv2d_cpu_kernel.h"
#include "conv/cpu_gemm.h"
#include "conv/cpu_weight.h"
#include "conv/cpu_winograd_transforms.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int kMaxPairs = kFunctionals * kFunctionals;
constexpr int kMaxGroups = kTileKinds * kTileKinds;
constexpr int kMaxPairProducts = kMaxProducts * kMaxProducts;
constexpr int kSlice = 64;                    // channels that a transform handles at a time: its scratch stays in L1
constexpr int64_t kSmallWeights = 400 << 10;  // bytes of U up to which blocks of tiles are made to fit L2
constexpr int64_t kL2Bytes = 320 << 10;       // V and M of such a block
constexpr int64_t kLargeWeights = 2 << 20;    // bytes of U otherwise: it is made and used within L3
constexpr int64_t kBlockRows = 5600;          // rows of V in a block of the large kind
constexpr int64_t kGemmRows = 96;             // rows of V that a panel of U is held in L1 for
constexpr int64_t kRowPadding = 16;           // a cache line of floats

template <int K>
struct Kind {
  static constexpr int value = K;
};

// Calls f with the kind as a constant. Tap sets of one size share a transform, so one of them stands for all.
template <typename F>
inline void with_kind(int kind, const F& f) {
  switch (kind) {
    case kF4: return f(Kind<kF4>{});
    case kF3: return f(Kind<kF3>{});
    case kF2: return f(Kind<kF2>{});
    case kE2: return f(Kind<kE2>{});
  }
  switch (kTileSpecs[kind].products) {
    case 0: return f(Kind<kTaps>{});
    case 1: return f(Kind<kTaps + 1>{});
    case 2: return f(Kind<kTaps + 3>{});
    case 3: return f(Kind<kTaps + 7>{});
  }
}

// The tiles of a map by group (a kind per axis), and the pairs of functionals that they use.
struct TileGroups {
  int groups = 0, pairs = 0;
  uint8_t kind_y[kMaxGroups], kind_x[kMaxGroups];
  int64_t tiles[kMaxGroups];                    // all images together
  int16_t pair_of[kFunctionals][kFunctionals];  // -1: not used
  int64_t rows = 0;                             // of all pairs and tiles together
  int64_t all_tiles = 0;

  TileGroups(const AxisTiles& ty, const AxisTiles& tx, int64_t images) {
    for (auto& line : pair_of)
      for (int16_t& p : line) p = -1;
    for (int ky = 0; ky < kTileKinds; ++ky) {
      for (int kx = 0; kx < kTileKinds; ++kx) {
        if (ty.count[ky] == 0 || tx.count[kx] == 0) continue;
        kind_y[groups] = uint8_t(ky);
        kind_x[groups] = uint8_t(kx);
        tiles[groups] = images * ty.count[ky] * tx.count[kx];
        const TileSpec &a = kTileSpecs[ky], &b = kTileSpecs[kx];
        rows += tiles[groups] * a.products * b.products;
        all_tiles += tiles[groups];
        for (int i = 0; i < a.products; ++i)
          for (int j = 0; j < b.products; ++j) {
            int16_t& p = pair_of[a.functional[i]][b.functional[j]];
            if (p < 0) p = int16_t(pairs++);
          }
        ++groups;
      }
    }
  }

  // Calls f(product, pair) for the products of group g.
  template <typename F>
  void for_products(int g, const F& f) const {
    const TileSpec &a = kTileSpecs[kind_y[g]], &b = kTileSpecs[kind_x[g]];
    for (int i = 0; i < a.products; ++i)
      for (int j = 0; j < b.products; ++j) f(i * b.products + j, pair_of[a.functional[i]][b.functional[j]]);
  }
};

// Part `index` of `count` of every group's tiles, and where their values lie in V and M. The rows of a pair lie together;
// pairs are kRowPadding elements further apart than their rows need, so that the lines that a tile writes for its
// products do not all fall into the same sets of L1.
struct TileBlock {
  int64_t first[kMaxGroups], end[kMaxGroups];
  int64_t v_at[kMaxGroups][kMaxPairProducts];  // of the group's first tile in the block, by product
  int64_t m_at[kMaxGroups][kMaxPairProducts];
  int64_t pair_row[kMaxPairs + 1];  // rows of pair f: [pair_row[f], pair_row[f + 1])
  int64_t tiles = 0;

  TileBlock(const TileGroups& tg, int64_t index, int64_t count, int64_t v_stride, int64_t m_stride) {
    int64_t rows[kMaxPairs] = {};
    for (int g = 0; g < tg.groups; ++g) {
      first[g] = cut(tg.tiles[g], index, count);
      end[g] = cut(tg.tiles[g], index + 1, count);
      tiles += end[g] - first[g];
      tg.for_products(g, [&](int, int pair) { rows[pair] += end[g] - first[g]; });
    }
    pair_row[0] = 0;
    for (int p = 0; p < tg.pairs; ++p) {
      pair_row[p + 1] = pair_row[p] + rows[p];
      rows[p] = pair_row[p];
    }
    for (int g = 0; g < tg.groups; ++g) {
      tg.for_products(g, [&](int product, int pair) {
        v_at[g][product] = rows[pair] * v_stride + pair * kRowPadding;
        m_at[g][product] = rows[pair] * m_stride + pair * kRowPadding;
        rows[pair] += end[g] - first[g];
      });
    }
  }

  // Cuts fall on whole register tiles where they can.
  static int64_t cut(int64_t tiles, int64_t index, int64_t count) {
    if (index >= count) return tiles;
    const int64_t at = tiles * index / count;
    return smaller(tiles, (at + kRows - 1) / kRows * kRows);
  }

  // The values of part `index` of `count`, all pairs together.
  static int64_t rows_in(const TileGroups& tg, int64_t index, int64_t count) {
    int64_t rows = 0;
    for (int g = 0; g < tg.groups; ++g) {
      const int64_t here = cut(tg.tiles[g], index + 1, count) - cut(tg.tiles[g], index, count);
      rows += here * kTileSpecs[tg.kind_y[g]].products * kTileSpecs[tg.kind_x[g]].products;
    }
    return rows;
  }
};

// Calls f(group, tile of the group) for the block's tiles first..last-1, counted over all its groups.
template <typename F>
inline void for_tiles(const TileGroups& tg, const TileBlock& block, int64_t first, int64_t last, const F& f) {
  int64_t before = 0;
  for (int g = 0; g < tg.groups; ++g) {
    const int64_t here = block.end[g] - block.first[g];
    const int64_t lo = larger<int64_t>(first - before, 0), hi = smaller(last - before, here);
    for (int64_t t = lo; t < hi; ++t) f(g, block.first[g] + t);
    before += here;
  }
}

struct TilePlace {
  int64_t image, y, x;  // of the tile's first output
};

inline TilePlace place_of(const AxisTiles& ty, const AxisTiles& tx, int ky, int kx, int64_t tile) {
  const int64_t per_image = int64_t(ty.count[ky]) * tx.count[kx];
  const int64_t rest = tile % per_image;
  return {tile / per_image, ty.first_output[ky][rest / tx.count[kx]], tx.first_output[kx][rest % tx.count[kx]]};
}

// The pixels of a tile: row i and column j meet at row[i] + column[j]. Those outside the map (null, negative) are zeros.
template <typename T>
struct TilePixels {
  const T* row[kMaxInputs];
  int64_t column[kMaxInputs];
  const T* zeros;

  inline const T* operator()(int i, int j) const { return row[i] && column[j] >= 0 ? row[i] + column[j] : zeros; }
};

// Stage 2 for one tile. Side says which transform: of the input, or of the gradient of the output (for the weight
// gradient). out(product) is where channel 0 of a value goes, layout places the others.
enum class Side { kInput, kGradient };

template <Side SIDE, int KIND>
constexpr int kLinesIn = SIDE == Side::kInput ? kTileSpecs[KIND].inputs : kTileSpecs[KIND].outputs;

template <Side SIDE, int KIND>
struct SideTransform {
  template <typename U>
  inline void operator()(const U* d, U* r) const {
    if constexpr (SIDE == Side::kInput) {
      input_transform<KIND>(d, r);
    } else {
      output_adjoint<KIND>(d, r);
    }
  }
};

template <Side SIDE, typename T, typename Out, typename Layout>
inline void transform_tile(int kind_y, int kind_x, int64_t channels, const TilePixels<T>& pixels, const Out& out,
                           const Layout& layout) {
  alignas(64) T scratch[kMaxProducts * kMaxInputs * kSlice];  // [product y][column][channel]
  const int py = kTileSpecs[kind_y].products;
  const int columns = SIDE == Side::kInput ? kTileSpecs[kind_x].inputs : kTileSpecs[kind_x].outputs;
  if (py == 0 || kTileSpecs[kind_x].products == 0) return;
  for (int64_t c0 = 0; c0 < channels; c0 += kSlice) {
    const int64_t n = smaller<int64_t>(kSlice, channels - c0);
    with_kind(kind_y, [&](auto kind) {
      constexpr int K = decltype(kind)::value;
      if constexpr (kTileSpecs[K].products > 0) {
        transform_lines<kLinesIn<SIDE, K>, kTileSpecs[K].products, T>(
            [&](int l, int i) { return pixels(i, l) + c0; }, columns, n, SideTransform<SIDE, K>{},
            [&](int l, int r) { return scratch + (r * columns + l) * kSlice; }, RowLayout{});
      }
    });
    with_kind(kind_x, [&](auto kind) {
      constexpr int K = decltype(kind)::value;
      constexpr int IN = kLinesIn<SIDE, K>, PX = kTileSpecs[K].products;
      if constexpr (PX > 0) {
        transform_lines<IN, PX, T>([&](int l, int i) { return scratch + (l * IN + i) * kSlice; }, py, n,
                                   SideTransform<SIDE, K>{}, [&](int l, int r) { return out(l * PX + r) + layout(c0); },
                                   layout);
      }
    });
  }
}

// The inputs of a tile, from channel k0.
template <typename T>
inline TilePixels<T> input_pixels(const ConvGeometry& g, const Map<const T>& x, int kind_y, int kind_x,
                                  const TilePlace& at, int64_t k0, const T* zeros) {
  const TileSpec &a = kTileSpecs[kind_y], &b = kTileSpecs[kind_x];
  TilePixels<T> p;
  p.zeros = zeros;
  for (int i = 0; i < a.inputs; ++i) {
    const int64_t y = at.y - g.pad_h + a.offset[i] * g.dil_h;
    p.row[i] = y >= 0 && y < g.h ? x.data + at.image * x.image + y * x.row + k0 : nullptr;
  }
  for (int j = 0; j < b.inputs; ++j) {
    const int64_t xx = at.x - g.pad_w + b.offset[j] * g.dil_w;
    p.column[j] = xx >= 0 && xx < g.w ? xx * x.pixel : -1;
  }
  return p;
}

// The outputs of a tile in the gradient, from channel n0.
template <typename T>
inline TilePixels<T> gradient_pixels(const ConvGeometry& g, const Map<const T>& dy, int kind_y, int kind_x,
                                     const TilePlace& at, int64_t n0) {
  TilePixels<T> p;
  p.zeros = nullptr;
  for (int i = 0; i < kTileSpecs[kind_y].outputs; ++i)
    p.row[i] = dy.data + at.image * dy.image + (at.y + i * g.dil_h) * dy.row + n0;
  for (int j = 0; j < kTileSpecs[kind_x].outputs; ++j) p.column[j] = (at.x + j * g.dil_w) * dy.pixel;
  return p;
}

// Stage 4 for one tile: columns n0..n0+n of the product rows at m(product).
template <typename T, typename Rows>
inline void finish_tile(int kind_y, int kind_x, const Rows& m, int64_t n, T* const* out, const T* scale, const T* shift,
                        bool relu_on) {
  alignas(64) T scratch[kMaxProducts * kMaxOutputs * kSlice];  // [product y][output x][channel]
  const int py = kTileSpecs[kind_y].products, px = kTileSpecs[kind_x].products;
  const int ox = kTileSpecs[kind_x].outputs;
  for (int64_t c0 = 0; c0 < n; c0 += kSlice) {
    const int64_t nc = smaller<int64_t>(kSlice, n - c0);
    if (py == 0 || px == 0) {
      for (int i = 0; i < py * ox * kSlice; ++i) scratch[i] = 0;
    } else {
      with_kind(kind_x, [&](auto kind) {
        constexpr int K = decltype(kind)::value;
        constexpr int PX = kTileSpecs[K].products;
        transform_lines<PX, kTileSpecs[K].outputs, T>([&](int l, int i) { return m(l * PX + i) + c0; }, py, nc,
                                                      [](const auto* d, auto* r) { output_transform<K>(d, r); },
                                                      [&](int l, int r) { return scratch + (l * ox + r) * kSlice; },
                                                      RowLayout{});
      });
    }
    with_kind(kind_y, [&](auto kind) {
      constexpr int K = decltype(kind)::value;
      constexpr int P = kTileSpecs[K].products, O = kTileSpecs[K].outputs;
      for (int l = 0; l < ox; ++l) {
        const T* src = scratch + l * kSlice;
        const int64_t step = int64_t(ox) * kSlice;
        T* dst[O];
#pragma GCC unroll 4
        for (int i = 0; i < O; ++i) dst[i] = out[i * ox + l] + c0;
        const auto finish = [&](auto zero, int64_t c, const auto& read, const auto& write) {
          using U = decltype(zero);
          U d[P > 0 ? P : 1], r[O];
#pragma GCC unroll 6
          for (int i = 0; i < P; ++i) d[i] = read(src + i * step + c);
          output_transform<K>(d, r);
#pragma GCC unroll 4
          for (int i = 0; i < O; ++i) {
            U v = r[i];
            if (scale) v = v * read(scale + c0 + c);
            if (shift) v = v + read(shift + c0 + c);
            if (relu_on) v = relu<T>(v);
            write(dst[i] + c, v);
          }
        };
        int64_t c = 0;
        for (; c + kLanes<T> <= nc; c += kLanes<T>) {
          finish(Vec<T>{}, c, [](const T* p) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
        }
        for (; c < nc; ++c) finish(T(0), c, [](const T* p) { return *p; }, [](T* p, T v) { *p = v; });
      }
    });
  }
}

// How a call is blocked, and where its arrays lie in the workspace (in elements).
struct WinogradBlocking {
  bool small;                         // a block per worker, in L2
  int64_t blocks, rows;               // blocks of tiles, and the most rows of V in one
  int64_t k_block, n_block, u_block;  // input and output channels of V and M, output channels of U
  int64_t v_stride, m_stride, u_stride;
  int64_t zeros, u, pack, v, m, total;  // offsets; v and m are per worker in the small case
  int64_t v_size, m_size;

  WinogradBlocking(const TileGroups& tg, int64_t c_in, int64_t c_out, int64_t itemsize, bool packed, int64_t workers) {
    const int64_t n16 = (c_out + kPanel - 1) / kPanel * kPanel;
    small = c_in <= kChannelBlock && tg.pairs * c_in * n16 * itemsize <= kSmallWeights;
    k_block = smaller(c_in, kChannelBlock);
    n_block = small ? n16 : smaller(n16, kChannelBlock);
    u_block = small ? n16
                    : larger<int64_t>(
                          smaller(n_block, kLargeWeights / (tg.pairs * k_block * itemsize) / kPanel * kPanel), kPanel);
    v_stride = k_block;
    m_stride = n_block;
    const int64_t most = small ? larger<int64_t>(kL2Bytes / ((v_stride + m_stride) * itemsize), 1) : kBlockRows;
    blocks = larger<int64_t>((tg.rows + most - 1) / most, 1);
    if (small) blocks = larger(blocks, smaller<int64_t>(workers, tg.all_tiles));
    rows = 0;
    for (int64_t b = 0; b < blocks; ++b) rows = larger(rows, TileBlock::rows_in(tg, b, blocks));
    u_stride = k_block * u_block + kRowPadding;
    const int64_t copies = small ? workers : 1;
    zeros = 0;
    u = zeros + (c_in + kRowPadding) / kRowPadding * kRowPadding;
    pack = u + tg.pairs * u_stride;
    v = pack + (packed ? 0 : workers * 9 * k_block * kPanel);
    v_size = rows * v_stride + tg.pairs * kRowPadding;
    m_size = rows * m_stride + tg.pairs * kRowPadding;
    m = v + copies * v_size;
    total = m + copies * m_size;
  }
};

template <typename T>
class Winograd {
 public:
  Winograd(const DenseArgs<T>& args, T* workspace, const Workers& workers)
      : a_(args),
        g_(args.g),
        tg_(args.tiles_y, args.tiles_x, args.g.n),
        bl_(tg_, args.g.c_in, args.g.c_out, sizeof(T), args.weight.packed != nullptr, workers.count),
        ws_(workspace),
        workers_(workers) {}

  void run() {
    for (int64_t i = 0; i < bl_.u; ++i) ws_[bl_.zeros + i] = T(0);
    if (bl_.small) {
      run_small();
    } else {
      run_large();
    }
  }

  static int64_t workspace(const DenseArgs<T>& args, int64_t workers) {
    const TileGroups tg(args.tiles_y, args.tiles_x, args.g.n);
    return WinogradBlocking(tg, args.g.c_in, args.g.c_out, sizeof(T), args.weight.packed != nullptr, workers).total;
  }

 private:
  // A worker owns its blocks and takes them through all stages.
  void run_small() {
    weights(0, g_.c_in, 0, bl_.n_block);
    for_each_part(workers_, bl_.blocks, [&](int64_t worker, int64_t first, int64_t last) {
      T* v = ws_ + bl_.v + worker * bl_.v_size;
      T* m = ws_ + bl_.m + worker * bl_.m_size;
      for (int64_t b = first; b < last; ++b) {
        const TileBlock block(tg_, b, bl_.blocks, bl_.v_stride, bl_.m_stride);
        inputs(block, 0, block.tiles, 0, g_.c_in, v);
        for (int p = 0; p < tg_.pairs; ++p)
          products(p, block.pair_row[p], block.pair_row[p + 1], g_.c_in, 0, bl_.n_block, false, v, m);
        outputs(block, 0, block.tiles, 0, g_.c_out, m);
      }
    });
  }

  // All workers go through the stages of a block together.
  void run_large() {
    T* v = ws_ + bl_.v;
    T* m = ws_ + bl_.m;
    const int64_t n16 = (g_.c_out + kPanel - 1) / kPanel * kPanel;
    for (int64_t b = 0; b < bl_.blocks; ++b) {
      const TileBlock block(tg_, b, bl_.blocks, bl_.v_stride, bl_.m_stride);
      for (int64_t n0 = 0; n0 < n16; n0 += bl_.n_block) {
        const int64_t n = smaller(bl_.n_block, n16 - n0);
        for (int64_t k0 = 0; k0 < g_.c_in; k0 += bl_.k_block) {
          const int64_t k = smaller(bl_.k_block, g_.c_in - k0);
          if (n0 == 0 || g_.c_in > bl_.k_block) {
            for_each_part(workers_, block.tiles,
                          [&](int64_t, int64_t first, int64_t last) { inputs(block, first, last, k0, k, v); });
          }
          for (int64_t u0 = 0; u0 < n; u0 += bl_.u_block) {
            const int64_t u = smaller(bl_.u_block, n - u0);
            weights(k0, k, n0 + u0, u);
            // Equal shares of the rows, cut at whole register tiles of a pair.
            for_each_part(workers_, block.pair_row[tg_.pairs], [&](int64_t, int64_t first, int64_t last) {
              for (int p = 0; p < tg_.pairs; ++p) {
                const int64_t lo = block.pair_row[p], hi = block.pair_row[p + 1];
                const int64_t from = at_tile(lo, hi, first), to = at_tile(lo, hi, last);
                if (from < to) products(p, from, to, k, u0, u, k0 > 0, v, m);
              }
            });
          }
        }
        for_each_part(workers_, block.tiles, [&](int64_t, int64_t first, int64_t last) {
          outputs(block, first, last, n0, smaller(n, g_.c_out - n0), m);
        });
      }
    }
  }

  static int64_t at_tile(int64_t lo, int64_t hi, int64_t row) {
    if (row <= lo) return lo;
    return smaller(hi, lo + (row - lo + kRows - 1) / kRows * kRows);
  }

  // Stage 1. Each panel is cut into parts, so that few panels keep many workers busy.
  void weights(int64_t k0, int64_t k, int64_t n0, int64_t n) {
    constexpr int64_t kParts = 8;
    for_each_part(workers_, n / kPanel * kParts, [&](int64_t worker, int64_t first, int64_t last) {
      T* scratch = ws_ + bl_.pack + worker * 9 * bl_.k_block * kPanel;
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t p = unit / kParts, panel = n0 / kPanel + p;
        const int64_t from = k * (unit % kParts) / kParts, to = k * (unit % kParts + 1) / kParts;
        const T* taps;
        int64_t tap_stride;
        if (a_.weight.packed) {
          taps = a_.weight.packed + (panel * 9 * g_.c_in + k0 + from) * kPanel;
          tap_stride = g_.c_in * kPanel;
        } else {
          pack_panel(a_.weight, g_.c_out, panel, k0 + from, to - from, 9, scratch, k * kPanel);
          taps = scratch;
          tap_stride = k * kPanel;
        }
        T* u = ws_ + bl_.u + (p * k + from) * kPanel;
        transform_weights(taps, tap_stride, to - from, u, bl_.u_stride, tg_.pair_of);
      }
    });
  }

  // Stage 2, tiles first..last-1 of the block.
  void inputs(const TileBlock& block, int64_t first, int64_t last, int64_t k0, int64_t k, T* v) const {
    for_tiles(tg_, block, first, last, [&](int g, int64_t tile) {
      const int ky = tg_.kind_y[g], kx = tg_.kind_x[g];
      const auto pixels =
          input_pixels(g_, a_.x, ky, kx, place_of(a_.tiles_y, a_.tiles_x, ky, kx, tile), k0, ws_ + bl_.zeros);
      T* to = v + (tile - block.first[g]) * bl_.v_stride;
      const int64_t* at = block.v_at[g];
      transform_tile<Side::kInput, T>(ky, kx, k, pixels, [&](int p) { return to + at[p]; }, RowLayout{});
    });
  }

  // Stage 3, rows from..to-1 of pair p and n columns from n0 (of U: from its first).
  void products(int p, int64_t from, int64_t to, int64_t k, int64_t n0, int64_t n, bool accumulate, const T* v,
                T* m) const {
    const T* u = ws_ + bl_.u + p * bl_.u_stride;
    v += p * kRowPadding;
    m += p * kRowPadding;
    const Finish<T> finish{accumulate, nullptr, nullptr, false};
    for (int64_t r0 = from; r0 < to; r0 += kGemmRows) {
      const int64_t rows = smaller(to - r0, kGemmRows);
      for (int64_t column = 0; column < n; column += kTileColumns<T>) {
        gemm_strided(v + r0 * bl_.v_stride, bl_.v_stride, rows, k, u + column * k, k * kPanel,
                     m + r0 * bl_.m_stride + n0 + column, bl_.m_stride,
                     int(smaller<int64_t>(kTileColumns<T>, n - column)), finish);
      }
    }
  }

  // Stage 4.
  void outputs(const TileBlock& block, int64_t first, int64_t last, int64_t n0, int64_t n, const T* m) const {
    for_tiles(tg_, block, first, last, [&](int g, int64_t tile) {
      const int ky = tg_.kind_y[g], kx = tg_.kind_x[g];
      const TilePlace at = place_of(a_.tiles_y, a_.tiles_x, ky, kx, tile);
      const int oy = kTileSpecs[ky].outputs, ox = kTileSpecs[kx].outputs;
      T* out[kMaxOutputs * kMaxOutputs];
      for (int i = 0; i < oy; ++i)
        for (int j = 0; j < ox; ++j)
          out[i * ox + j] = a_.y.data + at.image * a_.y.image + (at.y + i * g_.dil_h) * a_.y.row +
                            (at.x + j * g_.dil_w) * a_.y.pixel + n0;
      const T* from = m + (tile - block.first[g]) * bl_.m_stride;
      const int64_t* m_at = block.m_at[g];
      finish_tile<T>(
          ky, kx, [&](int p) { return from + m_at[p]; }, n, out, a_.scale ? a_.scale + n0 : nullptr,
          a_.shift ? a_.shift + n0 : nullptr, a_.relu);
    });
  }

  const DenseArgs<T>& a_;
  const ConvGeometry& g_;
  const TileGroups tg_;
  const WinogradBlocking bl_;
  T* const ws_;
  const Workers& workers_;
};

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
