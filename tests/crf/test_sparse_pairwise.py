"""sparse_pairwise and what builds its links, against the definition, on both devices."""

import pytest
import torch
from crf_cases import on_each_number_of_threads, rand, randn
from hypothesis import given
from hypothesis import strategies as st

from cuda_budget import cuda_budget
from drawn import drawn_settings
from pyseg import reference
from pyseg.functional import PixelLinks, correspondence_links, pixel_links, sparse_pairwise, track_links

OP = torch.ops.pyseg.sparse_pairwise.default
BACKWARD_WEIGHT = torch.ops.pyseg._sparse_pairwise_backward_weight.default
ADD = torch.ops.pyseg._sparse_pairwise_add.default


def random_links(pixels, length, seed=0, dtype=torch.float64):
    """Links between any pixels, in any order, some of them twice; made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(max(pixels, 1), (length,), generator=generator).sort()[0]
    columns = torch.randint(max(pixels, 1), (length,), generator=generator)
    starts = torch.searchsorted(rows, torch.arange(pixels + 1))
    return pixel_links(starts, columns, randn(length, seed=seed, dtype=dtype))


def on(links, device):
    return PixelLinks(*[tensor.to(device) for tensor in links])


def expected_of(values, links, transpose=False):
    if transpose:
        entries = links.transpose_entries.long()
        return reference.sparse_pairwise(
            values, links.transpose_starts, links.transpose_columns, links.weights[entries]
        )
    return reference.sparse_pairwise(values, links.row_starts, links.columns, links.weights)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 11, 16, 21, 33])
def test_definition(device, channels):
    """Every width of channels, planes and rows, both directions."""
    links = random_links(2 * 29, 90)
    values = randn(2, channels, 29, seed=1)
    for transpose in (False, True):
        expected = expected_of(values, links, transpose)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            for layout in (values, values.mT.contiguous().mT):
                got = sparse_pairwise(layout.to(device, dtype), on(links, device), transpose=transpose)
                assert got.dtype == dtype
                assert got.is_contiguous() == layout.is_contiguous()
                torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=tolerance)


def test_hypothesis(device):
    @drawn_settings(40, 4, device)
    @given(
        images=st.integers(1, 4),
        channels=st.integers(0, 40),
        points=st.integers(1, 70),
        length=st.integers(0, 200),
        rows=st.booleans(),
        transpose=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def check(images, channels, points, length, rows, transpose, seed):
        links = random_links(images * points, length, seed)
        values = randn(images, channels, points, seed=seed)
        given_values = (values.mT.contiguous().mT if rows else values).to(device)
        got = sparse_pairwise(given_values, on(links, device), transpose=transpose)
        torch.testing.assert_close(got.cpu(), expected_of(values, links, transpose), rtol=1e-10, atol=1e-10)

    check()


def test_blocks_of_pixels(device):
    """More pixels than a block takes, links between all images, pixels with many links and with none."""
    links = random_links(3 * 600, 700, dtype=torch.float32)
    values = randn(3, 6, 600, dtype=torch.float32)
    got = sparse_pairwise(values.to(device), on(links, device))
    torch.testing.assert_close(got.cpu().double(), expected_of(values, links), rtol=1e-5, atol=1e-5)
    star = pixel_links(torch.tensor([0, 500, *[500] * 599]), torch.arange(500) + 50)
    got = sparse_pairwise(values[:1].to(device), on(star, device))
    torch.testing.assert_close(got[0, :, 0].cpu(), values[0, :, 50:550].sum(1), rtol=1e-4, atol=1e-4)
    assert not got[0, :, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_types(device, dtype):
    """Summed in float32, rounded once."""
    links = on(random_links(40, 60, dtype=torch.float32), device)
    values = randn(2, 5, 20).to(device, dtype)
    for layout in (values, values.mT.contiguous().mT):
        got = sparse_pairwise(layout, links)
        assert got.dtype == dtype
        assert torch.equal(got, sparse_pairwise(layout.float(), links).to(dtype))


def test_layouts(device):
    links = on(random_links(2 * 20, 60, dtype=torch.float32), device)
    values = randn(2, 6, 4, 5, dtype=torch.float32).to(device)
    expected = sparse_pairwise(values, links)
    for strided in (
        values.contiguous(memory_format=torch.channels_last),
        values.transpose(2, 3).contiguous().transpose(2, 3),
        values.repeat_interleave(2, 3)[..., ::2],
    ):
        got = sparse_pairwise(strided, links)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    last = sparse_pairwise(values.contiguous(memory_format=torch.channels_last), links)
    assert last.is_contiguous(memory_format=torch.channels_last)
    rows = values.movedim(1, 3).reshape(40, 6)
    got = sparse_pairwise(rows, links)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected.movedim(1, 3).reshape(40, 6), rtol=1e-6, atol=1e-6)


def test_nothing(device):
    for images, channels, points in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 4)):
        links = on(random_links(images * points, 0), device)
        values = torch.ones(images, channels, points, dtype=torch.float64, device=device, requires_grad=True)
        summed = sparse_pairwise(values, links)
        assert summed.shape == values.shape
        assert not summed.any()
        assert not torch.autograd.grad(summed.sum(), values)[0].any()
    links = on(random_links(8, 5), device)
    weights = links.weights.requires_grad_()
    empty = sparse_pairwise(torch.ones(2, 0, 4, dtype=torch.float64, device=device), links)
    assert torch.autograd.grad(empty.sum(), weights)[0].tolist() == [0] * 5
    assert correspondence_links(torch.zeros(0, 3).long(), torch.zeros(0, 3).long(), (2, 3, 4)).columns.shape == (0,)


def test_values_that_are_not_finite(device):
    """They reach the pixels that are linked to them, in their own channel."""
    values = torch.ones(1, 2, 5, device=device)
    values[0, 0, 3] = float("nan")
    links = on(pixel_links(torch.tensor([0, 1, 2, 2, 2, 2]), torch.tensor([3, 4]), torch.ones(2)), device)
    assert sparse_pairwise(values, links).isnan().nonzero().tolist() == [[0, 0, 0]]


def test_same_bits_for_every_number_of_threads():
    """Planes and rows, both directions, and the weights' gradient."""
    for images, points, channels in ((2, 3000, 21), (1, 5000, 3)):
        links = random_links(images * points, 20_000, dtype=torch.float32)
        values = randn(images, channels, points, dtype=torch.float32)
        for layout in (values, values.mT.contiguous().mT):

            def run(layout=layout, links=links):
                v, w = layout.clone().requires_grad_(), links.weights.clone().requires_grad_()
                summed = sparse_pairwise(v, links._replace(weights=w))
                return [summed.detach(), *torch.autograd.grad(summed.square().sum(), (v, w))]

            on_each_number_of_threads(run)


