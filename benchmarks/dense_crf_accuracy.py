"""How far dense CRFs are from brute force: python benchmarks/dense_crf_accuracy.py [--json FILE].

Three photographs at 64x48, 21 classes, smoothness 3 pixels with weight 3, appearance 80 pixels and 13 grey values with
weight 10, symmetric normalisation. Brute force over all pairs of pixels in float64 (pyseg.reference) is the truth. For
pyseg's accuracies and pydensecrf: the mean error of the bilateral filter, normalised so that weights sum to one, of
random values; the mean error of marginals; the share of labels that are right. The largest error says nothing after
some iterations: single pixels flip.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PHOTOS = ("astronaut", "coffee", "chelsea")
ITERATIONS = (1, 5, 10)
WIDTH, HEIGHT, CLASSES = 64, 48, 21
PEER = "pydensecrf2"


def photo(name: str) -> Tensor:
    """[1, 3, HEIGHT, WIDTH] uint8."""
    import skimage.data
    from PIL import Image

    image = Image.fromarray(getattr(skimage.data, name)()).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()


def unary_of_blobs(seed: int = 0) -> Tensor:
    """[1, CLASSES, HEIGHT, WIDTH]: -log of the probabilities of smooth random logits, as a network's output is."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).standard_normal((CLASSES, HEIGHT, WIDTH))
    logits = gaussian_filter(noise, (0, 4, 4))
    return -torch.from_numpy(logits / logits.std() * 2)[None].log_softmax(1).clamp_min(np.log(1e-5))


def brute_force(unary: Tensor, image: Tensor) -> dict[int, Tensor]:
    """Marginals by number of iterations."""
    from pyseg import reference
    from pyseg.functional import bilateral_features

    image = image.double()
    matrices = [
        reference.pairwise_matrix(bilateral_features(image)[0].flatten(1)),
        reference.pairwise_matrix(bilateral_features(image[:, :0], 3.0)[0].flatten(1)),
    ]
    costs = [-10 * torch.eye(CLASSES), -3 * torch.eye(CLASSES)]
    results, done, marginals = {}, 0, None
    for iterations in ITERATIONS:
        marginals = reference.dense_crf(
            unary.flatten(2), matrices, costs, iterations=iterations - done, initial=marginals
        )
        results[iterations], done = marginals.reshape(unary.shape), iterations
    return results


def pyseg_marginals(accuracy: Any) -> Callable[[Tensor, Tensor, int], Tensor]:
    from pyseg.functional import dense_crf

    return lambda unary, image, iterations: dense_crf(unary.float(), image, iterations=iterations, accuracy=accuracy)


def pydensecrf_marginals() -> Callable[[Tensor, Tensor, int], Tensor]:
    """Raises ImportError where it is not installed."""
    import pydensecrf.densecrf as dcrf

    def marginals(unary: Tensor, image: Tensor, iterations: int) -> Tensor:
        crf = dcrf.DenseCRF2D(WIDTH, HEIGHT, CLASSES)
        crf.setUnaryEnergy(np.ascontiguousarray(unary[0].flatten(1).float().numpy()))
        crf.addPairwiseGaussian(sxy=3, compat=3)
        rgb = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
        crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=rgb, compat=10)
        return torch.from_numpy(np.array(crf.inference(iterations))).reshape(unary.shape)

    return marginals


def filter_error(image: Tensor, accuracy: Any, seed: int = 1) -> float:
    """Of random values in 0 to 1."""
    from pyseg import reference
    from pyseg.functional import FeatureKernel, bilateral_features

    features = bilateral_features(image.double())
    values = torch.from_numpy(np.random.default_rng(seed).random((1, CLASSES, HEIGHT, WIDTH)))
    expected = values.flatten(2) @ reference.pairwise_matrix(features.flatten(2), "after").mT
    kernel = FeatureKernel(features.float()).bind(values.float(), "after", accuracy)
    return (kernel.message(values.float()).flatten(2) - expected).abs().mean().item()


def closeness(what: str, result: Tensor, expected: Tensor) -> float:
    """Mean error of marginals, or share of equal labels."""
    if what == "marginals":
        return (result - expected).abs().mean().item()
    return (result.argmax(1) == expected.argmax(1)).double().mean().item()


def figures(names: tuple[str, ...] = PHOTOS) -> dict[str, dict[str, dict[str, Any]]]:
    """By photograph and program: "filter", and by iterations "marginals" and "labels"."""
    programs = {"pyseg fast": pyseg_marginals("fast"), "pyseg high": pyseg_marginals("high")}
    try:
        programs[PEER] = pydensecrf_marginals()
    except ImportError as error:
        print(f"{PEER} left out: {error}", file=sys.stderr)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        image, unary = photo(name), unary_of_blobs()
        expected = brute_force(unary, image)
        table[name] = {}
        for program, run in programs.items():
            # pydensecrf's lattice is that of "fast"; it does not offer its filter alone.
            accuracy = program.removeprefix("pyseg ")
            row: dict[str, Any] = {"filter": None if program == PEER else filter_error(image, accuracy)}
            results = {n: run(unary, image, n) for n in ITERATIONS}
            row["marginals"] = {n: (results[n] - expected[n]).abs().mean().item() for n in ITERATIONS}
            row["labels"] = {
                n: (results[n].argmax(1) == expected[n].argmax(1)).double().mean().item() for n in ITERATIONS
            }
            table[name][program] = row
    return table


def markdown(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    heads = [f"marginals, {n} it." for n in ITERATIONS] + [f"labels, {n} it." for n in ITERATIONS]
    lines = [f"| photo | program | filter | {' | '.join(heads)} |", "| --- " * (3 + len(heads)) + "|"]
    for name, programs in table.items():
        for program, row in programs.items():
            cells = ["–" if row["filter"] is None else f"{row['filter']:.1e}"]
            cells += [f"{row['marginals'][n]:.1e}" for n in ITERATIONS]
            cells += [f"{row['labels'][n]:.1%}" for n in ITERATIONS]
            lines.append(f"| {name} | {program} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    table = figures()
    print(markdown(table))
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
