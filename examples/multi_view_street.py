"""Segments several views of a street together: labels of one view reach all of them.

    .venv/bin/python examples/multi_view_street.py                         # a few seconds on two cores
    .venv/bin/python examples/multi_view_street.py --views 6 --seed 2 -o street.png

The street is drawn here by casting rays: facades with windows, road, pavement, parked cars and trees, seen by a camera
that drives along it. Only the view in the middle is labelled, by hand as it were: a tenth of its blocks are wrong. From
it a classifier of colour and height learns (a Gaussian a class); a dense CRF sharpens its map in each view by itself,
which is the baseline. Then all views are segmented as one random field (Xiao and Quan 2009): points of the scene, a
tenth of their observations wrong matches, link the pixels that see them. Prints accuracy and mean IoU a view, writes a
picture, and fails where the linked views stay below --least or below the baseline.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

CLASSES = ("sky", "facade", "road", "pavement", "car", "tree")
COLORS = ((120, 180, 240), (180, 90, 60), (90, 90, 100), (200, 180, 160), (60, 60, 220), (60, 160, 60))
SKY, FACADE, ROAD, PAVEMENT, CAR, TREE = range(6)
EYE_HEIGHT, STEP = 2.2, 1.2  # of the camera and between views, in metres
WRONG = 0.1  # of the labels, and of the observations of points
BLOCK = 8  # pixels of the blocks that are labelled wrongly
TRUST = 0.9  # in a label
EVIDENCE = 0.5  # of colour and height, beside what the CRF knows
COLOR_SIGMA = 25.0  # of observations that belong together, of 0 to 255
CRF = {"smoothness": 2.0, "appearance": 4.0, "spatial_sigma": 30.0, "color_sigma": 12.0}


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"multi_view_street: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("street.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--views", type=int, default=4, help="2 to 12, default %(default)s")
    parser.add_argument("--height", type=int, default=120, help="of a view in pixels, default %(default)s")
    parser.add_argument("--points", type=int, default=15000, help="of the scene that link views, default %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="iterations of mean field, default %(default)s")
    parser.add_argument("--least", type=float, default=0.7, help="mean IoU to reach, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the street, default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if not 2 <= arguments.views <= 12 or not 32 <= arguments.height <= 1000:
        raise UserError("--views must be 2 to 12 and --height 32 to 1000")
    if min(arguments.points, arguments.steps, arguments.threads) < 1 or arguments.seed < 0:
        raise UserError("--points, --steps and --threads must be at least 1, --seed at least 0")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import PIL  # noqa: F401
        import torch

        from pyseg import models
        from pyseg.functional import dense_crf, track_links
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)

    size = (arguments.height, arguments.height * 4 // 3)
    cameras, centres = cameras_of_drive(arguments.views, size)
    photos, truth, depth = render(street(), cameras, centres, size)
    points = points_of_scene(depth, cameras, centres, arguments.points)
    tracks = mistaken(models.observe_points(points, cameras, size, depth), size)
    weights = models.color_agreement(photos, tracks, COLOR_SIGMA)
    links = track_links(tracks, truth.shape, weights)
    say("")
    print(
        f"{arguments.views} views of {size[1]}x{size[0]}, {len(points)} points seen {len(tracks)} times, "
        f"{len(links.columns) // 2} links"
    )

    labels = labels_of_one_view(truth, arguments.views // 2)
    unary = EVIDENCE * classifier(photos, labels) + models.label_energies(labels, len(CLASSES), TRUST)
    results = {"classifier": unary.argmin(1)}
    say("every view by itself")
    results["single views"] = dense_crf(unary, photos, iterations=arguments.steps, output="labels", **CRF)
    say("all views together")
    clock = time.perf_counter()
    results["linked views"] = models.multi_view_crf(
        unary, photos, links, iterations=arguments.steps, output="labels", **CRF
    )
    taken = time.perf_counter() - clock
    say("")
    print(f"{arguments.steps} iterations over all views in {taken:.2f} s\n\naccuracy and mean IoU of each view")
    scores = {name: report(name, result, truth) for name, result in results.items()}
    draw(arguments.output, {"photographs": photos, "truth": truth, **results})
    print(f"wrote {arguments.output}; done in {time.perf_counter() - started:.0f} s")
    least = max(arguments.least, scores["single views"])
    if scores["linked views"] < least:
        print(
            f"multi_view_street: mean IoU of the linked views must be at least {least:.3f}, "
            f"got {scores['linked views']:.3f}",
            file=sys.stderr,
        )
        return 1
    return 0


# ---- what is known of the street ----


def classifier(photos, labels):
    """Energies [M, C, H, W] of a Gaussian in colour and height for each class, fitted to what is labelled."""
    import torch

    views, _, height, width = photos.shape
    row = torch.linspace(-1, 1, height).view(1, 1, -1, 1).expand(views, 1, height, width)
    smooth = torch.nn.functional.avg_pool2d(photos.float() / 64 - 2, 3, 1, 1, count_include_pad=False)
    features = torch.cat([smooth, 2 * row], 1).movedim(1, -1)  # [M, H, W, 4]
    energies = []
    for label in range(len(CLASSES)):
        own = features[labels == label]
        if len(own) < 2:
            raise UserError(f"the labels must show some {CLASSES[label]}: try another --seed")
        spread = own.T.cov() + 0.02 * torch.eye(4)
        from_mean = features - own.mean(0)
        distance = (from_mean @ spread.inverse() * from_mean).sum(-1)
        energies.append((distance + spread.logdet()) / 2 - math.log(len(own)))
    return -(-torch.stack(energies, 1)).clamp_min(-50).log_softmax(1).clamp_min(math.log(0.01))


def labels_of_one_view(truth, view: int):
    """Label maps [M, H, W], -1 in all views but one, which is wrong in some of its blocks."""
    import torch

    height, width = truth.shape[1:]
    places = -(-height // BLOCK), -(-width // BLOCK)
    guess = torch.where(torch.rand(places) < WRONG, torch.randint(len(CLASSES), places), -1)
    guess = guess.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:height, :width]
    labels = torch.full_like(truth, -1)
    labels[view] = torch.where(guess >= 0, guess, truth[view])
    return labels


def mistaken(tracks, size):
    """Tracks some of whose observations lie anywhere, as those of wrong matches do."""
    import torch

    wrong = torch.rand(len(tracks)) < WRONG
    tracks = tracks.clone()
    for column, length in ((2, size[0]), (3, size[1])):
        tracks[wrong, column] = torch.randint(length, (int(wrong.sum()),))
    return tracks


def points_of_scene(depth, cameras, centres, count: int):
    """[K, 3]: what random pixels of all views see, but for the sky."""
    import torch

    view, y, x = (depth < FAR).nonzero().T
    chosen = torch.randperm(len(view))[:count]
    view, y, x = view[chosen], y[chosen], x[chosen]
    pixels = torch.stack([x, y, torch.ones_like(x)], 1).float()
    rays = torch.linalg.solve(cameras[view, :, :3], pixels)
    return centres[view] + rays * depth[view, y, x, None]


# ---- the street ----

# x along the street, y to its other side, z up, in metres. The camera drives along y = 0.
FAR = 1e6  # where the sky is
KERB, FACADES = 5.5, 9.0  # y
LENGTH = (-15.0, 60.0)  # x


def street():
    """Rectangles (origin, edge, edge, label, colour) and balls (centre, radius, label, colour)."""
    import torch

    def uniform(low: float, high: float) -> float:
        return float(torch.rand(())) * (high - low) + low

    def tint(color: tuple[float, ...], spread: float) -> tuple[float, ...]:
        return tuple(channel + uniform(-spread, spread) for channel in color)

    rectangles: list[tuple] = []
    balls: list[tuple] = []

    def box(low: tuple[float, ...], high: tuple[float, ...], label: int, color: tuple[float, ...]) -> None:
        """The sides that a camera sees: in front, to the left and right, and on top."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        up, along, away = (0, 0, z1 - z0), (x1 - x0, 0, 0), (0, y1 - y0, 0)
        rectangles.append((low, along, up, label, color))
        rectangles.append((low, away, up, label, tuple(0.7 * channel for channel in color)))
        rectangles.append(((x1, y0, z0), away, up, label, tuple(0.8 * channel for channel in color)))
        rectangles.append(((x0, y0, z1), along, away, label, tuple(1.15 * channel for channel in color)))

    start, end = LENGTH
    rectangles.append(((start - 20, -20, 0), (end - start + 60, 0, 0), (0, KERB + 20, 0), ROAD, (95, 95, 100)))
    rectangles.append(((start - 20, KERB, 0.12), (end - start + 60, 0, 0), (0, 60, 0), PAVEMENT, (150, 145, 140)))
    rectangles.append(((start - 20, KERB, 0), (end - start + 60, 0, 0), (0, 0, 0.12), PAVEMENT, (170, 165, 160)))
    x = start
    while x < end:
        width = uniform(5, 9)
        walls = tint((150, 125, 110), 45)
        box((x, FACADES, 0), (x + width, FACADES + 8, uniform(5, 10)), FACADE, walls)
        x += width + (uniform(1.5, 4) if uniform(0, 1) < 0.4 else 0)
    x = start
    while x < end:
        paint = tint((120, 110, 120), 80)
        box((x, 3.4, 0.3), (x + 4.2, 5.1, 0.95), CAR, paint)
        box((x + 0.8, 3.6, 0.95), (x + 3.4, 4.9, 1.5), CAR, tint((60, 70, 85), 10))
        x += uniform(5.5, 11)
    x = start + 3
    while x < end:
        box((x - 0.12, 6.4, 0.1), (x + 0.12, 6.6, 2.8), TREE, (85, 65, 45))
        leaves = tint((70, 110, 50), 20)
        for _ in range(6):
            place = (x + uniform(-0.9, 0.9), 6.5 + uniform(-0.6, 0.6), uniform(2.6, 4.4))
            balls.append((place, uniform(0.6, 1.1), TREE, tint(leaves, 12)))
        x += uniform(6, 11)
    return rectangles, balls


