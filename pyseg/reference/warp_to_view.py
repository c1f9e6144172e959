"""warp_to_view and the fusion of views from their formulas, pixel by pixel."""

import math

import torch
from torch import Tensor


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
    r"""y[n, c, v, u] = scores[n, c] at (x, y), bilinear, where the view sees the keyframe's pixel (u, v); else 0.

    d (x, y, 1) = K_s (R z K_k^-1 (u, v, 1) + t), z = depth[n, v, u]: Ma et al. 2017 (1703.08866), section III.

    scores [N, C, H, W], depth [N, H', W'], matrices [N, 3, 3] and [N, 4, 4], source_depth [N, H, W] or None. Returns y
    [N, C, H', W'] and which pixels are seen [N, H', W']. Differentiable in the scores by torch's autograd.
    """
    images, _, height, width = scores.shape
    rows = []
    seen = torch.zeros(depth.shape, dtype=torch.bool)
    for n in range(images):
        inverse = torch.linalg.inv(key_intrinsics[n].double())
        rotation, shift = pose[n, :3, :3].double(), pose[n, :3, 3].double()
        intrinsics = source_intrinsics[n].double()
        for v in range(depth.shape[1]):
            for u in range(depth.shape[2]):
                value = torch.zeros_like(scores[n, :, 0, 0])
                z = float(depth[n, v, u])
                if z > 0 and math.isfinite(z):
                    ray = inverse @ torch.tensor([u, v, 1.0], dtype=torch.float64)
                    x, y, d = (intrinsics @ (z * (rotation @ ray) + shift)).tolist()
                    if d > 0 and -0.5 <= x / d <= width - 0.5 and -0.5 <= y / d <= height - 0.5:
                        x, y = min(max(x / d, 0), width - 1), min(max(y / d, 0), height - 1)
                        near = None if source_depth is None else float(source_depth[n, int(y + 0.5), int(x + 0.5)])
                        if near is None or _is_near(d, near, absolute_tolerance, relative_tolerance):
                            value = _bilinear(scores[n], y, x)
                            seen[n, v, u] = True
                rows.append(value)
    return torch.stack(rows).reshape(*depth.shape, -1).movedim(3, 1), seen


def _is_near(depth: float, measured: float, absolute: float, relative: float) -> bool:
    return 0 < measured < math.inf and abs(depth - measured) <= absolute + relative * measured


def _bilinear(scores: Tensor, y: float, x: float) -> Tensor:
    height, width = scores.shape[1:]
    top, left = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = (1 - (x - left)) * scores[:, top, left] + (x - left) * scores[:, top, right]
    lower = (1 - (x - left)) * scores[:, bottom, left] + (x - left) * scores[:, bottom, right]
    return (1 - (y - top)) * upper + (y - top) * lower


def fuse_views(scores: Tensor, valid: Tensor, mode: str = "bayes", from_logits: bool = True) -> Tensor:
    """log p[n, c, i, j] from V views, scores [V, N, C, H, W] and valid [V, N, H, W], one pixel at a time.

    bayes: the product of the views' probabilities, sum: their mean, max: their maximum; each normalised over the
    classes. Where no view is valid, every class has the same probability.
    """
    views, images, _, height, width = scores.shape
    probability = scores.softmax(2) if from_logits else scores
    fused = []
    for n in range(images):
        for i in range(height):
            for j in range(width):
                seen = [probability[k, n, :, i, j] for k in range(views) if valid[k, n, i, j]]
                together = torch.ones_like(probability[0, 0, :, 0, 0])
                if seen:
                    each = torch.stack(seen)
                    together = {"bayes": each.prod(0), "sum": each.mean(0), "max": each.amax(0)}[mode]
                fused.append((together / together.sum()).log())
    return torch.stack(fused).reshape(images, height, width, -1).movedim(3, 1)
