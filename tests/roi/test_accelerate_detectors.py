"""pyseg.accelerate on torchvision's detectors, and on stand-ins of detectron2's and mmcv's modules."""

import copy
import pickle
import sys
import types

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.ops import MultiScaleRoIAlign

import pyseg
from pyseg._accelerate import detection as detection_parts
from pyseg._accelerate import measure

PARTS = {"rpn": "batched_nms", "roi_heads": "batched_nms", "roi_heads.box_roi_pool": "multiscale_roi_align"}


class Backbone(nn.Module):
    """Two levels, no batch norms."""

    out_channels = 16

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.down = nn.Conv2d(16, 16, 2, stride=2)

    def forward(self, x):
        x = self.stem(x).relu()
        return {"0": x, "1": self.down(x)}


def make(kind):
    """A detector with small heads."""
    torch.manual_seed(0)
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    parts = {}
    if kind is detection.MaskRCNN:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1"], 14, 2)
        parts["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(16, (16,), 1)
        parts["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(16, 16, 4)
    if kind is detection.KeypointRCNN:
        parts["keypoint_roi_pool"] = MultiScaleRoIAlign(["0", "1"], 14, 2)
        parts["keypoint_head"] = detection.keypoint_rcnn.KeypointRCNNHeads(16, (16,))
        parts["keypoint_predictor"] = detection.keypoint_rcnn.KeypointRCNNPredictor(16, 17)
    model = kind(
        Backbone(),
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 7 * 7, 32),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, 4),
        min_size=80,
        max_size=120,
        box_score_thresh=0.0,
        box_detections_per_img=20,
        rpn_post_nms_top_n_test=60,
        **parts,
    )
    return model.eval()


def images():
    torch.manual_seed(1)
    return [torch.rand(3, 70, 100), torch.rand(3, 100, 80)]