def cameras_of_drive(views: int, size):
    """Cameras [M, 3, 4] of views [H, W] = size along the street, and where they stand [M, 3]."""
    import torch

    height, width = size
    focal, yaw = 0.75 * width, math.radians(62)
    inner = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, 0.62 * (height - 1)], [0, 0, 1]])
    forward = torch.tensor([math.cos(yaw), math.sin(yaw), 0.0])
    down = torch.tensor([0.0, 0.0, -1.0])
    turn = torch.stack([torch.linalg.cross(down, forward), down, forward])  # right, down, forward
    centres = torch.tensor([[STEP * view, 0.3 * math.sin(view), EYE_HEIGHT] for view in range(views)])
    return torch.stack([inner @ torch.cat([turn, -(turn @ c)[:, None]], 1) for c in centres]), centres


def render(scene, cameras, centres, size):
    """Photographs [M, 3, H, W] uint8, labels [M, H, W] and depths [M, H, W], FAR for the sky."""
    import torch

    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1).float()
    photos, labels, depths = [], [], []
    for view, (camera, centre) in enumerate(zip(cameras, centres, strict=True)):
        say(f"drawing view {view + 1} of {len(cameras)}")
        rays = torch.linalg.inv(camera[:, :3]) @ pixels  # of depth 1
        color, label, depth = cast(scene, centre, rays)
        exposure = 1 + 0.1 * math.sin(2.1 * view)
        color = color * exposure + 5 * torch.randn(color.shape)
        photos.append(color.clamp(0, 255).byte().reshape(3, height, width))
        labels.append(label.reshape(height, width))
        depths.append(depth.reshape(height, width))
    return torch.stack(photos), torch.stack(labels), torch.stack(depths)


