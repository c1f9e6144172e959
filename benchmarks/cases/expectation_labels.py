"""expectation_labels: the E-steps of DeepLab-EM beside plain PyTorch, a loop over images and classes with kthvalue or
sort, and the loop's body compiled."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Case, Contender, Prepared, Workload
from peers import channels_last

BASELINE = "torch, kthvalue"
BIASES, SHARES = (3.0, 5.0), (0.4, 0.2)  # background, foreground


@dataclass(frozen=True)
class Setting:
    method: str  # fixed, all (fixed, absent classes compete) or adapt
    batch: int = 8
    classes: int = 21
    size: int = 321  # height and width
    sweeps: int = 16
    layout: str = "NCHW"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        rounds = f"/sweeps{self.sweeps}" if self.method == "adapt" else ""
        dtype = "" if self.dtype == torch.float32 else f"/{str(self.dtype).removeprefix('torch.')}"
        shape = f"{self.batch}x{self.classes}x{self.size}x{self.size}"
        return f"systems/expectation_labels/{self.method}{rounds}/{shape}/{self.layout}{dtype}"


# With the numbers of threads at which the quick run has them.
SETTINGS = {
    Setting("fixed"): (1,),
    Setting("all"): (),
    Setting("all", layout="channels_last"): (),
    Setting("adapt", sweeps=1): (),
    Setting("adapt"): (1, 2),
    Setting("adapt", layout="channels_last"): (),
    Setting("adapt", dtype=torch.bfloat16): (),
    Setting("adapt", 1, 21, 1024): (),
}


def cases() -> list[Case]:
    return [_case(setting, quick) for setting, quick in SETTINGS.items()]


def _inputs(setting: Setting) -> tuple[Tensor, Tensor]:
    """Smooth scores with some noise, the background ahead; one to three foreground classes an image."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(setting.batch, setting.classes, 11, 11, generator=generator) * 3
    x = F.interpolate(coarse, (setting.size, setting.size), mode="bicubic", align_corners=True)
    x = x + 0.2 * torch.randn(x.shape, generator=generator)
    x[:, 0] += 2
    present = torch.zeros(setting.batch, setting.classes, dtype=torch.bool)
    present[:, 0] = True
    for i, row in enumerate(present):
        row[1 + torch.randperm(setting.classes - 1, generator=generator)[: 1 + i % 3]] = True
    x = x.to(setting.dtype)
    return channels_last(x) if setting.layout == "channels_last" else x, present


# ---- plain PyTorch ----


def _fixed(logits: Tensor, present: Tensor, exclude_absent: bool) -> Tensor:
    bias = torch.where(present, BIASES[1], float("-inf") if exclude_absent else 0.0)
    bias[:, 0] = BIASES[0]
    return (logits.float() + bias[..., None, None]).argmax(1)


def _kth(margin: Tensor, k: int) -> tuple[Tensor, Tensor]:
    v = margin.kthvalue(k).values
    return v, margin.masked_fill(margin <= v, float("inf")).min()


