"""Exports an accelerated network to torch.export and to ONNX, runs both on a photograph, and compares.

    .venv/bin/python examples/export_onnx.py                          # a minute or two on two cores
    .venv/bin/python examples/export_onnx.py my.jpg --folder models -o masks.png

The network is U2-Net-p with its trained weights (as in segment_photo.py), accelerated by pyseg. Its program of
torch.export is saved, loaded and run with pyseg's kernels; its ONNX file has standard operators alone and runs in
onnxruntime, here for any number of images. Fails where a result is farther than --tolerance from the network's own.
Writes a picture of the photograph and the masks.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from segment_photo import SIDE, UserError, load_photos, model_file, postprocess, preprocess

PHOTO = "chelsea"
TOLERANCE = 2e-3  # of probabilities: segment_photo.py says why this network needs more than 1e-4


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"export_onnx: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", type=Path, help="image file; left out: one from scikit-image")
    parser.add_argument("-o", "--output", type=Path, default=Path("masks.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(), help="where u2netp.pt2 and u2netp.onnx go (%(default)s)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if min(arguments.threads, arguments.repeats) < 1 or not arguments.tolerance > 0:
        raise UserError("--threads and --repeats must be at least 1, --tolerance positive")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import onnxscript  # noqa: F401
        import torch

        import pyseg
        from pyseg.models import load_u2net_onnx, u2netp
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    torch.set_num_threads(arguments.threads)
    chosen = [arguments.photo] if arguments.photo else []
    ((_, photo),) = load_photos(argparse.Namespace(photo=chosen, photos=PHOTO))
    image = torch.from_numpy(preprocess(photo))

    model = OneOutput(load_u2net_onnx(u2netp(batch_norm=False), model_file())).eval()
    model = pyseg.accelerate(model, image, tolerance=TOLERANCE)
    files = exported(model, image, arguments.folder)
    calls: dict[str, Callable] = {
        "accelerated network": model,
        files[0].name: torch.export.load(files[0]).module(),
        files[1].name: onnx_call(files[1], arguments.threads),
    }
    with torch.inference_mode():
        results = {name: call(image) for name, call in calls.items()}
        pair = torch.cat([image, image.flip(3)])
        batches = {name: call(pair) for name, call in calls.items()}
        times = timed(calls, image, arguments.repeats)

    expected, expected_pair = (next(iter(each.values())) for each in (results, batches))
    print(f"\n{SIDE}x{SIDE}, {arguments.threads} threads{'':12}{'ms':>8}{'difference':>12}{'of a batch of 2':>17}")
    worst = 0.0
    for name, result in results.items():
        difference = (result - expected).abs().max().item()
        of_pair = (batches[name] - expected_pair).abs().max().item()
        worst = max(worst, difference, of_pair)
        print(f"{name:32}{times[name]:8.0f}{difference:12.1e}{of_pair:17.1e}")
    draw(arguments.output, photo, results)
    print(f"wrote {arguments.output}")
    if worst > arguments.tolerance:
        print(f"export_onnx: results must agree within {arguments.tolerance}, got {worst:.1e}", file=sys.stderr)
        return 1
    return 0


def OneOutput(network):
    """The network with the fused prediction alone, which is what users look at."""
    from torch import Tensor, nn

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: Tensor) -> Tensor:
            return self.network(image)[0]

    return First()


def exported(model, image, folder: Path) -> tuple[Path, Path]:
    """Writes the program of torch.export and the ONNX file, both for any number of images."""
    import torch
    from torch.export import Dim

    import pyseg

    files = folder / "u2netp.pt2", folder / "u2netp.onnx"
    pair = torch.cat([image, image])  # an example with more images than one, since their number is to vary
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with torch.no_grad():
            program = torch.export.export(model, (pair,), dynamic_shapes={"image": {0: Dim("n")}})
        torch.export.save(program, files[0])
        middle = time.perf_counter()
        pyseg.export_onnx(program, file=files[1], external_data=False, input_names=["image"], output_names=["mask"])
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    for file, seconds in zip(files, (middle - start, time.perf_counter() - middle), strict=True):
        print(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB, in {seconds:.1f} s")
    return files


def onnx_call(file: Path, threads: int) -> Callable:
    """onnxruntime on a file, tensors in and out."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def timed(calls: dict[str, Callable], image, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call(image)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


def draw(path: Path, photo, results: dict) -> None:
    from pyseg.visualize import overlay_mask, save_panel

    masks = [postprocess(result[0, 0].numpy(), (photo.shape[1], photo.shape[0])) for result in results.values()]
    try:
        save_panel(path, [photo, *[overlay_mask(photo, mask) for mask in masks]], ["photo", *results])
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
