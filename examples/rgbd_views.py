"""Trains a small FuseNet on rendered rooms, and measures what the fusion of several views brings to a keyframe.

    .venv/bin/python examples/rgbd_views.py                       # about a minute of computation
    .venv/bin/python examples/rgbd_views.py --steps 400 --views 12 -o rooms.png

The rooms are ray-cast here: floor, walls, boxes, balls and columns, in colours and stripes that do not give the class
away, from cameras that look at the same place. FuseNet (Hazirbas et al. 2016) learns from single images, with noise in
colour and depth and with holes, by a cross-entropy at every scale of its decoder. Then each held-out room's frames are
segmented one by one, warped into a keyframe by the rooms' surfaces, and fused (Ma et al. 2017, 1703.08866). Prints the
mean IoU of the keyframe's own prediction and of Bayesian, sum and max fusion, writes a picture of one room, and fails
where Bayesian fusion does not gain --least over the single view.
"""

import argparse
import os
import sys
import time
from pathlib import Path

CLASSES = ("floor", "wall", "box", "ball", "column")
COLORS = ((120, 120, 120), (200, 190, 160), (220, 80, 70), (80, 140, 230), (90, 190, 110))
HEIGHT, WIDTH, FOCAL = 48, 64, 56.0  # pixels
BATCH, WIDTHS = 8, (12, 24, 32)
COLOR_NOISE, DEPTH_NOISE, HOLES = 0.25, 0.04, 0.1
HELD_OUT = 1_000_000  # rooms from this number on are not trained on


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"rgbd_views: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("views.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=250, help=f"of training with {BATCH} images, default %(default)s")
    parser.add_argument("--views", type=int, default=8, help="frames beside the keyframe, default %(default)s")
    parser.add_argument("--rooms", type=int, default=20, help="held-out rooms to measure on, default %(default)s")
    parser.add_argument("--least", type=float, default=0.02, help="gain in mean IoU to reach, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if min(arguments.steps, arguments.views, arguments.rooms, arguments.threads) < 1 or arguments.seed < 0:
        raise UserError("--steps, --views, --rooms and --threads must be at least 1, --seed at least 0")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import PIL  # noqa: F401
        import torch

        from pyseg.models import FuseNet
    except ImportError as error:
        raise UserError(f"{error}; the example needs Pillow") from error
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)

    model = FuseNet(len(CLASSES), WIDTHS, (1, 1, 1), dropout=0.0)
    started = time.perf_counter()
    train(model, arguments.steps, arguments.seed)
    print(f"trained in {time.perf_counter() - started:.0f} s, {arguments.steps} steps of {BATCH} images")

    scores, shown = measure(model, arguments.rooms, arguments.views)
    print(f"\n{arguments.rooms} held-out rooms, {arguments.views} frames and the keyframe{'mean IoU':>12}")
    for name, value in scores.items():
        print(f"{name:44}{value:12.3f}")
    draw(arguments.output, shown)
    print(f"wrote {arguments.output}; done in {time.perf_counter() - started:.0f} s")
    gain = scores["Bayesian fusion"] - scores["single view"]
    if gain < arguments.least:
        print(f"rgbd_views: Bayesian fusion must gain {arguments.least} over one view, got {gain:.3f}", file=sys.stderr)
        return 1
    return 0


# ---- rooms ----


def render(room: int, views: int) -> dict:
    """`views` images of a room: image [V, 3, H, W], depth [V, 1, H, W], label [V, H, W], pose (to the world) [V, 4, 4].

    depth has noise and holes (0); surface is the depth without, as mapping makes it of many frames. The same in every
    call.
    """
    import torch

    g = torch.Generator().manual_seed(room)
    u = lambda *shape: torch.rand(shape, generator=g)  # noqa: E731
    poses = torch.stack([look_at_room(u(4)) for _ in range(views)])
    v, h = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    rays = torch.stack([(h - (WIDTH - 1) / 2) / FOCAL, (v - (HEIGHT - 1) / 2) / FOCAL, torch.ones(HEIGHT, WIDTH)], -1)
    rays = torch.einsum("vij,hwj->vhwi", poses[:, :3, :3], rays)  # whose z in the camera is 1: t is the depth
    origin = poses[:, None, None, :3, 3]

    nearest = torch.full(rays.shape[:3], torch.inf)
    label = torch.zeros(rays.shape[:3], dtype=torch.int64)
    thing = torch.zeros_like(label)
    for number, (kind, hit) in enumerate(hits_of_things(origin, rays, u)):
        closer = hit < nearest
        nearest = torch.where(closer, hit, nearest)
        label[closer], thing[closer] = kind, number
    point = origin + nearest.unsqueeze(-1) * rays

    # Any colour for any class, in stripes of the world, which all views see alike.
    color, other, waves = u(32, 3), u(32, 3), 6 * u(32, 3)
    stripe = torch.sin(2 * (point * waves[thing]).sum(-1, keepdim=True)) > 0.3
    image = torch.where(stripe, 0.7 * color[thing] + 0.3 * other[thing], color[thing])
    image = image + COLOR_NOISE * torch.randn(image.shape, generator=g)
    depth = nearest * (1 + DEPTH_NOISE * torch.randn(nearest.shape, generator=g))
    depth[u(*depth.shape) < HOLES] = 0
    maps = {"image": image.movedim(3, 1), "depth": depth.unsqueeze(1), "surface": nearest, "label": label}
    return {**maps, "pose": poses}