def cast(scene, centre, rays):
    """Colours [3, P], labels [P] and depths [P] of what rays [3, P] from a place hit first."""
    import torch

    depth = torch.full(rays.shape[1:], FAR)
    label = torch.full(rays.shape[1:], SKY)
    haze = (rays[2] / rays.norm(dim=0)).clamp(0, 1)
    color = torch.tensor([[175.0], [195.0], [215.0]]) - haze * torch.tensor([[70.0], [45.0], [5.0]])
    rectangles, balls = scene
    for number, (origin, along, up, kind, paint) in enumerate(rectangles):
        along, up, start = (torch.tensor(vector).float() for vector in (along, up, origin))
        start -= centre
        normal = torch.linalg.cross(along, up)
        distance = (normal @ start) / (normal @ rays)
        place = distance * rays - start[:, None]
        s, t = along @ place / along.norm(), up @ place / up.norm()
        inside = (s >= 0) & (s <= along.norm()) & (t >= 0) & (t <= up.norm())
        seen = inside & (distance > 0.1) & (distance < depth)
        depth[seen], label[seen] = distance[seen], kind
        color[:, seen] = texture(kind, paint, s[seen], t[seen], number)
    for number, (place, radius, kind, paint) in enumerate(balls):
        start = torch.tensor(place) - centre
        square, middle = rays.square().sum(0), start @ rays
        under = middle.square() - square * (start.square().sum() - radius**2)
        distance = (middle - under.clamp_min(0).sqrt()) / square
        seen = (under > 0) & (distance > 0.1) & (distance < depth)
        depth[seen], label[seen] = distance[seen], kind
        hit = distance[seen] * rays[:, seen] + centre[:, None]
        color[:, seen] = texture(kind, paint, hit[0] + hit[1], hit[2] + 0.4 * hit[1], number)
    return color, label, depth


