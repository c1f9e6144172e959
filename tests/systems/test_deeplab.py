"""DeepLab and FastFCN as models: backbones against torchvision's dilated ones, logits, CRF, and the example."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyseg
from pyseg.models import ResNetStages, deeplab, fastfcn

EXAMPLES = Path(__file__).parents[2] / "examples"


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1))


def test_backbone_is_torchvisions():
    models = pytest.importorskip("torchvision.models")
    stages = ResNetStages("resnet50", 8).eval()
    theirs = models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.load_state_dict(stages.state_dict(), strict=False)
    image = torch.randn(1, 3, 24, 32)
    with torch.no_grad():
        maps = stages(image)
        expected = nn.Sequential(*list(theirs.children())[:-2])(image)
    torch.testing.assert_close(maps[-1], expected)
    assert tuple(each.shape[1] for each in maps) == stages.channels == (256, 512, 1024, 2048)


def test_basic_blocks_are_dilated():
    """torchvision refuses to dilate ResNet-18."""
    pytest.importorskip("torchvision")
    stages = ResNetStages("resnet18", 8).eval()
    with torch.no_grad():
        sizes = [tuple(each.shape[1:]) for each in stages(torch.randn(1, 3, 64, 32))]
    assert sizes == [(64, 16, 8), (128, 8, 4), (256, 8, 4), (512, 8, 4)]
    rates = [m.dilation[0] for m in stages.layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert rates == [2, 2, 4, 4]


def test_deeplab_without_and_with_crf():
    model = deeplab(backbone(), 4, 8, crf=True, width=6, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    assert [conv[0].dilation for conv in list(model.aspp.convs)[1:4]] == [(12, 12), (24, 24), (36, 36)]
    image = torch.randn(2, 3, 21, 18)
    with torch.no_grad():
        coarse = model.classifier(model.aspp(model.backbone(image)))
        expected = nn.functional.interpolate(coarse, (21, 18), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model.unary(image), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(image), model.crf(expected, (image / 4 + 0.5) * 255), rtol=1e-3, atol=1e-3)
        plain = copy.deepcopy(model)
        plain.crf = None
        torch.testing.assert_close(plain(image), expected, rtol=1e-5, atol=1e-5)


def test_modes_of_a_backbone_stay():
    """Counting its channels leaves each module's mode, frozen norms in a backbone that trains too."""
    given = backbone().train()
    given[1].eval()
    deeplab(given, 3)
    assert [module.training for module in given.modules()] == [True, True, False, True, True]


def test_gradients_reach_everything():
    model = deeplab(backbone(), 3, 16, crf=True, width=4, dropout=0.0).train()
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_fastfcn():
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = fastfcn("resnet18", 3, "aspp", width=8, head_width=8).eval()
    image = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        coarse = model.head(model.jpu(*model.backbone(image))[-1])
        assert coarse.shape == (1, 3, 8, 4)
        assert [conv[0].dilation[0] for conv in list(model.head[0].convs)[1:4]] == [12, 24, 36]
        expected = nn.functional.interpolate(coarse, (64, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="deeplab: output_stride must be 8, 16 or 32, got 4"):
        deeplab(backbone(), 3, 4)
    with pytest.raises(ValueError, match="segmentation_head: kind must be fcn or aspp, got crf"):
        pyseg.models.segmentation_head("crf", 4, 3)
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="name must be that of a ResNet, got alexnet"):
        ResNetStages("alexnet")


def test_example(monkeypatch, capsys, tmp_path):
    """Too few steps: it runs through, draws, and says by its status that it has failed."""
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("deeplab_crf")
    monkeypatch.setattr(example, "BATCH", 2)
    out = tmp_path / "deeplab.png"
    threads = torch.get_num_threads()
    try:
        monkeypatch.setattr(sys, "argv", ["deeplab_crf.py", "--steps", "4", "--threads", "1", "-o", str(out)])
        assert example.main() == 1
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    assert "the loss must at least halve" in printed.err
    assert "DeepLab with CRF  mean IoU 0." in printed.out
    with image.open(out) as picture:
        assert picture.width > 1000
    monkeypatch.setattr(sys, "argv", ["deeplab_crf.py", "--steps", "1"])
    assert example.main() == 2