def test_add(device):
    """base + factor * sums: of planes, rows and narrow types."""
    links = random_links(2 * 300, 150, dtype=torch.float32)
    for channels in (3, 12):
        base, values = (randn(2, channels, 300, seed=seed, dtype=torch.float32) for seed in (1, 2))
        factor = randn(channels, dtype=torch.float32)
        expected = base + factor[:, None] * expected_of(values, links).float()
        moved = on(links, device)
        for layout in (values, values.mT.contiguous().mT):
            got = ADD(base.to(device), factor.to(device), layout.to(device), *moved[:3])
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
        half = ADD(base.to(device).half(), factor.to(device), values.to(device).half(), *moved[:3])
        torch.testing.assert_close(half.cpu().float(), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="_sparse_pairwise_add: it has no gradient, sparse_pairwise does"):
        ADD(base.to(device).requires_grad_(), factor.to(device), values.to(device), *moved[:3]).sum().backward()


# ---- gradients ----


@pytest.mark.parametrize("transpose", [False, True])
def test_gradients(device, transpose):
    """Of every order: it is linear in values and in weights."""
    fast = device == "cuda"
    links = on(random_links(2 * 7, 20), device)
    weights = links.weights.requires_grad_()

    def summed(values, weights):
        return sparse_pairwise(values, links._replace(weights=weights), transpose=transpose)

    planes = randn(2, 3, 7, seed=1).to(device).requires_grad_()
    assert torch.autograd.gradcheck(summed, (planes, weights), fast_mode=fast)
    assert torch.autograd.gradgradcheck(summed, (planes, weights), fast_mode=True)
    rows = randn(14, 3, seed=1).to(device).requires_grad_()
    assert torch.autograd.gradcheck(summed, (rows, weights), fast_mode=fast)


