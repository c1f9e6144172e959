"""Trains a small U-Net from scratch to find cell nuclei in a stained tissue section, with pyseg's losses.

    .venv/bin/python examples/train_unet_cells.py                    # about two minutes on two cores
    .venv/bin/python examples/train_unet_cells.py --steps 400 -o nuclei.png
    .venv/bin/python examples/train_unet_cells.py --augment        # U-Net's elastic deformations too

The image is scikit-image's `immunohistochemistry`, which comes with the library. It has no labels of its own: they are
made here by a classical method (stain separation, Otsu's threshold, watershed), so the network learns to do what that
does, on the left three quarters; the right quarter is only looked at to measure. First border-weighted cross-entropy
and Dice, so that touching nuclei come apart, then the Hausdorff distance as well, which pulls in what lies far off.
Writes a picture with curves and masks, and prints what the losses cost in one training step, here and in other
libraries.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CROP, BATCH = 128, 4
SPLIT = 0.75  # of the width, for training
HAUSDORFF_SHARE = 0.25  # of the steps, the last ones
BORDER = {"w0": 5.0, "sigma": 4.0}


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        run(parse_arguments())
    except UserError as error:
        print(f"train_unet_cells: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("nuclei.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=240, help="of training, default %(default)s")
    parser.add_argument(
        "--augment", action="store_true", help="deform, turn and scale crops (U-Net, section 3.1), not only mirror them"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    if arguments.steps < 4 or arguments.threads < 1:
        raise UserError("--steps must be at least 4 and --threads at least 1")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import matplotlib  # noqa: F401
        import skimage  # noqa: F401
        import torch

        import pyseg  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)

    image, instances = tissue()
    width = int(image.shape[2] * SPLIT)
    print(f"{instances.max()} nuclei by stain separation, Otsu's threshold and watershed; {width} columns to train on")
    network = unet(3, 2)
    before = evaluate(network, image[..., width:], instances[:, width:])
    losses = train(network, image[..., :width], instances[:, :width], arguments.steps, arguments.augment)
    say("")
    after = evaluate(network, image[..., width:], instances[:, width:])

    if arguments.augment:
        print("trained on augmented crops: compare the last row with a run without --augment")
    print(f"\n{'right quarter':24}{'IoU':>8}{'HD95':>10}")
    for name, (iou, distance, _) in (("before training", before), ("after training", after)):
        print(f"{name:24}{iou:8.3f}{distance:7.1f} px" + (", nothing found" if distance == float("inf") else ""))
    taken = time.perf_counter() - started
    print(f"trained in {taken:.0f} s, {arguments.steps} steps of {BATCH} crops of {CROP}x{CROP}")
    print_costs()
    picture(arguments.output, image[..., width:], instances[:, width:], before, after, losses)
    print(f"wrote {arguments.output}; done in {time.perf_counter() - started:.0f} s")


def say(line: str) -> None:
    """Shows progress: on a terminal in one line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


# ---- data ----


