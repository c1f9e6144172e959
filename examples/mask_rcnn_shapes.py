"""Trains a small Mask R-CNN from scratch to find overlapping coloured shapes, with pyseg's kernels in its place.

    .venv/bin/python examples/mask_rcnn_shapes.py                        # about two minutes on two cores
    .venv/bin/python examples/mask_rcnn_shapes.py --steps 1000 -o shapes.png

The images are drawn here: one to four circles, squares and triangles of random size and colour, those that come later
over those before. The network is torchvision's MaskRCNN over a small residual network with a feature pyramid;
`pyseg.accelerate` changes its convolutions, pooling, suppression, mask targets and mask pasting, for training and then
for inference, and says what that brought. Prints the average precision (pycocotools) on images that were not trained
on, writes a picture of some of them, and fails where the loss has not halved or AP50 of boxes or masks stays below
--least.
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SIDE, BATCH = 128, 8  # pixels, images
CLASSES = ("background", "circle", "square", "triangle")
SHOWN = 6  # images
LEAST_SCORE = 0.5  # of what is drawn
MOST_LOSS, AVERAGED = 0.5, 10  # of what it was at first; means of that many steps at each end
HELD_OUT = 0  # their series; training images are of those after it


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"mask_rcnn_shapes: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("shapes.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help=f"of training with {BATCH} images, default %(default)s")
    parser.add_argument("--held-out", type=int, default=100, help="images to measure on, default %(default)s")
    parser.add_argument("--least", type=float, default=0.8, help="AP50 to reach, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if min(arguments.steps, arguments.held_out, arguments.threads) < 1 or arguments.seed < 0:
        raise UserError("--steps, --held-out and --threads must be at least 1, --seed at least 0")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import pycocotools  # noqa: F401
        import torch
        import torchvision  # noqa: F401

        import pyseg
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)

    network = mask_rcnn()
    accelerate(network.train(), next(batches(HELD_OUT)), "one training step")
    first, last = train(network, arguments.steps, HELD_OUT + 1 + arguments.seed)
    taken = time.perf_counter() - started
    print(f"trained in {taken:.0f} s, {arguments.steps} steps of {BATCH} images of {SIDE}x{SIDE}")
    print(f"loss {first:.2f} at first, {last:.2f} at last")

    images, targets = next(batches(HELD_OUT, arguments.held_out))
    pyseg.restore(network).eval()
    accelerate(network, (images[:BATCH],), f"inference on {BATCH} images")
    detections = detect(network, images)
    print(f"\n{f'{len(images)} held-out images':24}{'AP':>8}{'AP50':>8}")
    reached = []
    for kind, name in (("bbox", "boxes"), ("segm", "masks")):
        precision, precision50 = average_precision(detections, targets, kind)
        print(f"{name:>24}{precision:8.3f}{precision50:8.3f}")
        reached.append(precision50)
    picture(arguments.output, images, detections)
    print(f"wrote {arguments.output}; done in {time.perf_counter() - started:.0f} s")
    failed = False
    if last > MOST_LOSS * first:
        print(f"mask_rcnn_shapes: the loss must at least halve, from {first:.2f}, got {last:.2f}", file=sys.stderr)
        failed = True
    if min(reached) < arguments.least:
        print(f"mask_rcnn_shapes: AP50 must be at least {arguments.least}, got {min(reached):.3f}", file=sys.stderr)
        failed = True
    return int(failed)


# ---- data ----


def draw(series: int, number: int):
    """One image of a series, [3, SIDE, SIDE] in 0 to 1, and its target as torchvision's detectors take it."""
    import numpy as np
    import torch

    rng = np.random.default_rng((series, number))
    background = rng.random(3)
    image = np.broadcast_to(background[:, None, None], (3, SIDE, SIDE)).copy()
    shapes: list[np.ndarray] = []  # whole
    masks: list[np.ndarray] = []  # what is seen of them
    labels = []
    count = rng.integers(1, 5)
    while len(labels) < count:
        label = int(rng.integers(1, len(CLASSES)))
        radius = rng.uniform(10, 28)
        inside = shape(CLASSES[label], *rng.uniform(radius, SIDE - radius, 2), radius)
        seen = [mask & ~inside for mask in masks]
        color = rng.random(3)
        # At least half of each is seen, and none has the background's colour.
        hidden = any(2 * mask.sum() < whole.sum() for mask, whole in zip(seen, shapes, strict=True))
        if hidden or abs(color - background).max() < 0.2:
            continue
        shapes.append(inside)
        masks = [*seen, inside]
        labels.append(label)
        image[:, inside] = color[:, None]
    image = (image + rng.normal(0, 0.02, image.shape)).clip(0, 1)
    target = {
        "boxes": torch.tensor([box_of(mask) for mask in masks], dtype=torch.float32),
        "labels": torch.tensor(labels),
        "masks": torch.from_numpy(np.stack(masks)).to(torch.uint8),
    }
    return torch.from_numpy(image.astype(np.float32)), target


def shape(name: str, x: float, y: float, radius: float):
    """The pixels whose centres lie in the shape: [SIDE, SIDE] bool."""
    import numpy as np

    dy, dx = np.mgrid[:SIDE, :SIDE] + 0.5
    dx, dy = dx - x, dy - y
    if name == "circle":
        return dx**2 + dy**2 <= radius**2
    half = radius if name == "square" else (dy + radius) / 2  # of a triangle: grows from its tip down
    return (abs(dx) <= half) & (abs(dy) <= radius)


