// Masks [K, m_h, m_w] resized to their boxes in images [K, H, W] of zeros: He et al. 2017's last step, as torchvision
// pastes (paste_masks_math.h).
//
// paste_masks_plan: a thread finds the pixels of a box. paste_masks: a thread writes 16 bytes of the output that lie
// side by side (4 of packed bits), of whatever rows; pixels outside the box cost a comparison, those inside four
// elements of the mask, which is small enough for the first-level cache. Values, bools and bits come from one function
// whose operations are not fused otherwise, so that they agree. paste_masks_backward: a warp gathers the gradient of
// an element from the pixels around it.
//
// Bytes at the least: the output, once, and the masks. One writer for each output, sums in a fixed order:
// deterministic.
#pragma once

#include "roi/element_cuda.cuh"
#include "roi/paste_masks_math.h"

namespace pyseg::roi {

constexpr int kPasteThreads = 256;
constexpr int kPasteWarp = 32;

struct CudaPaste {
  const void* boxes;  // [K, 4], double if float64, else float
  int64_t count, mask_height, mask_width, padding, height, width;
  const void* masks;   // [K, mask_height, mask_width]
  PasteAxis* rows;     // [K]
  PasteAxis* columns;  // [K]
  double threshold;
  void* output;      // [K, height, width or packed bytes of a row]
  const void* grad;  // [K, height, width]
  void* grad_masks;  // [K, mask_height, mask_width]
};

// A thread a box. One that is not finite covers no pixel.
template <typename A>
__global__ void __launch_bounds__(kPasteThreads) paste_masks_plan(const __grid_constant__ CudaPaste a) {
  const int64_t k = int64_t(blockIdx.x) * kPasteThreads + threadIdx.x;
  if (k >= a.count) return;
  const A* box = static_cast<const A*>(a.boxes) + 4 * k;
  if (isfinite(box[0]) && isfinite(box[1]) && isfinite(box[2]) && isfinite(box[3])) {
    a.rows[k] = paste_axis(box[1], box[3], a.mask_width, a.padding, a.height);
    a.columns[k] = paste_axis(box[0], box[2], a.mask_width, a.padding, a.width);
  } else {
    a.rows[k] = a.columns[k] = {0, 1, 0, 0};
  }
}

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// Pixel x of a row of a box: the mask along x between two elements, for the two lines that the row lies between.
template <typename T, typename A>
__device__ __forceinline__ A pasted(const CudaPaste& a, const T* mask, const PastePoint<A>& y, const PasteAxis& columns,
                                    int64_t x) {
  const PastePoint<A> p = paste_point<A>(columns, x, a.mask_width + 2 * a.padding);
  const int64_t left = p.low - a.padding, right = p.high - a.padding;
  const auto line = [&](int64_t framed) {
    const int64_t i = framed - a.padding;
    if (i < 0 || i >= a.mask_height) return A(0);
    const T* from = mask + i * a.mask_width;
    const A low = left >= 0 && left < a.mask_width ? A(widen(__ldg(from + left))) : A(0);
    const A high = right >= 0 && right < a.mask_width ? A(widen(__ldg(from + right))) : A(0);
    return fused(high, p.w_high, rounded_product(low, p.w_low));
  };
  return fused(line(y.high), y.w_high, rounded_product(line(y.low), y.w_low));
}

// A thread for kCells cells of the output, each a value, a bool, or a byte of eight columns.
template <typename T, PasteOutput kOutput>
__global__ void __launch_bounds__(kPasteThreads) paste_masks(const __grid_constant__ CudaPaste a) {
  using A = Accumulator<T>;
  constexpr bool kValues = kOutput == PasteOutput::kValues;
  constexpr int kColumns = kOutput == PasteOutput::kPacked ? 8 : 1;  // of a cell
  using Cell = std::conditional_t<kValues, T, uint8_t>;
  using Word = std::conditional_t<kColumns == 8, uint32_t, uint4>;
  constexpr int kCells = sizeof(Word) / sizeof(Cell);
  const int64_t row_cells = kColumns == 8 ? (a.width + 7) / 8 : a.width, all = a.count * a.height * row_cells;
  const A threshold = A(a.threshold);
  for (int64_t first = (int64_t(blockIdx.x) * kPasteThreads + threadIdx.x) * kCells; first < all;
       first += int64_t(gridDim.x) * kPasteThreads * kCells) {
    int64_t cell, y;
    int64_t k = divide(divide(first, row_cells, &cell), a.height, &y);
    PasteAxis columns{}, rows{};
    PastePoint<A> py{};
    bool inside = false;
    const auto start_row = [&] {
      rows = a.rows[k];
      columns = a.columns[k];
      inside = y >= rows.begin && y < rows.end && columns.begin < columns.end;
      if (inside) py = paste_point<A>(rows, y, a.mask_height + 2 * a.padding);
    };
    start_row();
    alignas(sizeof(Word)) Cell cells[kCells];
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      cells[i] = Cell(0.f);
      if (first + i >= all) continue;
      if (cell == row_cells) {
        cell = 0;
        if (++y == a.height) y = 0, ++k;
        start_row();
      }
      const int64_t x0 = cell++ * kColumns;
      if (!inside || x0 + kColumns <= columns.begin || x0 >= columns.end) continue;
      const T* mask = static_cast<const T*>(a.masks) + k * a.mask_height * a.mask_width;
      if constexpr (kValues) {
        cells[i] = narrow<T>(pasted(a, mask, py, columns, x0));
      } else {
        unsigned bits = 0;
        for (int64_t x = x0; x < x0 + kColumns; ++x) {
          bool above = false;  // compared as the masks' type, as in torch
          if (x >= columns.begin && x < columns.end)
            above = A(widen(narrow<T>(pasted(a, mask, py, columns, x)))) > threshold;
          bits = bits << 1 | unsigned(above);
        }
        cells[i] = uint8_t(bits);
      }
    }
    Cell* const to = static_cast<Cell*>(a.output) + first;
    if (first + kCells <= all) {
      *reinterpret_cast<Word*>(to) = *reinterpret_cast<const Word*>(cells);
    } else {
#pragma unroll
      for (int i = 0; i < kCells; ++i)
        if (first + i < all) to[i] = cells[i];
    }
  }
}

