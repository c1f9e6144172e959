"""The operators of the assembled systems through ONNX, as in test_onnx.py; and that no operator was forgotten."""

import pytest
import torch
from torch.export import Dim

import pyseg
from onnx_cases import Call, check, maps, rand
from pyseg import functional as F


def test_fuse_query():
    weight, bias = rand(4, 5 + 3 + 8, 1, 1, seed=1), rand(4, seed=2)
    model = Call(lambda x, query: F.fuse_query(x, query, weight, bias, normalize=True, relu=True))
    sizes = maps("n", "h", "w")
    shapes = {"args": (sizes, {0: sizes[0]})}
    check(model, [(rand(2, 5, 6, 7), rand(2, 3)), (rand(3, 5, 4, 9), rand(3, 3))], shapes, optimize=True)


def test_valves():
    """Few taps, many (a convolution and region_gate), and a strided region."""
    few, many, valve, bias = rand(4, 3, 3, 3), rand(4, 12, 3, 3, seed=1), rand(4, 1, 3, 3, seed=2), rand(4, seed=3)

    def function(x, y, region, large):
        return (
            F.valve_conv2d(x, region, few, valve, bias, bias + 1, 2, 1, relu=True),
            F.valve_conv2d(y, region, many, valve, None, bias, padding=(2, 3), dilation=2, combine="add"),
            F.region_gate(y[:, :4], large, valve, bias, 2, 1, relu=True),
        )

    def example(n, h, w):
        region = (rand(n, 1, h, w) > 0).float()
        return rand(n, 3, h, w), rand(n, 12, h, w), region, region.repeat_interleave(2, 2).repeat_interleave(2, 3)

    check(Call(function), [example(2, 8, 7)])


def test_sparse_pairwise():
    """Any links, to a file that takes other ones."""
    model = Call(lambda x, *links: (F.sparse_pairwise(x, F.PixelLinks(*links)), *transposed(x, links)))

    def example(count, seed):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.cat([torch.zeros(1).long(), torch.randint(0, count, (23,), generator=generator).sort()[0]])
        starts = torch.cat([starts, torch.tensor([count])])
        columns = torch.randint(0, 24, (count,), generator=generator)
        return rand(2, 3, 3, 4, seed=seed), *F.pixel_links(starts, columns, rand(count, seed=seed))

    links = {0: Dim("links")}
    check(
        model, [example(40, 0), example(7, 1)], {"args": (None, links, None, links, None, links, links)}, optimize=True
    )


def transposed(x, links):
    rows = x.flatten(2).mT.flatten(0, 1)
    return (F.sparse_pairwise(rows, F.PixelLinks(*links), transpose=True),)


def test_multi_view_crf():
    first = torch.tensor([[0, 1, 2], [0, 3, 4], [1, 0, 0]])
    second = torch.tensor([[1, 4, 4], [1, 2, 2], [0, 3, 4]])
    links = F.correspondence_links(first, second, (2, 5, 6), torch.tensor([1.0, 0.5, 2.0]))

    def function(x):
        return F.dense_crf(x, smoothness=None, iterations=1, kernels=[F.LinkKernel(links)])

    check(Call(function), [(rand(2, 3, 5, 6),)])


def cameras(n):
    intrinsics = torch.tensor([[9.0, 0.3, 4.2], [0.0, 8.0, 3.1], [0.0, 0.0, 1.0]]).expand(n, 3, 3)
    angle = torch.tensor(0.1)
    pose = torch.eye(4).repeat(n, 1, 1)
    pose[:, 0, 0] = pose[:, 2, 2] = angle.cos()
    pose[:, 0, 2], pose[:, 2, 0] = angle.sin(), -angle.sin()
    pose[:, :3, 3] = rand(n, 3) * 0.1
    return intrinsics, intrinsics * 0.9, pose


def test_warp_to_view():
    def example(n, h, w):
        depth, measured = 2 + rand(n, h, w).abs(), 2 + rand(n, h + 1, w, seed=1).abs()
        depth[:, 0, :2] = 0
        return rand(n, 3, h + 1, w), depth, *cameras(n), measured

    def function(*arguments):
        return F.warp_to_view(*arguments, absolute_tolerance=0.8)

    inputs = example(2, 6, 8)
    seen, tested = F.warp_to_view(*inputs[:-1])[1], function(*inputs)[1]
    assert 0 < tested.sum() < seen.sum() < seen.numel()
    check(Call(function), [inputs])


