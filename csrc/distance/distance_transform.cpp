// Schemas of distance_transform and distance_to_two_nearest_objects: exact Euclidean distances on 2D and 3D grids.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  // input [*, H, W] or [*, D, H, W]: as many axes as spacing has elements, batch dimensions before them. mode: "mask"
  // (distance to the nearest zero), "signed" (and minus the distance to the nearest nonzero, where zero), "labels" (to
  // the nearest element of another value), "objects" (the same, but 0 where zero). Distances like input, float32 or
  // float64; indices [*, dims, ...] int64, without elements unless asked for.
  m.def(
      "distance_transform(Tensor input, float[] spacing, str mode, bool squared, bool return_indices, bool float64) "
      "-> (Tensor, Tensor)");
  // Distances to the nearest and to the second nearest of the objects in labels (0 is none), each like labels.
  m.def(
      "distance_to_two_nearest_objects(Tensor labels, float[] spacing, bool squared, bool float64) "
      "-> (Tensor, Tensor)");
}
