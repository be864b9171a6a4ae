"""Measured against expected: what differs by more than chance allows must not be published.

The scatter of a block's error is in large part that of its absmax, which no quantizer decides.  So the check takes off
each block's expected error given its absmax and adds the mean of that, which the theory knows: a control variate.  What
is left is sharper, and bears heavy tails.  The limit allows for all cases of a run together: of a thousand runs of a
right program one fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from qkernels.errors import UserError

from . import theory
from .distributions import Array
from .statistics import Estimate, jackknife
from .tables import TABLES

FALSE_ALARMS = 1e-3
# The theory integrates numerically and knows nothing of float32: its own error, relative.
THEORY_ERROR = 1e-5
# Of scaling, multiplying by the scale and taking the difference, over absmax.
FLOAT32_ERROR = 4 * 2.0**-24
# Of float32, and of thresholds that are written as decimals of six digits.
ROUNDING_EXCESS = 2e-6


class DisagreementError(Exception):
    """What was measured is not what the theory expects: the numbers must not be published."""


def exit_code(work: Callable[[], None]) -> int:
    """Do a command's work: 0, 1 where the theory is contradicted, 2 on wrong arguments; what went wrong is said."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    controlled: the mean squared error by the control variate.
    z: its distance from the theory, in standard errors.
    limit: the largest |z| that passes.
    """

    controlled: Estimate
    z: float
    limit: float


def z_limit(groups: int, cases: int) -> float:
    """The |z| that, with so many groups, any of so many right cases exceeds once in 1 / FALSE_ALARMS runs."""
    return float(stats.t.isf(FALSE_ALARMS / cases / 2, groups - 1))


def against_theory(
    weight: Tensor, decoded: Tensor, case: tuple[str, str, int, bool], group: int, cases: int
) -> Verdict:
    """Compare the error of one case with the theory's.

    Args:
        weight, decoded: float32, of a whole number of blocks.
        case: distribution, format, blocksize, double quantization.
        group: weights in a group, see `statistics.group_size`.
        cases: how many are compared in this run.
    """
    distribution, format_name, blocksize, nested = case
    measured = (decoded.double() - weight.double()).square().view(-1, blocksize).mean(dim=1)
    absmax = weight.abs().view(-1, blocksize).amax(dim=1).double()
    given = theory.expected_given_absmax(distribution, format_name, blocksize)
    conditional = np.exp(given(np.log(absmax.cpu().numpy())))
    residual = measured.cpu().numpy() - conditional
    blocks = group // blocksize
    sums = np.add.reduceat(residual, np.arange(0, len(residual), blocks))
    counts = np.diff(np.append(np.arange(0, len(residual), blocks), len(residual)))
    exact = theory.expected(distribution, format_name, blocksize, False).mse
    controlled = jackknife(np.stack([sums, counts], axis=1), lambda s: s[..., 0] / s[..., 1] + exact)
    expected = theory.expected(distribution, format_name, blocksize, nested).mse
    return Verdict(
        controlled, distance(controlled.value, controlled.standard_error, expected), z_limit(len(sums), cases)
    )


def distance(value: float, standard_error: float, expected: float) -> float:
    """In standard errors, to which the theory's own error is added."""
    return (value - expected) / float(np.hypot(standard_error, THEORY_ERROR * expected))


def largest_error_allowed(weight: Tensor, format_name: str, blocksize: int) -> float:
    """Half the widest gap of the code times the largest absmax: no rounding to the nearest code is further off."""
    table: Array = TABLES[format_name]
    return float((np.diff(table).max() / 2 + FLOAT32_ERROR) * weight.abs().max().item())


def rounding_excess(weight: Tensor, decoded: Tensor, format_name: str, blocksize: int) -> float:
    """How much further off a weight is than by rounding to the nearest code of the derived table, or nearer.

    Over its block's absmax, and the largest of all weights; the scale must be stored exactly.
    """
    scaled, found = weight.reshape(-1, blocksize), decoded.reshape(-1, blocksize)
    absmax = scaled.abs().amax(dim=1, keepdim=True)
    scaled, found = scaled / absmax, found / absmax
    table = torch.from_numpy(TABLES[format_name]).to(weight)
    nearest = table[torch.bucketize(scaled, (table[:-1] + table[1:]) / 2)]
    return ((found - scaled).abs() - (nearest - scaled).abs()).abs().max().item()


def refuse(disagreements: Iterable[str]) -> None:
    """Raise for any.

    Raises:
        DisagreementError: there is one.
    """
    if found := list(disagreements):
        raise DisagreementError(
            f"{len(found)} figures are not what the theory expects, so nothing is published:\n  " + "\n  ".join(found)
        )


def draw(distribution: str, n: int, seed: int = 0) -> Tensor:
    """`n` weights of a distribution, float32, the same for a seed."""
    return theory.DISTRIBUTIONS[distribution].draw(n, torch.Generator().manual_seed(seed))
