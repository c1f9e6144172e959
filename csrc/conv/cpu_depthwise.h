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

#include "common/cpu_workers.h"
#include "conv/atrous_conv2d_cpu_kernel.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int64_t kLineSlack = 64;  // elements behind a line that vectors may read
#if defined(__AVX512F__)
constexpr int64_t kDepthwiseChannels = 256;  // channels_last: channels that go through the map together
#else
constexpr int64_t kDepthwiseChannels = 512;
#endif
constexpr int kRun = 4;                      // channels_last: outputs of a phase that share inputs
constexpr int64_t kLine = 16;                // elements of a cache line of floats
constexpr int64_t kStreamBytes = 4 << 20;    // channels_last: larger outputs are stored past the caches
constexpr int64_t kPrefetchBytes = 8 << 20;  // larger maps leave the caches: what is needed next is prefetched

// Padded input rows, NCHW. Lines are reused while the output walks down a phase.
template <typename T>
class LineRing {
 public:
  LineRing(const ConvGeometry& g, T* storage) : g_(g), length_(line_size(g)), storage_(storage + lead(g)) {
    for (int64_t i = 0; i < size(g); ++i) storage[i] = T(0);
  }

  static int64_t size(const ConvGeometry& g) { return (kSlots + 1) * line_size(g); }

  // Points line[ky] at the row that tap ky of output row y reads. Rows come in order, `restart` begins a phase or a plane.
  // The lines of the call before stay valid.
  void move_to(const T* plane, int64_t row, int64_t y, bool restart, const T** line) {
    for (int ky = restart ? 0 : 2; ky < 3; ++ky) {
      newest_ = (newest_ + 1) % kSlots;
      fill(newest_, plane, row, y + ky * g_.dil_h);
    }
    for (int ky = 0; ky < 3; ++ky) line[ky] = lines_[(newest_ + kSlots - 2 + ky) % kSlots];
  }

 private:
  static constexpr int kSlots = 6;

  // Pixel 0 of a row, which the middle tap reads for output 0 where the padding is the rate, begins a cache line: vectors that
  // cross cache lines take two accesses.
  static int64_t lead(const ConvGeometry& g) { return (kLine - g.pad_w % kLine) % kLine; }
  static int64_t line_size(const ConvGeometry& g) {
    return (lead(g) + g.w + 2 * g.pad_w + kLineSlack + kLine - 1) / kLine * kLine;
  }

  void fill(int slot, const T* plane, int64_t row, int64_t padded_row) {
    const int64_t from = padded_row - g_.pad_h;
    if (from < 0 || from >= g_.h) {
      lines_[slot] = storage_ + kSlots * length_;  // stays zero
      return;
    }
    T* to = storage_ + slot * length_;
    lines_[slot] = to;
    const T* src = plane + from * row;
    T* dst = to + g_.pad_w;
    int64_t x = 0;
    for (; x + kLanes<T> <= g_.w; x += kLanes<T>) store(dst + x, load(src + x));
    for (; x < g_.w; ++x) dst[x] = src[x];
  }

  const ConvGeometry& g_;
  const int64_t length_;
  T* const storage_;
  const T* lines_[kSlots] = {};
  int newest_ = 0;
};

template <typename T>
inline bool leaves_caches(const ConvGeometry& g) {
  return g.n * g.c_in * g.h_out * g.w_out * int64_t(sizeof(T)) > kPrefetchBytes;
}

// Elements 0..n-1 of a line that is read, or written, soon.
template <bool WRITE, typename T>
inline void prefetch_line(const T* line, int64_t n) {
  constexpr int64_t kElements = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < n; i += kElements) __builtin_prefetch(line + i, WRITE, 2);
}

// Calls f(y, restart) for every output row, phase by phase.
template <typename F>
inline void for_rows_by_phase(const ConvGeometry& g, const F& f) {
  const int64_t phases = smaller(g.dil_h, g.h_out);
  for (int64_t phase = 0; phase < phases; ++phase)
    for (int64_t y = phase; y < g.h_out; y += g.dil_h) f(y, y == phase);
}

