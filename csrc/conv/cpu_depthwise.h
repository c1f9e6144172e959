// Depthwise 3x3 atrous convolution and its weight gradient, in both layouts.
//
// Nine multiply-adds an output against one read and one write: bound by memory once the taps cost no more than that. So
// each input row should come from memory once: output rows are visited phase by phase (y, y + d, y + 2d, ...), whose input
// rows overlap by two of three, and stay in L1 or L2 in between.
//   NCHW           vectors of pixels. Rows are copied to a line with a zero margin, so that the taps of all outputs are plain
//                  unaligned loads without edges; a ring of three lines serves a phase.
//   channels_last  vectors of channels. Four outputs x, x + d, x + 2d, x + 3d share six columns of inputs: 18 loads of inputs
//                  for 36 multiply-adds. Pixels outside the map are read from a row of zeros.
#pragma once

#include "conv/atrous_conv2d_cpu_kernel.h"
#include "conv/cpu_workers.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kLineSlack = 64;          // elements behind a line that vectors may read
constexpr int64_t kDepthwiseChannels = 128;  // channels_last: channels that go through the map together
constexpr int kRun = 4;                      // channels_last: outputs of a phase that share inputs

// The three padded input rows of an output row, NCHW. Lines are reused while the output walks down a phase.
template <typename T>
class LineRing {
 public:
  LineRing(const ConvGeometry& g, T* storage) : g_(g), length_(size(g)), storage_(storage) {
    for (int64_t i = 0; i < 4 * length_; ++i) storage_[i] = T(0);
  }

  static int64_t size(const ConvGeometry& g) { return g.w + 2 * g.pad_w + kLineSlack; }

  // Points line[ky] at the row that tap ky of output row y reads. `restart` begins a phase or a plane.
  void move_to(const T* plane, int64_t row, int64_t y, bool restart, const T** line) {
    for (int ky = restart ? 0 : 2; ky < 3; ++ky) {
      const int slot = restart ? ky : next_;
      next_ = slot == 2 ? 0 : slot + 1;
      const int64_t from = y - g_.pad_h + ky * g_.dil_h;
      T* to = storage_ + slot * length_;
      lines_[slot] = to;
      if (from < 0 || from >= g_.h) {
        lines_[slot] = storage_ + 3 * length_;  // stays zero
        continue;
      }
      const T* src = plane + from * row;
      T* dst = to + g_.pad_w;
      int64_t x = 0;
      for (; x + kLanes<T> <= g_.w; x += kLanes<T>) store(dst + x, load(src + x));
      for (; x < g_.w; ++x) dst[x] = src[x];
    }
    for (int ky = 0; ky < 3; ++ky) line[ky] = lines_[(next_ + ky) % 3];
  }

 private:
  const ConvGeometry& g_;
  const int64_t length_;
  T* const storage_;
  const T* lines_[3] = {};
  int next_ = 0;  // the slot that the next row goes to: the oldest
};

// Calls f(y, restart) for every output row, phase by phase.
template <typename F>
inline void for_rows_by_phase(const ConvGeometry& g, const F& f) {
  const int64_t phases = smaller(g.dil_h, g.h_out);
  for (int64_t phase = 0; phase < phases; ++phase)
    for (int64_t y = phase; y < g.h_out; y += g.dil_h) f(y, y == phase);
}

template <typename T>
inline void depthwise_plane(const DepthwiseArgs<T>& a, int64_t image, int64_t c, T* storage) {
  const ConvGeometry& g = a.g;
  const T* plane = a.x.data + image * a.x.image + c * a.x.channel;
  T* out = a.y.data + image * a.y.image + c * a.y.channel;
  Vec<T> w[9];
  for (int t = 0; t < 9; ++t) w[t] = broadcast(a.weight[c * 9 + t]);
  const Vec<T> shift = broadcast(a.shift ? a.shift[c] : T(0));
  const int64_t d = g.dil_w;
  LineRing<T> ring(g, storage);
  for_rows_by_phase(g, [&](int64_t y, bool restart) {
    const T* line[3];
    ring.move_to(plane, a.x.row, y, restart, line);
    const auto outputs = [&](int64_t x) {
      Vec<T> top = shift, middle = Vec<T>{}, bottom = Vec<T>{};
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        top += w[kx] * load(line[0] + x + kx * d);
        middle += w[3 + kx] * load(line[1] + x + kx * d);
        bottom += w[6 + kx] * load(line[2] + x + kx * d);
      }
      const Vec<T> sum = top + middle + bottom;
      return a.relu ? relu<T>(sum) : sum;
    };
    T* to = out + y * a.y.row;
    int64_t x = 0;
    for (; x + kLanes<T> <= g.w_out; x += kLanes<T>) store(to + x, outputs(x));
    if (x < g.w_out) {
      T tail[kLanes<T>];
      store(tail, outputs(x));
      for (int i = 0; x + i < g.w_out; ++i) to[x + i] = tail[i];
    }
  });
}

