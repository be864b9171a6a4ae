"""Code tables derived from their definitions with scipy, on purpose not taken from `qkernels`.

The theory stands on these, so a wrong table in the library shows as a difference between what is measured and what is
expected.  A new format gets its definition here and its quantizer in `formats.py`.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from .distributions import Array


def normal_float() -> Array:
    """NF4: quantiles of N(0, 1), eight above zero and seven below, scaled to [-1, 1] (QLoRA, arXiv 2305.14314)."""
    outermost = 0.9677083  # the probability that bitsandbytes chose
    above = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    table = np.sort(np.concatenate([above, [0.0], below]))
    return table / table[-1]


def float4() -> Array:
    """bitsandbytes' FP4: a sign, two bits of exponent, one of fraction, and 1/16 for the subnormal; over 12."""
    magnitudes = np.array([0.0625, 2, 3, 4, 6, 8, 12]) / 12
    return np.concatenate([-magnitudes[::-1], [0.0], magnitudes])


def symmetric_integer(bits: int) -> Array:
    """Evenly spaced from -1 to 1 with an exact zero: 2^bits - 1 codes."""
    levels = 2 ** (bits - 1) - 1
    return np.arange(-levels, levels + 1) / levels


def dynamic_map() -> Array:
    """The signed 8-bit map of the scales: seven decades, 2^e means of equal steps in each (arXiv 2110.02861)."""
    decades = []
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        decades.append(10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2)
    magnitudes = np.concatenate(decades)
    return np.sort(np.concatenate([-magnitudes, [0.0], magnitudes, [1.0]]))


TABLES = {
    "nf4": normal_float(),
    "fp4": float4(),
    "int4": symmetric_integer(4),
    "int8": symmetric_integer(8),
}


def midpoints(table: Array) -> Array:
    """Where rounding to the nearest code changes from one to the next."""
    return (table[:-1] + table[1:]) / 2