// Calls f(y, line) for every output row of a plane, line[ky] being the padded row of tap ky. Lines are filled one output row
// early: unaligned loads of what was stored just before would have to wait for it.
template <typename T, typename F>
inline void for_padded_rows(const ConvGeometry& g, LineRing<T>& ring, const T* plane, int64_t row, const F& f) {
  const T *line[3], *next[3];
  int64_t y = -1;
  for_rows_by_phase(g, [&](int64_t next_y, bool restart) {
    ring.move_to(plane, row, next_y, restart, next);
    if (y >= 0) f(y, line);
    for (int ky = 0; ky < 3; ++ky) line[ky] = next[ky];
    y = next_y;
  });
  if (y >= 0) f(y, line);
}

// One output row from three padded lines. The last vector overlaps the one before it where the row is long enough.
template <typename T, bool RELU>
__attribute__((noinline)) void depthwise_line(const T* top, const T* middle, const T* bottom, int64_t d,
                                              const T* weight, T shift, int64_t n, T* to) {
  Vec<T> w[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) w[t] = broadcast(weight[t]);
  const Vec<T> start = broadcast(shift);
  const auto outputs = [&](int64_t x) {
    Vec<T> a = start + w[0] * load(top + x), b = w[3] * load(middle + x), c = w[6] * load(bottom + x);
    a += w[1] * load(top + x + d);
    b += w[4] * load(middle + x + d);
    c += w[7] * load(bottom + x + d);
    a += w[2] * load(top + x + 2 * d);
    b += w[5] * load(middle + x + 2 * d);
    c += w[8] * load(bottom + x + 2 * d);
    const Vec<T> sum = a + b + c;
    return RELU ? relu<T>(sum) : sum;
  };
  int64_t x = 0;
  for (; x + kLanes<T> <= n; x += kLanes<T>) store(to + x, outputs(x));
  if (x == n) return;
  if (n >= kLanes<T>) {
    store(to + n - kLanes<T>, outputs(n - kLanes<T>));
  } else {
    T tail[kLanes<T>];
    store(tail, outputs(0));
    for (int64_t i = 0; i < n; ++i) to[i] = tail[i];
  }
}

template <typename T>
inline void depthwise_plane(const DepthwiseArgs<T>& a, LineRing<T>& ring, int64_t image, int64_t c, bool prefetch) {
  const T* plane = a.x.data + image * a.x.image + c * a.x.channel;
  T* out = a.y.data + image * a.y.image + c * a.y.channel;
  int64_t done = 0;
  for_padded_rows(a.g, ring, plane, a.x.row, [&](int64_t y, const T* const* line) {
    // Phases visit rows in an order that no hardware prefetcher follows, so the next plane is fetched in order meanwhile.
    if (prefetch) {
      prefetch_line<false>(plane + a.x.channel + done * a.x.row, a.g.w);
      prefetch_line<true>(out + a.y.channel + done * a.y.row, a.g.w_out);
      ++done;
    }
    const auto row = a.relu ? depthwise_line<T, true> : depthwise_line<T, false>;
    row(line[0], line[1], line[2], a.g.dil_w, a.weight + c * 9, a.shift ? a.shift[c] : T(0), a.g.w_out,
        out + y * a.y.row);
  });
}

// Outputs x, x + d, ... (RUN of them) of channels 0..n of one row. in[3 * column + ky] points at the inputs. Two vectors
// at a time: with many channels all pixels share the same sets of L1, so a line must be used up when it is there.
template <typename T, int RUN, int VECS, bool STREAM>
inline void depthwise_run_vectors(const T* const* in, int64_t c, const T* w, int64_t w_stride, const T* shift,
                                  bool relu_on, T* const* out) {
  Vec<T> acc[RUN][VECS];
#pragma GCC unroll 4
  for (int i = 0; i < RUN; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) acc[i][v] = shift ? load(shift + c + v * kLanes<T>) : Vec<T>{};
#pragma GCC unroll 3
  for (int ky = 0; ky < 3; ++ky) {
    Vec<T> wk[3][VECS];
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx)
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) wk[kx][v] = load(w + (ky * 3 + kx) * w_stride + c + v * kLanes<T>);
#pragma GCC unroll 6
    for (int column = 0; column < RUN + 2; ++column) {
      const T* from = in[3 * column + ky] + c;
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) {
        const Vec<T> x = load(from + v * kLanes<T>);
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx)
          if (column - kx >= 0 && column - kx < RUN) acc[column - kx][v] += wk[kx][v] * x;
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < RUN; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) {
      const Vec<T> y = relu_on ? relu<T>(acc[i][v]) : acc[i][v];
      if constexpr (STREAM) {
        stream(out[i] + c + v * kLanes<T>, y);
      } else {
        store(out[i] + c + v * kLanes<T>, y);
      }
    }
}

