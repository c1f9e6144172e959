"""Point supervision, forward and backward, of a batch of 8x21x321x321 (the crops of DeepLab and of the paper's FCN on
PASCAL VOC): image-level and point terms, with and without an objectness prior, beside torch's own operators, eager and
compiled.

Eight points an image. The floor is two reads of the logits and one write of the gradient (without a prior: one read),
and two reads of labels of 8 bytes and of the prior.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import Case, Contender, Prepared, Workload

BASELINE = "torch"
FAMILY_NOTES: dict[str, str] = {}  # measured reasons, by the summary's row
TOLERANCE = 3e-4
SHAPE = (8, 21, 321, 321)
Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def cases() -> list[Case]:
    return [_case(prior, layout) for prior in (False, True) for layout in ("contiguous", "channels_last")]


def _case(with_prior: bool, layout: str) -> Case:
    def build() -> Workload:
        logits, target, labels, prior = _maps()
        prior = prior if with_prior else None
        if layout == "channels_last":
            logits = logits.contiguous(memory_format=torch.channels_last)

        def step(loss: Loss, x: Tensor) -> Callable[[], list[Tensor]]:
            x = x.detach().requires_grad_()

            def call() -> list[Tensor]:
                value = loss(x, target, labels, prior)
                return [value.detach(), *torch.autograd.grad(value, x)]

            return call

        def compiled() -> Prepared:
            call = step(torch.compile(_definition, dynamic=False), logits)
            call()  # compiles, for longer than a call that is timed may take
            return Prepared(call)

        contenders = [
            Contender(BASELINE, lambda: Prepared(step(_definition, logits))),
            Contender("torch.compile", compiled),
            Contender("pyseg", lambda: Prepared(step(_ours, logits)), ours=True),
        ]
        return Workload(contenders, step(_definition, logits.double()))

    elements, pixels = math.prod(SHAPE), math.prod(SHAPE) // SHAPE[1]
    terms = "image + points" + (" + objectness" if with_prior else "")
    least = 4 * elements * (3 if with_prior else 2) + 2 * pixels * (8 + 4 * with_prior)
    return Case(
        name=f"systems/point_supervision_loss/{terms}/{'x'.join(map(str, SHAPE))}/{layout}",
        groups=("systems", f"point supervision, {terms}"),
        build=build,
        params={"shape": list(SHAPE), "dtype": "float32", "layout": layout},
        baseline=BASELINE,
        tolerance=TOLERANCE,
        least=lambda: (0, least),
        inference=False,
        quick=(1,) if layout == "contiguous" else (),
    )


def _maps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, points, labels of the images, a prior; smooth, so that there are regions."""
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int) -> Tensor:
        small = torch.randn(SHAPE[0], channels, 13, 13, generator=generator)
        return F.interpolate(small, SHAPE[2:], mode="bilinear", align_corners=True)

    logits = 3 * smooth(SHAPE[1]) + 0.3 * torch.randn(SHAPE, generator=generator)
    full = smooth(SHAPE[1]).argmax(1)
    target = torch.full_like(full, -100)
    labels = torch.zeros(SHAPE[:2], dtype=torch.int64)
    labels[:, 0] = 1
    for image in range(SHAPE[0]):
        for row, column in torch.randint(SHAPE[2], (8, 2), generator=generator).tolist():
            target[image, row, column] = full[image, row, column]
            labels[image, full[image, row, column]] = 1
    return logits, target, labels, smooth(1).squeeze(1).sigmoid()


def _definition(x: Tensor, target: Tensor, labels: Tensor, prior: Tensor | None) -> Tensor:
    log_s = x.log_softmax(1)
    best = log_s.flatten(2).amax(2)
    present, absent = (labels > 0).to(x.dtype), (labels == 0).to(x.dtype)
    image = (present * best).sum(1) / present.sum(1)
    image = image + (absent * torch.log1p(-best.exp())).sum(1) / absent.sum(1)
    points = F.nll_loss(log_s, target, reduction="none").flatten(1).sum(1)
    loss = points / (target != -100).flatten(1).sum(1) - image
    if prior is not None:
        objects = log_s[:, 1:].logsumexp(1)
        loss = loss - (prior * objects + (1 - prior) * log_s[:, 0]).flatten(1).mean(1)
    return loss.mean()


def _ours(x: Tensor, target: Tensor, labels: Tensor, prior: Tensor | None) -> Tensor:
    from pyseg.functional import point_supervision_loss

    return point_supervision_loss(x, target, image_labels=labels, objectness=prior)