def run(model):
    with torch.no_grad():
        return model(images())


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert len(one["boxes"]) == 20
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [detection.FasterRCNN, detection.MaskRCNN, detection.KeypointRCNN])
def test_torchvision(kind):
    model = make(kind)
    expected, classes = run(model), [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pyseg.accelerate(model, exact=True)
    rows = {row.name: row.became for row in pyseg.report(model).rows}
    want = dict(PARTS)
    if kind is detection.MaskRCNN:
        want |= {"transform": "paste_masks", "roi_heads": "batched_nms, crop_masks"}
        want |= {"roi_heads.mask_roi_pool": "multiscale_roi_align"}
    if kind is detection.KeypointRCNN:
        want |= {"roi_heads.keypoint_roi_pool": "multiscale_roi_align"}
    for name, became in want.items():
        assert set(became.split(", ")) <= set(rows[name].split(", "))
        assert isinstance(model.get_submodule(name), classes[[n for n, _ in model.named_modules()].index(name)])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_same(run(model), expected)
    assert_same(run(copy.deepcopy(model)), expected)
    assert_same(run(pickle.loads(pickle.dumps(model))), expected)
    restored = pyseg.restore(pickle.loads(pickle.dumps(model)))
    for each in (restored, pyseg.restore(model)):
        assert [type(module) for module in each.modules()] == classes
        assert_same(run(each), expected)


def test_our_operators_run():
    """What the report says is what happens: the dispatcher sees our operators and none of torchvision's."""
    model = pyseg.accelerate(make(detection.MaskRCNN))
    with torch.profiler.profile() as profile:
        run(model)
    called = {event.key for event in profile.key_averages()}
    assert {"pyseg::multiscale_roi_align", "pyseg::nms", "pyseg::paste_masks"} <= called
    assert not {"torchvision::roi_align", "torchvision::nms"} & called


def test_measured():
    model = make(detection.MaskRCNN)
    expected = run(model)
    pyseg.accelerate(model, (images(),), exact=True, channels_last=False, rounds=1)
    report = pyseg.report(model)
    rows = {row.name: row for row in report.rows}
    for name in (*PARTS, "transform", "roi_heads.mask_roi_pool"):
        assert rows[name].before_ms > 0
        assert rows[name].after_ms > 0
        assert rows[name].difference < 1e-4
    assert "roi_heads.box_roi_pool" in str(report)
    assert_same(run(model), expected)


def test_training():
    """Losses and gradients, mask targets from boolean and byte masks."""
    model = make(detection.MaskRCNN).double().train()
    boxes = torch.tensor([[5.0, 5, 60, 50], [30, 20, 90, 65]], dtype=torch.float64)
    image, losses = torch.rand(3, 70, 100, dtype=torch.float64), {}
    for dtype in (torch.uint8, torch.bool):
        masks = torch.zeros(2, 70, 100, dtype=dtype)
        masks[0, 5:50, 5:60] = masks[1, 20:65, 30:90] = 1
        target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}
        for accelerated in (False, True):
            if accelerated:
                pyseg.accelerate(model, exact=True)
            torch.manual_seed(3)
            loss = model([image], [target])
            parameters = [p for p in model.parameters() if p.requires_grad]
            losses[accelerated] = [*loss.values(), *torch.autograd.grad(sum(loss.values()), parameters)]
        pyseg.restore(model)
        for got, want in zip(losses[True], losses[False], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_mask_targets_of_values_above_one():
    """Bytes from 0 to 255 are values, not truths."""
    boxes = torch.tensor([[5.0, 5, 60, 50], [30, 20, 90, 65]])
    masks = torch.zeros(2, 70, 100, dtype=torch.uint8)
    masks[0, 5:40, 5:60] = masks[1, 20:65, 40:90] = 255
    found = {}
    loss = detection_parts._rebound(detection.roi_heads.maskrcnn_loss, found, 4)
    assert list(found) == ["crop_masks"]
    logits = torch.full((2, 4, 28, 28), 0.3)
    for values in (masks, masks // 255):
        arguments = logits, [boxes], [values], [torch.tensor([1, 2])], [torch.arange(2)]
        torch.testing.assert_close(loss(*arguments), detection.roi_heads.maskrcnn_loss(*arguments))


def test_clocks_wait_for_the_device(monkeypatch):
    """A part's time starts when earlier work is done, and ends when its own is."""
    events = []

    def clock():
        events.append("clock")
        return float(len(events))

    monkeypatch.setattr(measure.Example, "synchronize", lambda example: events.append("wait"))
    monkeypatch.setattr(detection_parts, "perf_counter", clock)
    layer = torchvision.ops.RoIAlign(3, 0.5, 2)
    pyseg.accelerate(layer, (torch.randn(1, 5, 60, 64), [rows_of_boxes()]))
    clocks = [i for i, event in enumerate(events) if event == "clock"]
    assert len(clocks) >= 4
    assert all(events[i - 1] == "wait" for i in clocks)


def test_subclass_that_calls_super():
    """A method of the user's own over the one that is made anew."""

    class Heads(detection.roi_heads.RoIHeads):
        calls = 0

        def postprocess_detections(self, *args):
            Heads.calls += 1
            return super().postprocess_detections(*args)

    model = make(detection.FasterRCNN)
    model.roi_heads.__class__ = Heads
    expected = run(model)
    pyseg.accelerate(model, exact=True)
    assert_same(run(model), expected)
    assert Heads.calls == 2


# ---- stand-ins ----

LAYERS = """
import torch, torchvision
from torch import nn

class Boxes:
    def __init__(self, tensor):
        self.tensor = tensor

class ROIAlign(nn.Module):
    def __init__(self, output_size, spatial_scale, sampling_ratio, aligned=True):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, input, rois):
        size, scale = self.output_size, self.spatial_scale
        return torchvision.ops.roi_align(input, rois, size, scale, self.sampling_ratio, self.aligned)

class ROIPooler(nn.Module):
    def __init__(self, output_size, scales, sampling_ratio, aligned=True):
        super().__init__()
        self.output_size = (output_size, output_size)
        self.level_poolers = nn.ModuleList(ROIAlign(self.output_size, s, sampling_ratio, aligned) for s in scales)
        self.min_level, self.max_level = 2, 1 + len(scales)
        self.canonical_level, self.canonical_box_size = 4, 224

    def forward(self, x, box_lists):
        index = torch.cat([torch.full((len(b.tensor), 1), float(i)) for i, b in enumerate(box_lists)])
        boxes = torch.cat([b.tensor for b in box_lists])
        sizes = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.floor(self.canonical_level + torch.log2(sizes / self.canonical_box_size + 1e-8))
        level = level.clamp(self.min_level, self.max_level).long() - self.min_level
        rows = torch.cat([index, boxes], 1)
        output = x[0].new_zeros(len(rows), x[0].shape[1], *self.output_size)
        for i, pooler in enumerate(self.level_poolers):
            output[level == i] = pooler(x[i], rows[level == i])
        return output

def batched_nms(boxes, scores, idxs, iou_threshold):
    batched_nms.calls += 1
    return torchvision.ops.batched_nms(boxes.float(), scores, idxs, iou_threshold)
batched_nms.calls = 0

def inference_single_image(boxes, scores, classes, threshold):
    keep = batched_nms(boxes, scores, classes, threshold)
    return boxes[keep]

def inference(boxes, scores, classes, threshold):
    return [inference_single_image(b, s, c, threshold) for b, s, c in zip(boxes, scores, classes)]

class FastRCNNOutputLayers(nn.Module):
    threshold = 0.5

    def inference(self, boxes, scores, classes):
        return inference(boxes, scores, classes, self.threshold)

    def forward(self, *inputs):
        return self.inference(*inputs)
"""


@pytest.fixture
def detectron2(monkeypatch):
    module = types.ModuleType("detectron2.standin")
    monkeypatch.setitem(sys.modules, "detectron2", types.ModuleType("detectron2"))
    monkeypatch.setitem(sys.modules, "detectron2.standin", module)
    exec(LAYERS, module.__dict__)
    return module


def rows_of_boxes(count=20):
    corner = torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) * 100
    return torch.cat([corner, corner + torch.linspace(5, 140, 2 * count).reshape(count, 2)], 1)


def test_detectron2_pooler(detectron2):
    pooler = detectron2.ROIPooler(7, [0.25, 0.125], 0)
    features = [torch.randn(2, 6, 60, 64), torch.randn(2, 6, 30, 32)]
    boxes = [detectron2.Boxes(rows_of_boxes()), detectron2.Boxes(rows_of_boxes(5))]
    expected = pooler(features, boxes)
    pyseg.accelerate(pooler)
    assert [row.became for row in pyseg.report(pooler).rows] == ["multiscale_roi_align", "roi_align", "roi_align"]
    torch.testing.assert_close(pooler(features, boxes), expected, rtol=1e-4, atol=1e-4)
    pyseg.restore(pooler)
    assert type(pooler) is detectron2.ROIPooler
    pooler.level_poolers[1].aligned = False  # levels that differ: not one call
    pyseg.accelerate(pooler)
    assert [row.became for row in pyseg.report(pooler).rows] == ["roi_align", "roi_align"]


def sizes_around_levels():
    """Boxes whose sizes are powers of two, and some units in the last place more and less."""
    size = torch.tensor([14.0, 28.0, 56.0, 112.0, 224.0]).repeat_interleave(41)
    size = size * (1 + torch.arange(-20, 21).repeat(5) * 2.0**-23)
    return torch.stack([size * 0, size * 0, size, size], 1)


def test_levels_of_detectron2(detectron2):
    """Its epsilon is within the logarithm, torchvision's behind it: sizes just below a power of two tell them apart."""
    scales = [0.25, 0.125, 0.0625]
    pooler = detectron2.ROIPooler(1, scales, 1)
    features = [torch.full((1, 1, 64 >> i, 64 >> i), float(i)) for i in range(3)]
    boxes = sizes_around_levels()
    expected = pooler(features, [detectron2.Boxes(boxes)])
    pyseg.accelerate(pooler)
    assert torch.equal(pooler(features, [detectron2.Boxes(boxes)]), expected)
    theirs = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 1, 1)
    arguments = {str(i): x for i, x in enumerate(features)}, [boxes], [(256, 256)]
    other = theirs(*arguments)
    assert not torch.equal(other, expected)
    assert torch.equal(pyseg.accelerate(theirs)(*arguments), other)


