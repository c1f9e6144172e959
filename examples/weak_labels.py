"""Learns to segment drawn shapes from weak labels: the classes of each image, or boxes (DeepLab-EM).

    .venv/bin/python examples/weak_labels.py                       # about a minute on two cores
    .venv/bin/python examples/weak_labels.py --steps 200 --seed 1 -o weak.png

A small fully convolutional network sees noisy scenes of one or two shapes and is told only which classes are in each.
It first learns to classify whole scenes by pooled scores, as the paper's networks start from classification; from
there EM-Fixed and EM-Adapt (Papandreou et al. 2015) estimate the masks while it learns. Beside them stand the same
without biases; boxes, filled and cut out by a dense CRF; half of the masks, with EM-Adapt on the other half; and all
masks. Prints the mean IoU of each on scenes that none has seen, and writes a picture. The exit status is 1 where
EM-Adapt does not reach its mark or does not beat what has no biases.
"""

import argparse
import copy
import os
import sys
import time
from pathlib import Path

CLASSES = ("background", "disc", "square", "triangle", "ring")
COLORS = ((40, 40, 40), (200, 90, 70), (80, 120, 200), (190, 170, 70), (90, 170, 110))
SIDE, BATCH, TRAINING = 64, 8, 128
MARK = 0.45  # mean IoU that EM-Adapt must reach with the default steps


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"weak_labels: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("weak.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="of each training, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 1 or arguments.threads < 1:
        raise UserError("--steps and --threads must be at least 1")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import PIL  # noqa: F401
        import torch

        from pyseg.models import EMAdapt, EMFixed
    except ImportError as error:
        raise UserError(f"{error}; the example needs Pillow") from error
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1234)
    held_out = scenes(48)
    torch.manual_seed(arguments.seed)
    training = scenes(TRAINING)
    half = torch.arange(TRAINING) % 2 == 0
    started = time.perf_counter()
    pooled = train("pooled scores", network(), pooled_step, training, arguments.steps)
    methods = {  # name -> arguments of em_step
        "EM without biases": {"method": EMFixed(0, 0, exclude_absent=True)},
        "EM-Fixed": {"method": EMFixed()},
        "EM-Adapt": {"method": EMAdapt()},
        "boxes, filled": {"masks": box_masks(training, crf=False)},
        "boxes, dense CRF": {"masks": box_masks(training, crf=True)},
        "half of the masks": {"method": EMAdapt(), "masks": training.masks, "strong": half},
        "all masks": {"masks": training.masks},
    }
    print(f"mean IoU on {len(held_out.images)} scenes, trained on {TRAINING}:")
    scores, predicted = {}, {}
    for name, supervision in {"pooled scores": None, **methods}.items():
        model = pooled
        if supervision is not None:
            torch.manual_seed(arguments.seed)
            model = train(name, copy.deepcopy(pooled), em(**supervision), training, arguments.steps)
        scores[name], predicted[name] = evaluate(model, held_out)
        print(f"  {name:<18} {scores[name]:.3f}", flush=True)
    draw(arguments.output, held_out, predicted)
    taken = time.perf_counter() - started
    print(f"{len(scores)} times {arguments.steps} steps of {BATCH} scenes in {taken:.0f} s; wrote {arguments.output}")
    baseline = max(scores["pooled scores"], scores["EM without biases"])
    reached = scores["EM-Adapt"] >= MARK and scores["EM-Adapt"] > baseline
    verdict = "reached" if reached else "MISSED"
    print(f"EM-Adapt {scores['EM-Adapt']:.3f}, {verdict}: at least {MARK} and more than {baseline:.3f} without biases")
    return 0 if reached else 1


# ---- data ----


class Scenes:
    """Images [N, 3, SIDE, SIDE] of 0 to 255, masks [N, SIDE, SIDE], and each image's boxes [K, 4] with classes [K]."""

    def __init__(self, images, masks, boxes, classes) -> None:
        self.images, self.masks, self.boxes, self.classes = images, masks, boxes, classes


