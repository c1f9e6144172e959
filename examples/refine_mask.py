"""Sharpens a coarse mask by the colours of its photograph, with a dense CRF.

    .venv/bin/python examples/refine_mask.py  # photographs of scikit-image, masks by U2-Net-p
    .venv/bin/python examples/refine_mask.py photo.jpg mask.png -o out.png  # white is the subject, grey is unsure
    .venv/bin/python examples/refine_mask.py photo.jpg scribbles.png --scribbles

Scribbles are strokes on a transparent or black ground, of one colour for each label: a few are enough. Writes the
refined mask (for scribbles: the label of each pixel in the colour of its stroke) as NAME_refined.png, and the way there
side by side as NAME_refinement.png. The network is the one of segment_photo.py.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from segment_photo import PHOTOS, UserError, load_photos, model_file, postprocess, preprocess, read_photo, say

MAX_LABELS = 64
APPEARANCE = 5.0  # weight of the colours; more lets fine structure of the photograph into the mask


def main() -> int:
    """Runs the program; its exit status."""
    try:
        run(parse_arguments())
    except UserError as error:
        print(f"refine_mask: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", type=Path, help="an image file; left out: photographs from scikit-image")
    parser.add_argument("mask", nargs="?", type=Path, help="an image file of the same size; left out: by U2-Net-p")
    parser.add_argument("--scribbles", action="store_true", help="the mask holds strokes, a colour for each label")
    parser.add_argument("-o", "--output", type=Path, help="the refined mask as PNG, or a folder")
    parser.add_argument("--photos", default=",".join(PHOTOS), help="scikit-image's photographs, default %(default)s")
    parser.add_argument("--iterations", type=int, default=10, help="default %(default)s")
    parser.add_argument("--accuracy", choices=("fast", "high"), default="fast", help="default %(default)s")
    parser.add_argument("--certainty", type=float, default=0.9, help="how far to trust the mask, default %(default)s")
    parser.add_argument("--spatial-sigma", type=float, default=60.0, help="in pixels, default %(default)s")
    parser.add_argument("--color-sigma", type=float, default=10.0, help="of 0 to 255, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    if arguments.threads < 1 or arguments.iterations < 1:
        raise UserError("--threads and --iterations must be at least 1")
    if not 0 < arguments.certainty < 1:
        raise UserError(f"--certainty must be between 0 and 1, got {arguments.certainty}")
    if not (arguments.spatial_sigma > 0 and arguments.color_sigma > 0):
        raise UserError("--spatial-sigma and --color-sigma must be positive")
    if arguments.scribbles and arguments.mask is None:
        raise UserError("--scribbles needs a photo and a file of scribbles")
    if arguments.photo is None:
        photos = load_photos(argparse.Namespace(photo=[], photos=arguments.photos))
    else:
        photos = [(arguments.photo.stem, read_photo(arguments.photo))]
    outputs = [output_paths(arguments, name, len(photos)) for name, _ in photos]
    say("loading PyTorch and pyseg")
    try:
        import torch

        import pyseg  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    torch.set_num_threads(arguments.threads)

    for (name, photo), (mask_path, panel_path) in zip(photos, outputs, strict=True):
        say(f"{name}: reading the mask")
        if arguments.scribbles:
            unary, colors, coarse = from_scribbles(read_scribbles(arguments.mask, photo.shape[:2]), arguments.certainty)
        else:
            mask = saliency(photo) if arguments.mask is None else read_mask(arguments.mask, photo.shape[:2])
            unary, colors, coarse = from_mask(mask, arguments.certainty), None, mask
        say(f"{name}: refining")
        start = time.perf_counter()
        marginals = refine(photo, unary, arguments)
        seconds = time.perf_counter() - start
        say("")
        changed = (marginals.argmax(0) != unary.argmin(0)).mean()
        print(
            f"{name}: {photo.shape[1]}x{photo.shape[0]}, {len(unary)} labels, {arguments.iterations} iterations in "
            f"{seconds * 1e3:.0f} ms; the label of {changed:.1%} of the pixels changed"
        )
        write(mask_path, panel_path, photo, coarse, marginals, colors)
        print(f"wrote {mask_path} and {panel_path}")


# ---- what is computed ----


def refine(photo, unary, arguments: argparse.Namespace):
    """Probabilities [labels, H, W] from energies [labels, H, W] and a photograph [H, W, 3] uint8."""
    import torch

    from pyseg.functional import dense_crf

    with torch.inference_mode():
        marginals = dense_crf(
            torch.from_numpy(unary)[None],
            torch.from_numpy(photo.copy()).permute(2, 0, 1)[None],
            iterations=arguments.iterations,
            appearance=APPEARANCE,
            spatial_sigma=arguments.spatial_sigma,
            color_sigma=arguments.color_sigma,
            accuracy=arguments.accuracy,
        )
    return marginals[0].numpy()


def saliency(photo):
    """U2-Net-p's mask [H, W] of a photograph."""
    import torch

    from pyseg.models import load_u2net_onnx, u2netp

    model = load_u2net_onnx(u2netp(batch_norm=False), model_file()).eval()
    with torch.inference_mode():
        probabilities = model(torch.from_numpy(preprocess(photo)))[0][0, 0].numpy()
    return postprocess(probabilities, (photo.shape[1], photo.shape[0]))


