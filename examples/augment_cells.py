"""Draws what U-Net's augmentation does to an image and its cells, with the border weights of both.

    .venv/bin/python examples/augment_cells.py                       # stained nuclei of scikit-image
    .venv/bin/python examples/augment_cells.py --seed 7 --sigma 15 -o augmented.png

The image is scikit-image's `immunohistochemistry`; its nuclei are found by stain separation, Otsu's threshold and a
watershed, as in train_unet_cells.py. Each column of the picture is one random deformation (Ronneberger et al. 2015,
section 3.1): a coarse grid of displacements, a turn, a flip, brightness and contrast, applied to image and instances in
one pass. Below each stands the weight map of the paper (equation 2), which is computed from the warped instances: gaps
between cells stay gaps, since labels are copied and never mixed. Prints how long the pass takes beside plain PyTorch's,
and fails where a label appears that was none, or where the two disagree.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

SIDE = 256
LEAST_AGREEMENT = 0.999  # of the labels with those of plain PyTorch: places as near to two elements may differ


class UserError(Exception):
    """Something that the user can mend: told in one line."""


def main() -> int:
    """Runs the program; its exit status."""
    try:
        return run(parse_arguments())
    except UserError as error:
        print(f"augment_cells: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("augmented.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--sigma", type=float, default=10.0, help="pixels, of the displacements (%(default)s)")
    parser.add_argument("--count", type=int, default=3, help="deformations to draw, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if min(arguments.count, arguments.threads) < 1 or arguments.sigma < 0 or arguments.seed < 0:
        raise UserError("--count and --threads must be at least 1, --sigma and --seed not negative")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import matplotlib  # noqa: F401
        import skimage  # noqa: F401
        import torch

        import pyseg  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    from train_unet_cells import tissue

    from pyseg.nn import JointAugmentation

    torch.set_num_threads(arguments.threads)
    image, instances = tissue()
    image, instances = (image[:, :SIDE, :SIDE] + 1) / 2, instances[:SIDE, :SIDE]
    images = image.expand(arguments.count, -1, -1, -1)
    labels = instances.long().expand(arguments.count, -1, -1)
    generator = torch.Generator().manual_seed(arguments.seed)
    augment = JointAugmentation(sigma=arguments.sigma, brightness=0.15, contrast=0.3, generator=generator)
    state = generator.get_state()
    warped, warped_labels = augment(images, labels)

    generator.set_state(state)
    status = compare(augment.draw(arguments.count, (SIDE, SIDE)), images, labels, warped_labels)
    picture(arguments.output, image, instances, warped, warped_labels)
    print(f"wrote {arguments.output}")
    return status


def compare(drawn, images, labels, warped_labels) -> int:
    """Times joint_warp and plain PyTorch on the same parameters; the exit status."""
    import torch

    from pyseg.functional import joint_warp

    def ours():
        arguments = (images, labels, drawn.affine, drawn.displacement)
        return joint_warp(*arguments, gain=drawn.gain, bias=drawn.bias)[1]

    def plain():
        return plain_warp(drawn, images, labels)

    agreement = (plain() == warped_labels).double().mean().item()
    times = {name: milliseconds(call) for name, call in (("pyseg", ours), ("plain PyTorch", plain))}
    shape = "x".join(map(str, images.shape))
    print(f"{shape} and labels: pyseg {times['pyseg']:.1f} ms, plain PyTorch {times['plain PyTorch']:.1f} ms")
    print(f"labels agree in {100 * agreement:.3f} % of the pixels")
    new = ~torch.isin(warped_labels, labels)
    if new.any():
        print(f"augment_cells: {int(new.sum())} labels are none of the image's", file=sys.stderr)
        return 1
    if agreement < LEAST_AGREEMENT:
        print(f"augment_cells: labels must agree in {LEAST_AGREEMENT:.1%}, got {agreement:.3%}", file=sys.stderr)
        return 1
    return 0


def plain_warp(drawn, images, labels):
    """The labels, and on the way the image, by torch's own functions: the field by cubic convolution, one grid."""
    import torch
    from torch.nn import functional as F

    from pyseg.reference import displacement_field

    size = images.shape[2:]
    scale = torch.tensor([2 / (side - 1) for side in size])
    rows, columns = torch.meshgrid(*[torch.arange(float(side)) for side in size], indexing="ij")
    pixels = torch.stack([rows, columns, torch.ones_like(rows)])
    places = torch.einsum("nij,jhw->nihw", drawn.affine.float(), pixels)
    if drawn.displacement is not None:
        places = places + displacement_field(drawn.displacement, size).float()
    grid = (places.movedim(1, -1) * scale - 1).flip(-1)
    options = {"padding_mode": "reflection", "align_corners": True}
    image = F.grid_sample(images, grid, mode="bilinear", **options)
    image.mul_(drawn.gain.float()[:, None, None, None]).add_(drawn.bias.float()[:, None, None, None])
    return F.grid_sample(labels[:, None].float(), grid, mode="nearest", **options)[:, 0].long()


def milliseconds(call) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def picture(path: Path, image, instances, warped, warped_labels) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from pyseg.functional import unet_border_weights

    columns = [(image, instances), *zip(warped, warped_labels, strict=True)]
    figure, axes = plt.subplots(2, len(columns), figsize=(4 * len(columns), 8.2))
    for column, (photo, cells) in enumerate(columns):
        above, below = axes[:, column]
        above.imshow(photo.clamp(0, 1).movedim(0, 2).numpy())
        above.contour((cells > 0).numpy(), [0.5], colors="yellow", linewidths=0.7)
        above.set_title("image and nuclei" if column == 0 else f"augmented, {column}")
        below.imshow(unet_border_weights(cells.int()).numpy(), vmin=1, vmax=11, cmap="magma")
        below.set_title("border weights")
        above.set_axis_off()
        below.set_axis_off()
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=80)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