// The pixels begin <= at < end that can lie next to element i of the framed mask: two more on each side are harmless.
template <typename A>
__device__ __forceinline__ void pixels_of(const PasteAxis& axis, int64_t i, int64_t size, int64_t* begin,
                                          int64_t* end) {
  const double step = double(size) / double(axis.length), slack = 2 + 1e-6 * double(axis.length);
  const double low = (double(i) - 1) / step - slack, high = (double(i) + 2) / step + slack;
  const double from = double(axis.first) + low, to = double(axis.first) + high;
  // Points before the middle of the first element belong to it.
  *begin = i > 0 && from > double(axis.begin) ? (from < double(axis.end) ? int64_t(from) : axis.end) : axis.begin;
  *end = i < size - 1 && to < double(axis.end) ? (to > double(axis.begin) ? int64_t(to) : axis.begin) : axis.end;
}

// A warp an element of the masks: lanes take columns, then are added up in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kPasteThreads) paste_masks_backward(const __grid_constant__ CudaPaste a) {
  using A = Accumulator<T>;
  const int lane = threadIdx.x % kPasteWarp;
  const int64_t all = a.count * a.mask_height * a.mask_width;
  for (int64_t element = (int64_t(blockIdx.x) * kPasteThreads + threadIdx.x) / kPasteWarp; element < all;
       element += int64_t(gridDim.x) * (kPasteThreads / kPasteWarp)) {
    int64_t i, j;
    const int64_t k = divide(divide(element, a.mask_width, &j), a.mask_height, &i);
    const PasteAxis rows = a.rows[k], columns = a.columns[k];
    const int64_t rows_size = a.mask_height + 2 * a.padding, columns_size = a.mask_width + 2 * a.padding;
    const auto weight_of = [](const PastePoint<A>& p, int64_t framed) {
      return (p.low == framed ? p.w_low : A(0)) + (p.high == framed ? p.w_high : A(0));
    };
    int64_t y0, y1, x0, x1;
    pixels_of<A>(rows, i + a.padding, rows_size, &y0, &y1);
    pixels_of<A>(columns, j + a.padding, columns_size, &x0, &x1);
    A sum = 0;
    for (int64_t x = x0 + lane; x < x1; x += kPasteWarp) {
      const PastePoint<A> px = paste_point<A>(columns, x, columns_size);
      if (px.low != j + a.padding && px.high != j + a.padding) continue;
      A column = 0;
      for (int64_t y = y0; y < y1; ++y) {
        const PastePoint<A> py = paste_point<A>(rows, y, rows_size);
        if (py.low != i + a.padding && py.high != i + a.padding) continue;
        column +=
            weight_of(py, i + a.padding) * A(widen(static_cast<const T*>(a.grad)[(k * a.height + y) * a.width + x]));
      }
      sum += weight_of(px, j + a.padding) * column;
    }
    for (int step = kPasteWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) static_cast<T*>(a.grad_masks)[element] = narrow<T>(sum);
  }
}

}  // namespace pyseg::roi