def test_detectron2_suppression(detectron2):
    """Through functions that call functions."""
    layers = detectron2.FastRCNNOutputLayers()
    boxes, scores, classes = rows_of_boxes(), torch.rand(20), torch.randint(0, 2, (20,))
    arguments = [boxes] * 2, [scores] * 2, [classes] * 2
    expected = layers(*arguments)
    assert detectron2.batched_nms.calls == 2
    pyseg.accelerate(layers)
    for got, want in zip(layers(*arguments), expected, strict=True):
        assert torch.equal(got, want)
    assert detectron2.batched_nms.calls == 2


class RoIAlign(nn.Module):
    """mmcv's attributes."""

    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode="avg", aligned=True):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = int(sampling_ratio)
        self.pool_mode = pool_mode
        self.aligned = aligned
        self.use_torchvision = False

    def forward(self, input, rois):
        raise NotImplementedError


def test_mmcv_roi_align():
    input, rois = torch.randn(1, 5, 60, 64), torch.cat([torch.zeros(20, 1), rows_of_boxes()], 1)
    for mode in ("avg", "max"):
        layer = pyseg.accelerate(RoIAlign((3, 4), 0.5, 2, mode))
        expected = pyseg.functional.roi_align(input, rois, (3, 4), 0.5, 2, True, mode=mode)
        assert torch.equal(layer(input, rois), expected)
    assert not pyseg.report(pyseg.accelerate(RoIAlign(3, pool_mode="other"))).rows


def test_torchvision_roi_align():
    layer = torchvision.ops.RoIAlign(3, 0.5, 2)
    input, boxes = torch.randn(1, 5, 60, 64), [rows_of_boxes()]
    expected = layer(input, boxes)
    torch.testing.assert_close(pyseg.accelerate(layer)(input, boxes), expected, rtol=1e-4, atol=1e-4)