def scenes(count: int) -> Scenes:
    """One or two shapes of different classes each, the second in front, in shades of their colours over noise."""
    import torch

    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    ramp = torch.stack([x, y]).float().div(SIDE).sub(0.5)
    tilt = 40 * torch.randn(count, 2)
    images = (
        90 + 25 * torch.randn(count, 3, 1, 1) + torch.einsum("nk,khw->nhw", tilt, ramp)[:, None].expand(-1, 3, -1, -1)
    )
    images = images + 25 * torch.randn(count, 3, SIDE, SIDE)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    all_boxes, all_classes = [], []
    for image, mask in zip(images, masks, strict=True):
        kinds = torch.randperm(len(CLASSES) - 1)[: int(torch.randint(1, 3, ()))] + 1
        boxes = []
        for kind in kinds.tolist():
            radius = float(torch.randint(SIDE // 5, SIDE // 3, ()))
            u, v = (axis - int(torch.randint(SIDE // 5, 4 * SIDE // 5, ())) for axis in (x, y))
            distance = (u**2 + v**2).sqrt()
            inside = {
                1: distance < radius,
                2: torch.maximum(u.abs(), v.abs()) < 0.85 * radius,
                3: (v < 0.7 * radius) & (v > 2 * u.abs() - radius),
                4: (distance < radius) & (distance > 0.45 * radius),
            }[kind]
            mask[inside] = kind
            shade = torch.tensor(COLORS[kind]).unsqueeze(1) + 15 * torch.randn(3, 1)
            image[:, inside] = shade + 25 * torch.randn(3, int(inside.sum()))
            rows, columns = inside.nonzero().unbind(1)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        all_boxes.append(torch.tensor(boxes).float())
        all_classes.append(kinds)
    return Scenes(images.clamp(0, 255), masks, all_boxes, all_classes)


# ---- network and training ----


def network():
    """Four 3x3 convolutions at half the resolution, dilated to see 31 pixels of it, and a linear classifier."""
    from torch import nn

    from pyseg.nn import AtrousConv2d

    def block(inputs: int, outputs: int, stride: int, dilation: int):
        conv = AtrousConv2d(inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, 24, 2, 1),
        *block(24, 32, 1, 1),
        *block(32, 32, 1, 2),
        *block(32, 32, 1, 4),
        nn.Conv2d(32, len(CLASSES), 1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    )


def normalised(images):
    return (images - 100) / 50


def em(masks=None, strong=None, **supervision):
    """A step on the scenes of numbers `chosen`: of all of them the network is told the classes."""
    from pyseg.models import em_step, image_labels

    def step(model, data: Scenes, chosen):
        return em_step(
            model,
            normalised(data.images[chosen]),
            image_labels(data.masks[chosen], len(CLASSES)),
            masks=None if masks is None else masks[chosen],
            strong=None if strong is None else strong[chosen],
            **supervision,
        ).loss

    return step


def pooled_step(model, data: Scenes, chosen):
    """Classification of whole scenes by the mean of the pixels' scores above the background's."""
    from torch.nn import functional as F

    from pyseg.models import image_labels

    logits = model(normalised(data.images[chosen]))
    scores = (logits[:, 1:] - logits[:, :1]).flatten(2).mean(2)
    return F.binary_cross_entropy_with_logits(scores, image_labels(data.masks[chosen], len(CLASSES))[:, 1:].float())


def box_masks(data: Scenes, crf: bool):
    """Masks [N, SIDE, SIDE] of the scenes' boxes."""
    import torch

    from pyseg.models import box_crf_labels, box_labels

    return torch.stack(
        [
            box_crf_labels(image, boxes, classes, spatial_sigma=20.0, color_sigma=40.0)
            if crf
            else box_labels(boxes, classes, (SIDE, SIDE))
            for image, boxes, classes in zip(data.images, data.boxes, data.classes, strict=True)
        ]
    )


def train(name: str, model, step, data: Scenes, steps: int):
    import torch

    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=max(steps, 2))
    model.train()
    for i in range(steps):
        loss = step(model, data, torch.randint(len(data.images), (BATCH,)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if sys.stderr.isatty():
            print(f"\r\033[K{name}: step {i + 1}/{steps}, loss {loss.item():.3f}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return model.eval()


def evaluate(model, data: Scenes):
    """The mean IoU over the classes, and labels [N, SIDE, SIDE]."""
    import torch

    from pyseg.functional import confusion_matrix, iou

    with torch.inference_mode():
        logits = model(normalised(data.images))
        return iou(confusion_matrix(logits, data.masks), reduction="mean").item(), logits.argmax(1)


# ---- picture ----


def draw(path: Path, data: Scenes, predicted: dict) -> None:
    import numpy as np

    from pyseg.visualize import save_panel

    palette = np.array(COLORS, np.uint8)
    shown = slice(0, 3)  # scenes, one below the other

    def column(images):
        return np.concatenate(list(images), 0)

    photos = column(data.images[shown].byte().movedim(1, 3).numpy())
    panels = [photos, column(palette[data.masks[shown].numpy()])]
    panels += [column(palette[labels[shown].numpy()]) for labels in predicted.values()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_panel(path, panels, ["scene", "drawn", *predicted], height=600, caption="  ".join(CLASSES[1:]))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
