"""Trains a network to segment what a sentence refers to, in drawn scenes of coloured shapes.

    .venv/bin/python examples/referring_expressions.py                   # about three minutes on two cores
    .venv/bin/python examples/referring_expressions.py --steps 1000 -o expressions.png

Each scene has four to six discs, squares and triangles in few colours, and sentences that fit exactly one of them: by
its attributes ("the red square"), its size ("the largest disc"), its place ("the topmost blue shape") or its place
beside another ("the red square left of the blue disc"). `pyseg.models.ReferringSegmenter` (Hu, Rohrbach, Darrell 2016,
1603.06180) learns both the words and the shapes from the masks alone. Beside it learns the same network that is given
zeros instead of the sentence's vector. Prints the overall IoU of both (sum of intersections over sum of unions, as in
the paper) on scenes that were not trained on, writes a picture of some of them, and fails where the first stays below
--least or does not beat the other by half.
"""

import argparse
import os
import sys
import time
from pathlib import Path

SIDE = 64  # pixels
SCENES, SENTENCES = 8, 4  # of a step, and of a scene
SHOWN = 6  # scenes
LEARNING_RATE = 3e-3
HELD_OUT = 0  # their series; training scenes are of those after it

KINDS = ("disc", "square", "triangle")
COLORS = {"red": (0.85, 0.2, 0.2), "green": (0.25, 0.7, 0.3), "blue": (0.2, 0.35, 0.9), "yellow": (0.95, 0.85, 0.2)}
FORMS = ("attributes", "size", "place", "relation")
EXTREMES = (("leftmost", "rightmost"), ("topmost", "bottommost"))  # along x and y
SIDES = (("left of", "right of"), ("above", "below"))
WORDS = ("", "the", "shape", *KINDS, *COLORS, "largest", "smallest", *EXTREMES[0], *EXTREMES[1])
WORDS += ("left", "right", "of", "above", "below")
LONGEST = 9  # words


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"referring_expressions: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("expressions.png"), help="PNG to write (%(default)s)")
    steps = f"of training with {SCENES} scenes, {SENTENCES} sentences each; default %(default)s"
    parser.add_argument("--steps", type=int, default=600, help=steps)
    parser.add_argument("--held-out", type=int, default=200, help="scenes to measure on, default %(default)s")
    parser.add_argument("--least", type=float, default=0.6, help="overall IoU to reach, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if min(arguments.held_out, arguments.threads) < 1 or arguments.steps < 2 or arguments.seed < 0:
        raise UserError("--held-out and --threads must be at least 1, --steps at least 2, --seed at least 0")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import PIL  # noqa: F401
        import torch

        import pyseg  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    torch.set_num_threads(arguments.threads)

    started = time.perf_counter()
    held_out = [scene(HELD_OUT, number) for number in range(arguments.held_out)]
    rows, networks = {}, {}
    for name, blind in (("with the sentence", False), ("without", True)):
        torch.manual_seed(arguments.seed)
        networks[name] = network(blind)
        before = time.perf_counter()
        train(networks[name], arguments.steps, HELD_OUT + 1 + arguments.seed, name)
        seconds = time.perf_counter() - before
        rows[name] = overall_iou(networks[name], held_out)
        print(f"trained {name} in {seconds:.0f} s, {arguments.steps} steps", flush=True)

    title = f"overall IoU, {arguments.held_out} held-out scenes"
    print(f"\n{title:34}{'all':>12}" + "".join(f"{form:>12}" for form in FORMS))
    for name, values in rows.items():
        print(f"{name:>34}" + "".join(f"{value:12.3f}" for value in values))
    picture(arguments.output, networks["with the sentence"], held_out[:SHOWN])
    print(f"wrote {arguments.output}; done in {time.perf_counter() - started:.0f} s")
    reached, blind_iou = rows["with the sentence"][0], rows["without"][0]
    least = max(arguments.least, 1.5 * blind_iou)
    if reached < least:
        message = f"overall IoU must be at least {least:.3f}, got {reached:.3f} ({blind_iou:.3f} without the sentence)"
        print(f"referring_expressions: {message}", file=sys.stderr)
        return 1
    return 0


# ---- scenes ----


def scene(series: int, number: int):
    """Image [3, SIDE, SIDE], words [SENTENCES, LONGEST], masks [SENTENCES, SIDE, SIDE], and the sentences' forms."""
    import numpy as np

    rng = np.random.default_rng((series, number))
    while True:
        shapes = draw_shapes(rng)
        sentences = sentences_about(shapes)
        if sentences["relation"]:
            break
    inside = [mask_of(shape) for shape in shapes]
    image = np.full((SIDE, SIDE, 3), rng.uniform(0.4, 0.6, 3))
    for (_, color, *_), mask in zip(shapes, inside, strict=True):
        image[mask] = np.array(COLORS[color]) * rng.uniform(0.85, 1.1) + rng.normal(0, 0.04, 3)
    image += rng.normal(0, 0.05, image.shape)

    forms = [form for form in FORMS if sentences[form]]
    words = np.zeros((SENTENCES, LONGEST), np.int64)
    chosen = [forms[i % len(forms)] for i in range(SENTENCES)]
    masks = np.empty((SENTENCES, SIDE, SIDE), bool)
    for i, form in enumerate(chosen):
        sentence, meant = sentences[form][rng.integers(len(sentences[form]))]
        numbers = [WORDS.index(word) for word in sentence.split()]
        words[i, : len(numbers)] = numbers
        masks[i] = inside[meant]
    return image.transpose(2, 0, 1).astype(np.float32), words, masks, [FORMS.index(form) for form in chosen]


def draw_shapes(rng) -> list:
    """Up to six (kind, colour, x, y, radius) that do not overlap, of two kinds and two or three colours."""
    kinds = rng.permutation(KINDS)[:2].tolist()
    colors = rng.permutation(list(COLORS))[: rng.integers(2, 4)].tolist()
    count = rng.integers(4, 7)
    shapes = []
    for size, across, down, kind, color in rng.random((40, 5)).tolist():
        radius = 6 + 5 * size
        x, y = (radius + 1 + place * (SIDE - 2 * radius - 2) for place in (across, down))
        if all((x - u) ** 2 + (y - v) ** 2 > (1.1 * (radius + r) + 1) ** 2 for *_, u, v, r in shapes):
            shapes.append((kinds[int(kind * len(kinds))], colors[int(color * len(colors))], x, y, radius))
        if len(shapes) == count:
            break
    return shapes


def mask_of(shape):
    import numpy as np

    kind, _, x, y, radius = shape
    v, u = np.mgrid[:SIDE, :SIDE] + 0.5
    u, v = u - x, v - y
    if kind == "disc":
        return u * u + v * v < radius**2
    if kind == "square":
        return np.maximum(abs(u), abs(v)) < 0.85 * radius
    return (v < 0.75 * radius) & (v > 2 * abs(u) - radius)


def sentences_about(shapes: list) -> dict:
    """Sentences that fit one of the shapes, clearly, by their form: (sentence, which shape)."""
    groups: dict[tuple, list[int]] = {}  # the shapes of a kind or any, and of a colour or any
    for i, (kind, color, *_) in enumerate(shapes):
        for key in ((kind, color), (kind, None), (None, color), (None, None)):
            groups.setdefault(key, []).append(i)

    def name(key: tuple) -> str:
        kind, color = key
        return f"{color + ' ' if color else ''}{kind or 'shape'}"

    found: dict[str, list] = {form: [] for form in FORMS}
    for key, members in groups.items():
        if len(members) == 1:
            found["attributes"].append((f"the {name(key)}", members[0]))
            continue
        by_size = sorted(members, key=lambda i: shapes[i][4])
        if shapes[by_size[-1]][4] > 1.3 * shapes[by_size[-2]][4]:
            found["size"].append((f"the largest {name(key)}", by_size[-1]))
        if shapes[by_size[1]][4] > 1.3 * shapes[by_size[0]][4]:
            found["size"].append((f"the smallest {name(key)}", by_size[0]))
        for axis, (low, high) in enumerate(EXTREMES):
            at = {i: shapes[i][2 + axis] for i in members}
            order = sorted(members, key=at.__getitem__)
            if at[order[1]] - at[order[0]] > 6:
                found["place"].append((f"the {low} {name(key)}", order[0]))
            if at[order[-1]] - at[order[-2]] > 6:
                found["place"].append((f"the {high} {name(key)}", order[-1]))
        found["relation"] += relations(shapes, key, members, groups, name)
    return found


def relations(shapes: list, key: tuple, members: list, groups: dict, name) -> list:
    """Those of several shapes of a kind that lie on one side of a shape that is alone in its kind and colour."""
    found = []
    if key[0] is None:
        return found
    for other, (landmark, *more) in groups.items():
        if more or None in other:
            continue
        for axis, words in enumerate(SIDES):
            distance = {i: shapes[i][2 + axis] - shapes[landmark][2 + axis] for i in members if i != landmark}
            if len(distance) < 2 or any(abs(d) < 6 for d in distance.values()):
                continue
            for sign, word in zip((-1, 1), words, strict=True):
                meant = [i for i, d in distance.items() if sign * d > 0]
                if len(meant) == 1:
                    found.append((f"the {name(key)} {word} the {name(other)}", meant[0]))
    return found


def batch(scenes: list):
    """images [B, 3, SIDE, SIDE], words [B * SENTENCES, LONGEST], masks [B * SENTENCES, SIDE, SIDE], forms of these."""
    import numpy as np
    import torch

    images, words, masks, forms = zip(*scenes, strict=True)
    joined = (np.stack(images), np.concatenate(words), np.concatenate(masks), np.concatenate(forms))
    return tuple(torch.from_numpy(each) for each in joined)


# ---- training ----


def network(blind: bool):
    """blind: with zeros for the sentence's vector."""
    from pyseg.models import ReferringSegmenter

    model = ReferringSegmenter(len(WORDS))
    if blind:
        model.sentence.register_forward_hook(lambda module, inputs, vector: vector * 0)
    return model


def train(model, steps: int, series: int, name: str) -> None:
    import torch

    from pyseg.nn import DiceCELoss

    loss_of = DiceCELoss(mode="binary")
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    model.train()
    for step in range(steps):
        images, words, masks, _ = batch([scene(series, step * SCENES + i) for i in range(SCENES)])
        loss = loss_of(model(images, words).unsqueeze(1), masks.unsqueeze(1))
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


def overall_iou(model, scenes: list) -> list[float]:
    """Intersections over unions, each summed over sentences: of all of them, and of those of each form."""
    import torch

    model.eval()
    sums = torch.zeros(2, len(FORMS), dtype=torch.int64)
    with torch.inference_mode():
        for first in range(0, len(scenes), SCENES):
            images, words, masks, forms = batch(scenes[first : first + SCENES])
            found = model(images, words) > 0
            for row, pixels in enumerate((found & masks, found | masks)):
                sums[row].index_add_(0, forms, pixels.sum((1, 2)))
    intersection, union = torch.cat([sums.sum(1, keepdim=True), sums], 1)
    return (intersection / union.clamp_min(1)).tolist()


# ---- picture ----


def picture(path: Path, model, scenes: list) -> None:
    """A column a scene: the image, then a row for each sentence with what was found for it."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    from pyseg.visualize import overlay_mask

    scale, caption, gap = 4, 16, 8
    images, words, _, _ = batch(scenes)
    with torch.inference_mode():
        found = model(images, words).sigmoid().unflatten(0, (len(scenes), SENTENCES)).numpy()
    width, height = SIDE * scale + gap, SIDE * scale + gap + caption
    sheet = Image.new("RGB", (len(scenes) * width + gap, (SENTENCES + 1) * height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = images.clamp(0, 1).mul(255).round().byte().movedim(1, -1).numpy()
    for column, (image, sentences, masks) in enumerate(
        zip(pixels, words.unflatten(0, (len(scenes), SENTENCES)), found, strict=True)
    ):
        large = image.repeat(scale, 0).repeat(scale, 1)
        rows = [(f"scene {column + 1}", large)]
        for numbers, mask in zip(sentences.tolist(), masks, strict=True):
            text = " ".join(WORDS[number] for number in numbers if number)
            marked = overlay_mask(large, mask.repeat(scale, 0).repeat(scale, 1), (255, 255, 255))
            rows.append((text, np.asarray(marked)))
        for row, (text, drawn) in enumerate(rows):
            x, y = gap + column * width, gap + row * height
            pen.text((x, y), text, fill="black")
            sheet.paste(Image.fromarray(drawn), (x, y + caption))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