def same(name, *arguments):
    """An operator and its decomposition, without any export."""
    operator = getattr(torch.ops.pyseg, name).default
    for got, want in zip(pyseg.export.decompositions()[operator](*arguments), operator(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_views_of_keyframes():
    """Added up: what warp_and_fuse asks for."""
    key, source, pose = cameras(6)
    depth, measured = 2 + rand(2, 5, 7).abs(), 2 + rand(6, 4, 1, seed=1).abs()
    for dtype in (torch.float32, torch.bfloat16):
        same("warp_to_view", rand(6, 3, 4, 1).to(dtype), depth, key[:2], source, pose, None, 0.05, 0.01)
    same("warp_to_view", rand(6, 3, 4, 1), depth, key[:2], source, pose, measured, 1.0, 0.0)


def warped(axes):
    shape, size = (7, 6, 5)[-axes:], (8, 9, 4)[-axes:]
    affine = F.warp_matrix(shape, size, rotation=torch.tensor([20.0, -70.0]), scale=1.2).float()
    labels = torch.randint(0, 4, (2, *shape), generator=torch.Generator().manual_seed(0))
    return size, (rand(2, 3, *shape), labels, affine, rand(2, axes, *(3, 2, 4)[-axes:], seed=1))


@pytest.mark.parametrize("border", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("axes", [2, 3])
def test_warps(axes, border):
    """Far beyond the image, sides of one element, NaN in places and elements, every type of labels."""
    size, (image, labels, affine, displacement) = warped(axes)
    image[0, 0, 0, 0], affine[0, 0, 0] = torch.nan, 20.0
    for cut in (labels, labels.to(torch.uint8), labels > 1, image[:, 1:]):
        arguments = (affine, displacement, rand(2, 3), rand(2, 3), list(size), border, 0.5, border, 1, -0.75, True)
        same("joint_warp", image.nan_to_num(2.0), cut, *arguments)
    # One control point and one element along the first axis, in float64.
    flat, points = image.double().nan_to_num(2.0)[:, :, :1], displacement.double()[:, :, :1]
    options = (None, None, [1, *size[1:]], border, 3.0, border, 0, -0.5, False)
    same("joint_warp", flat, None, affine.double(), points, *options)
    options = (list(image.shape[2:]), border, 9.0, border, 0, -0.5, False)
    plain = torch.eye(axes, axes + 1).repeat(2, 1, 1)
    bytes = (image * 90).nan_to_num(7.0).abs().clamp(0, 255).to(torch.uint8)
    same("joint_warp", bytes, None, plain * 0.7, None, rand(2, 3) + 1, None, *options)
    # A NaN is copied by the identity, and reaches nothing else.
    same("joint_warp", image, labels, plain, None, None, None, *options)
    plain[1, 0, 0] = torch.nan
    same("joint_warp", image[1:], labels[1:], plain[1:], None, None, None, *options)


def test_joint_warp():
    """What the decomposition above becomes: displaced, with labels; and bytes with bool."""
    size, inputs = warped(2)

    def displaced(*arguments):
        return F.joint_warp(*arguments, size=size, border="constant", fill=2.0, ignore_index=9)

    def turned(values, mask, affine):
        return F.joint_warp(values, mask, affine, size=size, border="replicate", ignore_index=1)

    check(Call(displaced), [inputs])
    image, labels, affine, _ = inputs
    check(Call(turned), [((image * 90).clamp(0, 255).to(torch.uint8), labels > 1, affine)], optimize=True)


def test_expectation_labels():
    def function(logits, present, valid):
        options = {"background_bias": 0.3, "foreground_bias": 1.0}
        labels = F.expectation_labels(logits, present, valid=valid, ignore_index=255, **options)
        return labels, *F.expectation_labels(logits, present, exclude_absent=False, return_bias=True, **options)

    present = torch.tensor([[True, False, True, True], [False, False, False, False], [False, True, False, True]])
    check(Call(function), [(rand(3, 4, 5, 6), present, rand(3, 5, 6) > -1)])


# ---- what has no form ----

IN_PLACE = {"atrous_conv2d_out", "region_gate_"}  # write into arguments: tracing takes the operators without


def test_no_operator_is_forgotten():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "pyseg::" in name}
    tables = (pyseg.export.decompositions(), pyseg.export.onnx_translations())
    entered = {operator._opname for table in tables for operator in table if operator.namespace == "pyseg"}
    public = {name for name in names if not name.startswith("_")}
    assert len(public) > 20
    assert public - entered == IN_PLACE
    # The private ones that inference calls; others are gradients.
    assert {name for name in names - public - entered if "backward" not in name} == {"_activation_vjp"}


@pytest.mark.parametrize("name", ["lovasz_statistics", "point_supervision_loss", "_hausdorff_dt", "paste_masks_rle"])
def test_what_raises(name):
    operator = getattr(torch.ops.pyseg, name).default
    with pytest.raises(RuntimeError, match=r": .*; docs/export.md says what can be exported"):
        pyseg.export.decompositions()[operator]()


def test_shares_raise():
    program = torch.export.export(
        Call(lambda x, present: F.expectation_labels(x, present, background_share=0.4)),
        (rand(1, 3, 4, 4), torch.ones(1, 3, dtype=torch.bool)),
    )
    with pytest.raises(RuntimeError, match="expectation_labels: shares .EM-Adapt. take a loop over data"):
        program.run_decompositions(pyseg.export.onnx_decompositions())
