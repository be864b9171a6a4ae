"""Errors of decoded weights with 95% confidence intervals.

The blocks are cut into groups that do not share a scale, so for independent weights the groups are independent; every
metric is a function of sums over groups.  Its interval is the jackknife's with Student's t: the metric without each
group in turn.  For a given model, whose weights are no sample, it says how far blocks like its blocks would scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from .distributions import Array
from .formats import NESTED_BLOCK

GROUPS = 256
FEWEST_GROUPS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval; NaN bounds where there are too few groups for one."""

    value: float
    low: float
    high: float
    standard_error: float


def group_size(n: int, blocksize: int, nested: bool) -> int:
    """Weights in a group: whole blocks, and whole blocks of scales where the scales are quantized."""
    unit = blocksize * (NESTED_BLOCK if nested else 1)
    return unit * max(1, n // (GROUPS * unit))


@dataclass(frozen=True)
class Sums:
    """Sums over groups, float64[groups, 6]: how many, e^2, |e|, w^2, w d, d^2 (e = d - w, d decoded); and max |e|."""

    groups: Array
    max_error: float

    @staticmethod
    def of(weight: Tensor, decoded: Tensor, group: int) -> Sums:
        w, d = weight.reshape(-1), decoded.reshape(-1)
        rows, largest = [], 0.0
        for begin in range(0, w.numel(), group):
            a, b = w[begin : begin + group].double(), d[begin : begin + group].double()
            error = b - a
            magnitude = error.abs()
            largest = max(largest, magnitude.max().item())
            products = [error @ error, magnitude.sum(), a @ a, a @ b, b @ b]
            rows.append(torch.stack([torch.tensor(float(a.numel())), *[p.cpu() for p in products]]))
        return Sums(torch.stack(rows).numpy().astype(np.float64), largest)

    @staticmethod
    def pooled(parts: list[Sums]) -> Sums:
        """Of several tensors together, a tensor's groups being its own."""
        return Sums(np.concatenate([part.groups for part in parts]), max(part.max_error for part in parts))


METRICS: dict[str, Callable[[Array], Array]] = {
    "mse": lambda s: s[..., 1] / s[..., 0],
    "mae": lambda s: s[..., 2] / s[..., 0],
    "relative_rms": lambda s: np.sqrt(s[..., 1] / s[..., 3]),
    "sqnr_db": lambda s: 10 * np.log10(s[..., 3] / s[..., 1]),
    "cosine": lambda s: s[..., 4] / np.sqrt(s[..., 3] * s[..., 5]),
}


def estimates(sums: Sums) -> dict[str, Estimate]:
    """Every metric of `METRICS`."""
    return {name: jackknife(sums.groups, metric) for name, metric in METRICS.items()}


def jackknife(groups: Array, metric: Callable[[Array], Array]) -> Estimate:
    """A metric of summed columns, its interval from leaving out each row of `groups` in turn.

    Args:
        groups: float64[groups, columns].
        metric: [..., columns] -> [...].
    """
    total = groups.sum(axis=0)
    value = float(metric(total))
    count = len(groups)
    if count < FEWEST_GROUPS:
        return Estimate(value, np.nan, np.nan, np.nan)
    without = metric(total - groups)
    error = float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Estimate(value, value - half, value + half, error)
