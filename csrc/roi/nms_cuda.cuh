// Greedy non-maximum suppression of boxes that are sorted by falling score.
//
// nms_overlaps: a block compares 64 boxes (a thread each) with 4 * 64 others behind them, whose coordinates are in
// shared memory, and writes four words a thread, a whole sector: bit j says that the box removes box j. Only words on
// and above the diagonal.
// nms_reduce: one block settles the boxes, 64 at a time: one thread goes through the word on the diagonal, then all
// threads or the kept boxes' other words into what is removed, a bit a box in shared memory.
//
// Bytes at the least: the boxes; the matrix is K * K / 8 bytes, half of them written, those of kept boxes read.
// Deterministic; products and quotients are rounded one by one, as on the CPU, so that the same rows stay.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "roi/paste_masks_math.h"

namespace pyseg::roi {

constexpr int kNmsWord = 64;
constexpr int kNmsGroup = 4;  // words that are written together
constexpr int kNmsThreads = 512;
constexpr int kMostNmsWords = 4096;
static_assert(kMostNmsWords <= 65535, "rows of words are a grid's second axis");
static_assert(kNmsGroup * 8 == 32, "a sector");
static_assert(kMostNmsWords * 8 + kNmsWord * 8 <= 48 * 1024, "static shared memory ends there");

struct NmsBoxes {
  const void* boxes;      // [K, 4] x1, y1, x2, y2
  const int64_t* order;   // [K] rows by falling score
  const int64_t* groups;  // [K] or null: boxes of different ones do not remove each other
  int64_t count, words;   // K, and K / 64 rounded up
  int64_t pitch;          // words of a row of the matrix: whole groups
  double threshold;
};

template <typename A>
struct NmsBox {
  A x1, y1, x2, y2, area;
};

template <typename A>
__device__ __forceinline__ NmsBox<A> load_nms_box(const NmsBoxes& a, int64_t row) {
  const A* p = static_cast<const A*>(a.boxes) + 4 * row;
  NmsBox<A> box{p[0], p[1], p[2], p[3], A(0)};
  box.area = rounded_product(box.x2 - box.x1, box.y2 - box.y1);
  return box;
}

// Whether box i, which has the higher score, removes box j.
template <typename A>
__device__ __forceinline__ bool removes(const NmsBox<A>& i, const NmsBox<A>& j, A threshold) {
  const A width = (j.x2 < i.x2 ? j.x2 : i.x2) - (j.x1 < i.x1 ? i.x1 : j.x1);
  const A height = (j.y2 < i.y2 ? j.y2 : i.y2) - (j.y1 < i.y1 ? i.y1 : j.y1);
  const A overlap = rounded_product(width < A(0) ? A(0) : width, height < A(0) ? A(0) : height);
  return overlap / (i.area + j.area - overlap) > threshold;
}

// Grid: groups of words of a row x rows of words.
template <typename A>
__global__ void __launch_bounds__(kNmsWord)
    nms_overlaps(const __grid_constant__ NmsBoxes a, uint64_t* __restrict__ matrix) {  // [K, pitch]
  __shared__ NmsBox<A> others[kNmsWord];
  __shared__ int64_t other_groups[kNmsWord];
  const int t = threadIdx.x;
  const int64_t row_word = blockIdx.y;
  const int64_t i = row_word * kNmsWord + t;
  NmsBox<A> own{};
  int64_t own_group = 0;
  if (i < a.count) {
    own = load_nms_box<A>(a, a.order[i]);
    if (a.groups) own_group = a.groups[a.order[i]];
  }
  const int64_t group = row_word / kNmsGroup + blockIdx.x;
  if (group >= a.pitch / kNmsGroup) return;
  uint64_t bits[kNmsGroup] = {};
#pragma unroll
  for (int g = 0; g < kNmsGroup; ++g) {
    const int64_t word = group * kNmsGroup + g, first = word * kNmsWord;
    if (word < row_word || word >= a.words) continue;
    const int count = int(a.count - first < kNmsWord ? a.count - first : kNmsWord);
    __syncthreads();
    if (t < count) {
      others[t] = load_nms_box<A>(a, a.order[first + t]);
      other_groups[t] = a.groups ? a.groups[a.order[first + t]] : 0;
    }
    __syncthreads();
    for (int j = word == row_word ? t + 1 : 0; j < count; ++j)
      if (own_group == other_groups[j] && removes(own, others[j], A(a.threshold))) bits[g] |= uint64_t{1} << j;
  }
  if (i >= a.count) return;
  auto* const to = reinterpret_cast<ulonglong2*>(matrix + i * a.pitch + group * kNmsGroup);
  to[0] = {bits[0], bits[1]};
  to[1] = {bits[2], bits[3]};
}

// One block.
__global__ void __launch_bounds__(kNmsThreads)
    nms_reduce(const __grid_constant__ NmsBoxes a, const uint64_t* __restrict__ matrix,  // [K, pitch]
               int64_t* __restrict__ rows,                                               // [K], -1 behind the kept
               int64_t* __restrict__ number) {                                           // of kept rows
  __shared__ uint64_t removed[kMostNmsWords], diagonal[kNmsWord], kept_bits;
  const int t = threadIdx.x;
  for (int64_t w = t; w < a.words; w += kNmsThreads) removed[w] = 0;
  int64_t kept_before = 0;
  for (int64_t word = 0; word < a.words; ++word) {
    const int64_t first = word * kNmsWord;
    const int count = int(a.count - first < kNmsWord ? a.count - first : kNmsWord);
    if (t < count) diagonal[t] = matrix[(first + t) * a.pitch + word];
    __syncthreads();
    if (t == 0) {
      uint64_t gone = removed[word], kept = 0;
      for (int i = 0; i < count; ++i) {
        if (gone >> i & 1) continue;
        kept |= uint64_t{1} << i;
        gone |= diagonal[i];
      }
      kept_bits = kept;
    }
    __syncthreads();
    const uint64_t kept = kept_bits;
    for (int64_t w = word + 1 + t; w < a.words; w += kNmsThreads) {
      uint64_t bits = removed[w];
      for (uint64_t left = kept; left != 0; left &= left - 1)
        bits |= matrix[(first + __ffsll(int64_t(left)) - 1) * a.pitch + w];
      removed[w] = bits;
    }
    if (t < count && (kept >> t & 1))
      rows[kept_before + __popcll(kept & ((uint64_t{1} << t) - 1))] = a.order[first + t];
    kept_before += __popcll(kept);
    __syncthreads();
  }
  for (int64_t i = kept_before + t; i < a.count; i += kNmsThreads) rows[i] = -1;
  if (t == 0) *number = kept_before;
}

}  // namespace pyseg::roi