template <typename T, int RUN, bool STREAM>
__attribute__((noinline)) void depthwise_run(const T* const* in, int64_t n, const T* w, int64_t w_stride,
                                             const T* shift, bool relu_on, T* const* out) {
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= n; c += 2 * kLanes<T>)
    depthwise_run_vectors<T, RUN, 2, STREAM>(in, c, w, w_stride, shift, relu_on, out);
  for (; c + kLanes<T> <= n; c += kLanes<T>)
    depthwise_run_vectors<T, RUN, 1, STREAM>(in, c, w, w_stride, shift, relu_on, out);
  for (; c < n; ++c) {
    for (int i = 0; i < RUN; ++i) {
      T sum = shift ? shift[c] : T(0);
      for (int ky = 0; ky < 3; ++ky)
        for (int kx = 0; kx < 3; ++kx) sum += w[(ky * 3 + kx) * w_stride + c] * in[3 * (i + kx) + ky][c];
      out[i][c] = relu_on ? relu<T>(sum) : sum;
    }
  }
}

// One output row of channels c0..c0+n, channels_last. w: [9][w_stride], already at c0.
template <typename T, bool STREAM>
inline void depthwise_row(const DepthwiseArgs<T>& a, int64_t image, int64_t y, int64_t c0, int64_t n, const T* w,
                          int64_t w_stride, const T* zeros, bool prefetch) {
  const ConvGeometry& g = a.g;
  const T* rows[3];
  for (int ky = 0; ky < 3; ++ky) {
    const int64_t from = y - g.pad_h + ky * g.dil_h;
    rows[ky] = from >= 0 && from < g.h ? a.x.data + image * a.x.image + from * a.x.row + c0 : nullptr;
  }
  // The row that the next output row of the phase needs and this one does not.
  const int64_t next = y - g.pad_h + 3 * g.dil_h;
  const T* next_row =
      prefetch && next >= 0 && next < g.h ? a.x.data + image * a.x.image + next * a.x.row + c0 : nullptr;
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
      for (int i = 0; i < run && next_row; ++i) {
        const int64_t from = x - g.pad_w + (i + 1) * g.dil_w;
        if (from >= 0 && from < g.w) prefetch_line<false>(next_row + from * a.x.pixel, n);
      }
      switch (run) {
        case 1: depthwise_run<T, 1, STREAM>(in, n, w, w_stride, shift, a.relu, out); break;
        case 2: depthwise_run<T, 2, STREAM>(in, n, w, w_stride, shift, a.relu, out); break;
        case 3: depthwise_run<T, 3, STREAM>(in, n, w, w_stride, shift, a.relu, out); break;
        case 4: depthwise_run<T, 4, STREAM>(in, n, w, w_stride, shift, a.relu, out); break;
      }
    }
  }
}

template <typename T>
inline bool streams_output(const DepthwiseArgs<T>& a) {
  const ConvGeometry& g = a.g;
  const auto aligned = [](int64_t elements) { return elements % kLanes<T> == 0; };
  return g.n * g.h_out * g.w_out * g.c_in * int64_t(sizeof(T)) > kStreamBytes &&
         reinterpret_cast<uintptr_t>(a.y.data) % kVectorBytes == 0 && aligned(a.y.image) && aligned(a.y.row) &&
         aligned(a.y.pixel);
}

template <typename T>
inline int64_t depthwise_workspace_size(const DepthwiseArgs<T>& a, int64_t workers) {
  if (!a.channels_last) return workers * LineRing<T>::size(a.g);
  return 9 * a.g.c_in + kDepthwiseChannels + kLineSlack;
}

