"""The E-step of EM-Fixed and EM-Adapt, one image and one class after the other, by sorting all margins."""

import math

import torch
from torch import Tensor


def expectation_labels(
    logits: Tensor,
    present: Tensor,
    *,
    background_bias: float = 0.0,
    foreground_bias: float = 0.0,
    background_share: float = 0.0,
    foreground_share: float = 0.0,
    exclude_absent: bool = True,
    sweeps: int = 16,
    valid: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Labels [N, *S] and biases [N, C], -inf for classes that do not compete (Papandreou et al. 2015).

    In float64 for float64 logits, else float32: which margin is the k-th smallest depends on how they are rounded.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    infinity = torch.tensor(math.inf, dtype=dtype)
    scores = logits.to(dtype).nan_to_num(math.inf, math.inf, -math.inf).flatten(2)
    counted = torch.ones_like(scores[:, 0], dtype=torch.bool) if valid is None else valid.flatten(1)
    labels = torch.full(counted.shape, ignore_index)
    biases = torch.full(present.shape, -math.inf, dtype=dtype)
    for n, f in enumerate(scores):
        here, b = present[n], biases[n]
        competing = [c for c in range(len(f)) if here[c] or not exclude_absent]
        if not competing:
            continue
        for c in competing:
            b[c] = 0.0 if not here[c] else background_bias if c == 0 else foreground_bias
        wanted = {c: background_share if c == 0 else foreground_share for c in competing if here[c]}
        total = max(1.0, sum(wanted.values()))
        pixels = int(counted[n].sum())
        for _ in range(sweeps if len(competing) > 1 else 0):
            before = b.clone()
            for c, share in wanted.items():
                k = math.floor(share * pixels / total)
                best = torch.stack([f[o] + b[o] for o in competing if o != c]).amax(0)
                least = torch.nextafter(best + 0.0, infinity)
                margin = least - f[c]
                margin = torch.where(f[c] + margin < least, torch.nextafter(margin, infinity), margin)[counted[n]]
                if (margin <= b[c]).sum() >= k:
                    continue
                winnable = margin[(margin <= b[c]) | margin.isfinite()].sort().values
                if len(winnable) and winnable[min(k, len(winnable)) - 1] > b[c]:
                    v = winnable[min(k, len(winnable)) - 1]
                    larger = winnable[winnable > v]
                    middle = v + (larger[0] - v) * 0.5 if len(larger) else infinity
                    b[c] = middle if len(larger) and middle < larger[0] else v
            if torch.equal(b, before):
                break
        best_class = (f[competing] + b[competing, None]).argmax(0)
        labels[n, counted[n]] = torch.tensor(competing)[best_class][counted[n]]
    return labels.reshape(len(logits), *logits.shape[2:]), biases
