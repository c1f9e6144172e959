"""The photo example, as a user runs it: on a photograph of scikit-image and on files of one's own."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image

from warm_python import run_example

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "segment_photo.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("segment_photo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def network(example):
    """The ONNX file, or a skip where it cannot be had."""
    try:
        return example.model_file()
    except example.UserError as error:
        pytest.skip(str(error))


def run(*arguments):
    return run_example("segment_photo.py", *arguments)


def test_photograph(network, tmp_path):
    pytest.importorskip("onnxruntime")
    done = run("--photos", "chelsea", "--repeats", 1, "--threads", 1, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("chelsea "))
    *_, from_torch, from_onnxruntime = map(float, row.split()[1:])
    assert max(from_torch, from_onnxruntime) <= 2e-3
    with Image.open(tmp_path / "chelsea_segmented.png") as picture:
        assert picture.width > 5 * 300


def test_mask_is_sane(example, network):
    """The cat is found: most of the middle, none of the upper right corner; the same as onnxruntime finds."""
    torch = pytest.importorskip("torch")
    onnxruntime = pytest.importorskip("onnxruntime")
    chelsea = pytest.importorskip("skimage.data").chelsea()
    import pyseg
    from pyseg.models import load_u2net_onnx, u2netp

    model = pyseg.accelerate(load_u2net_onnx(u2netp(batch_norm=False), network).eval())
    x = example.preprocess(chelsea)
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: x})
    with torch.inference_mode():
        outputs = model(torch.from_numpy(x))
    assert len(outputs) == len(expected) == 7
    for got, want in zip(outputs, expected, strict=True):
        assert np.abs(got.numpy() - want).max() <= example.TOLERANCE
    mask = example.postprocess(outputs[0][0, 0].numpy(), (chelsea.shape[1], chelsea.shape[0]))
    assert mask.shape == chelsea.shape[:2]
    assert 0 <= mask.min() <= mask.max() <= 1
    height, width = mask.shape
    assert mask[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3].mean() > 0.9
    assert mask[: height // 10, -width // 10 :].mean() < 0.2


def test_batch_norms_load_nothing_but_folded_weights(network):
    from pyseg.models import load_u2net_onnx, u2net

    with pytest.raises(
        ValueError, match=r"rebnconv1\.conv_s1\.weight must be \[32, 64, 3, 3\], .* has \[16, 64, 3, 3\]"
    ):
        load_u2net_onnx(u2net(batch_norm=False), network)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        (b"", "is not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"rubbish" * 9, "is not an image|is broken|cannot read"),
        (
            b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00",
            "is not an image|cannot read|is broken",
        ),
    ],
    ids=["missing", "empty", "broken png", "broken jpeg"],
)
def test_bad_file_is_one_line(tmp_path, content, message):
    file = tmp_path / "photo.jpg"
    if content is not None:
        file.write_bytes(content)
    done = run(file)
    assert done.returncode == 2
    assert re.match(rf"segment_photo: .*({message})", done.stderr)
    assert done.stderr.count("\n") == 1


def test_truncated_file_is_one_line(tmp_path):
    file = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    done = run(file)
    assert done.returncode == 2
    assert done.stderr.startswith("segment_photo: ")
    assert done.stderr.count("\n") == 1


def test_photo_is_not_overwritten(tmp_path):
    file = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(file)
    done = run(file, "-o", file)
    assert done.returncode == 2
    assert "must not be the photo itself" in done.stderr


def test_modes_and_orientation(example, tmp_path):
    """What cameras, scanners and drawing programs save."""
    red = Image.new("RGB", (6, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    red.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (6, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (6, 4), (100, 255)).save(tmp_path / "grey_alpha.png")
    Image.new("L", (6, 4), 100).save(tmp_path / "grey.png")
    Image.new("P", (6, 4)).save(tmp_path / "palette.gif")
    Image.new("CMYK", (6, 4)).save(tmp_path / "cmyk.tif")
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 1000).save(tmp_path / "deep.png")
    shapes = {file.name: example.read_photo(file).shape for file in tmp_path.iterdir()}
    assert shapes.pop("turned.jpg") == (6, 4, 3)
    assert set(shapes.values()) == {(4, 6, 3)}
    assert (example.read_photo(tmp_path / "clear.png") == 255).all()
    deep = example.read_photo(tmp_path / "deep.png")
    assert deep.dtype == np.uint8
    assert deep.min() == 0
    assert deep.max() == 255


def test_own_photo(example, network, tmp_path, monkeypatch):
    """In this process, and accelerated without timing each module, which the test above does."""
    pytest.importorskip("onnxruntime")
    torch = pytest.importorskip("torch")
    import pyseg

    accelerate = pyseg.accelerate
    monkeypatch.setattr(pyseg, "accelerate", lambda model, *_, **__: accelerate(model))
    file = tmp_path / "my photo.png"
    skimage = pytest.importorskip("skimage.data")
    Image.fromarray(skimage.coffee()).convert("LA").resize((1300, 900)).save(file)
    out = tmp_path / "new" / "out.png"
    arguments = [file, "-o", out, "--repeats", 1, "--threads", torch.get_num_threads()]
    monkeypatch.setattr(sys, "argv", ["segment_photo.py", *map(str, arguments)])
    assert example.main() == 0
    assert out.is_file()


# ---- drawing ----


def test_overlay_and_cutout():
    from pyseg.visualize import cutout, mask_image, overlay_mask

    image = np.full((40, 50, 3), 200, np.uint8)
    mask = np.zeros((40, 50), np.float32)
    mask[10:30, 10:40] = 1
    overlay = overlay_mask(image, mask, color=(255, 0, 0), alpha=0.5)
    assert overlay[20, 20].tolist() == [228, 100, 100]  # half way to red, halves to even
    assert overlay[10, 20].tolist() == [255, 0, 0]  # the edge
    assert overlay[0, 0].tolist() == [120, 120, 120]
    cut = cutout(image, mask)
    assert cut.shape == (40, 50, 4)
    assert (cut[..., 3] == mask * 255).all()
    assert (mask_image(mask)[..., 0] == mask * 255).all()
    with pytest.raises(ValueError, match=r"cutout: mask must be \[40, 50\], got \[4, 4\]"):
        cutout(image, np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"overlay_mask: image must be \[H, W, 3\] uint8"):
        overlay_mask(mask, mask)


@pytest.mark.parametrize("shape", [(30, 40), (1, 900), (900, 1)])
def test_panel(tmp_path, shape):
    from pyseg.visualize import save_panel

    images = [np.zeros((*shape, 3), np.uint8), np.zeros((*shape, 4), np.uint8)]
    save_panel(tmp_path / "panel.png", images, ["one", "two"], caption="text")
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.width <= 4096
    with pytest.raises(ValueError, match="titles must be 2"):
        save_panel(tmp_path / "panel.png", images, ["one"])


# ---- training ----


def test_unet_trains(tmp_path):
    """A few steps: the program runs through, and says what it should."""
    pytest.importorskip("skimage")
    out = tmp_path / "nuclei.png"
    done = run_example("train_unet_cells.py", "--steps", 8, "--threads", 1, "-o", out)
    assert done.returncode == 0, done.stderr
    assert re.search(r"after training +\d\.\d{3}", done.stdout)
    assert re.search(r"Hausdorff by distances +\d", done.stdout)
    with Image.open(out) as picture:
        assert picture.width > 1000
    for arguments, message in ((["--steps", "1"], "--steps must be"), (["-o", "x.txt"], "-o must end in .png")):
        done = run_example("train_unet_cells.py", *arguments)
        assert done.returncode == 2
        assert message in done.stderr


def test_fastfcn(tmp_path):
    pytest.importorskip("torchvision")
    out = tmp_path / "shapes.png"
    done = run_example("fastfcn.py", "--head", "aspp", "--steps", 6, "--size", 96, "--threads", 1, "-o", out)
    first, last = map(float, re.search(r"loss (\S+) at first, (\S+) at last", done.stdout).groups())
    assert done.returncode == (last > 0.5 * first), done.stderr  # six steps may be too few
    before, after = map(float, re.search(r"mean IoU (\S+) before, (\S+) after", done.stdout).groups())
    assert before < after <= 1
    assert re.search(r"FastFCN, accelerated +\d+", done.stdout)
    difference = re.search(r"outputs differ by (\S+) of", done.stdout)[1]
    assert float(difference) <= 1e-4
    with Image.open(out) as picture:
        assert picture.width > 1000


def test_fastfcn_errors(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    fastfcn = importlib.import_module("fastfcn")
    for arguments, message in (
        (["--steps", "1"], "--steps must be at least 2"),
        (["-o", "shapes.jpg"], "-o must end in .png, got shapes.jpg"),
    ):
        monkeypatch.setattr(sys, "argv", ["fastfcn.py", *arguments])
        assert fastfcn.main() == 2
        assert message in capsys.readouterr().err


def test_display_instances():
    from pyseg.visualize import display_instances

    image = np.full((60, 80, 3), 100, np.uint8)
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 30:50, 10:30] = True
    masks[1, 20:40, 50:70] = True
    boxes = np.array([[10, 30, 29, 49], [50, 20, 69, 39]], np.float32)
    drawn = display_instances(image, boxes, masks, [1, 0], ["disc", "square"], [0.91, 0.5])
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (image == 100).all()
    first, second = drawn[40, 20], drawn[30, 60]
    assert (first != 100).any()
    assert (second != first).any()
    assert (drawn[55, 75] == 100).all()  # background stays
    assert (drawn[30, 20] != drawn[40, 20]).any()  # the contour and box differ from the tint
    assert (drawn[:29, 10:20] != 100).any()  # the caption stands above the box
    plain = display_instances(image, boxes, masks.astype(np.float32), [1, 0], ["disc", "square"], show_captions=False)
    assert (plain[:15] == 100).all()
    only_boxes = display_instances(image, boxes, None, [1, 0], ["disc", "square"], show_captions=False)
    assert (only_boxes[40, 20] == 100).all()
    assert (only_boxes[30, 20] != 100).any()
    assert (display_instances(image, boxes[:0], masks[:0], [], []) == image).all()
    with pytest.raises(ValueError, match="display_instances: scores must have 2 elements for as many boxes, got 1"):
        display_instances(image, boxes, masks, [1, 0], ["disc", "square"], [0.5])
    with pytest.raises(ValueError, match=r"mask must be \[60, 80\], got \[59, 80\]"):
        display_instances(image, boxes, masks[:, 1:], [1, 0], ["disc", "square"])


# ---- refine_mask.py, train_crf.py ----


@pytest.fixture
def disc(tmp_path):
    """A noisy photograph of a bright disc, a coarse mask of it, strokes on and beside it, and the disc itself."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:60, :80]
    inside = (y - 30) ** 2 + (x - 40) ** 2 < 400
    photo = np.where(inside[..., None], (200, 180, 90), (60, 90, 120)) + rng.normal(0, 4, (60, 80, 3))
    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(tmp_path / "disc.png")
    blocks = inside.reshape(6, 10, 8, 10).mean((1, 3)).repeat(10, 0).repeat(10, 1)
    Image.fromarray((255 * blocks).astype(np.uint8)).save(tmp_path / "mask.png")
    strokes = np.zeros((60, 80, 4), np.uint8)
    strokes[28:32, 30:50] = (255, 0, 0, 255)
    strokes[3:6, 5:75] = (0, 0, 255, 255)
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    return tmp_path, inside, blocks > 0.5