template <typename T>
inline void depthwise(const DepthwiseArgs<T>& a, T* workspace, const Workers& workers) {
  const ConvGeometry& g = a.g;
  const bool prefetch = leaves_caches<T>(g);
  if (!a.channels_last) {
    for_each_part(workers, g.n * g.c_in, [&](int64_t worker, int64_t first, int64_t last) {
      LineRing<T> ring(g, workspace + worker * LineRing<T>::size(g));
      for (int64_t i = first; i < last; ++i) depthwise_plane(a, ring, i / g.c_in, i % g.c_in, prefetch && g.dil_h > 1);
    });
    return;
  }
  T* w = workspace;  // [9][C]
  T* zeros = w + 9 * g.c_in;
  for (int t = 0; t < 9; ++t)
    for (int64_t c = 0; c < g.c_in; ++c) w[t * g.c_in + c] = a.weight[c * 9 + t];
  for (int64_t i = 0; i < kDepthwiseChannels + kLineSlack; ++i) zeros[i] = T(0);
  const int64_t blocks = (g.c_in + kDepthwiseChannels - 1) / kDepthwiseChannels;
  // Blocks of equal size, so that workers get equal shares; whole cache lines.
  const int64_t width = ((g.c_in + blocks - 1) / blocks + kLine - 1) / kLine * kLine;
  const auto row = streams_output(a) ? depthwise_row<T, true> : depthwise_row<T, false>;
  const int64_t phases = smaller(g.dil_h, g.h_out);
  // Units: image, channel block, phase of rows; few and large for rate 1, so those are cut by rows.
  const int64_t bands = phases == 1 ? smaller<int64_t>(g.h_out, 8) : 1;
  for_each_part(workers, g.n * blocks * phases * bands, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t band = unit % bands, phase = unit / bands % phases, block = unit / (bands * phases) % blocks;
      const int64_t image = unit / (bands * phases * blocks);
      const int64_t c0 = block * width, n = smaller(width, g.c_in - c0);
      const int64_t y0 = phases == 1 ? g.h_out * band / bands : phase;
      const int64_t y1 = phases == 1 ? g.h_out * (band + 1) / bands : g.h_out;
      for (int64_t y = y0; y < y1; y += g.dil_h) row(a, image, y, c0, n, w + c0, g.c_in, zeros, prefetch);
    }
    stream_fence();
  });
}

// Adds the products of a row of gradients with three padded lines to acc[9].
template <typename T>
__attribute__((noinline)) void depthwise_weight_grad_line(const T* const* line, int64_t d, const T* grad, int64_t n,
                                                          Vec<T>* acc) {
  const T *top = line[0], *middle = line[1], *bottom = line[2];
  Vec<T> sum[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) sum[t] = acc[t];
  const auto add = [&](Vec<T> v, int64_t x, const auto& read) {
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) {
      sum[kx] += v * read(top + x + kx * d);
      sum[3 + kx] += v * read(middle + x + kx * d);
      sum[6 + kx] += v * read(bottom + x + kx * d);
    }
  };
  int64_t x = 0;
  for (; x + kLanes<T> <= n; x += kLanes<T>) add(load(grad + x), x, [](const T* p) { return load(p); });
  if (x < n) {
    // Lanes beyond the row count as zero on both sides: zero times an infinity that lies there would be NaN.
    T tail[kLanes<T>] = {}, valid[kLanes<T>] = {};
    for (int64_t i = x; i < n; ++i) {
      tail[i - x] = grad[i];
      valid[i - x] = T(1);
    }
    const auto mask = load(valid) != Vec<T>{};
    add(load(tail), x, [&](const T* p) { return mask ? load(p) : Vec<T>{}; });
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) acc[t] = sum[t];
}

// NCHW: the nine sums of one channel over all images, each a vector of partial sums that is folded at the end.
template <typename T>
inline void depthwise_weight_grad_channel(const DepthwiseWeightGradArgs<T>& a, LineRing<T>& ring, int64_t c,
                                          bool prefetch) {
  Vec<T> acc[9] = {};
  for (int64_t image = 0; image < a.g.n; ++image) {
    const T* plane = a.x.data + image * a.x.image + c * a.x.channel;
    const T* grad = a.grad.data + image * a.grad.image + c * a.grad.channel;
    int64_t done = 0;
    for_padded_rows(a.g, ring, plane, a.x.row, [&](int64_t y, const T* const* line) {
      if (prefetch) {
        prefetch_line<false>(plane + a.x.channel + done * a.x.row, a.g.w);
        prefetch_line<false>(grad + a.grad.channel + done * a.grad.row, a.g.w_out);
        ++done;
      }
      depthwise_weight_grad_line(line, a.g.dil_w, grad + y * a.grad.row, a.g.w_out, acc);
    });
  }
  for (int t = 0; t < 9; ++t) {
    T sum = 0;
    for (int i = 0; i < kLanes<T>; ++i) sum += acc[t][i];
    a.grad_weight[c * 9 + t] = sum;
  }
}