def look_at_room(random):
    """A camera at one side of the room that looks at its middle: camera to world, x right, y down, z ahead."""
    import torch

    angle = float(random[0] - 0.5) * 0.9
    place = torch.tensor([3.2 * torch.sin(torch.tensor(angle)), -1.0 - 0.8 * float(random[1]), -3.0])
    target = torch.tensor([0.6 * float(random[2] - 0.5), -0.5, 0.6 * float(random[3])])
    ahead = torch.nn.functional.normalize(target - place, dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), ahead), dim=0)
    pose = torch.eye(4)
    pose[:3] = torch.stack([right, torch.linalg.cross(ahead, right), ahead, place], 1)
    return pose


def hits_of_things(origin, rays, u):
    """Class and distance along the rays, infinity where they miss, of everything in a room whose floor is y = 0."""
    import torch

    def plane(axis: int, at: float):
        t = (at - origin[..., axis]) / rays[..., axis]
        return torch.where(t > 0, t, torch.inf)

    def between(low, high):  # the slabs of a box
        near = torch.minimum((low - origin) / rays, (high - origin) / rays).amax(-1)
        far = torch.maximum((low - origin) / rays, (high - origin) / rays).amin(-1)
        return torch.where((near < far) & (near > 0), near, torch.inf)

    def round_thing(centre, radius: float, axes: list[int]):  # a sphere, or a cylinder along the axis that is left out
        o, d = (origin - centre)[..., axes], rays[..., axes]
        a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - radius**2
        root = b * b - a * c
        t = (-b - root.clamp_min(0).sqrt()) / a
        return torch.where((root > 0) & (t > 0), t, torch.inf)

    yield 0, plane(1, 0.0)
    for axis, at in ((2, 3.0), (0, -3.5), (0, 3.5)):
        yield 1, plane(axis, at)
    for i in range(9):
        kind = 2 + i % 3
        place = torch.tensor([4.4, 0.0, 4.0]) * (u(3) - torch.tensor([0.5, 0.0, 0.35]))
        size = 0.25 + 0.3 * u(3)
        if kind == 2:
            low, high = (place + size * torch.tensor(corner) for corner in ((-1.0, -2.0, -1.0), (1.0, 0.0, 1.0)))
            yield kind, between(low, high)
        elif kind == 3:
            yield kind, round_thing(place - torch.tensor([0.0, float(size[0]), 0.0]), float(size[0]), [0, 1, 2])
        else:
            t = round_thing(place, 0.6 * float(size[0]), [0, 2])
            y = origin[..., 1] + t * rays[..., 1]
            yield kind, torch.where((y < 0) & (y > -1.2 - float(size[1])), t, torch.inf)


def inputs(data: dict):
    """What the network takes: colours and inverse depth around 0, holes 0."""
    import torch

    depth = data["depth"]
    return data["image"] - 0.5, torch.where(depth > 0, 4 / depth.clamp_min(0.5) - 1, 0.0)


# ---- training and fusion ----


def train(model, steps: int, seed: int) -> None:
    import torch

    from pyseg.functional import multiscale_cross_entropy

    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        rooms = [render(seed * 10_000 + 2 * step + i, BATCH // 2) for i in range(2)]
        data = {key: torch.cat([room[key] for room in rooms]) for key in rooms[0]}
        loss = multiscale_cross_entropy(model(*inputs(data)), data["label"], generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if sys.stderr.isatty():
            print(f"\r\033[Kstep {step + 1}/{steps}, loss {loss.item():.3f}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


def measure(model, rooms: int, views: int) -> tuple[dict[str, float], dict]:
    """Mean IoU of each way, and the first room's images."""
    import torch

    from pyseg.functional import iou, warp_and_fuse
    from pyseg.nn import ConfusionMatrix

    modes = {"Bayesian fusion": "bayes", "sum fusion": "sum", "max fusion": "max"}
    matrices = {name: ConfusionMatrix(len(CLASSES)) for name in ("single view", *modes)}
    intrinsics = torch.tensor([[FOCAL, 0, (WIDTH - 1) / 2], [0, FOCAL, (HEIGHT - 1) / 2], [0, 0, 1]]).unsqueeze(0)
    shown: dict = {}
    model.eval()
    with torch.inference_mode():
        for room in range(rooms):
            data = render(HELD_OUT + room, views + 1)  # the first is the keyframe
            logits = model(*inputs(data))[0]
            pose = torch.linalg.inv(data["pose"][1:]) @ data["pose"][0]
            depth = data["surface"]
            cameras = (intrinsics, intrinsics.expand(views, -1, -1), pose, depth[1:])
            results = {"single view": logits[:1]}
            for name, mode in modes.items():
                results[name] = warp_and_fuse(
                    logits[1:],
                    depth[:1],
                    *cameras,
                    key_scores=logits[:1],
                    mode=mode,
                    absolute_tolerance=0.05,
                    relative_tolerance=0.05,
                )
            for name, result in results.items():
                matrices[name].update(result, data["label"][:1])
            if room == 0:
                shown = {"image": data["image"][0], "label": data["label"][0]}
                shown.update({name: result[0].argmax(0) for name, result in results.items()})
    return {name: iou(matrix.compute(), reduction="mean").item() for name, matrix in matrices.items()}, shown


def draw(path: Path, shown: dict) -> None:
    import numpy as np

    from pyseg.visualize import save_panel

    palette = np.array(COLORS, np.uint8)
    enlarged = lambda image: image.repeat(5, 0).repeat(5, 1)  # noqa: E731
    photo = shown["image"].clamp(0, 1).mul(255).byte().movedim(0, 2).numpy()
    names = ("label", "single view", "Bayesian fusion", "sum fusion")
    images = [photo, *(palette[shown[name].numpy()] for name in names)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_panel(path, [enlarged(i) for i in images], ["keyframe", "truth", *names[1:]], 5 * HEIGHT)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
