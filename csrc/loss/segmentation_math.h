// What host and device of the segmentation losses share: the columns of the statistics, the activations.
//
// With p = activation(z), g the target in [0, 1] and w the pixel's weight, an image and class has the sums
//   PG p g, P p, G g, PP p^2, GG g^2, PPG p^2 g,
//   POS w g (1 - p)^gamma (-log p), NEG w (1 - g) p^gamma (-log(1 - p)), WG w g, W w, NLL w (-log p).
// Their derivatives by z follow from two closed forms, with L = -log p:
//   softmax   d[(1 - p_t)^gamma L_t] / dz_c = q (p_c - [c = t]),  q = (1 - p)^gamma + gamma p (1 - p)^(gamma - 1) L
//   sigmoid   d[(1 - p)^gamma L] / dz = -(1 - p)^gamma (1 - p + gamma p L); NEG with p and 1 - p exchanged, and the sign
// (Lin et al. 2017, appendix; gamma = 0 is plain cross-entropy).
#pragma once

#include <cstdint>

namespace pyseg {

enum StatisticsColumn { kPG, kP, kG, kPP, kGG, kPPG, kPos, kNeg, kWG, kW, kNll, kStatistics };

enum class Activation : uint8_t { kSoftmax, kSigmoid, kNone };

// Logarithms of probabilities given as such (Activation::kNone) end here, as in torch's binary_cross_entropy, and so do
// the denominators of their derivatives.
constexpr double kLeastLog = -100, kLeastDenominator = 1e-12;

}  // namespace pyseg
