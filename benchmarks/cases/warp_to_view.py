"""Frames warped into a keyframe, and fused there, beside what users compose from torch's operators and kornia.

Eight frames of one keyframe, 320x240 and 640x480, 13 and 40 classes (NYUDv2's). The peers unproject, project and sample
by grid_sample, and test the depth where the case does. kornia.geometry.depth.warp_frame_depth has neither depth test
nor mask; its case has all points within the view. The floor is the scores and the depths read once, the output written
once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Case, Contender, Prepared, Workload

BASELINE = "torch NCHW"
FAMILY_NOTES: dict[str, str] = {}  # measured reasons, by the summary's row
TOLERANCE = 2e-3  # the peers' coordinates are in float32
VIEWS = 8
TOLERANCES = (1.0, 0.05)  # of the depth test: about two thirds of the pixels pass


@dataclass(frozen=True)
class Problem:
    kind: str  # warp, fuse or kornia
    classes: int
    height: int
    width: int
    training: bool = False
    quick: tuple[int, ...] = ()


def cases() -> list[Case]:
    problems = []
    for height, width in ((240, 320), (480, 640)):
        for classes in (13, 40):
            quick = (1, 2) if (height, classes) == (240, 13) else ()
            problems.append(Problem("warp", classes, height, width, quick=quick))
            problems.append(Problem("warp", classes, height, width, training=True, quick=quick))
            problems.append(Problem("fuse", classes, height, width, quick=quick))
        problems.append(Problem("kornia", 13, height, width))
    return [_case(problem) for problem in problems]


def _views(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """depth [1, H, W], intrinsics [8, 3, 3], pose [8, 4, 4] and source_depth [8, H, W], of float64."""
    height, width = problem.height, problem.width
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    depth = (3 + 0.5 * torch.sin(6 * u / width) + 0.5 * torch.cos(5 * v / height)).double().unsqueeze(0)
    k = torch.tensor([[0.9 * width, 0, (width - 1) / 2], [0, 0.9 * width, (height - 1) / 2], [0, 0, 1]])
    poses = torch.eye(4, dtype=torch.float64).repeat(VIEWS, 1, 1)
    for i, pose in enumerate(poses):
        if problem.kind == "kornia":
            pose[:3, 3] = torch.tensor([0.01 * i, 0.01, 1.0])
        else:
            angle = 0.03 * (i + 1)
            c, s = math.cos(angle), math.sin(angle)
            pose[:3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
            pose[0, 3] = 0.05 * i
    measured = torch.full((VIEWS, height, width), 3.0, dtype=torch.float64)
    measured[:, ::8, ::8] = 0  # holes
    return depth, k.double().repeat(VIEWS, 1, 1), poses, measured


def _by_torch(scores: Tensor, depth: Tensor, k: Tensor, pose: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    height, width = depth.shape[1:]
    v, u = torch.meshgrid(
        torch.arange(height, dtype=depth.dtype), torch.arange(width, dtype=depth.dtype), indexing="ij"
    )
    rays = torch.linalg.inv(k) @ torch.stack([u, v, torch.ones_like(u)]).flatten(1)
    points = k @ (pose[:, :3, :3] @ (rays * depth.flatten(1).unsqueeze(1)) + pose[:, :3, 3:])
    z = points[:, 2]
    x, y, z = (t.unflatten(1, (height, width)) for t in (points[:, 0] / z, points[:, 1] / z, z))
    valid = (depth > 0) & (z > 0) & (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
    grid = torch.stack([x * (2 / (width - 1)) - 1, y * (2 / (height - 1)) - 1], -1)
    m = F.grid_sample(measured.unsqueeze(1), grid, mode="nearest", padding_mode="border", align_corners=True)[:, 0]
    valid = valid & (m > 0) & ((z - m).abs() <= TOLERANCES[0] + TOLERANCES[1] * m)
    warped = F.grid_sample(scores, grid, padding_mode="border", align_corners=True)
    return torch.where(valid.unsqueeze(1), warped, 0.0), valid


def _fused_by_torch(scores: Tensor, *geometry: Tensor) -> Tensor:
    warped, _ = _by_torch(scores, *geometry)
    return warped.sum(0, keepdim=True).log_softmax(1)


def _case(problem: Problem) -> Case:
    from pyseg import functional

    named = {"absolute_tolerance": TOLERANCES[0], "relative_tolerance": TOLERANCES[1]}

    def ours(scores: Tensor, depth: Tensor, k: Tensor, pose: Tensor, measured: Tensor) -> Tensor:
        if problem.kind == "kornia":
            return functional.warp_to_view(scores, depth, k, k, pose)[0]
        return functional.warp_to_view(scores, depth, k, k, pose, measured, **named)[0]

    def ours_fused(scores: Tensor, depth: Tensor, k: Tensor, pose: Tensor, measured: Tensor) -> Tensor:
        return functional.warp_and_fuse(scores, depth, k[:1], k, pose, measured, **named)

    def ours_in_two(scores: Tensor, depth: Tensor, k: Tensor, pose: Tensor, measured: Tensor) -> Tensor:
        warped, valid = functional.warp_to_view(scores, depth, k, k, pose, measured, **named)
        return functional.fuse_views(warped.unsqueeze(1), valid.unsqueeze(1))

    def theirs(scores: Tensor, *geometry: Tensor) -> Tensor:
        return _by_torch(scores, *geometry)[0]

    def by_kornia(scores: Tensor, depth: Tensor, k: Tensor, pose: Tensor, measured: Tensor) -> Tensor:
        from kornia.geometry.depth import warp_frame_depth

        return warp_frame_depth(scores, depth.unsqueeze(1).expand(VIEWS, -1, -1, -1), pose, k)

    def build() -> Workload:
        geometry = [t.float() for t in _views(problem)]
        scores = torch.randn(
            VIEWS, problem.classes, problem.height, problem.width, generator=torch.Generator().manual_seed(0)
        )
        keys = 1 if problem.kind == "fuse" else VIEWS
        grad = torch.randn(
            keys, problem.classes, problem.height, problem.width, generator=torch.Generator().manual_seed(1)
        )

        def call(function: Callable[..., Tensor], x: Tensor, geometry: list[Tensor], grad: Tensor) -> Callable[[], Any]:
            if not problem.training:
                return lambda: function(x, *geometry)
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            return lambda: torch.autograd.grad(function(leaf, *geometry), leaf, grad)[0]

        def prepare(function: Callable[..., Tensor], last: bool, compiled: bool = False) -> Prepared:
            memory_format = torch.channels_last if last else torch.contiguous_format
            x, own = scores.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
            run = call(torch.compile(function, dynamic=False) if compiled else function, x, geometry, own)
            with torch.inference_mode(not problem.training):  # as it is measured: compiled code depends on it
                run()
            return Prepared(run)

        plain = {"warp": theirs, "fuse": _fused_by_torch, "kornia": by_kornia}[problem.kind]
        mine = ours_fused if problem.kind == "fuse" else ours

        def expected() -> list[Tensor]:
            with torch.inference_mode(False):
                doubles = [t.double() for t in geometry]
                return [call(plain, scores.double(), doubles, grad.double())().detach()]

        name = "kornia" if problem.kind == "kornia" else "torch"
        contenders = [
            Contender(f"{name} NCHW", lambda: prepare(plain, False)),
            Contender(f"{name} channels_last", lambda: prepare(plain, True)),
            Contender("pyseg NCHW", lambda: prepare(mine, False), ours=True),
            Contender("pyseg channels_last", lambda: prepare(mine, True), ours=True),
        ]
        if problem.kind != "kornia":
            contenders.append(Contender("torch.compile NCHW", lambda: prepare(plain, False, True)))
        if problem.kind == "fuse":
            contenders.append(Contender("pyseg NCHW, warped and fused", lambda: prepare(ours_in_two, False), ours=True))
        return Workload(contenders, expected)

    frames = VIEWS * problem.classes * problem.height * problem.width
    written = frames // VIEWS if problem.kind == "fuse" else frames
    maps = (VIEWS + 1) * problem.height * problem.width
    passes = 2 if problem.training else 1
    what = {"warp": "warp", "fuse": "warp and Bayesian fusion", "kornia": "warp without depth test"}[problem.kind]
    way = "forward+backward" if problem.training else "forward"
    return Case(
        name=f"systems/warp_to_view/{problem.kind}/{way}/{VIEWS}x{problem.classes}x{problem.height}x{problem.width}",
        groups=(f"multi-view {what}, {way}",),
        build=build,
        params={"scores": [VIEWS, problem.classes, problem.height, problem.width], "dtype": "float32"},
        baseline="kornia NCHW" if problem.kind == "kornia" else BASELINE,
        tolerance=TOLERANCE,
        least=lambda: (8 * passes * frames, 4 * passes * (frames + written + maps)),
        inference=not problem.training,
        quick=problem.quick,
    )