def test_gradients_of_the_reference(device):
    """Upstream gradients in another layout than the values, blocks of pixels, all widths of channels."""
    for channels in (1, 6, 21):
        links = random_links(2 * 270, 300, seed=channels)
        values = randn(2, channels, 270, seed=1).requires_grad_()
        weights = links.weights.clone().requires_grad_()
        upstream = randn(2, channels, 270, seed=2)
        loss = (expected_of(values, links._replace(weights=weights)) * upstream).sum()
        expected = torch.autograd.grad(loss, (values, weights))
        for layouts in ((False, False), (True, True), (True, False)):
            v, g = (
                (t.detach().mT.contiguous().mT if rows else t.detach()).to(device)
                for t, rows in zip((values, upstream), layouts, strict=True)
            )
            w = weights.detach().to(device).requires_grad_()
            summed = sparse_pairwise(v.requires_grad_(), on(links, device)._replace(weights=w))
            got = torch.autograd.grad(summed, (v, w), g)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a.cpu(), b)


def test_gradient_of_narrow_values(device):
    links = on(random_links(20, 30, dtype=torch.float32), device)
    weights = links.weights.requires_grad_()
    values = randn(1, 3, 20).to(device, torch.bfloat16).requires_grad_()
    summed = sparse_pairwise(values, links._replace(weights=weights))
    grads = torch.autograd.grad(summed.sum(), (values, weights))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(grads[1], values.detach().float().sum(1)[0, links.columns.long()], rtol=1e-5, atol=1e-5)


# ---- the contract ----


def test_opcheck(device):
    links = on(random_links(2 * 6, 15), device)
    plain = [tensor.detach() for tensor in links]
    values = randn(2, 3, 6).to(device)
    for layout in (values, values.mT.contiguous().mT):
        torch.library.opcheck(
            OP, (layout.clone().requires_grad_(), plain[0].clone().requires_grad_(), *plain[1:], False)
        )
        torch.library.opcheck(ADD, (values, torch.ones(3, dtype=torch.float64, device=device), layout, *plain[:3]))
    torch.library.opcheck(
        BACKWARD_WEIGHT, (values.clone().requires_grad_(), values.clone().requires_grad_(), *plain[1:])
    )


def test_vmap(device):
    links = on(random_links(2 * 7, 20), device)
    values = randn(4, 2, 5, 7).to(device)
    expected = torch.stack([sparse_pairwise(v, links) for v in values])
    torch.testing.assert_close(torch.vmap(lambda v: sparse_pairwise(v, links))(values), expected)
    weights = links.weights.expand(4, -1)
    with pytest.raises(RuntimeError, match="sparse_pairwise: vmap must be over values alone"):
        torch.vmap(lambda w, v: sparse_pairwise(v, links._replace(weights=w)))(weights, values)