def tissue():
    """The image [3, H, W] in -1 to 1 and its nuclei [H, W], 0 for what is none."""
    import numpy as np
    import torch
    from scipy import ndimage
    from skimage import color, data, feature, filters, measure, morphology, segmentation

    photo = data.immunohistochemistry()
    stain = filters.gaussian(color.rgb2hed(photo)[..., 0], 1.5)  # haematoxylin stains nuclei
    nuclei = morphology.remove_small_objects(stain > filters.threshold_otsu(stain), max_size=40)
    nuclei = ndimage.binary_fill_holes(nuclei)
    depth = ndimage.distance_transform_edt(nuclei)
    peaks = feature.peak_local_max(depth, min_distance=6, labels=measure.label(nuclei))
    seeds = np.zeros(nuclei.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    # The watershed's lines are background, so that touching nuclei have a gap that the border weights can find.
    instances = segmentation.watershed(-depth, seeds, mask=nuclei, watershed_line=True)
    image = torch.from_numpy(photo).movedim(2, 0).float() / 127.5 - 1
    return image, torch.from_numpy(instances.astype(np.int32))


def crops(image, maps: list) -> Iterator[tuple]:
    """Batches of random crops of the image and of each map [H, W], turned and mirrored, without end."""
    import torch

    height, width = image.shape[1:]
    while True:
        batch = []
        for _ in range(BATCH):
            top, left = (int(torch.randint(size - CROP + 1, ())) for size in (height, width))
            turns, mirrored = int(torch.randint(4, ())), bool(torch.randint(2, ()))
            cut = [m[..., top : top + CROP, left : left + CROP].rot90(turns, (-2, -1)) for m in (image, *maps)]
            batch.append([m.flip(-1) if mirrored else m for m in cut])
        yield tuple(torch.stack(column) for column in zip(*batch, strict=True))


def augmented_crops(image, instances) -> Iterator[tuple]:
    """Batches of random crops, each warped in one pass with its nuclei; border weights of the warped nuclei."""
    import torch

    from pyseg.functional import unet_border_weights
    from pyseg.nn import JointAugmentation

    generator = torch.Generator().manual_seed(int(torch.randint(1 << 31, ())))
    augment = JointAugmentation(CROP, sigma=5.0, rotation=180.0, brightness=0.05, contrast=0.1, generator=generator)
    images, labels = image.expand(BATCH, -1, -1, -1), instances.expand(BATCH, -1, -1)
    while True:
        x, objects = augment(images, labels)
        yield x, objects, unet_border_weights(objects, **BORDER)


# ---- network ----


def unet(channels_in: int, classes: int, width: int = 12):
    """Three levels, two convolutions each, with skip connections."""
    import torch
    from torch import nn

    def level(before: int, after: int):
        layers = []
        for channels in (before, after):
            layers.append(nn.Conv2d(channels, after, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [width, 2 * width, 4 * width]
            self.down = nn.ModuleList([level(a, b) for a, b in zip([channels_in, *widths], widths, strict=False)])
            self.up = nn.ModuleList([level(a + b, a) for a, b in itertools.pairwise(widths)])
            self.head = nn.Conv2d(width, classes, 1)

        def forward(self, x):
            skips = []
            for i, stage in enumerate(self.down):
                x = stage(x if i == 0 else nn.functional.max_pool2d(x, 2))
                skips.append(x)
            x = skips.pop()
            for stage in reversed(self.up):
                skip = skips.pop()
                x = nn.functional.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)
                x = stage(torch.cat([skip, x], 1))
            return self.head(x)

    return UNet()


def train(network, image, instances, steps: int, augment: bool = False) -> list[float]:
    """The loss of every step."""
    import torch

    from pyseg.functional import unet_border_weights
    from pyseg.nn import CrossEntropyLoss, DiceLoss, HausdorffDTLoss

    border = unet_border_weights(instances, **BORDER)
    batches = augmented_crops(image, instances) if augment else crops(image, [instances, border])
    entropy, dice, hausdorff = CrossEntropyLoss(), DiceLoss(), HausdorffDTLoss(include_background=False)
    optimiser = torch.optim.Adam(network.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    network.train()
    losses = []
    last = int(steps * (1 - HAUSDORFF_SHARE))
    for step, (x, objects, weights) in zip(range(steps), batches, strict=False):
        target = (objects > 0).long()
        logits = network(x)
        overlap = dice(logits, target)
        loss = overlap + entropy(logits, target, pixel_weight=weights)
        if step >= last:
            distance = hausdorff(logits, target)
            # As large as Dice, as Karimi and Salcudean weigh it.
            loss = loss + distance * (overlap.detach() / distance.detach().clamp_min(1e-6))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        done = 40 * (step + 1) // steps
        name = "Dice + border-weighted CE" + (" + Hausdorff" if step >= last else "")
        say(f"[{'#' * done}{'.' * (40 - done)}] {step + 1}/{steps}  {name} {losses[-1]:.3f}")
    return losses


# ---- figures ----


def evaluate(network, image, instances) -> tuple:
    """IoU, the 95th percentile of the distances between boundaries (HD95) in pixels, and the mask."""
    import torch

    network.eval()
    with torch.inference_mode():
        mask = network(image[None]).argmax(1)[0] > 0
    true = instances > 0
    union = (mask | true).sum().item()
    iou = (mask & true).sum().item() / union if union else 1.0
    return iou, hd95(mask, true), mask


def hd95(first, second) -> float:
    """The 95th percentile of the distances of each mask's boundary pixels to the other's boundary."""
    import torch

    from pyseg.functional import distance_transform

    # Boundary pixels: in the mask, and as near to its outside as can be.
    edges = [m & (distance_transform(m, squared=True) == 1) for m in (first, second)]
    if not all(edge.any() for edge in edges):
        return float("inf")
    there, back = (distance_transform(~to)[of] for of, to in (edges, edges[::-1]))
    return torch.cat([there, back]).quantile(0.95).item()


def print_costs() -> None:
    """Forward and backward of the losses alone, on logits of 4x2x256x256: pyseg, torch, and MONAI where installed."""
    import torch
    from torch.nn import functional as F

    from pyseg.nn import DiceCELoss, HausdorffDTLoss

    generator = torch.Generator().manual_seed(0)
    small = torch.randn(BATCH, 4, 12, 12, generator=generator)
    maps = F.interpolate(small, (256, 256), mode="bilinear")
    logits, target = 3 * maps[:, :2], maps[:, 2:].argmax(1)

    def torch_dice_ce(x, t):
        p, g = x.softmax(1), F.one_hot(t, 2).movedim(-1, 1)
        overlap = (2 * (p * g).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + g.sum((2, 3)) + 1e-5)
        return 1 - overlap.mean() + F.cross_entropy(x, t)

    rows: dict[str, dict[str, Callable]] = {
        "Dice + cross-entropy": {"pyseg": DiceCELoss(), "torch": torch_dice_ce},
        "Hausdorff by distances": {"pyseg": HausdorffDTLoss(include_background=False)},
    }
    try:
        from monai import losses
    except ImportError:
        print("\nMONAI is not installed: left out of what follows")
    else:
        arguments = {"softmax": True, "to_onehot_y": True}
        for row, kind in zip(rows.values(), (losses.DiceCELoss, losses.HausdorffDTLoss), strict=True):
            loss = kind(**arguments)
            row["MONAI"] = lambda x, t, loss=loss: loss(x, t.unsqueeze(1))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print("\nthe losses in one training step of 4x2x256x256 logits, ms (medians of 5)")
    print(f"{'':24}" + "".join(f"{name:>10}" for name in names))
    for title, row in rows.items():
        cells = [f"{milliseconds(row[name], logits, target):10.1f}" if name in row else f"{'-':>10}" for name in names]
        print(f"{title:24}" + "".join(cells))


def milliseconds(loss: Callable, logits, target) -> float:
    import torch

    times = []
    for _ in range(6):
        x = logits.detach().requires_grad_()
        start = time.perf_counter()
        torch.autograd.grad(loss(x, target), x)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def picture(path: Path, image, instances, before: tuple, after: tuple, losses: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    photo = ((image + 1) / 2).movedim(0, 2).numpy()
    figure, axes = plt.subplots(1, 5, figsize=(17, 5.5), gridspec_kw={"width_ratios": [1, 1, 1, 1, 2.2]})
    titles = ["image", "classical labels", "before training", "after training"]
    for axis, title, mask in zip(axes, titles, [None, instances > 0, before[2], after[2]], strict=False):
        axis.imshow(photo)
        if mask is not None:
            axis.contour(mask.numpy(), [0.5], colors="yellow", linewidths=0.8)
        axis.set_title(title)
        axis.set_axis_off()
    curve = axes[-1]
    curve.plot(losses)
    curve.axvline(int(len(losses) * (1 - HAUSDORFF_SHARE)), color="grey", linestyle=":")
    curve.set_title(f"loss; right of the line with Hausdorff\nIoU {before[0]:.2f} to {after[0]:.2f}, HD95 "
                    f"{before[1]:.0f} to {after[1]:.0f} px")  # fmt: skip
    curve.set_xlabel("step")
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
