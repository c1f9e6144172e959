"""Trains FastFCN on drawn scenes, and measures what joint pyramid upsampling saves over a dilated backbone.

    .venv/bin/python examples/fastfcn.py                      # about two minutes on two cores
    .venv/bin/python examples/fastfcn.py --head aspp --steps 120 -o shapes.png

The network is `pyseg.models.fastfcn`: torchvision's ResNet-50 as it is (strides 4, 8, 16, 32), `pyseg.nn.JPU` on its
last three maps, and an FCN or ASPP head (Wu et al. 2019, 1903.11816). It learns from scratch to tell discs, squares,
triangles and rings apart, which are drawn over noise, each in shades of its colour. Then it is accelerated and timed in
inference, beside itself as it was and beside a dilated ResNet-50 with the same kind of head. Writes a picture of a
scene, and fails unless the loss has halved.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path

CLASSES = ("background", "disc", "square", "triangle", "ring")
COLORS = ((40, 40, 40), (230, 80, 60), (70, 150, 240), (250, 200, 60), (90, 200, 120))
SIDE, BATCH, WIDTH = 96, 8, 128
MOST_LOSS, AVERAGED = 0.5, 4  # of what it was at first; means of that many steps at each end


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"fastfcn: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("shapes.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--head", choices=("fcn", "aspp"), default="fcn", help="default %(default)s")
    parser.add_argument("--steps", type=int, default=60, help="of training, default %(default)s")
    parser.add_argument("--size", type=int, default=480, help="side of the image that is timed, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 2 or arguments.threads < 1 or arguments.size < 64:
        raise UserError("--steps must be at least 2, --threads at least 1 and --size at least 64")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import PIL  # noqa: F401
        import torch
        import torchvision  # noqa: F401

        import pyseg
    except ImportError as error:
        raise UserError(f"{error}; the example needs torchvision and Pillow") from error
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)

    model = pyseg.models.fastfcn("resnet50", len(CLASSES), arguments.head, width=WIDTH, head_width=WIDTH)
    image, labels = scenes(1)
    before = mean_iou(model)
    started = time.perf_counter()
    first, last = train(model, arguments.steps)
    taken = time.perf_counter() - started
    print(f"mean IoU {before:.3f} before, {mean_iou(model):.3f} after {arguments.steps} steps in {taken:.0f} s")
    print(f"loss {first:.3f} at first, {last:.3f} at last")

    with torch.inference_mode():
        predicted = model(image).argmax(1)
    draw(arguments.output, image[0], labels[0], predicted[0])
    print(f"wrote {arguments.output}")

    example = torch.randn(1, 3, arguments.size, arguments.size)
    accelerated = pyseg.accelerate(copy.deepcopy(model), example)
    with torch.inference_mode():
        expected, got = model(example), accelerated(example)
    difference = ((expected - got).abs().max() / expected.abs().max()).item()
    rows = {"dilated ResNet-50": dilated(arguments.head), "FastFCN": model, "FastFCN, accelerated": accelerated}
    print(f"\ninference at {arguments.size}x{arguments.size}, {arguments.threads} threads, medians of 3, ms")
    for name, milliseconds in timed(rows, example).items():
        print(f"{name:24}{milliseconds:8.0f}")
    print(f"the accelerated network's outputs differ by {difference:.1e} of the largest magnitude")
    if last > MOST_LOSS * first:
        print(f"fastfcn: the loss must at least halve, from {first:.3f}, got {last:.3f}", file=sys.stderr)
        return 1
    return 0


# ---- networks ----


def dilated(head: str):
    """What FastFCN replaces: stages 3 and 4 at stride 8 with dilation, as in torchvision's segmentation models."""
    from torch import nn
    from torchvision.models import resnet50

    from pyseg.models import segmentation_head

    backbone = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    stages = list(backbone.children())[:-2]
    to_classes = segmentation_head(head, 2048, len(CLASSES), WIDTH)
    return nn.Sequential(*stages, to_classes, nn.Upsample(scale_factor=8, mode="bilinear")).eval()


# ---- data ----


def scenes(count: int):
    """Images [N, 3, SIDE, SIDE] with labels [N, SIDE, SIDE]: up to five shapes each, later ones in front."""
    import torch

    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = torch.rand(count, 3, 1, 1) * 2 - 1 + 0.3 * torch.randn(count, 3, SIDE, SIDE)
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for image, label in zip(images, labels, strict=True):
        for _ in range(int(torch.randint(2, 6, ()))):
            kind, radius = int(torch.randint(1, 5, ())), float(torch.randint(SIDE // 8, SIDE // 4, ()))
            u, v = x - torch.randint(SIDE, ()), y - torch.randint(SIDE, ())
            distance = (u**2 + v**2).sqrt()
            inside = {
                1: distance < radius,
                2: torch.maximum(u.abs(), v.abs()) < 0.8 * radius,
                3: (v < 0.7 * radius) & (v > 2 * u.abs() - radius),
                4: (distance < radius) & (distance > 0.6 * radius),
            }[kind]
            label[inside] = kind
            shade = torch.tensor(COLORS[kind]).unsqueeze(1) / 64 - 2 + 0.4 * torch.randn(3, 1)
            image[:, inside] = shade + 0.3 * torch.randn(3, int(inside.sum()))
    return images, labels


# ---- training ----


def train(model, steps: int) -> tuple[float, float]:
    """The loss in the first and in the last steps."""
    import torch

    from pyseg.nn import DiceCELoss

    loss_of = DiceCELoss()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    model.train()
    losses = []
    for step in range(steps):
        images, labels = scenes(BATCH)
        loss = loss_of(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if sys.stderr.isatty():
            print(f"\r\033[Kstep {step + 1}/{steps}, loss {loss.item():.3f}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return statistics.fmean(losses[:AVERAGED]), statistics.fmean(losses[-AVERAGED:])


def mean_iou(model) -> float:
    """Over the classes, on 16 scenes that are the same in every call."""
    import torch

    from pyseg.nn import ConfusionMatrix

    matrix = ConfusionMatrix(len(CLASSES))
    model.eval()
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(1234)
        for _ in range(2):
            images, labels = scenes(8)
            matrix.update(model(images), labels)
    counts = matrix.compute()
    intersection = counts.diagonal()
    return (intersection / (counts.sum(0) + counts.sum(1) - intersection).clamp_min(1)).mean().item()


# ---- figures ----


def timed(models: dict, image) -> dict[str, float]:
    """Median milliseconds of one call, the models taking turns."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(4):
            for name, model in models.items():
                start = time.perf_counter()
                model(image)
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(each[1:]) for name, each in times.items()}


def draw(path: Path, image, labels, predicted) -> None:
    import numpy as np

    from pyseg.visualize import save_panel

    palette = np.array(COLORS, np.uint8)
    photo = ((image + 2) / 4).clamp(0, 1).mul(255).byte().movedim(0, 2).numpy()
    try:
        save_panel(
            path,
            [photo, palette[labels.numpy()], palette[predicted.numpy()]],
            ["scene", "drawn", "found"],
            caption="  ".join(CLASSES[1:]),
        )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
