"""One segmentation from many views of a scene: Bayesian, sum and max fusion in a keyframe."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pyseg.functional.warp_to_view import _each, _image

Mode = Literal["bayes", "sum", "max"]
_MODES = ("bayes", "sum", "max")
_LEAST_LOG = -100.0  # of a probability, as in the losses


def fuse_views(
    scores: Sequence[Tensor] | Tensor, valid: Sequence[Tensor] | Tensor, mode: Mode = "bayes", from_logits: bool = True
) -> Tensor:
    r"""The classes' log-probabilities at each pixel from all views that see it: Ma et al. 2017 (1703.08866), section
    III.

        bayes   p(c) = prod_v p_v(c) / sum_k prod_v p_v(k)      independent views, every class as likely beforehand
        sum     p(c) = sum_v p_v(c) / sum_k sum_v p_v(k)
        max     p(c) = max_v p_v(c) / sum_k max_v p_v(k)

    over the views v that are valid at the pixel; where none is, every class has the same probability.

    Args:
        scores: V views, as a sequence of [N, C, H, W] or one tensor [V, N, C, H, W]: logits, or with from_logits=False
            probabilities, whose logarithms end at -100.
        valid: V masks, [N, H, W] bool each or [V, N, H, W], such as warp_to_view returns them.
        mode: see above.
        from_logits: p_v is the softmax of scores[v].

    Returns:
        [N, C, H, W] log-probabilities, float32 for 16-bit scores: argmax gives labels, exp probabilities, and losses
        take them for logits. Differentiable in the scores.

    Raises:
        ValueError: an argument that does not fit.
    """
    _check_mode("fuse_views", mode)
    if len(scores) == 0 or len(scores) != len(valid):
        raise ValueError(f"fuse_views: valid must be as many as scores, 1 or more, got {len(valid)} and {len(scores)}")
    total: Tensor | None = None
    for view, mask in zip(scores, valid, strict=True):
        if mask.shape != view.shape[:1] + view.shape[2:]:
            expected = [*view.shape[:1], *view.shape[2:]]
            raise ValueError(f"fuse_views: valid must be {expected} like scores, got {list(mask.shape)}")
        value = _summand(view, mode, from_logits)
        value = torch.where(mask.unsqueeze(1), value, value.new_zeros(()))
        if total is not None:
            value = torch.maximum(total, value) if mode == "max" else total + value
        total = value
    assert total is not None
    return _normalised(total, mode)


def warp_and_fuse(
    scores: Tensor,
    depth: Tensor,
    key_intrinsics: Tensor,
    source_intrinsics: Tensor,
    pose: Tensor,
    source_depth: Tensor | None = None,
    *,
    key_scores: Tensor | None = None,
    mode: Mode = "bayes",
    from_logits: bool = True,
    absolute_tolerance: float = 0.05,
    relative_tolerance: float = 0.01,
) -> Tensor:
    """Log-probabilities [K, C, H', W'] of frames warped into their keyframe and fused there, no warped frame written.

    What warp_to_view and fuse_views make of N = K * V frames in two steps, the V frames of a keyframe one after the
    other. What is warped are log-probabilities for "bayes" (of logits, themselves: what they lack to log-probabilities
    is the same for all classes) and probabilities for "sum" and "max". For "bayes" and "sum" the warped frames are
    added up pixel by pixel and never written; "max" warps one frame of each keyframe after the other.

    Args:
        scores: [K * V, C, H, W] of the frames: logits, or with from_logits=False probabilities.
        depth: [K, 1, H', W'] or [K, H', W'] of the keyframes.
        key_intrinsics: [K, 3, 3]; the others, source_depth and the tolerances, as in warp_to_view, are of the frames.
            One matrix stands for all, as there.
        key_scores: [K, C, H', W'] of the keyframes themselves, one more view, valid everywhere.
        mode, from_logits: as in fuse_views.

    Differentiable in the scores. 16-bit scores are widened to float32 first and no sum is rounded to 16 bits.

    Raises:
        ValueError, or RuntimeError as warp_to_view: an argument that does not fit.
    """
    op = "warp_and_fuse"
    _check_mode(op, mode)
    if scores.dim() != 4:
        raise ValueError(f"{op}: scores must be [K * V, C, H, W], got {list(scores.shape)}")
    frames = scores.shape[0]
    depth = _image(op, "depth", depth, depth.shape[0] if depth.dim() > 0 else 1)
    keys = depth.shape[0]
    if frames % max(keys, 1) or frames > keys == 0:
        raise ValueError(f"{op}: scores must have as many frames of each of {keys} keyframes, got {frames}")
    expected = [keys, scores.shape[1], *depth.shape[1:]]
    if key_scores is not None and list(key_scores.shape) != expected:
        raise ValueError(f"{op}: key_scores must be {expected}, got {list(key_scores.shape)}")
    key_intrinsics = _each(op, "key_intrinsics", key_intrinsics, keys)
    source_intrinsics = _each(op, "source_intrinsics", source_intrinsics, frames)
    pose = _each(op, "pose", pose, frames)
    if source_depth is not None:
        source_depth = _image(op, "source_depth", source_depth, frames)
    values = _summand(scores, mode, from_logits)
    own = None if key_scores is None else _summand(key_scores, mode, from_logits)

    def warped(step: int, first: int) -> Tensor:
        """The sum of every step-th frame from the first on."""
        each = (values, source_intrinsics, pose, source_depth)
        some, cameras, poses, measured = (None if t is None else t[first::step] for t in each)
        arguments = (some, depth, key_intrinsics, cameras, poses, measured, absolute_tolerance, relative_tolerance)
        total: Tensor = torch.ops.pyseg.warp_to_view(*arguments)[0]
        return total

    views = frames // max(keys, 1)
    if mode != "max" or views == 0:
        total = warped(1, 0)
        return _normalised(total if own is None else total + own, mode)
    total = warped(views, 0) if own is None else torch.maximum(own, warped(views, 0))
    for view in range(1, views):
        total = torch.maximum(total, warped(views, view))
    return _normalised(total, mode)


def _check_mode(op: str, mode: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"{op}: mode must be one of {', '.join(_MODES)}, got {mode}")


def _summand(scores: Tensor, mode: str, from_logits: bool) -> Tensor:
    """What is added up over the views, or compared."""
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if mode == "bayes":
        return scores if from_logits else _log(scores)
    return scores.softmax(1) if from_logits else scores


def _normalised(total: Tensor, mode: str) -> Tensor:
    if mode == "bayes":
        return total.log_softmax(1)
    mass = total.sum(1, keepdim=True)
    total = torch.where(mass == 0, 1.0, total)  # NaN stays
    return _log(total / total.sum(1, keepdim=True))


def _log(p: Tensor) -> Tensor:
    """log p, at least -100. What is 0, or so small that 1 / p overflows, gets the gradient 0."""
    small = p < torch.finfo(p.dtype).tiny
    return torch.where(small, p.detach().log(), torch.where(small, 1.0, p).log()).clamp_min(_LEAST_LOG)