def texture(kind: int, paint, s, t, number: int):
    """Colours [3, P] at places s, t of a surface, in metres: its paint, grains, and windows."""
    import torch

    grain = {ROAD: (6.0, 10.0), PAVEMENT: (1.6, 12.0), FACADE: (3.0, 12.0), CAR: (1.0, 6.0), TREE: (6.0, 28.0)}
    scale, contrast = grain[kind]
    color = torch.tensor(paint).float()[:, None].expand(3, len(s)).clone()
    if kind == FACADE:
        window = (s % 2 > 0.5) & (s % 2 < 1.5) & (t % 2.8 > 0.9) & (t % 2.8 < 2.3)
        color[:, window] = torch.tensor([[70.0], [85.0], [105.0]]) + 25 * torch.sin(s[window] // 2 * 7 + number)
    coarse = torch.sin((s * scale).floor() * 12.9898 + (t * scale).floor() * 78.233 + number) * 43758.5453
    return color + contrast * (2 * (coarse - coarse.floor()) - 1)


# ---- figures ----


def report(name: str, result, truth) -> float:
    """Prints accuracy and mean IoU of each view; the mean IoU over all views."""
    from pyseg.functional import confusion_matrix, iou, pixel_accuracy

    matrix = confusion_matrix(result, truth, len(CLASSES), per_image=True)
    accuracy, overlap = pixel_accuracy(matrix), iou(matrix, reduction="mean")
    total = iou(matrix.sum(0), reduction="mean").item()
    each = "".join(f"   {a:.3f} {o:.3f}" for a, o in zip(accuracy, overlap, strict=True))
    print(f"{name:14}{each}   all {pixel_accuracy(matrix.sum(0)):.3f} {total:.3f}")
    return total


def draw(path: Path, columns: dict) -> None:
    """Photographs and label maps of all views, one below the other."""
    import numpy as np

    from pyseg.visualize import save_panel

    palette = np.array(COLORS, np.uint8)
    pictures = [
        np.concatenate(list(column.movedim(1, -1).numpy() if column.dim() == 4 else palette[column.numpy()]))
        for column in columns.values()
    ]
    try:
        save_panel(path, pictures, list(columns), height=len(next(iter(columns.values()))) * 210)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def say(text: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
