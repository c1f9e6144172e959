"""Class scores of one camera's image as another camera would see them."""

import torch
from torch import Tensor

from pyseg._ops import warp_to_view as _op  # noqa: F401  registers the fake kernels
from pyseg._ops.forward_mode import refuse_tangents


def warp_to_view(
    scores: Tensor,
    depth: Tensor,
    key_intrinsics: Tensor,
    source_intrinsics: Tensor,
    pose: Tensor,
    source_depth: Tensor | None = None,
    *,
    absolute_tolerance: float = 0.05,
    relative_tolerance: float = 0.01,
) -> tuple[Tensor, Tensor]:
    r"""Scores of a frame, warped into a keyframe by the keyframe's depth; and where the frame sees the keyframe.

        warped[n, :, v, u] = scores[n] at (x, y), bilinear

        d (x, y, 1) = K_s (R z K_k^-1 (u, v, 1) + t)        z = depth[n, v, u]

    of Ma, Stueckler, Kerl and Cremers, "Multi-view deep learning for consistent semantic mapping with RGB-D cameras",
    2017 (1703.08866), section III, where z K_k^-1 (u, v, 1) is the point that the keyframe's pixel shows, and (R, t)
    moves it into the frame's camera. A pixel is seen, and `valid` there, where

    * z is a depth: positive and finite (0, negative values, infinity and NaN are none);
    * the point lies in front of the frame's camera and in one of its pixels: -1/2 <= x <= W - 1/2 and
      -1/2 <= y <= H - 1/2; between the outer pixels' centres and the image's edge the outer pixels' values hold;
    * with source_depth: the depth m that the frame measured at the nearest pixel is one, and nothing hides the point:
      \|d - m\| <= absolute_tolerance + relative_tolerance * m.

    Elsewhere `warped` is 0.

    Args:
        scores: [N, C, H, W] of the frames: logits, probabilities, features. float32, float64, float16 or bfloat16. Any
            strides.
        depth: [N, 1, H', W'] or [N, H', W'] of the keyframes, along the optical axis. A float dtype. N, or 1 for one
            keyframe of all frames.
        key_intrinsics: [N, 3, 3], [1, 3, 3] or [3, 3], the keyframes' [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in pixels,
            the first pixel's centre at (0, 0). float32 or float64; the last row is not read.
        source_intrinsics: the frames', likewise.
        pose: [N, 4, 4] or [4, 4], [[R, t], [0, 1]] from the keyframe's camera to the frame's, in the depth's unit. The
            last row is not read.
        source_depth: [N, 1, H, W] or [N, H, W] of the frames, or None: hidden points are not told from seen ones.
        absolute_tolerance: in the depth's unit; the default is meant for metres.
        relative_tolerance: see above.

    Returns:
        warped [N, C, H', W'], channels_last where scores are, and valid [N, H', W'] bool.

    The geometry is computed in double precision whatever the dtypes; 16-bit scores are summed in float32 and rounded
    once. NaN in a score reaches the pixels between whose four elements it is, with a weight of 0 too. Differentiable in
    the scores, any number of times; the depth and the cameras are constants and get no gradient. The gradient adds up
    in the keyframe's order of pixels (on CUDA the pixels are sorted by their place in the frame first; no atomics): the
    same bits in every run and, on the CPU, for every number of threads. vmap works. O(N C H' W') time; the gradient O(N
    C (H W + H' W')) and, on CUDA, 40 bytes for each of the pixels.

    Raises:
        RuntimeError: an argument that does not fit: names argument, expected and got.
    """
    op = "warp_to_view"
    refuse_tangents(op, scores)
    images = scores.shape[0]
    depth = _image(op, "depth", depth, images)
    arguments = (
        _each(op, "key_intrinsics", key_intrinsics, images),
        _each(op, "source_intrinsics", source_intrinsics, images),
        _each(op, "pose", pose, images),
        None if source_depth is None else _image(op, "source_depth", source_depth, images),
    )
    warped, seen = torch.ops.pyseg.warp_to_view(scores, depth, *arguments, absolute_tolerance, relative_tolerance)
    return warped, seen.view(torch.bool)


def _image(op: str, name: str, depth: Tensor, images: int) -> Tensor:
    """[N, H, W] of [N, 1, H, W] or [N, H, W]; one image stands for all."""
    if depth.dim() == 4 and depth.shape[1] == 1:
        depth = depth.squeeze(1)
    if depth.dim() != 3:
        raise RuntimeError(f"{op}: {name} must be [N, 1, H, W] or [N, H, W], got {list(depth.shape)}")
    return depth.expand(images, -1, -1) if depth.shape[0] == 1 else depth


def _each(op: str, name: str, matrix: Tensor, images: int) -> Tensor:
    """[N, r, r] of [N, r, r], [1, r, r] or [r, r]."""
    if matrix.dim() == 2 or (matrix.dim() == 3 and matrix.shape[0] == 1):
        return matrix.expand(images, *matrix.shape[-2:])
    return matrix
