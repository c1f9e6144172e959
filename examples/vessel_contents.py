"""Finds glass vessels in drawn scenes and what is in them, with valve filters (Eppel 2017, 1710.05126).

    .venv/bin/python examples/vessel_contents.py                       # 81 s of processor time
    .venv/bin/python examples/vessel_contents.py --steps 400 -o vessels.png

Vessels hold liquid, foam, solids and air; the same materials lie about outside of them. A first network finds the
vessels. Second networks, trained on the true regions, tell the contents apart: one without the region, three that are
given it as valve filters in the first layer, as one more channel, or by blackening the rest of the image. Prints each
one's mean IoU of the four contents on images that were not trained on, and that of the two stages joined; fails where
the valves stay below --least or below the network without region. Writes a picture of some scenes.
"""

import argparse
import os
import sys
import time
from pathlib import Path

CLASSES = ("background", "air", "liquid", "foam", "solid")
COLORS = ((30, 30, 30), (130, 200, 255), (60, 90, 230), (250, 250, 200), (200, 110, 40))
SIDE, BATCH, WIDTH = 64, 8, 12
KINDS = {
    "none": "without region",
    "concat": "one more channel",
    "mask": "blackened outside",
    "valve": "valve filters",
}
SHOWN = 3


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"vessel_contents: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("vessels.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=160, help=f"of {BATCH} images a network, default %(default)s")
    parser.add_argument("--images", type=int, default=400, help="to train on, default %(default)s")
    parser.add_argument("--held-out", type=int, default=96, help="images to measure on, default %(default)s")
    parser.add_argument("--least", type=float, default=0.6, help="mean IoU to reach, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if min(arguments.steps, arguments.threads) < 1 or min(arguments.images, arguments.held_out) < BATCH:
        raise UserError(f"--steps and --threads must be at least 1, --images and --held-out at least {BATCH}")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import PIL  # noqa: F401
        import torch

        from pyseg.models import HierarchicalSegmenter, RegionUNet
    except ImportError as error:
        raise UserError(f"{error}; the example needs Pillow") from error
    torch.set_num_threads(arguments.threads)
    started, cpu_started = time.perf_counter(), time.process_time()

    generator = torch.Generator().manual_seed(arguments.seed)
    training, held_out = scenes(arguments.images, generator), scenes(arguments.held_out, generator)

    torch.manual_seed(arguments.seed)
    objects = RegionUNet(2, "none", WIDTH)
    train(objects, training, arguments.steps, "vessels", lambda labels: (labels > 0).long())
    reached, networks = {}, {}
    print(f"mean IoU of {', '.join(CLASSES[1:])} on {arguments.held_out} images after {arguments.steps} steps")
    for kind, title in KINDS.items():
        torch.manual_seed(arguments.seed)
        networks[kind] = RegionUNet(len(CLASSES), kind, WIDTH)
        train(networks[kind], training, arguments.steps, title)
        reached[kind] = mean_iou(networks[kind], held_out)
        print(f"{title:24}{reached[kind]:8.3f}", flush=True)
    system = HierarchicalSegmenter(objects, networks["valve"]).eval()
    predicted = torch.cat([system.predict(images) for images in held_out[0].split(BATCH)])
    print(f"{'both stages':24}{score(predicted, held_out[1]):8.3f}   vessels found by the first")
    draw(arguments.output, held_out, predicted, networks["none"].eval())
    taken, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    print(f"wrote {arguments.output}; {taken:.0f} s, {cpu:.0f} s of processor time")

    if reached["valve"] < arguments.least or reached["valve"] <= reached["none"]:
        wanted = f"{arguments.least} and beat {reached['none']:.3f} without region"
        print(f"vessel_contents: valve filters must reach {wanted}, got {reached['valve']:.3f}", file=sys.stderr)
        return 1
    return 0


# ---- data ----


def scenes(count: int, generator):
    """Images [N, 3, SIDE, SIDE] of about unit variance with labels [N, SIDE, SIDE]: one or two vessels each."""
    import torch

    drawn = [scene(generator) for _ in range(count)]
    images = torch.stack([image for image, _ in drawn])
    return (images - 0.5) / 0.25, torch.stack([labels for _, labels in drawn])


def scene(generator):
    import torch

    y, x = torch.meshgrid(torch.arange(SIDE).float(), torch.arange(SIDE).float(), indexing="ij")

    def number(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def noise(scale: int):
        """Blobs of `scale` pixels."""
        small = torch.rand(1, 1, SIDE // scale + 1, SIDE // scale + 1, generator=generator)
        return torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear", align_corners=True)[0, 0]

    def material(kind: str):
        """[3, SIDE, SIDE]: liquid is smooth, foam bright and bubbly, solids grainy, each in any colour of its range."""
        tint = torch.rand(3, 1, 1, generator=generator)
        if kind == "liquid":
            return 0.15 + 0.6 * tint + 0.06 * noise(16)
        if kind == "foam":
            return 0.65 + 0.15 * tint + 0.3 * (noise(2) - 0.5)
        return (
            0.2
            + 0.4 * tint * torch.tensor([1.0, 0.8, 0.5])[:, None, None]
            + 0.5 * (torch.rand(SIDE, SIDE, generator=generator) - 0.5)
        )

    image = torch.rand(3, 1, 1, generator=generator) * 0.6 + 0.2 + 0.3 * (noise(12) - 0.5)
    for _ in range(7):  # the same materials, in front of nothing
        u, v = x - number(0, SIDE), y - number(0, SIDE)
        wide, high = number(4, 13), number(4, 13)
        inside = (u.abs() < wide) & (v.abs() < high) if number(0, 1) < 0.6 else (u / wide) ** 2 + (v / high) ** 2 < 1
        image = torch.where(inside, material(("liquid", "foam", "solid")[int(number(0, 3))]), image)

    labels = torch.zeros(SIDE, SIDE, dtype=torch.int64)
    two = number(0, 1) < 0.5
    for place in range(2 if two else 1):
        centre = number(14, 18) + 30 * place if two else number(16, SIDE - 16)
        half, height, bottom = number(8, 13), number(24, 44), number(40, SIDE - 4)
        u, v = x - centre, (bottom - y) / height  # v: 0 at the bottom, 1 at the top
        profile = {0: half + 0 * v, 1: half * (1.15 - 0.7 * v), 2: torch.where(v < 0.65, half, 0.45 * half)}[
            int(number(0, 3))
        ]
        vessel = (u.abs() < profile) & (v > 0) & (v < 1)
        inner = (u.abs() < profile - 1.5) & (v > 1.5 / height) & (v < 1)
        glass = image * 0.85 + 0.12
        image = torch.where(vessel, torch.where(inner, glass, 0.25 * glass + 0.65 + 0.1 * noise(4)), image)
        levels = torch.rand(3, generator=generator) * torch.tensor([0.35, 0.5, 0.3])
        levels[torch.rand(3, generator=generator) < 0.3] = 0
        labels[vessel] = 1
        low = 0.0
        for kind, level in zip((4, 2, 3), levels.tolist(), strict=True):  # solids sink, foam floats
            part = inner & (v >= low) & (v < low + level)
            image = torch.where(part, material(CLASSES[kind]), image)
            labels[part] = kind
            low += level
    return (image + 0.03 * torch.randn(3, SIDE, SIDE, generator=generator)).clamp(0, 1), labels


# ---- training ----


def train(model, data, steps: int, title: str, target=lambda labels: labels) -> None:
    """On the true regions."""
    import torch

    from pyseg.nn import DiceCELoss

    images, labels = data
    loss_of = DiceCELoss()
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=max(2, steps))
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        batch, wanted = images[chosen], labels[chosen]
        if step % 2:
            batch, wanted = batch.flip(-1), wanted.flip(-1)
        region = (wanted > 0).unsqueeze(1)
        loss = loss_of(model(batch, region), target(wanted))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if sys.stderr.isatty():
            text = f"{title}: step {step + 1}/{steps}, loss {loss.item():.3f}"
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    model.eval()


def mean_iou(model, data) -> float:
    """Of the contents, with the true regions."""
    import torch

    images, labels = data
    with torch.inference_mode():
        predicted = [
            model(batch, (wanted > 0).unsqueeze(1)).argmax(1)
            for batch, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True)
        ]
    return score(torch.cat(predicted), labels)


def score(predicted, labels) -> float:
    from pyseg.functional import confusion_matrix, iou

    matrix = confusion_matrix(predicted, labels, len(CLASSES))
    return iou(matrix, reduction="mean", classes=range(1, len(CLASSES))).item()


# ---- figures ----


def draw(path: Path, data, predicted, without) -> None:
    """Rows of scenes: image, true labels, the two stages, the network without region."""
    import numpy as np
    import torch

    from pyseg.visualize import save_panel

    images, labels = (each[:SHOWN] for each in data)
    with torch.inference_mode():
        plain = without(images).argmax(1)
    palette = np.array(COLORS, np.uint8)
    photos = (images * 0.25 + 0.5).clamp(0, 1).mul(255).byte().movedim(1, 3).numpy()
    columns = [photos, *[palette[each.numpy()] for each in (labels, predicted[:SHOWN], plain)]]
    stacked = [np.concatenate(list(each)) for each in columns]
    try:
        save_panel(
            path,
            [image.repeat(4, 0).repeat(4, 1) for image in stacked],
            ["scene", "drawn", "two stages, valves", "without region"],
            height=SHOWN * 4 * SIDE,
            caption="blue: liquid, light blue: air, yellow: foam, brown: solid",
        )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
