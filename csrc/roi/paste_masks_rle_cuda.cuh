// COCO's compressed run lengths of pasted masks, without an image: columns from the top left, each length as its
// difference to that two runs before, five bits a character, the least first, 32 set where more follow, from '0' on.
//
// A block takes a mask and goes through the visible pixels of its box, a thread each, 256 at a time. Where a pixel
// differs from the one before it in the image a run ends; a scan numbers the ends, whose positions meet in shared
// memory, beside the last three of the step before. Each run's characters are then counted and, in the second launch,
// written behind those of all runs before. The same pixels are computed twice instead of being kept.
//
// Bytes at the least: the characters; masks are read from the caches. Deterministic. Time: O(pixels of the box) / 256
// steps for a mask.
#pragma once

#include "roi/paste_masks_cuda.cuh"

namespace pyseg::roi {

constexpr int kRleWarps = kPasteThreads / kPasteWarp;
constexpr int kEnds = 2;     // of runs, that a pixel can have: before it, and behind it at the end of a column
constexpr int kCarried = 3;  // ends from the step before that a run's difference depends on

// The characters of a number, into `to` unless it is null; returns how many.
__device__ __forceinline__ int write_run(int64_t x, uint8_t* to) {
  int count = 0;
  bool more = true;
  while (more) {
    const int64_t bits = x & 31;
    x >>= 5;
    more = (bits & 16) != 0 ? x != -1 : x != 0;
    if (to) to[count] = uint8_t(bits + (more ? 32 : 0) + 48);
    ++count;
  }
  return count;
}

// The sum over all lanes before this one in the block, and over the block.
__device__ __forceinline__ int64_t sum_before(int64_t own, int64_t (&warps)[kRleWarps], int64_t* total) {
  const int lane = threadIdx.x % kPasteWarp, warp = threadIdx.x / kPasteWarp;
  int64_t sum = own;
  for (int step = 1; step < kPasteWarp; step *= 2) {
    const int64_t other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == kPasteWarp - 1) warps[warp] = sum;
  __syncthreads();
  int64_t before = sum - own;
  *total = 0;
  for (int w = 0; w < kRleWarps; ++w) {
    if (w < warp) before += warps[w];
    *total += warps[w];
  }
  return before;
}

// Grid: masks. Without `bytes` writes each mask's number of characters to sizes [K]; with it, the characters, those of
// all masks one after the other.
template <typename T>
__global__ void __launch_bounds__(kPasteThreads)
    paste_masks_rle(const __grid_constant__ CudaPaste a, int64_t* sizes, uint8_t* bytes) {
  using A = Accumulator<T>;
  __shared__ int64_t ends[kCarried + kEnds * kPasteThreads];
  __shared__ int64_t warps[kRleWarps];
  const int t = threadIdx.x, lane = t % kPasteWarp;
  const int64_t k = blockIdx.x;
  const PasteAxis rows = a.rows[k], columns = a.columns[k];
  const int64_t height = rows.end - rows.begin, items = height * (columns.end - columns.begin);
  const bool whole = height == a.height;  // columns follow each other without a pixel outside the box between
  const T* const mask = static_cast<const T*>(a.masks) + k * a.mask_height * a.mask_width;
  const auto above = [&](int64_t item) {
    int64_t y;
    const int64_t x = columns.begin + divide(item, height, &y);
    const PastePoint<A> py = paste_point<A>(rows, rows.begin + y, a.mask_height + 2 * a.padding);
    return A(widen(narrow<T>(pasted(a, mask, py, columns, x)))) > A(a.threshold);
  };

  // 1. Where this mask's characters begin.
  uint8_t* to = bytes;
  if (bytes) {
    int64_t own = 0, before;
    for (int64_t i = t; i < k; i += kPasteThreads) own += sizes[i];
    sum_before(own, warps, &before);
    to += before;
  }
  if (t < kCarried) ends[t] = 0;

  // 2. Steps of 256 pixels, in columns; behind the last one the image ends.
  int64_t runs_before = 0, bytes_before = 0;
  for (int64_t first = 0; first <= items; first += kPasteThreads) {
    const int64_t item = first + t;
    const bool value = item < items && above(item);
    bool previous = __shfl_up_sync(~0u, value, 1);
    int64_t position = a.height * a.width;
    bool ends_before = item == items, ends_behind = false;
    if (item < items) {
      int64_t y;
      const int64_t column = divide(item, height, &y);
      if (y == 0 && (!whole || item == 0)) {
        previous = false;
      } else if (lane == 0) {
        previous = above(item - 1);
      }
      position = (columns.begin + column) * a.height + rows.begin + y;
      ends_before = value != previous;
      const bool goes_on = y + 1 < height || (whole && item + 1 < items);
      ends_behind = value && !goes_on && position + 1 < a.height * a.width;
    }

    // 3. The ends, in their order.
    int64_t runs;
    const int64_t number = sum_before(int(ends_before) + int(ends_behind), warps, &runs);
    if (ends_before) ends[kCarried + number] = position;
    if (ends_behind) ends[kCarried + number + int(ends_before)] = position + 1;
    __syncthreads();

    // 4. Their characters: two runs a thread.
    int64_t difference[kEnds];
    int64_t characters = 0;
#pragma unroll
    for (int i = 0; i < kEnds; ++i) {
      const int64_t run = int64_t(t) * kEnds + i;
      if (run >= runs) continue;
      const int64_t* end = ends + kCarried + run;
      difference[i] = end[0] - end[-1];
      if (runs_before + run > 2) difference[i] -= end[-2] - end[-3];
      characters += write_run(difference[i], nullptr);
    }
    int64_t total;
    int64_t offset = bytes_before + sum_before(characters, warps, &total);
    if (bytes) {
#pragma unroll
      for (int i = 0; i < kEnds; ++i)
        if (int64_t(t) * kEnds + i < runs) offset += write_run(difference[i], to + offset);
    }

    // 5. What the next step needs.
    const int64_t carried = t < kCarried ? ends[runs + t] : 0;
    __syncthreads();
    if (t < kCarried) ends[t] = carried;
    runs_before += runs;
    bytes_before += total;
  }
  if (!bytes && t == 0) sizes[k] = bytes_before;
}

}  // namespace pyseg::roi
