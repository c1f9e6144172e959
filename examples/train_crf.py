"""Learns the weights of a dense CRF (CRF as RNN, Zheng et al. 2015) that repairs corrupted masks of photographs.

    .venv/bin/python examples/train_crf.py                        # about a minute on two cores
    .venv/bin/python examples/train_crf.py --steps 100 -o crf.png

Photographs come from scikit-image, their masks from U2-Net-p (as in segment_photo.py). The masks are coarsened to
blocks and blocks flipped at random; CRFasRNN, whose weights start at one, learns on all photographs but the last to
give the clean masks back from the broken ones and the photographs. Prints intersection over union before and after on
the last, and writes a picture.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from segment_photo import UserError, load_photos, model_file, postprocess, preprocess

PHOTOS = ("chelsea", "coffee", "astronaut")  # the last one is only looked at to measure
SIDE = 160  # pixels of the longer side
BLOCK, FLIPPED, CONFIDENCE = 8, 0.15, 2.0  # of the corruption: pixels, share of blocks, logit


def main() -> int:
    """Runs the program; its exit status."""
    try:
        run(parse_arguments())
    except UserError as error:
        print(f"train_crf: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("crf.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of training, default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all, here %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    if arguments.steps < 1 or arguments.threads < 1:
        raise UserError("--steps and --threads must be at least 1")
    if arguments.output.suffix.lower() != ".png":
        raise UserError(f"-o must end in .png, got {arguments.output}")
    try:
        import torch

        import pyseg
    except ImportError as error:
        raise UserError(f"{error}; the example needs: pip install 'pyseg-kernels[demo]'") from error
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(arguments.seed)
    samples = load_samples()
    *training, (name, image, target) = samples

    crf = pyseg.nn.CRFasRNN(
        2, spatial_sigma=30.0, color_sigma=12.0, smoothness_sigma=2.0, appearance=1.0, smoothness=1.0
    )
    broken = torch.cat([corrupted(target, torch.Generator().manual_seed(1000 + i)) for i in range(8)])
    images = image.expand(len(broken), -1, -1, -1)
    before = {"corrupted mask": broken, "CRF, initial weights": evaluated(crf, broken, images)}

    optimizer = torch.optim.Adam(crf.parameters(), lr=0.1)
    start = time.perf_counter()
    for step in range(arguments.steps):
        loss = 0.0
        crf.train()
        optimizer.zero_grad()
        for _, photo, mask in training:
            logits = crf(corrupted(mask, generator), photo)
            one = pyseg.functional.dice_loss(logits, mask, mode="multiclass")
            (one / len(training)).backward()
            loss += one.item() / len(training)
        optimizer.step()
        progress(step + 1, arguments.steps, loss, time.perf_counter() - start)

    results = {**before, "CRF, learned weights": evaluated(crf, broken, images)}
    print(
        f"{arguments.steps} steps in {time.perf_counter() - start:.1f} s; {name}, mean over {len(broken)} corruptions:"
    )
    for title, logits in results.items():
        print(f"  {title:<22} IoU {iou(logits, target):.3f}")
    for title, parameter in crf.named_parameters():
        print(f"  {title:<22} {[round(value, 2) for value in parameter.detach().flatten().tolist()]}")
    write_picture(arguments.output, image, target, {title: logits[0] for title, logits in results.items()})
    print(f"wrote {arguments.output}")


def progress(step: int, steps: int, loss: float, seconds: float) -> None:
    """A bar on a terminal, a line now and then elsewhere."""
    line = f"step {step}/{steps}, loss {loss:.3f}, {seconds:.0f} s"
    if sys.stderr.isatty():
        done = 30 * step // steps
        end = "\n" if step == steps else ""
        print(f"\r\033[K[{'#' * done}{'.' * (30 - done)}] {line}", end=end, file=sys.stderr, flush=True)
    elif step % 20 == 0 or step == steps:
        print(line, file=sys.stderr, flush=True)


# ---- data ----


def load_samples() -> list:
    """(name, photograph [1, 3, H, W] in 0 to 255, mask [1, H, W] of 0 and 1) for each of the photographs."""
    import numpy as np
    import torch
    from PIL import Image

    from pyseg.models import load_u2net_onnx, u2netp

    model = load_u2net_onnx(u2netp(batch_norm=False), model_file()).eval()
    samples = []
    for name, photo in load_photos(argparse.Namespace(photo=[], photos=",".join(PHOTOS))):
        with torch.inference_mode():
            saliency = model(torch.from_numpy(preprocess(photo)))[0][0, 0].numpy()
        scale = SIDE / max(photo.shape[:2])
        size = (round(photo.shape[1] * scale), round(photo.shape[0] * scale))
        small = np.array(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))
        mask = torch.from_numpy(postprocess(saliency, size) > 0.5).long()[None]
        samples.append((name, torch.from_numpy(small).permute(2, 0, 1)[None].float(), mask))
    return samples


def corrupted(mask, generator):
    """Logits [1, 2, H, W] of a mask [1, H, W] as blocks, some flipped, blurred like a network's output."""
    import torch
    from torch.nn import functional as F

    coarse = F.avg_pool2d(mask[None].float(), BLOCK, ceil_mode=True, count_include_pad=False)
    flips = torch.rand(coarse.shape, generator=generator) < FLIPPED
    coarse = torch.where(flips, 1 - coarse, coarse)
    smooth = F.interpolate(coarse, size=mask.shape[1:], mode="bilinear")
    foreground = CONFIDENCE * (2 * smooth - 1)
    return torch.cat([-foreground, foreground], 1)


# ---- what is measured and shown ----


def evaluated(crf, broken, images):
    """What the CRF makes of them in eval mode."""
    import torch

    crf.eval()
    with torch.inference_mode():
        return crf(broken, images)


def iou(logits, target) -> float:
    """Of the subject."""
    from pyseg.functional import confusion_matrix
    from pyseg.functional import iou as score

    return score(confusion_matrix(logits, target.expand(len(logits), -1, -1)))[1].item()


def write_picture(path: Path, image, target, results: dict) -> None:
    import numpy as np

    from pyseg.visualize import mask_image, overlay_mask, save_panel

    photo = image[0].permute(1, 2, 0).numpy().astype(np.uint8)
    images, titles = [photo], ["photo"]
    for title, logits in results.items():
        images.append(mask_image(logits.softmax(0)[1].numpy()))
        titles.append(title)
    images += [mask_image(target[0].numpy().astype(np.float32)), overlay_mask(photo, logits.softmax(0)[1].numpy())]
    titles += ["mask to find", "learned, on the photo"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_panel(path, images, titles)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