def test_refine_mask(disc):
    folder, inside, coarse = disc
    done = run_example("refine_mask.py", folder / "disc.png", folder / "mask.png", "-o", folder, "--threads", 1)
    assert done.returncode == 0, done.stderr
    refined = np.asarray(Image.open(folder / "disc_refined.png"))[:, :, 0] > 127
    assert (refined != inside).sum() < 0.2 * (coarse != inside).sum()
    assert Image.open(folder / "disc_refinement.png").width > 5 * 300


def test_refine_scribbles(disc):
    folder, inside, _ = disc
    arguments = [folder / "disc.png", folder / "strokes.png", "--scribbles", "--threads", 1]
    done = run_example("refine_mask.py", *arguments, "-o", folder / "labels.png")
    assert done.returncode == 0, done.stderr
    labels = np.asarray(Image.open(folder / "labels.png"))
    assert ((labels == (255, 0, 0)).all(2) != inside).mean() < 0.02
    assert ((labels == (0, 0, 255)).all(2) == inside).mean() < 0.02


def test_refine_mask_errors(disc, monkeypatch, capsys):
    """In this process: a new one for each would take long."""
    folder, *_ = disc
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    refine_mask = importlib.import_module("refine_mask")
    photo, mask, strokes = folder / "disc.png", folder / "mask.png", folder / "strokes.png"
    Image.new("RGB", (7, 5)).save(folder / "small.png")
    Image.new("RGB", (80, 60), "red").save(folder / "red.png")
    for arguments, message in (
        ([photo, folder / "small.png"], "must be as large as the photo, 80x60, got 7x5"),
        ([photo, folder / "none.png"], "cannot read"),
        ([photo, folder / "red.png", "--scribbles"], "scribbles must have 2 to 64 colours"),
        ([photo, "--scribbles"], "--scribbles needs a photo and a file of scribbles"),
        ([photo, mask, "-o", photo], "-o must not be one of the inputs"),
        ([photo, mask, "-o", folder / "x.jpg"], "-o must end in .png"),
        ([photo, strokes, "--certainty", 2], "--certainty must be between 0 and 1"),
        ([photo, mask, "--color-sigma", 0], "--spatial-sigma and --color-sigma must be positive"),
    ):
        monkeypatch.setattr(sys, "argv", ["refine_mask.py", *map(str, arguments)])
        assert refine_mask.main() == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_train_crf(network, tmp_path):
    pytest.importorskip("skimage.data")
    done = run_example("train_crf.py", "--steps", 8, "--threads", 1, "-o", tmp_path / "crf.png")
    assert done.returncode == 0, done.stderr
    scores = [float(value) for value in re.findall(r"IoU (\d\.\d+)", done.stdout)]
    assert scores[0] < scores[1] < scores[2]
    assert Image.open(tmp_path / "crf.png").width > 1000