def test_autocast(device):
    """Changes nothing."""
    links = on(random_links(12, 20, dtype=torch.float32), device)
    values = randn(1, 2, 12, dtype=torch.float32).to(device)
    expected = sparse_pairwise(values, links)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(sparse_pairwise(values, links), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": lambda v: v[..., :6]}, r"row_starts must be \[13\], got \[15\]"),
        ({"values": lambda v: v.long()}, "values must be float32, float64, float16 or bfloat16, got"),
        ({"values": lambda v: v[0, 0]}, r"values must be \[N, C, \*S\] or \[R, C\], got \[7\]"),
        ({"columns": lambda t: t.long()}, "columns must be torch.Int, got torch.Long"),
        ({"columns": lambda t: t[1:]}, r"columns must be \[20\], got \[19\]"),
        ({"row_starts": lambda t: t.int()}, "row_starts must be torch.Long, got torch.Int"),
        ({"transpose_starts": lambda t: t[1:]}, r"transpose_starts must be \[15\], got \[14\]"),
        ({"transpose_columns": lambda t: t[1:]}, r"transpose_columns must be \[20\], got \[19\]"),
        ({"transpose_entries": lambda t: t[1:]}, r"transpose_entries must be \[20\], got \[19\]"),
    ],
)
def test_errors(device, change, message):
    arguments = {"values": randn(2, 3, 7), **random_links(14, 20)._asdict()}
    arguments = {name: change.get(name, lambda t: t)(tensor).to(device) for name, tensor in arguments.items()}
    with pytest.raises(RuntimeError, match=f"sparse_pairwise: {message}"):
        sparse_pairwise(arguments.pop("values"), PixelLinks(**arguments))


def test_fake_errors():
    """Traced code raises the same errors."""
    links = PixelLinks(*[tensor.to("meta") for tensor in random_links(14, 20)])
    with pytest.raises(RuntimeError, match=r"sparse_pairwise: row_starts must be \[13\], got \[15\]"):
        sparse_pairwise(torch.ones(2, 3, 6, dtype=torch.float64, device="meta"), links)
    with pytest.raises(RuntimeError, match="sparse_pairwise: weights must be torch.float64, got torch.float32"):
        OP(
            torch.ones(2, 3, 7, dtype=torch.float64, device="meta"), links.weights.float(), *links[1:], False
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("columns", 3, 14, "columns must be from 0 to 13, got 14"),
        ("columns", 7, -1, "columns must be from 0 to 13, got -1"),
        ("row_starts", 0, 1, "starts of rows must begin with 0 and end with 20 .* got 1 and 20"),
        ("row_starts", 14, 21, "starts of rows must begin with 0 and end with 20 .* got 0 and 21"),
        ("row_starts", 5, 30, "starts of rows must ascend, got 30 before"),
        ("row_starts", 5, -3, "starts of rows must ascend, got .* before -3"),
        ("transpose_entries", 2, 20, "transpose_entries must be from 0 to 19, got 20"),
        ("transpose_columns", 2, 1 << 30, "columns must be from 0 to 13, got 1073741824"),
    ],
)
@pytest.mark.parametrize("rows", [False, True])
def test_links_that_would_be_read_out_of_bounds(name, place, value, message, rows):
    """On the CPU contents are checked, too."""
    links = random_links(14, 20)
    wrong = getattr(links, name).clone()
    wrong[place] = value
    values = randn(2, 3, 7)
    values = values.mT.contiguous().mT if rows else values
    broken = links._replace(**{name: wrong})
    with pytest.raises(RuntimeError, match=f"sparse_pairwise: {message}"):
        sparse_pairwise(values, broken, transpose=name.startswith("transpose"))
    if not name.startswith("transpose"):
        with pytest.raises(RuntimeError, match=f"_sparse_pairwise_backward_weight: {message}"):
            BACKWARD_WEIGHT(values, values, *broken[1:])