// channels_last: sums[3 * KYS] += the products of an output row with the input rows of KYS vertical taps, for the channels of
// U. Walking along a phase, each input is loaded once and used for three taps. The rows `ahead` of inputs and gradients are
// prefetched.
template <int KYS, typename U, typename T, typename Read, typename Write>
inline void depthwise_weight_grad_run(const ConvGeometry& g, const T* const* rows, int64_t pixel, const T* grad,
                                      int64_t grad_pixel, const T* const* ahead, T* sums, const Read& read,
                                      const Write& write) {
  U acc[KYS][3];
#pragma GCC unroll 3
  for (int ky = 0; ky < KYS; ++ky)
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) acc[ky][kx] = read(sums + (ky * 3 + kx) * kDepthwiseChannels);
  const auto input = [&](int ky, int64_t x) { return x >= 0 && x < g.w ? read(rows[ky] + x * pixel) : U{}; };
  const int64_t phases = smaller(g.dil_w, g.w_out);
  for (int64_t phase = 0; phase < phases; ++phase) {
    U left[KYS], middle[KYS];
#pragma GCC unroll 3
    for (int ky = 0; ky < KYS; ++ky) {
      left[ky] = input(ky, phase - g.pad_w);
      middle[ky] = input(ky, phase - g.pad_w + g.dil_w);
    }
    for (int64_t x = phase; x < g.w_out; x += g.dil_w) {
      const U v = read(grad + x * grad_pixel);
      __builtin_prefetch(ahead[0] + smaller(x, g.w - 1) * pixel);
      __builtin_prefetch(ahead[1] + x * grad_pixel);
#pragma GCC unroll 3
      for (int ky = 0; ky < KYS; ++ky) {
        const U right = input(ky, x - g.pad_w + 2 * g.dil_w);
        acc[ky][0] += v * left[ky];
        acc[ky][1] += v * middle[ky];
        acc[ky][2] += v * right;
        left[ky] = middle[ky];
        middle[ky] = right;
      }
    }
  }
#pragma GCC unroll 3
  for (int ky = 0; ky < KYS; ++ky)
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; ++kx) write(sums + (ky * 3 + kx) * kDepthwiseChannels, acc[ky][kx]);
}

// A cache line of floats: two vectors as one value, one with AVX-512.
template <typename T>
struct VecPair {
  Vec<T> a, b;
  inline VecPair operator*(const VecPair& o) const { return {a * o.a, b * o.b}; }
  inline VecPair& operator+=(const VecPair& o) {
    a += o.a;
    b += o.b;
    return *this;
  }
};

