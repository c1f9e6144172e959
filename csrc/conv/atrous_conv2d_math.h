// Minimal filtering along one axis of a dilated 3-tap convolution: the arithmetic that plan and CPU kernels share.
// Torch-free; plain data and constants only, so that every CPU target may include it.
//
// A convolution of rate d is d independent ordinary ones on the phases o, o+d, o+2d, ... Within a phase the outputs are
// cut into tiles. A tile computes y = A^T [(G w) * (B^T x)] (Winograd 1980; Lavin and Gray 2015, eq. 1): B^T takes the
// tile's inputs to a few values, each is multiplied by one linear functional G_f of the filter taps (w0, w1, w2), and A^T
// adds the products up to the outputs. In two dimensions tiles nest, and each product becomes a matrix product over
// channels. The kinds of tile:
//   F4, F3, F2   4, 3, 2 outputs from 6, 5, 4 products: Toom-Cook at the points 0, 1, -1, 2, -2, infinity (a prefix of
//                them for F3 and F2, so that all share one set of transformed weights);
//   E2           2 outputs whose outer neighbours both lie outside the map: a 2x2 Toeplitz product in 3 products instead of
//                4. It serves phases of two pixels, on which F2 (4 products) saves nothing;
//   tap sets     1 output from the taps of a bit mask (bit k: w_k), for what remains and for phases of one pixel.
#pragma once

#include <cstdint>

namespace pyseg {

// Linear functionals of the taps (w0, w1, w2). The scale of the first five makes F4's B^T integer.
enum Functional : uint8_t {
  kAt0,     // w0 / 4
  kAt1,     // -(w0 + w1 + w2) / 6
  kAtM1,    // -(w0 - w1 + w2) / 6
  kAt2,     // (w0 + 2 w1 + 4 w2) / 24
  kAtM2,    // (w0 - 2 w1 + 4 w2) / 24
  kAtInf,   // w2
  kFirst,   // w0
  kCentre,  // w1
  kLow,     // w1 - w0
  kHigh,    // w2 - w1
  kFunctionals
};

// kTaps + mask (1..7) is a tap set; kTaps itself (mask 0) is an output without any tap inside the map.
enum TileKind : uint8_t { kF4, kF3, kF2, kE2, kTaps, kTileKinds = kTaps + 8 };

// Both paths cut the sum over input channels; between the parts the sums rest in memory. The plan counts that.
constexpr int64_t kDirectTerms = 384;   // direct path: terms (taps x channels) of a part; its rows and panel stay in L1
constexpr int64_t kChannelBlock = 256;  // Winograd path: input (and output) channels of a large product

constexpr int kMaxProducts = 6;
constexpr int kMaxInputs = 6;
constexpr int kMaxOutputs = 4;

struct TileSpec {
  int8_t outputs, inputs, products;
  int8_t offset[kMaxInputs];  // input i lies at (first output) - padding + offset[i] * dilation
  Functional functional[kMaxProducts];
};

constexpr TileSpec kTileSpecs[kTileKinds] = {
    {4, 6, 6, {0, 1, 2, 3, 4, 5}, {kAt0, kAt1, kAtM1, kAt2, kAtM2, kAtInf}},
    {3, 5, 5, {0, 1, 2, 3, 4}, {kAt0, kAt1, kAtM1, kAt2, kAtInf}},
    {2, 4, 4, {0, 1, 2, 3}, {kAt0, kAt1, kAtM1, kAtInf}},
    {2, 2, 3, {1, 2}, {kCentre, kHigh, kLow}},
    {1, 0, 0, {}, {}},
    {1, 1, 1, {0}, {kFirst}},
    {1, 1, 1, {1}, {kCentre}},
    {1, 2, 2, {0, 1}, {kFirst, kCentre}},
    {1, 1, 1, {2}, {kAtInf}},
    {1, 2, 2, {0, 2}, {kFirst, kAtInf}},
    {1, 2, 2, {1, 2}, {kCentre, kAtInf}},
    {1, 3, 3, {0, 1, 2}, {kFirst, kCentre, kAtInf}},
};

// The tiles of one axis: first_output[kind][0..count[kind]); output i of a tile lies at first_output + i * dilation.
struct AxisTiles {
  int32_t count[kTileKinds];
  const int32_t* first_output[kTileKinds];
};

}  // namespace pyseg