@pytest.mark.cuda_only
@pytest.mark.parametrize(
    "name", ["row_starts", "columns", "transpose_starts", "transpose_columns", "transpose_entries"]
)
def test_nothing_is_read_outside(device, name):
    """Links that lie count for nothing: no access out of bounds, which the fake GPU would report."""
    links, values = random_links(2 * 40, 60), randn(2, 4, 40)
    for wrong in (2**30, -(2**30)):
        broken = on(links._replace(**{name: torch.full_like(getattr(links, name), wrong)}), device)
        for layout in (values, values.mT.contiguous().mT):
            v = layout.to(device)
            for transpose in (False, True):
                assert sparse_pairwise(v, broken, transpose=transpose).shape == values.shape
            assert BACKWARD_WEIGHT(v, v, *broken[1:]).shape == (60,)


@pytest.mark.cuda_only
@pytest.mark.sm(75, 80, 90)
def test_cuda_reads_links_once(device):
    """Planes: starts and links once for the channels of a block; rows: 16 bytes at a time."""
    pixels, channels = 2048, 8
    links = on(random_links(pixels, 256, dtype=torch.float32), device)
    values = randn(1, channels, pixels, dtype=torch.float32).to(device)
    written, starts = values.nbytes, links.row_starts.nbytes
    # A sector of 32 bytes for each gathered value of a plane, half as many for a row's; starts are read twice.
    gathered = 256 * channels * 32
    with cuda_budget(
        "sparse_planes_kernel<float>", launches=1, min_bytes=written + 2 * starts + gathered, bytes_ratio=1.5
    ):
        sparse_pairwise(values, links)
    gathered = 256 * channels * 4
    with cuda_budget(
        "sparse_rows_kernel<float, 4>", launches=1, min_bytes=written + 2 * starts + gathered, bytes_ratio=2
    ):
        sparse_pairwise(values.mT.contiguous().mT, links)
    with cuda_budget("sparse_dots_kernel<float>", launches=1):
        BACKWARD_WEIGHT(values, values, *links[1:])


# ---- building links ----


