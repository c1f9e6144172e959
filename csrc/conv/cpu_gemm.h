// The matrix product under all dense CPU kernels: rows given by pointers, times panels of 16 columns.
//
// A tile is kRows x kTileColumns: two vectors wide, a panel with AVX2 and two with AVX-512. Its accumulators stay in registers
// while a list of `taps` is walked; tap t contributes sum over k of a[t][row][k] * b[t][k][column]. So one routine serves a
// plain product (one tap), and the direct convolution (a tap's rows are the pixels that it reads: no im2col). Per step of k:
// two vector loads of b, kRows broadcasts of a and 2 * kRows multiply-adds (AVX2: 12 in 6 cycles, 8 loads in 4; AVX-512: 24 in
// 12, 14 loads in 7), so the loop is bound by the arithmetic. One panel at a time would be bound by the loads with AVX-512.
#pragma once

#include "common/simd.h"

namespace pyseg {
namespace PYSEG_TARGET {
namespace {

constexpr int kPanel = 16;   // columns of a packed panel, the same for every target: the packed weight is portable
constexpr int kMaxTaps = 9;  // of a 3x3 kernel

#if defined(__AVX512F__)
constexpr int kRows = 12;  // 12 x 2 vectors of accumulators, 2 of b and 1 broadcast: 27 of 32 registers
#else
constexpr int kRows = 6;  // 6 x 2 vectors of accumulators, 2 of b and 1 broadcast: 15 of 16 registers
#endif

template <typename T>
constexpr int kTileColumns = larger(kPanel, 2 * kLanes<T>);

// What is done with a finished tile, per column (pointers at the tile's first column; null: not applied):
// c = relu(scale * (c_old + product) + shift).
template <typename T>
struct Finish {
  bool accumulate;  // add what c holds
  const T* scale;
  const T* shift;
  bool relu;
};

// Rows anywhere, several taps.
template <typename T>
struct TileOperands {
  int taps;
  const T* a_rows[kMaxTaps][kRows];
  const T* panels[kMaxTaps];  // [k][16]
  int64_t panel_step;         // from a panel to the next
  T* c_rows[kRows];

  inline const T* a(int tap, int row) const { return a_rows[tap][row]; }
  inline const T* b(int tap) const { return panels[tap]; }
  inline T* c(int row) const { return c_rows[row]; }
};

// Rows a fixed distance apart, one tap.
template <typename T>
struct StridedOperands {
  static constexpr int taps = 1;
  const T* a_first;
  int64_t a_stride;
  const T* panel;      // [k][16]
  int64_t panel_step;  // from a panel to the next
  T* c_first;
  int64_t c_stride;

  inline const T* a(int, int row) const { return a_first + row * a_stride; }
  inline const T* b(int) const { return panel; }
  inline T* c(int row) const { return c_first + row * c_stride; }
};

template <typename T, int ROWS, int kVecs, typename Operands>
__attribute__((noinline)) void gemm_tile_rows(const Operands& op, int64_t k, int columns, const Finish<T>& fin) {
  constexpr int kStep = kVecs * kLanes<T>;
  for (int j = 0; j < columns; j += kStep) {
    Vec<T> acc[ROWS][kVecs];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec<T>{};
    for (int t = 0; t < op.taps; ++t) {
      const T* a[ROWS];
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) a[i] = op.a(t, i);
      const T* b[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        const int column = j + v * kLanes<T>;
        b[v] = op.b(t) + column / kPanel * op.panel_step + column % kPanel;
      }
#pragma GCC unroll 2
      for (int64_t kk = 0; kk < k; ++kk) {
        Vec<T> bv[kVecs];
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) bv[v] = load(b[v] + kk * kPanel);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
          const Vec<T> s = broadcast(a[i][kk]);
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) acc[i][v] += s * bv[v];
        }
      }
    }
    if (j + kStep <= columns) {
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          T* c = op.c(i) + j + v * kLanes<T>;
          Vec<T> r = acc[i][v];
          if (fin.accumulate) r += load(c);
          if (fin.scale) r = r * load(fin.scale + j + v * kLanes<T>);
          if (fin.shift) r = r + load(fin.shift + j + v * kLanes<T>);
          if (fin.relu) r = relu<T>(r);
          store(c, r);
        }
      }
    } else {
      for (int i = 0; i < ROWS; ++i) {
        alignas(kVectorBytes) T values[kStep];
        for (int v = 0; v < kVecs; ++v) store(values + v * kLanes<T>, acc[i][v]);
        for (int n = 0; j + n < columns; ++n) {
          T r = values[n];
          if (fin.accumulate) r += op.c(i)[j + n];
          if (fin.scale) r = r * fin.scale[j + n];
          if (fin.shift) r = r + fin.shift[j + n];
          if (fin.relu) r = relu<T>(r);
          op.c(i)[j + n] = r;
        }
      }
    }
  }
}

// rows in 1..kRows; kVecs vectors of columns at a time.
template <typename T, int kVecs, typename Operands>
inline void gemm_tile_vectors(const Operands& op, int rows, int64_t k, int columns, const Finish<T>& fin) {
  switch (rows) {
#define PYSEG_CASE(n) \
  case n: gemm_tile_rows<T, n, kVecs>(op, k, columns, fin); break;
    PYSEG_CASE(1)
    PYSEG_CASE(2)
    PYSEG_CASE(3)
    PYSEG_CASE(4)
    PYSEG_CASE(5)
    PYSEG_CASE(6)
#if defined(__AVX512F__)
    PYSEG_CASE(7)
    PYSEG_CASE(8)
    PYSEG_CASE(9)
    PYSEG_CASE(10)
    PYSEG_CASE(11)
    PYSEG_CASE(12)
#endif
#undef PYSEG_CASE
  }
}

// rows in 1..kRows, columns in 1..kTileColumns; whole panels are read.
template <typename T, typename Operands>
inline void gemm_tile(const Operands& op, int rows, int64_t k, int columns, const Finish<T>& fin) {
  if constexpr (kTileColumns<T> > kPanel) {
    if (columns > kPanel) return gemm_tile_vectors<T, 2>(op, rows, k, columns, fin);
  }
  gemm_tile_vectors<T, smaller(2, kPanel / kLanes<T>)>(op, rows, k, columns, fin);
}

// c[row][0..columns) of `rows` rows a fixed distance apart; columns in 1..kTileColumns.
template <typename T>
inline void gemm_strided(const T* a, int64_t a_stride, int64_t rows, int64_t k, const T* panel, int64_t panel_step,
                         T* c, int64_t c_stride, int columns, const Finish<T>& fin) {
  StridedOperands<T> op{a, a_stride, panel, panel_step, c, c_stride};
  for (; rows > 0; rows -= kRows) {
    gemm_tile<T>(op, int(smaller<int64_t>(rows, kRows)), k, columns, fin);
    op.a_first += kRows * a_stride;
    op.c_first += kRows * c_stride;
  }
}

}  // namespace
}  // namespace PYSEG_TARGET
}  // namespace pyseg