def from_mask(mask, certainty: float):
    """Energies [2, H, W] of a mask [H, W] in 0 to 1 that is trusted so far."""
    import numpy as np

    subject = certainty * mask + (1 - certainty) / 2
    return -np.log(np.stack([1 - subject, subject])).astype(np.float32)


def from_scribbles(strokes, certainty: float):
    """Energies [labels, H, W], the labels' colours [labels, 3] and a picture, of strokes [H, W, 3], black for none."""
    import numpy as np

    from pyseg.compat.pydensecrf.utils import unary_from_labels

    colors, labels = np.unique(strokes.reshape(-1, 3), axis=0, return_inverse=True)
    number = np.zeros(len(colors), np.int64)
    marked = colors.any(1)
    count = int(marked.sum())
    if not 2 <= count <= MAX_LABELS:
        raise UserError(f"scribbles must have 2 to {MAX_LABELS} colours on black or nothing, got {count}")
    number[marked] = np.arange(1, count + 1)
    unary = unary_from_labels(number[labels], count, certainty).reshape(count, *strokes.shape[:2])
    return unary, colors[marked], strokes


# ---- files ----


def output_paths(arguments: argparse.Namespace, name: str, count: int) -> tuple[Path, Path]:
    """Where the refined mask and the panel of a photograph go, checked before the work starts."""
    output: Path | None = arguments.output
    if output is not None and not output.is_dir() and count == 1 and output.suffix:
        mask = output
    else:
        mask = (output or Path()) / f"{name}_refined.png"
    panel = mask.with_name(f"{mask.stem.removesuffix('_refined')}_refinement.png")
    if mask.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {mask}")
    for source in (arguments.photo, arguments.mask):
        if source is not None and source.resolve() in (mask.resolve(), panel.resolve()):
            raise UserError(f"-o must not be one of the inputs: {source}")
    try:
        mask.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {mask.parent}: {error.strerror}") from error
    return mask, panel


def read_mask(path: Path, size: tuple[int, int]):
    """A mask [H, W] in 0 to 1."""
    import numpy as np

    image = read_photo(path)
    check_size(path, image, size)
    return image.astype(np.float32).mean(2) / 255


def read_scribbles(path: Path, size: tuple[int, int]):
    """[H, W, 3] uint8, black where there is no stroke."""
    import numpy as np
    from PIL import Image

    image = read_photo(path)  # for its errors; transparent parts come out white
    check_size(path, image, size)
    with Image.open(path) as file:
        if file.has_transparency_data:
            image = image * (np.asarray(file.convert("RGBA"))[:, :, 3:] > 127)
    return image.astype(np.uint8)


def check_size(path: Path, image, size: tuple[int, int]) -> None:
    if image.shape[:2] != size:
        raise UserError(
            f"{path} must be as large as the photo, {size[1]}x{size[0]}, got {image.shape[1]}x{image.shape[0]}"
        )


def write(mask_path: Path, panel_path: Path, photo, coarse, marginals, colors) -> None:
    import numpy as np
    from PIL import Image

    from pyseg.visualize import cutout, mask_image, overlay_mask, save_panel

    if colors is None:
        mask = marginals[1]
        result = mask_image(mask)
        images = [photo, mask_image(coarse), result, cutout(photo, coarse), cutout(photo, mask)]
        titles = ["photo", "coarse mask", "refined mask", "coarse cut-out", "refined cut-out"]
    else:
        labels = marginals.argmax(0)
        result = colors[labels].astype(np.uint8)
        mixed = photo
        for label, color in enumerate(colors):
            mine = (labels == label).astype(np.float32)
            mixed = np.where(mine[..., None] > 0, overlay_mask(photo, mine, tuple(map(int, color))), mixed)
        images = [photo, coarse, result, mixed]
        titles = ["photo", "scribbles", "labels", "labels on the photo"]
    try:
        Image.fromarray(result).save(mask_path)
        save_panel(panel_path, images, titles)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or mask_path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