// Outputs x, x + d, ... (RUN of them) of channels 0..n of one row. in[3 * column + ky] points at the inputs.
template <typename T, int RUN>
inline void depthwise_run(const T* const* in, int64_t n, const T* w, int64_t w_stride, const T* shift, bool relu_on,
                          T* const* out) {
  for (int64_t c = 0; c < n;) {
    const bool whole = c + kLanes<T> <= n;
    if (whole) {
      Vec<T> acc[RUN];
#pragma GCC unroll 4
      for (int i = 0; i < RUN; ++i) acc[i] = shift ? load(shift + c) : Vec<T>{};
#pragma GCC unroll 3
      for (int ky = 0; ky < 3; ++ky) {
        Vec<T> wk[3];
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) wk[kx] = load(w + (ky * 3 + kx) * w_stride + c);
#pragma GCC unroll 6
        for (int column = 0; column < RUN + 2; ++column) {
          const Vec<T> v = load(in[3 * column + ky] + c);
#pragma GCC unroll 3
          for (int kx = 0; kx < 3; ++kx)
            if (column - kx >= 0 && column - kx < RUN) acc[column - kx] += wk[kx] * v;
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < RUN; ++i) store(out[i] + c, relu_on ? relu<T>(acc[i]) : acc[i]);
      c += kLanes<T>;
    } else {
      for (int i = 0; i < RUN; ++i) {
        T sum = shift ? shift[c] : T(0);
        for (int ky = 0; ky < 3; ++ky)
          for (int kx = 0; kx < 3; ++kx) sum += w[(ky * 3 + kx) * w_stride + c] * in[3 * (i + kx) + ky][c];
        out[i][c] = relu_on ? relu<T>(sum) : sum;
      }
      ++c;
    }
  }
}

// One output row of channels c0..c0+n, channels_last. w: [9][w_stride], already at c0.
template <typename T>
inline void depthwise_row(const DepthwiseArgs<T>& a, int64_t image, int64_t y, int64_t c0, int64_t n, const T* w,
                          int64_t w_stride, const T* zeros) {
  const ConvGeometry& g = a.g;
  const T* rows[3];
  for (int ky = 0; ky < 3; ++ky) {
    const int64_t from = y - g.pad_h + ky * g.dil_h;
    rows[ky] = from >= 0 && from < g.h ? a.x.data + image * a.x.image + from * a.x.row + c0 : nullptr;
  }
  T* out_row = a.y.data + image * a.y.image + y * a.y.row + c0;
  const T* shift = a.shift ? a.shift + c0 : nullptr;
  const int64_t phases = smaller(g.dil_w, g.w_out);
  for (int64_t phase = 0; phase < phases; ++phase) {
    for (int64_t x = phase; x < g.w_out; x += kRun * g.dil_w) {
      const T* in[3 * (kRun + 2)];
      T* out[kRun];
      int run = 0;
      for (; run < kRun && x + run * g.dil_w < g.w_out; ++run) out[run] = out_row + (x + run * g.dil_w) * a.y.pixel;
      for (int column = 0; column < run + 2; ++column) {
        const int64_t from = x - g.pad_w + column * g.dil_w;
        const bool inside = from >= 0 && from < g.w;
        for (int ky = 0; ky < 3; ++ky) in[3 * column + ky] = inside && rows[ky] ? rows[ky] + from * a.x.pixel : zeros;
      }
      switch (run) {
        case 1: depthwise_run<T, 1>(in, n, w, w_stride, shift, a.relu, out); break;
        case 2: depthwise_run<T, 2>(in, n, w, w_stride, shift, a.relu, out); break;
        case 3: depthwise_run<T, 3>(in, n, w, w_stride, shift, a.relu, out); break;
        case 4: depthwise_run<T, 4>(in, n, w, w_stride, shift, a.relu, out); break;
      }
    }
  }
}