def test_pixel_links():
    """Any matrix of compressed rows, and its transpose."""
    dense = randn(9, 9) * (rand(9, 9, seed=1) < 0.3)
    rows, columns = dense.nonzero().T
    links = pixel_links(torch.searchsorted(rows, torch.arange(10)), columns, dense[rows, columns])
    values = randn(9, 4, seed=2)
    torch.testing.assert_close(sparse_pairwise(values, links), dense @ values)
    torch.testing.assert_close(sparse_pairwise(values, links, transpose=True), dense.T @ values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_pixel_links_of_small_integers(dtype):
    """With more pixels than the type of the columns counts to."""
    pixels = 40_000 if dtype == torch.int16 else 300
    columns = torch.tensor([3, 100, 7], dtype=dtype)
    starts = torch.tensor([0, 1]).repeat_interleave(torch.tensor([1, pixels])) * 3
    links = pixel_links(starts, columns)
    expected = torch.zeros(pixels, 1)
    expected[columns.long()] = 1
    ones = torch.ones(pixels, 1)
    torch.testing.assert_close(sparse_pairwise(ones, links, transpose=True), expected)
    assert sparse_pairwise(ones, links).sum() == 3


@pytest.mark.parametrize("column", [2**32 + 1, -(2**32) + 1, 2**31, 4, -1])
def test_columns_that_do_not_exist(column):
    """They must not become other ones in 32 bits."""
    links = pixel_links(torch.tensor([0, 1, 2, 2, 2]), torch.tensor([column, 1]))
    for transpose in (False, True):
        with pytest.raises(RuntimeError, match="sparse_pairwise: "):
            sparse_pairwise(torch.ones(4, 1), links, transpose=transpose)


@drawn_settings(30)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    count=st.integers(0, 30),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_correspondence_links(shape, count, weighted, seed):
    """Symmetric, repeated pairs added up, no pixel linked to itself; in any number of axes."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.stack([torch.randint(size, (count,), generator=generator) for size in shape], 1) for _ in range(2)
    )
    weights = rand(count, seed=seed) if weighted else None
    matrix = reference.link_matrix(first, second, shape, weights)
    links = correspondence_links(first, second, shape, weights)
    eye = torch.eye(len(matrix), dtype=torch.float64)
    torch.testing.assert_close(sparse_pairwise(eye, links), matrix)
    torch.testing.assert_close(sparse_pairwise(eye, links, transpose=True), matrix)
    assert links.columns.shape[0] == (matrix != 0).sum()


def test_gradient_of_correspondences():
    first = torch.tensor([[0, 0], [0, 1], [1, 2], [0, 0], [1, 1]])
    second = torch.tensor([[1, 2], [1, 0], [0, 0], [0, 2], [1, 1]])
    values = randn(2, 2, 3)

    def summed(weights):
        return sparse_pairwise(values, correspondence_links(first, second, (2, 3), weights))

    assert torch.autograd.gradcheck(summed, rand(5).requires_grad_())


def test_track_links():
    """All pairs of a track, whatever the order of its observations."""
    tracks = torch.tensor([[7, 0, 1, 1], [3, 0, 0, 0], [7, 1, 1, 2], [7, 2, 0, 0], [5, 1, 0, 1], [3, 2, 1, 1]])
    shape, weights = (3, 2, 3), torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 5.0])
    pairs = [(0, 2), (0, 3), (2, 3), (1, 5)]
    first, second = (tracks[[pair[end] for pair in pairs], 1:] for end in (0, 1))
    product = torch.stack([weights[a] * weights[b] for a, b in pairs])
    expected = reference.link_matrix(first, second, shape, product)
    eye = torch.eye(18, dtype=torch.float64)
    for order in (torch.arange(6), torch.tensor([4, 2, 0, 5, 1, 3])):
        got = sparse_pairwise(eye, track_links(tracks[order], shape, weights[order]))
        torch.testing.assert_close(got, expected)
    assert track_links(tracks[:0], shape).columns.shape == (0,)


PAIR = torch.zeros(1, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: correspondence_links(PAIR, PAIR + 1, (1, 4, 4)),
            r"correspondence_links: second must lie in \[1, 4, 4\]",
        ),
        (lambda: correspondence_links(PAIR - 1, PAIR, (1, 4, 4)), r"first must lie in .* got \[-1, -1, -1\]"),
        (lambda: correspondence_links(PAIR.float(), PAIR, (1, 4, 4)), r"first must be \[K, 3\] integers, got \[1, 3\]"),
        (lambda: correspondence_links(PAIR, PAIR[:0], (1, 4, 4)), r"second must be \[1, 3\] like first, got \[0, 3\]"),
        (lambda: correspondence_links(PAIR, PAIR, (1, 4, 4), torch.ones(2)), r"weights must be \[1\], got \[2\]"),
        (lambda: track_links(PAIR, (1, 4, 4)), r"track_links: tracks must be \[K, 4\] integers, got \[1, 3\]"),
        (lambda: track_links(PAIR, (4, 4), torch.ones(2)), r"track_links: weights must be \[1\], got \[2\]"),
        (lambda: pixel_links(PAIR, PAIR[0]), r"pixel_links: row_starts must be a list of integers, got \[1, 3\]"),
        (lambda: pixel_links(PAIR[0], PAIR[0].bool()), r"columns must be a list of integers, got \[3\] torch.bool"),
        (lambda: track_links(PAIR.float(), (4, 4)), r"track_links: tracks must be .* got \[1, 3\] torch.f"),
        (lambda: pixel_links(PAIR[0, :0], PAIR[0]), r"pixel_links: row_starts must be \[R \+ 1\], got \[0\]"),
        (lambda: pixel_links(PAIR[0], PAIR[0], torch.ones(1)), r"weights must be \[3\] like columns, got \[1\]"),
    ],
)
def test_errors_of_links(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