# ---- mask_rcnn_shapes.py ----


def test_mask_rcnn_trains(tmp_path):
    """Too few steps to learn: the program runs through, reports, draws, and says by its status that it has failed."""
    pytest.importorskip("pycocotools")
    pytest.importorskip("torchvision")
    out = tmp_path / "shapes.png"
    done = run_example("mask_rcnn_shapes.py", "--steps", 2, "--held-out", 8, "--threads", 1, "-o", out)
    assert done.returncode == 1, done.stderr
    assert "mask_rcnn_shapes: the loss must at least halve" in done.stderr
    assert done.stderr.endswith("mask_rcnn_shapes: AP50 must be at least 0.8, got 0.000\n")
    assert done.stderr.count("\n") == 2
    assert len(re.findall(r"the whole network +\d+\.\d +\d+\.\d", done.stdout)) == 2
    assert re.search(r"boxes +0\.\d{3} +0\.\d{3}\n +masks +0\.\d{3} +0\.\d{3}\n", done.stdout)
    with Image.open(out) as picture:
        assert picture.width > 1000
    for arguments, message in ((["--steps", 0], "--steps"), (["-o", "x.txt"], "-o must end in .png")):
        done = run_example("mask_rcnn_shapes.py", *arguments)
        assert done.returncode == 2
        assert message in done.stderr


def test_shapes_and_their_precision(monkeypatch):
    """Drawn shapes fit their boxes, are drawn the same each time, and found perfectly have a precision of 1."""
    pytest.importorskip("pycocotools")
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    shapes = importlib.import_module("mask_rcnn_shapes")
    images, targets = next(shapes.batches(7, 20))
    again, _ = next(shapes.batches(7, 20))
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    assert {int(label) for target in targets for label in target["labels"]} == {1, 2, 3}
    for target in targets:
        for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            outside = mask.clone()
            outside[y1:y2, x1:x2] = 0
            assert not outside.any()
            edges = mask[y1, x1:x2], mask[y2 - 1, x1:x2], mask[y1:y2, x1], mask[y1:y2, x2 - 1]
            assert all(edge.any() for edge in edges)
        assert target["masks"].sum(0).max() == 1  # what lies behind is not seen
    found = [{**target, "scores": torch.ones(len(target["labels"]))} for target in targets]
    for kind in ("bbox", "segm"):
        assert shapes.average_precision(found, targets, kind) == pytest.approx((1, 1))
        assert shapes.average_precision(found[1:] + found[:1], targets, kind)[1] < 0.2