template <typename T>
inline int64_t depthwise_workspace_size(const DepthwiseArgs<T>& a, int64_t workers) {
  if (a.x.channel != 1) return workers * 4 * LineRing<T>::size(a.g);
  return 9 * a.g.c_in + kDepthwiseChannels + kLineSlack;
}

template <typename T>
inline void depthwise(const DepthwiseArgs<T>& a, T* workspace, const Workers& workers) {
  const ConvGeometry& g = a.g;
  if (a.x.channel != 1) {
    for_each_part(workers, g.n * g.c_in, [&](int64_t worker, int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        depthwise_plane(a, i / g.c_in, i % g.c_in, workspace + worker * 4 * LineRing<T>::size(g));
    });
    return;
  }
  T* w = workspace;  // [9][C]
  T* zeros = w + 9 * g.c_in;
  for (int t = 0; t < 9; ++t)
    for (int64_t c = 0; c < g.c_in; ++c) w[t * g.c_in + c] = a.weight[c * 9 + t];
  for (int64_t i = 0; i < kDepthwiseChannels + kLineSlack; ++i) zeros[i] = T(0);
  const int64_t blocks = (g.c_in + kDepthwiseChannels - 1) / kDepthwiseChannels;
  const int64_t phases = smaller(g.dil_h, g.h_out);
  // Units: image, channel block, phase of rows; few and large for rate 1, so those are cut by rows.
  const int64_t bands = phases == 1 ? smaller<int64_t>(g.h_out, 8) : 1;
  for_each_part(workers, g.n * blocks * phases * bands, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t band = unit % bands, phase = unit / bands % phases, block = unit / (bands * phases) % blocks;
      const int64_t image = unit / (bands * phases * blocks);
      const int64_t c0 = block * kDepthwiseChannels, n = smaller(kDepthwiseChannels, g.c_in - c0);
      const int64_t y0 = phases == 1 ? g.h_out * band / bands : phase;
      const int64_t y1 = phases == 1 ? g.h_out * (band + 1) / bands : g.h_out;
      for (int64_t y = y0; y < y1; y += g.dil_h) depthwise_row(a, image, y, c0, n, w + c0, g.c_in, zeros);
    }
  });
}

// NCHW: the nine sums of one channel over all images, each a vector of partial sums that is folded at the end.
template <typename T>
inline void depthwise_weight_grad_channel(const DepthwiseWeightGradArgs<T>& a, int64_t c, T* storage) {
  const ConvGeometry& g = a.g;
  const int64_t d = g.dil_w;
  Vec<T> acc[9] = {};
  LineRing<T> ring(g, storage);
  T* grad_line = storage + 4 * LineRing<T>::size(g);
  for (int64_t i = 0; i < LineRing<T>::size(g); ++i) grad_line[i] = T(0);
  for (int64_t image = 0; image < g.n; ++image) {
    const T* plane = a.x.data + image * a.x.image + c * a.x.channel;
    const T* grad = a.grad.data + image * a.grad.image + c * a.grad.channel;
    for_rows_by_phase(g, [&](int64_t y, bool restart) {
      const T* line[3];
      ring.move_to(plane, a.x.row, y, restart, line);
      const T* from = grad + y * a.grad.row;
      const auto add = [&](Vec<T> v, int64_t x) {
#pragma GCC unroll 3
        for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 3
          for (int kx = 0; kx < 3; ++kx) acc[ky * 3 + kx] += v * load(line[ky] + x + kx * d);
      };
      int64_t x = 0;
      for (; x + kLanes<T> <= g.w_out; x += kLanes<T>) add(load(from + x), x);
      if (x < g.w_out) {
        for (int64_t i = x; i < g.w_out; ++i) grad_line[i - x] = from[i];  // zeros follow
        add(load(grad_line), x);
      }
    });
  }
  for (int t = 0; t < 9; ++t) {
    T sum = 0;
    for (int i = 0; i < kLanes<T>; ++i) sum += acc[t][i];
    a.grad_weight[c * 9 + t] = sum;
  }
}