def _kth_by_sort(margin: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ordered = margin.sort().values
    v = ordered[k - 1]
    return v, ordered[torch.searchsorted(ordered, v, right=True).clamp_max(len(ordered) - 1)]


def _raised(
    scores: Tensor, bias: Tensor, c: int, k: int, kth: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> Tensor:
    """The bias of one class: as pyseg's, margins rounded in the same way."""
    others = scores + bias[:, None]
    others[c] = float("-inf")
    infinity = torch.tensor(float("inf"))
    least = torch.nextafter(others.amax(0) + 0.0, infinity)
    margin = least - scores[c]
    margin = torch.where(scores[c] + margin < least, torch.nextafter(margin, infinity), margin)
    v, larger = kth(margin, k)
    middle = v + (larger - v) * 0.5
    raised = torch.where(middle < larger, middle, v)
    return torch.where((margin <= bias[c]).sum() >= k, bias[c], raised)


def _adapt(
    logits: Tensor, present: Tensor, sweeps: int, raised: Callable[[Tensor, Tensor, int, int], Tensor]
) -> Tensor:
    labels = torch.empty(logits.shape[0], *logits.shape[2:], dtype=torch.int64)
    for n in range(logits.shape[0]):
        here = present[n].nonzero().flatten()
        scores = logits[n, here].float().flatten(1)
        bias = torch.zeros(len(here))
        total = max(1.0, sum([SHARES[0]] + [SHARES[1]] * (len(here) - 1)))
        quotas = [int(SHARES[c > 0] * scores.shape[1] / total) for c in range(len(here))]
        for _ in range(sweeps):
            before = bias.clone()
            for c, k in enumerate(quotas):
                bias[c] = raised(scores, bias, c, k)
            if torch.equal(bias, before):
                break
        labels[n] = here[(scores + bias[:, None]).argmax(0)].view_as(labels[n])
    return labels


def _case(setting: Setting, quick: tuple[int, ...]) -> Case:
    def build() -> Workload:
        logits, present = _inputs(setting)
        exclude = setting.method != "all"

        def torch_fixed(compiled: bool) -> Prepared:
            function = torch.compile(_fixed, dynamic=False) if compiled else _fixed
            return Prepared(lambda: function(logits, present, exclude))

        def torch_adapt(kth: Callable[[Tensor, int], tuple[Tensor, Tensor]], compiled: bool = False) -> Prepared:
            def raised(scores: Tensor, bias: Tensor, c: int, k: int) -> Tensor:
                return _raised(scores, bias, c, k, kth)

            # Class and quota as symbols: a graph for each of their values would exceed the recompilation limit.
            function = torch.compile(raised, dynamic=True) if compiled else raised
            return Prepared(lambda: _adapt(logits, present, setting.sweeps, function))

        def ours() -> Prepared:
            from pyseg.functional import expectation_labels

            if setting.method == "adapt":
                background, foreground = SHARES
                return Prepared(
                    lambda: expectation_labels(
                        logits,
                        present,
                        background_share=background,
                        foreground_share=foreground,
                        sweeps=setting.sweeps,
                    )
                )
            background, foreground = BIASES
            return Prepared(
                lambda: expectation_labels(
                    logits,
                    present,
                    background_bias=background,
                    foreground_bias=foreground,
                    exclude_absent=exclude,
                )
            )

        if setting.method == "adapt":
            contenders = [
                Contender(BASELINE, lambda: torch_adapt(_kth)),
                Contender("torch, sort", lambda: torch_adapt(_kth_by_sort)),
                Contender("torch.compile, kthvalue", lambda: torch_adapt(_kth, compiled=True)),
            ]
        else:
            contenders = [
                Contender("torch, argmax", lambda: torch_fixed(False)),
                Contender("torch.compile", lambda: torch_fixed(True)),
            ]
        contenders.append(Contender("pyseg", ours, ours=True))

        def expected() -> list[Tensor]:
            if setting.method != "adapt":
                return [_fixed(logits, present, exclude)]
            return [_adapt(logits, present, setting.sweeps, lambda *arguments: _raised(*arguments, _kth))]

        return Workload(contenders, expected)

    def least() -> tuple[int, int]:
        _, present = _inputs(Setting(setting.method, setting.batch, setting.classes, 11))
        competing = present.numel() if setting.method == "all" else int(present.sum())
        pixels = setting.size**2
        return 0, pixels * (competing * setting.dtype.itemsize + setting.batch * 8)

    return Case(
        name=setting.name,
        groups=(f"E-step, {'EM-Adapt' if setting.method == 'adapt' else 'EM-Fixed'}",),
        build=build,
        params={"shape": [setting.batch, setting.classes, setting.size, setting.size], "layout": setting.layout},
        baseline=BASELINE if setting.method == "adapt" else "torch, argmax",
        tolerance=0.0,
        least=least,
        quick=quick,
    )
