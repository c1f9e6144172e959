"""Trains DeepLab v3 with a CRF as its last layer on drawn scenes, and says what the CRF adds.

    .venv/bin/python examples/deeplab_crf.py                          # about two minutes on two cores
    .venv/bin/python examples/deeplab_crf.py --backbone resnet50 --steps 120 -o scene.png

`pyseg.models.deeplab`: a dilated ResNet-18 at output stride 8, atrous spatial pyramid pooling, bilinear upsampling and
`pyseg.nn.CRFasRNN` (Zheng et al. 2015), on the scenes of fastfcn.py. As in the paper the network learns first and then,
in the last quarter of the steps, both together through the mean field's iterations. Fails unless the loss has halved
and the intersection over union with the CRF is above that without. Writes a picture of a scene.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from fastfcn import BATCH, CLASSES, COLORS, UserError, mean_iou, scenes

MEAN, STD = (0.5,) * 3, (0.25,) * 3  # of the drawn scenes: noise about 0, shades from -2 to 2
MOST_LOSS = 0.5  # of what it was at first
AVERAGED = 4  # steps at each end


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"deeplab_crf: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("deeplab.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--backbone", default="resnet18", help="one of torchvision's ResNets, default %(default)s")
    parser.add_argument("--steps", type=int, default=80, help="of training, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 4 or arguments.threads < 1:
        raise UserError("--steps must be at least 4, --threads at least 1")
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

    crf = pyseg.nn.CRFasRNN(
        len(CLASSES), spatial_sigma=12.0, color_sigma=40.0, smoothness_sigma=1.5, appearance=2.0, smoothness=1.0
    )
    try:
        model = pyseg.models.deeplab(
            arguments.backbone, len(CLASSES), 8, crf, width=64, dropout=0.1, mean=MEAN, std=STD
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    started = time.perf_counter()
    first, last = train(model, arguments.steps)
    taken = time.perf_counter() - started
    print(f"{arguments.steps} steps in {taken:.0f} s: loss {first:.3f} at first, {last:.3f} at last")

    scores = {"DeepLab": mean_iou(Unary(model)), "DeepLab with CRF": mean_iou(model)}
    for name, score in scores.items():
        print(f"{name:18}mean IoU {score:.3f}")
    image, labels = scenes(1)
    with torch.inference_mode():
        plain, refined = model.unary(image).argmax(1), model(image).argmax(1)
    draw(arguments.output, image[0], [labels[0], plain[0], refined[0]])
    print(f"wrote {arguments.output}")
    without, with_crf = scores.values()
    if last > MOST_LOSS * first:
        print(f"deeplab_crf: the loss must at least halve, from {first:.3f}, got {last:.3f}", file=sys.stderr)
        return 1
    if with_crf <= without:
        print(f"deeplab_crf: with the CRF the IoU must be above {without:.3f}, got {with_crf:.3f}", file=sys.stderr)
        return 1
    return 0


def train(model, steps: int) -> tuple[float, float]:
    """Its cross-entropy in the first and the last steps: without, then through the CRF."""
    import torch

    loss_of = torch.nn.CrossEntropyLoss()
    own = [parameter for name, parameter in model.named_parameters() if not name.startswith("crf.")]
    groups = [{"params": own, "lr": 2e-3}, {"params": model.crf.parameters(), "lr": 2e-2}]
    optimiser = torch.optim.AdamW(groups, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [2e-3, 2e-2], total_steps=steps)
    model.train()
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        images, labels = scenes(BATCH)
        jointly = step >= steps - steps // 4
        loss = loss_of(model(images) if jointly else model.unary(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if sys.stderr.isatty():
            done = 30 * (step + 1) // steps
            line = f"{step + 1}/{steps}, loss {losses[-1]:.3f}, {time.perf_counter() - start:.0f} s"
            print(f"\r\033[K[{'#' * done}{'.' * (30 - done)}] {line}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    model.eval()
    return statistics.fmean(losses[:AVERAGED]), statistics.fmean(losses[-AVERAGED:])


class Unary:
    """The network without its CRF, as a model."""

    def __init__(self, model) -> None:
        self.model = model

    def eval(self) -> None:
        self.model.eval()

    def __call__(self, image):
        return self.model.unary(image)


def draw(path: Path, image, labels: list) -> None:
    import numpy as np

    from pyseg.visualize import save_panel

    palette = np.array(COLORS, np.uint8)
    photo = ((image + 2) / 4).clamp(0, 1).mul(255).byte().movedim(0, 2).numpy()
    try:
        save_panel(
            path,
            [photo, *[palette[each.numpy()] for each in labels]],
            ["scene", "drawn", "DeepLab", "with CRF"],
            caption="  ".join(CLASSES[1:]),
        )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