// channels_last: sums[9][kDepthwiseChannels] += the products of output row y for channels c0..c0+n.
template <typename T>
inline void depthwise_weight_grad_row(const DepthwiseWeightGradArgs<T>& a, int64_t image, int64_t y, int64_t c0,
                                      int64_t n, T* sums) {
  const ConvGeometry& g = a.g;
  const T* grad = a.grad.data + image * a.grad.image + y * a.grad.row + c0;
  int64_t first[3], last[3];
  for (int kx = 0; kx < 3; ++kx) {
    first[kx] = larger<int64_t>(0, g.pad_w - kx * g.dil_w);
    last[kx] = smaller(g.w_out, g.w + g.pad_w - kx * g.dil_w);
  }
  // Where all three taps lie inside: between the left tap's first output and the right tap's last.
  int64_t all_first = first[0], all_last = last[2];
  if (all_last <= all_first) all_first = all_last = 0;
  for (int ky = 0; ky < 3; ++ky) {
    const int64_t from = y - g.pad_h + ky * g.dil_h;
    if (from < 0 || from >= g.h) continue;
    const T* row = a.x.data + image * a.x.image + from * a.x.row - g.pad_w * a.x.pixel + c0;
    T* to = sums + ky * 3 * kDepthwiseChannels;
    const int64_t tap = g.dil_w * a.x.pixel;
    const auto channels = [&](auto zero, int64_t c, const auto& read, const auto& write) {
      using U = decltype(zero);
      U acc[3];
      for (int kx = 0; kx < 3; ++kx) acc[kx] = read(to + kx * kDepthwiseChannels + c);
      for (int64_t x = all_first; x < all_last; ++x) {
        const U v = read(grad + x * a.grad.pixel + c);
        const T* p = row + x * a.x.pixel + c;
        acc[0] += v * read(p);
        acc[1] += v * read(p + tap);
        acc[2] += v * read(p + 2 * tap);
      }
      for (int kx = 0; kx < 3; ++kx) {
        const int64_t end_left = smaller(all_first, last[kx]), begin_right = larger(all_last, first[kx]);
        for (int64_t x = first[kx]; x < end_left; ++x)
          acc[kx] += read(grad + x * a.grad.pixel + c) * read(row + x * a.x.pixel + kx * tap + c);
        for (int64_t x = larger(begin_right, end_left); x < last[kx]; ++x)
          acc[kx] += read(grad + x * a.grad.pixel + c) * read(row + x * a.x.pixel + kx * tap + c);
        write(to + kx * kDepthwiseChannels + c, acc[kx]);
      }
    };
    int64_t c = 0;
    for (; c + kLanes<T> <= n; c += kLanes<T>)
      channels(Vec<T>{}, c, [](const T* p) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
    for (; c < n; ++c) channels(T(0), c, [](const T* p) { return *p; }, [](T* p, T v) { *p = v; });
  }
}

template <typename T>
inline int64_t depthwise_weight_grad_workspace_size(const DepthwiseWeightGradArgs<T>& a, int64_t workers) {
  return workers * (a.x.channel != 1 ? 5 * LineRing<T>::size(a.g) : 9 * kDepthwiseChannels);
}

template <typename T>
inline void depthwise_weight_grad(const DepthwiseWeightGradArgs<T>& a, T* workspace, const Workers& workers) {
  const ConvGeometry& g = a.g;
  if (a.x.channel != 1) {
    for_each_part(workers, g.c_in, [&](int64_t worker, int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        depthwise_weight_grad_channel(a, c, workspace + worker * 5 * LineRing<T>::size(g));
    });
    return;
  }
  // Blocks of 64 channels, so that 256 channels keep four workers busy.
  constexpr int64_t kBlock = kDepthwiseChannels / 2;
  for_each_part(workers, (g.c_in + kBlock - 1) / kBlock, [&](int64_t worker, int64_t first, int64_t last) {
    T* sums = workspace + worker * 9 * kDepthwiseChannels;
    for (int64_t block = first; block < last; ++block) {
      const int64_t c0 = block * kBlock, n = smaller(kBlock, g.c_in - c0);
      for (int64_t i = 0; i < 9 * kDepthwiseChannels; ++i) sums[i] = T(0);
      for (int64_t image = 0; image < g.n; ++image)
        for_rows_by_phase(g, [&](int64_t y, bool) { depthwise_weight_grad_row(a, image, y, c0, n, sums); });
      for (int64_t c = 0; c < n; ++c)
        for (int t = 0; t < 9; ++t) a.grad_weight[(c0 + c) * 9 + t] = sums[t * kDepthwiseChannels + c];
    }
  });
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
