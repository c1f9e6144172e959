"""Learns to segment from one point an object, and measures what each kind of weak label adds.

    .venv/bin/python examples/point_supervision.py            # about a minute on two cores
    .venv/bin/python examples/point_supervision.py --steps 300 -o points.png

Discs, squares, triangles and rings are drawn over grey noise, each in shades of its colour. The same small FCN learns,
from scratch and on the same scenes, with `pyseg.nn.PointSupervisionLoss` (Bearman et al. 2016, 1506.02106): from which
shapes are in a scene; from one labelled pixel of each shape too; from an objectness prior too, which is how far the
blurred colour of a pixel is from the scene's commonest; and, for comparison, from all labels with cross-entropy. Prints
the mean IoU of each on scenes that none has seen, and writes a picture of one. Ends with status 1 where the full loss
does not reach --least, or does not beat the image labels alone by --margin.
"""

import argparse
import os
import sys
import time
from pathlib import Path

CLASSES = ("background", "disc", "square", "triangle", "ring")
COLORS = ((40, 40, 40), (230, 80, 60), (70, 150, 240), (250, 200, 60), (90, 200, 120))
SIDE, BATCH, WIDTH = 64, 8, 32
IMAGE, POINTS, FULL, DENSE = "image labels", "and points", "and objectness", "all labels"


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"point_supervision: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("points.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=160, help="of each training, default %(default)s")
    parser.add_argument("--least", type=float, default=0.7, help="mean IoU of the full loss, default %(default)s")
    parser.add_argument("--margin", type=float, default=0.25, help="over image labels alone, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 2 or arguments.threads < 1:
        raise UserError("--steps must be at least 2 and --threads at least 1")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import PIL  # noqa: F401
        import torch

        import pyseg  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; the example needs Pillow") from error
    torch.set_num_threads(arguments.threads)

    torch.manual_seed(arguments.seed + 1_000_000)  # scenes that no training draws
    held_out = [scenes(BATCH) for _ in range(8)]
    images, labels, _ = held_out[0]
    found, scores = [], {}
    print(f"mean IoU on {BATCH * len(held_out)} scenes after {arguments.steps} steps of {BATCH} scenes")
    for name in (IMAGE, POINTS, FULL, DENSE):
        started = time.perf_counter()
        model = train(name, arguments.steps, arguments.seed)
        scores[name] = mean_iou(model, held_out)
        print(f"{name:16}{scores[name]:.3f}   {time.perf_counter() - started:.0f} s")
        with torch.inference_mode():
            found.append(model(images[:1]).argmax(1)[0])
    draw(arguments.output, images[0], labels[0], found)
    print(f"wrote {arguments.output}")

    gain = scores[FULL] - scores[IMAGE]
    if scores[FULL] < arguments.least or gain < arguments.margin:
        print(
            f"the full loss reached {scores[FULL]:.3f}, {gain:.3f} more than image labels alone: expected at least "
            f"{arguments.least} and {arguments.margin} more",
            file=sys.stderr,
        )
        return 1
    return 0


# ---- data ----


def scenes(count: int):
    """Images [N, 3, SIDE, SIDE], labels [N, SIDE, SIDE], and a point of each visible shape: rows image, class, y, x."""
    import torch

    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    shades = 1.5 * torch.rand(count, 1, 1, 1) + 0.2 * torch.randn(count, 3, 1, 1) - 1.5
    images = shades + 0.3 * torch.randn(count, 3, SIDE, SIDE)
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    shapes = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)  # which shape is in front
    points = []
    for n in range(count):
        number = int(torch.randint(1, 4, ()))
        for shape in range(1, number + 1):
            kind, radius = int(torch.randint(1, 5, ())), float(torch.randint(SIDE // 8, SIDE // 4, ()))
            u, v = x - torch.randint(8, SIDE - 8, ()), y - torch.randint(8, SIDE - 8, ())
            distance = (u**2 + v**2).sqrt()
            inside = {
                1: distance < radius,
                2: torch.maximum(u.abs(), v.abs()) < 0.8 * radius,
                3: (v < 0.7 * radius) & (v > 2 * u.abs() - radius),
                4: (distance < radius) & (distance > 0.5 * radius),
            }[kind]
            labels[n][inside], shapes[n][inside] = kind, shape
            shade = torch.tensor(COLORS[kind]).unsqueeze(1) / 64 - 2 + 0.4 * torch.randn(3, 1)
            images[n][:, inside] = shade + 0.3 * torch.randn(3, int(inside.sum()))
        for shape in range(1, number + 1):
            pixels = (shapes[n] == shape).nonzero()
            if len(pixels):
                row, column = pixels[torch.randint(len(pixels), ())].tolist()
                points.append((n, int(labels[n, row, column]), row, column))
    return images, labels, torch.tensor(points)


def classes_of(labels):
    """Which classes are in the images, [N, C]."""
    import torch

    return torch.stack([(labels == c).flatten(1).any(1) for c in range(len(CLASSES))], 1)


def objectness_of(images):
    """How likely pixels are to be of any shape, [N, SIDE, SIDE], by the contrast to the scene's median colour."""
    import torch
    from torch.nn.functional import avg_pool2d

    smooth = avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)
    contrast = (smooth - smooth.flatten(2).median(2).values[..., None, None]).square().sum(1).sqrt()
    return torch.sigmoid(6 * (contrast - 1))


# ---- training ----


def fcn():
    """To a quarter of the pixels, with growing rates, and back."""
    from torch import nn

    from pyseg.nn import AtrousConv2d

    def block(inputs: int, outputs: int, **arguments: int) -> list[nn.Module]:
        return [AtrousConv2d(inputs, outputs, 3, bias=False, **arguments), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, WIDTH, padding=1, stride=2),
        *block(WIDTH, WIDTH, padding=1),
        *block(WIDTH, WIDTH, padding=2, dilation=2),
        *block(WIDTH, WIDTH, padding=4, dilation=4),
        nn.Conv2d(WIDTH, len(CLASSES), 1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    )


def train(name: str, steps: int, seed: int):
    """A network that has learnt from the labels of that name."""
    import torch

    from pyseg.functional import cross_entropy, points_to_labels
    from pyseg.nn import PointSupervisionLoss

    torch.manual_seed(seed)
    model, weak = fcn(), PointSupervisionLoss()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for step in range(steps):
        images, labels, points = scenes(BATCH)
        logits = model(images)
        if name == DENSE:
            loss = cross_entropy(logits, labels)
        else:
            target = None if name == IMAGE else points_to_labels(points, labels.shape)[0]
            prior = objectness_of(images) if name == FULL else None
            loss = weak(logits, target, image_labels=classes_of(labels), objectness=prior)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if sys.stderr.isatty():
            print(
                f"\r\033[K{name}: step {step + 1}/{steps}, loss {loss.item():.3f}", end="", file=sys.stderr, flush=True
            )
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return model.eval()


def mean_iou(model, batches) -> float:
    """Over the classes."""
    import torch

    from pyseg.functional import iou
    from pyseg.nn import ConfusionMatrix

    matrix = ConfusionMatrix(len(CLASSES))
    with torch.inference_mode():
        for images, labels, _ in batches:
            matrix.update(model(images), labels)
    return iou(matrix.compute()).mean().item()


# ---- the picture ----


def draw(path: Path, image, labels, found) -> None:
    import numpy as np

    from pyseg.visualize import save_panel

    palette = np.array(COLORS, np.uint8)
    photo = ((image + 2) / 4).clamp(0, 1).mul(255).byte().movedim(0, 2).numpy()
    prior = objectness_of(image[None])[0].mul(255).byte().numpy()
    panels = [photo, palette[labels.numpy()], np.stack([prior] * 3, 2), *(palette[each.numpy()] for each in found)]
    panels = [np.kron(panel, np.ones((4, 4, 1), np.uint8)) for panel in panels]
    try:
        save_panel(
            path,
            panels,
            ["scene", "drawn", "objectness", IMAGE, POINTS, FULL, DENSE],
            caption="  ".join(CLASSES[1:]),
        )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