def box_of(mask) -> list[int]:
    """x1, y1, x2, y2 of a mask's outermost pixels, in pixels' edges."""
    (rows,), (columns,) = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def batches(series: int, size: int = BATCH) -> Iterator[tuple[list, list]]:
    """Lists of images and of targets, without end."""
    for first in itertools.count(0, size):
        images, targets = zip(*(draw(series, first + i) for i in range(size)), strict=True)
        yield list(images), list(targets)


# ---- network ----


def mask_rcnn():
    """torchvision's Mask R-CNN over a pyramid of three levels of a residual network, all small."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.ops import MultiScaleRoIAlign

    width, levels = 64, ["0", "1", "2"]
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    layers = {f"layer{1 + int(level)}": level for level in levels}
    anchors = AnchorGenerator(((16,), (32,), (64,), (96,)), ((0.5, 1.0, 2.0),) * 4)  # the fourth level: every other
    return MaskRCNN(
        BackboneWithFPN(network, layers, [64, 128, 256], width),  # pixel of the third
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
        box_head=TwoMLPHead(width * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, len(CLASSES)),
        box_batch_size_per_image=32,
        box_detections_per_img=20,
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
        mask_head=MaskRCNNHeads(width, (width, width), 1),
        mask_predictor=MaskRCNNPredictor(width, width, len(CLASSES)),
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )


def accelerate(network, example: tuple, what: str) -> None:
    """pyseg.accelerate, and a line for each part of the detector that it changed."""
    import pyseg

    # Losses are means over samples that the network draws among its own proposals, and a rounding error in a score may
    # let it draw others.
    pyseg.accelerate(network, example, tolerance=0.2 if network.training else None, progress=say)
    say("")
    report = pyseg.report(network)
    print(f"\n{what + ', ms':32}{'before':>8}{'after':>8}")
    for row in report.rows:
        if row.became and row.before_ms is not None and "->" not in row.original:  # that is a convolution
            print(f"{row.name:32}{row.before_ms:8.1f}{row.after_ms:8.1f}  {row.became}")
    if report.before_ms is not None:
        print(f"{'the whole network':32}{report.before_ms:8.1f}{report.after_ms:8.1f}")
    for note in report.notes:
        print(note)


def train(network, steps: int, series: int) -> tuple[float, float]:
    """The loss in the first and in the last steps."""
    import torch

    rate = 2e-3
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    start, mean = time.perf_counter(), 0.0
    seen: list[float] = []
    for step, (images, targets) in zip(range(1, steps + 1), batches(series), strict=False):
        losses = network(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        seen.append(loss.item())
        mean += (seen[-1] - mean) / min(step, 20)
        left = (time.perf_counter() - start) / step * (steps - step)
        done = 40 * step // steps
        say(f"[{'#' * done}{'.' * (40 - done)}] {step}/{steps}  loss {mean:.3f}, {left:.0f} s left")
    say("")
    return statistics.fmean(seen[:AVERAGED]), statistics.fmean(seen[-AVERAGED:])


def say(line: str) -> None:
    """Shows progress: on a terminal in one line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


# ---- what is measured and shown ----


def detect(network, images: list) -> list[dict]:
    """What the network finds in each image: boxes, labels, scores, and masks [K, SIDE, SIDE] bool."""
    import torch

    found = []
    with torch.inference_mode():
        for first in range(0, len(images), BATCH):
            for each in network(images[first : first + BATCH]):
                each["masks"] = each["masks"][:, 0] > 0.5
                found.append(each)
    return found


def average_precision(detections: list[dict], targets: list[dict], kind: str) -> tuple[float, float]:
    """AP and AP50 of boxes ("bbox") or masks ("segm"), by pycocotools."""
    import numpy as np
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(results: list[dict]) -> Iterator[dict]:
        for image_id, result in enumerate(results, 1):
            for i, (x1, y1, x2, y2) in enumerate(result["boxes"].tolist()):
                mask = coco_mask.encode(np.asfortranarray(result["masks"][i].numpy().astype(np.uint8)))
                score = result["scores"][i].item() if "scores" in result else 1.0
                row = {"image_id": image_id, "category_id": int(result["labels"][i]), "score": score}
                shown = {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": mask}
                yield {**row, **shown, "area": float(coco_mask.area(mask)), "iscrowd": 0}

    def data(results: list[dict]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, len(results) + 1)],
            "categories": [{"id": i} for i in range(1, len(CLASSES))],
            "annotations": [{**row, "id": i} for i, row in enumerate(rows(results), 1)],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(data(targets), data(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def picture(path: Path, images: list, detections: list[dict]) -> None:
    """The first held-out images with what was found in them, twice as large."""
    import numpy as np

    from pyseg.visualize import display_instances, save_panel

    drawn = []
    for image, found in zip(images[:SHOWN], detections, strict=False):
        sure = found["scores"] >= LEAST_SCORE
        boxes, masks, labels, scores = (found[key][sure].numpy() for key in ("boxes", "masks", "labels", "scores"))
        pixels = np.rint(image.movedim(0, 2).numpy() * 255).astype(np.uint8).repeat(3, 0).repeat(3, 1)
        large = masks.repeat(3, 1).repeat(3, 2)
        drawn.append(display_instances(pixels, 3 * boxes, large, labels.tolist(), CLASSES, scores.tolist()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_panel(path, drawn, [f"held-out image {i}" for i in range(1, len(drawn) + 1)], height=3 * SIDE)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
