"""Weights whose distribution is known in closed form: each can be drawn, and its density integrated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

STUDENT_DEGREES = 5
OUTLIER_SHARE, OUTLIER_SCALE = 1e-3, 10.0


@dataclass(frozen=True)
class Distribution:
    """Symmetric about zero.

    Attributes:
        density: f(x).
        tail: P(|X| > m).
        second_moment: E X^2.
        draw: (how many, generator) -> float32 values.
        largest: where the distribution ends; infinity for most.
    """

    name: str
    description: str
    density: Callable[[Array], Array]
    tail: Callable[[Array], Array]
    second_moment: float
    draw: Callable[[int, torch.Generator], torch.Tensor]
    largest: float = float("inf")

    def tail_quantile(self, tail: Array) -> Array:
        """The m with P(|X| > m) = tail, by bisection; `tail` in (0, 1)."""
        low = np.zeros_like(tail)
        high = np.full_like(tail, 1.0 if np.isfinite(self.largest) else 1e9)
        for _ in range(200):
            middle = 0.5 * (low + high)
            beyond = self.tail(middle) > tail
            low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
        return 0.5 * (low + high)


def _draw_student(n: int, generator: torch.Generator) -> torch.Tensor:
    chi_square = torch.zeros(n, dtype=torch.float64)
    for _ in range(STUDENT_DEGREES):
        chi_square += torch.randn(n, generator=generator, dtype=torch.float64).square()
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    return (normal / (chi_square / STUDENT_DEGREES).sqrt()).float()


def _draw_outliers(n: int, generator: torch.Generator) -> torch.Tensor:
    is_outlier = torch.rand(n, generator=generator) < OUTLIER_SHARE
    return torch.randn(n, generator=generator) * torch.where(is_outlier, OUTLIER_SCALE, 1.0)


def _mixed(function: Callable[[Array], Array], of_outliers: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: (1 - OUTLIER_SHARE) * function(x) + OUTLIER_SHARE * of_outliers(x)


_NORMAL, _WIDE, _STUDENT = stats.norm(), stats.norm(scale=OUTLIER_SCALE), stats.t(STUDENT_DEGREES)

DISTRIBUTIONS = {
    one.name: one
    for one in (
        Distribution(
            name="normal",
            description="N(0, 1)",
            density=_NORMAL.pdf,
            tail=lambda m: 2 * _NORMAL.sf(m),
            second_moment=1.0,
            draw=lambda n, generator: torch.randn(n, generator=generator),
        ),
        Distribution(
            name="uniform",
            description="uniform on [-1, 1]",
            density=lambda x: np.where(np.abs(x) <= 1, 0.5, 0.0),
            tail=lambda m: np.clip(1 - m, 0, 1),
            second_moment=1 / 3,
            draw=lambda n, generator: 2 * torch.rand(n, generator=generator) - 1,
            largest=1.0,
        ),
        Distribution(
            name="student-t",
            description=f"Student's t with {STUDENT_DEGREES} degrees of freedom",
            density=_STUDENT.pdf,
            tail=lambda m: 2 * _STUDENT.sf(m),
            second_moment=STUDENT_DEGREES / (STUDENT_DEGREES - 2),
            draw=_draw_student,
        ),
        Distribution(
            name="outliers",
            description=f"N(0, 1), of which {OUTLIER_SHARE:.1%} N(0, {OUTLIER_SCALE:g}²)",
            density=_mixed(_NORMAL.pdf, _WIDE.pdf),
            tail=_mixed(lambda m: 2 * _NORMAL.sf(m), lambda m: 2 * _WIDE.sf(m)),
            second_moment=1 - OUTLIER_SHARE + OUTLIER_SHARE * OUTLIER_SCALE**2,
            draw=_draw_outliers,
        ),
    )
}
