// What host and device of point supervision share: the columns of its results, and how everything is kept in logarithms.
//
// With S = softmax(z) over the classes, O the object classes and u = log sum_{c in O} exp z_c - log sum_{c not in O} exp
// z_c of a pixel, sum_{c in O} S_c = sigmoid(u), so that its objectness term is the binary cross-entropy of u and P:
//   P softplus(-u) + (1 - P) softplus(u);  d / dz_c = (sigmoid(u) - P) softmax_O(z)_c in O, minus the same of the rest
// With x_c = z_c - log sum_{k != c} exp z_k, the log-odds of S_c, -log S_c = softplus(-x_c) and -log(1 - S_c) =
// softplus(x_c); dx_c / dz_k = [k = c] - [k != c] exp z_k / sum_{j != c} exp z_j. Nothing is subtracted from 1.
//
// t_c, the pixel where S_c is largest, is that of the largest rank: log S_c where S_c <= 1/2; where it is larger, so that
// c alone has the pixel's largest logit, softplus(x_c) - log 4, which still grows where log S_c would round to 0.
#pragma once

#include <cstdint>

namespace pyseg {

// The columns of an image's sums: -log S_{t_c c} of the classes present, -log(1 - S_{t_c c}) of those absent, weighted
// -log S of the points, the objectness terms of all pixels; how many classes are present and absent, how many points.
enum PointTerm {
  kPresentTerm,
  kAbsentTerm,
  kPointTerm,
  kObjectnessTerm,
  kPresentCount,
  kAbsentCount,
  kPointCount,
  kPointTerms
};

// What the backward pass needs of a class: the pixel t_c where S is largest; 1 present, 0 absent, -1 neither; and there x_c,
// the largest logit of the other classes and the sum of their exponentials after it has been subtracted.
enum PointKept { kBestPixel, kPresence, kLogOdds, kMostOther, kSumOther, kPointKept };

constexpr double kLog4 = 1.3862943611198906;

constexpr int64_t kMostPointClasses = 1024;  // of which a block on CUDA devices holds a best pixel each

}  // namespace pyseg