// sums[KYS * 3][kDepthwiseChannels] += the products for channels 0..n.
template <int KYS, typename T>
inline void depthwise_weight_grad_taps(const ConvGeometry& g, const T* const* rows, int64_t pixel, const T* grad,
                                       int64_t grad_pixel, const T* const* ahead, int64_t n, T* sums) {
  const T *at[KYS], *ahead_at[2];
  const auto run = [&](auto zero, int64_t c, const auto& read, const auto& write) {
    for (int ky = 0; ky < KYS; ++ky) at[ky] = rows[ky] + c;
    for (int i = 0; i < 2; ++i) ahead_at[i] = ahead[i] + c;
    depthwise_weight_grad_run<KYS, decltype(zero)>(g, at, pixel, grad + c, grad_pixel, ahead_at, sums + c, read, write);
  };
  int64_t c = 0;
  if constexpr (KYS == 1) {
    for (; c + 2 * kLanes<T> <= n; c += 2 * kLanes<T>)
      run(
          VecPair<T>{}, c, [](const T* p) { return VecPair<T>{load(p), load(p + kLanes<T>)}; },
          [](T* p, const VecPair<T>& v) {
            store(p, v.a);
            store(p + kLanes<T>, v.b);
          });
  } else {
    for (; c + kLanes<T> <= n; c += kLanes<T>)
      run(Vec<T>{}, c, [](const T* p) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
  }
  for (; c < n; ++c) run(T(0), c, [](const T* p) { return *p; }, [](T* p, T v) { *p = v; });
}

// sums[9][kDepthwiseChannels] += the products of output row y for channels c0..c0+n.
template <typename T>
__attribute__((noinline)) void depthwise_weight_grad_row(const DepthwiseWeightGradArgs<T>& a, int64_t image, int64_t y,
                                                         int64_t c0, int64_t n, bool prefetch, T* sums) {
  const ConvGeometry& g = a.g;
  const T* grad = a.grad.data + image * a.grad.image + y * a.grad.row + c0;
  const T* rows[3];
  bool all = true;
  for (int ky = 0; ky < 3; ++ky) {
    const int64_t from = y - g.pad_h + ky * g.dil_h;
    rows[ky] = from >= 0 && from < g.h ? a.x.data + image * a.x.image + from * a.x.row + c0 : nullptr;
    all &= rows[ky] != nullptr;
  }
  // What the next row of the phase needs and this one does not; or, at no cost, what is in a cache already.
  const int64_t next = y - g.pad_h + 3 * g.dil_h;
  const T* inside = a.x.data + image * a.x.image + c0;
  const T* ahead[2] = {prefetch && next >= 0 && next < g.h ? inside + next * a.x.row : grad,
                       prefetch && y + g.dil_h < g.h_out ? grad + g.dil_h * a.grad.row : grad};
#if defined(__AVX512F__)  // 9 sums, 6 inputs and the gradient fit the 32 registers
  if (all) return depthwise_weight_grad_taps<3>(g, rows, a.x.pixel, grad, a.grad.pixel, ahead, n, sums);
#endif
  for (int ky = 0; ky < 3; ++ky)
    if (rows[ky])
      depthwise_weight_grad_taps<1>(g, rows + ky, a.x.pixel, grad, a.grad.pixel, ahead, n,
                                    sums + ky * 3 * kDepthwiseChannels);
}

// channels_last: the rows are cut into parts with sums of their own, added up in order, so that there is work for every
// worker and the result does not depend on how many there are.
constexpr int64_t kWeightGradParts = 8;

template <typename T>
inline int64_t depthwise_weight_grad_workspace_size(const DepthwiseWeightGradArgs<T>& a, int64_t workers) {
  if (!a.channels_last) return workers * LineRing<T>::size(a.g);
  const int64_t blocks = (a.g.c_in + kDepthwiseChannels - 1) / kDepthwiseChannels;
  return blocks * kWeightGradParts * 9 * kDepthwiseChannels;
}

template <typename T>
inline void depthwise_weight_grad(const DepthwiseWeightGradArgs<T>& a, T* workspace, const Workers& workers) {
  const ConvGeometry& g = a.g;
  const bool prefetch = leaves_caches<T>(g);
  if (!a.channels_last) {
    for_each_part(workers, g.c_in, [&](int64_t worker, int64_t first, int64_t last) {
      LineRing<T> ring(g, workspace + worker * LineRing<T>::size(g));
      for (int64_t c = first; c < last; ++c) depthwise_weight_grad_channel(a, ring, c, prefetch && g.dil_h > 1);
    });
    return;
  }
  constexpr int64_t kSums = 9 * kDepthwiseChannels;
  const int64_t blocks = (g.c_in + kDepthwiseChannels - 1) / kDepthwiseChannels;
  for_each_part(workers, blocks * kWeightGradParts, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t part = unit % kWeightGradParts, c0 = unit / kWeightGradParts * kDepthwiseChannels;
      const int64_t n = smaller(kDepthwiseChannels, g.c_in - c0);
      T* sums = workspace + unit * kSums;
      for (int64_t i = 0; i < kSums; ++i) sums[i] = T(0);
      for (int64_t image = 0; image < g.n; ++image) {
        int64_t index = 0;
        for_rows_by_phase(g, [&](int64_t y, bool) {
          if (index++ * kWeightGradParts / g.h_out == part)
            depthwise_weight_grad_row(a, image, y, c0, n, prefetch, sums);
        });
      }
    }
  });
  for_each_part(workers, g.c_in, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const T* sums = workspace + c / kDepthwiseChannels * kWeightGradParts * kSums + c % kDepthwiseChannels;
      for (int t = 0; t < 9; ++t) {
        T sum = 0;
        for (int64_t part = 0; part < kWeightGradParts; ++part) sum += sums[part * kSums + t * kDepthwiseChannels];
        a.grad_weight[c * 9 + t] = sum;
      }
    }
  });
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
