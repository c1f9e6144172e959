"""sparse_pairwise: sums over links between the pixels of several views, and mean field over all of them.

Peers: torch.sparse's product (CSR), a gather with index_add as users write it, and the same compiled. The links are
local displacements between neighbouring views, as those of correspondences are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import Case, Contender, Prepared, Workload

BASELINE = "torch, index_add"
ITERATIONS = 5


@dataclass(frozen=True)
class Problem:
    views: int
    height: int
    width: int
    classes: int
    links: int
    rows: bool = False  # channels side by side

    @property
    def name(self) -> str:
        layout = "rows" if self.rows else "planes"
        size = f"{self.views}x{self.width}x{self.height}"
        return f"{size}/classes{self.classes}/links{self.links}/{layout}"

    @property
    def pixels(self) -> int:
        return self.views * self.height * self.width

    def values(self) -> Tensor:
        """[views, classes, height, width] marginals."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.views, self.classes, self.height, self.width, generator=generator)
        memory = torch.channels_last if self.rows else torch.contiguous_format
        return logits.softmax(1).contiguous(memory_format=memory)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Pixels of a view and of the next one, displaced by up to 40 pixels."""
        generator = torch.Generator().manual_seed(1)

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (self.links,), generator=generator)

        view, y, x = draw(0, self.views - 1), draw(0, self.height), draw(40, self.width)
        first = torch.stack([view, y, x], 1)
        shift = 20 + draw(0, 20)
        return first, torch.stack([view + 1, y, x - shift], 1)


def cases() -> list[Case]:
    street = Problem(4, 240, 320, 11, 50_000)
    problems = [street, Problem(4, 240, 320, 11, 50_000, rows=True), Problem(4, 240, 320, 11, 600_000)]
    return [*[_product(p, quick=(1,) if p is street else ()) for p in problems], _mean_field(street)]


def _product(problem: Problem, quick: tuple[int, ...]) -> Case:
    def build() -> Workload:
        from pyseg.functional import correspondence_links, sparse_pairwise

        values = problem.values()
        first, second = problem.pairs()
        links = correspondence_links(first, second, (problem.views, problem.height, problem.width))
        rows = torch.arange(problem.pixels).repeat_interleave(links.row_starts.diff())
        columns = links.columns.long()
        matrix = torch.sparse_csr_tensor(
            links.row_starts, columns, links.weights, (problem.pixels, problem.pixels), check_invariants=False
        )

        def flat(v: Tensor) -> Tensor:
            return v.movedim(1, 3).reshape(problem.pixels, problem.classes)

        def back(y: Tensor) -> Tensor:
            return y.reshape(problem.views, problem.height, problem.width, problem.classes).movedim(3, 1)

        def index_add(v: Tensor) -> Tensor:
            gathered = flat(v)[columns] * links.weights[:, None]
            return back(gathered.new_zeros(problem.pixels, problem.classes).index_add(0, rows, gathered))

        def compiled() -> Prepared:
            fast: Callable[..., Tensor] = torch.compile(index_add, dynamic=False)
            return Prepared(lambda: fast(values))

        contenders = [
            Contender(BASELINE, lambda: Prepared(lambda: index_add(values))),
            Contender("torch, index_add, compiled", compiled),
            Contender("torch.sparse, CSR", lambda: Prepared(lambda: back(matrix @ flat(values)))),
            Contender("pyseg", lambda: Prepared(lambda: sparse_pairwise(values, links)), ours=True),
        ]
        return Workload(contenders, lambda: [index_add(values.double())])

    # Each entry takes a multiply-add for each class; values of linked pixels, indices and weights in, results out.
    entries = 2 * problem.links
    bytes_ = 4 * problem.classes * (problem.pixels + min(entries, problem.pixels)) + 8 * problem.pixels + 8 * entries
    return Case(
        name=f"systems/sparse_pairwise/{problem.name}",
        groups=("sparse links",),
        build=build,
        params={"views": problem.views, "classes": problem.classes, "links": problem.links, "rows": problem.rows},
        baseline=BASELINE,
        tolerance=1e-5,
        least=lambda: (2 * entries * problem.classes, bytes_),
        quick=quick,
    )


def _mean_field(problem: Problem) -> Case:
    """The whole field, against pyseg's own kernels put together in PyTorch: what the composition costs."""

    def build() -> Workload:
        from pyseg.functional import correspondence_links, dense_crf_kernels
        from pyseg.models import multi_view_crf

        unary = -problem.values().log()
        generator = torch.Generator().manual_seed(2)
        image = torch.rand(problem.views, 3, problem.height // 8, problem.width // 8, generator=generator) * 255
        image = torch.nn.functional.interpolate(image, scale_factor=8, mode="bilinear")
        first, second = problem.pairs()
        links = correspondence_links(first, second, (problem.views, problem.height, problem.width))
        rows = torch.arange(problem.pixels).repeat_interleave(links.row_starts.diff())
        columns = links.columns.long()

        def message(q: Tensor) -> Tensor:
            flat = q.movedim(1, 3).reshape(problem.pixels, problem.classes)
            summed = torch.zeros_like(flat).index_add(0, rows, flat[columns] * links.weights[:, None])
            return summed.reshape(problem.views, problem.height, problem.width, problem.classes).movedim(3, 1)

        def composed(u: Tensor) -> Tensor:
            kernels = dense_crf_kernels(u, image)
            q = (-u).softmax(1)
            for _ in range(ITERATIONS):
                energy = u - 3.0 * message(q).to(u.dtype)
                for kernel in kernels:
                    energy = energy + kernel.energy(q)
                q = (-energy).softmax(1)
            return q

        def expected() -> list[Tensor]:
            return [composed(unary)]

        def run() -> Tensor:
            result: Tensor = multi_view_crf(unary, image, links, correspondence=3.0, iterations=ITERATIONS)
            return result

        contenders = [
            Contender("composition in PyTorch", lambda: Prepared(lambda: composed(unary))),
            Contender("pyseg", lambda: Prepared(run), ours=True),
        ]
        return Workload(contenders, expected)

    return Case(
        name=f"systems/multi_view_crf/{problem.name}/iterations{ITERATIONS}",
        groups=("multi-view mean field",),
        build=build,
        params={"views": problem.views, "classes": problem.classes, "links": problem.links, "iterations": ITERATIONS},
        baseline="composition in PyTorch",
        # Inference may filter smoothness on a coarse grid: dense_crf's docstring says by how much marginals change.
        tolerance=0.05,
        least=lambda: (0, problem.pixels * problem.classes * 8),
        note="both use pyseg's lattice and Gaussian filter; what differs is the links and that iterations are fused",
    )
