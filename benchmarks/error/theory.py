"""The error that a blockwise absmax quantizer must have, by numerical integration over the distribution of the weights.

A block of B weights drawn from a density f has absmax m with P(absmax <= m) = P(|X| <= m)^B.  Given m, one weight is
+-m and the others are independent with density f(x) / P(|X| <= m) on [-m, m].  With u = x / m, c(u) the nearest code
and s the scale that is stored (m itself, or what double quantization makes of it), the error is m u - s c(u); its
moments follow from those of u and c by one integral over u in each cell of the code and one over m.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.interpolate import CubicSpline

from .distributions import DISTRIBUTIONS, Array, Distribution
from .tables import TABLES, dynamic_map, midpoints

NESTED_BLOCK = 256


@dataclass(frozen=True)
class Expected:
    """Attributes:
    mse: mean squared error.
    mae: mean absolute error; None with double quantization, where it has no such short formula.
    relative_rms: root of mse over E X^2.
    sqnr_db: signal over noise, in decibels.
    cosine: between the weights and the decoded ones.
    """

    mse: float
    mae: float | None
    relative_rms: float
    sqnr_db: float
    cosine: float


@cache
def expected(distribution: str, format_name: str, blocksize: int, nested: bool) -> Expected:
    """The expected error of a format on weights of a distribution, in the distribution's own units."""
    of, table = DISTRIBUTIONS[distribution], TABLES[format_name]
    absmax, weight = _absmax_nodes(of, blocksize)
    given = _given(of, table, blocksize, absmax)
    off, off_squared = _scale_error(of, blocksize) if nested else (np.zeros_like(absmax), np.zeros_like(absmax))

    def mean(values: Array) -> float:
        return float((weight * values).sum())

    mse = mean(absmax**2 * given.error_squared - 2 * off * absmax * given.code_error + off_squared * given.code_squared)
    product = mean(absmax * (absmax + off) * given.u_code)
    decoded = mean((absmax**2 + 2 * absmax * off + off_squared) * given.code_squared)
    # From the same rule as the product: the cosine is so near to 1 that another rule's error would show.
    signal = mean(absmax**2 * given.u_squared)
    return Expected(
        mse=mse,
        mae=None if nested else mean(absmax * given.error_absolute),
        relative_rms=float(np.sqrt(mse / signal)),
        sqnr_db=float(10 * np.log10(signal / mse)),
        cosine=product / float(np.sqrt(signal * decoded)),
    )


@cache
def expected_given_absmax(distribution: str, format_name: str, blocksize: int) -> CubicSpline:
    """log(absmax) -> log of a block's expected mean squared error, its scale being stored exactly."""
    of = DISTRIBUTIONS[distribution]
    absmax, _ = _absmax_nodes(of, blocksize)
    ends = absmax[0] * 0.5, min(absmax[-1] * 2, of.largest)
    grid = np.geomspace(*ends, 600)
    error = grid**2 * _given(of, TABLES[format_name], blocksize, grid).error_squared
    return CubicSpline(np.log(grid), np.log(error))


@cache
def best_table_mse(distribution: str, blocksize: int, codes: int = 16) -> float:
    """The Lloyd-Max bound: no table of `codes` values beside an exact absmax scale has a smaller expected error.

    Lloyd's iteration on the density of u weighted by m^2, with the two atoms at +-1 of the blocks' largest weights.
    """
    of = DISTRIBUTIONS[distribution]
    absmax, weight = _absmax_nodes(of, blocksize)
    edges = np.linspace(-1, 1, 1 << 15)
    u = (edges[:-1] + edges[1:]) / 2
    density = _density_of_u(of, absmax[:, None], u[None, :])
    mass = (weight * absmax**2) @ density * np.diff(edges) * (blocksize - 1) / blocksize
    return _lloyd(edges, mass, codes, atom=float((weight * absmax**2).sum() / (2 * blocksize)))


def scaled_density(distribution: str, blocksize: int, u: Array) -> Array:
    """Density at `u` of weights over their block's absmax, without the largest of each block, which are at +-1."""
    of = DISTRIBUTIONS[distribution]
    absmax, weight = _absmax_nodes(of, blocksize)
    return weight @ _density_of_u(of, absmax[:, None], u[None, :])


@cache
def unblocked_lloyd_max(distribution: str, codes: int = 16) -> float:
    """The classical Lloyd-Max quantizer: one table for all weights, no scale for each block."""
    of = DISTRIBUTIONS[distribution]
    end = min(of.largest, float(of.tail_quantile(np.array([1e-9]))[0]))
    edges = end * np.sinh(np.linspace(-6, 6, 1 << 16)) / np.sinh(6)
    return _lloyd(edges, of.density((edges[:-1] + edges[1:]) / 2) * np.diff(edges), codes)


@dataclass(frozen=True)
class _Given:
    """Means over the weights of a block whose absmax is given, one entry a value of absmax."""

    error_squared: Array  # (u - c)^2
    error_absolute: Array  # |u - c|
    code_error: Array  # c (u - c)
    u_squared: Array  # u^2
    u_code: Array  # u c
    code_squared: Array  # c^2


def _absmax_nodes(of: Distribution, blocksize: int, steps: int = 160) -> tuple[Array, Array]:
    """Quadrature over the distribution of absmax: values, and weights whose sum is 1.

    P(absmax <= m) is uniform on (0, 1); the double-exponential substitution bears the singularity of heavy tails there.
    """
    s, step = np.linspace(-2.9, 2.9, steps, retstep=True)
    below, above = 1 / (1 + np.exp(-np.pi * np.sinh(s))), 1 / (1 + np.exp(np.pi * np.sinh(s)))
    weight = np.pi * np.cosh(s) * below * above * step
    # `below` is exact where it is small and `above` where that is: the logarithm takes the exact one.
    log_below = np.where(below < 0.5, np.log(below), np.log1p(-above))
    return of.tail_quantile(-np.expm1(log_below / blocksize)), weight / weight.sum()


def _density_of_u(of: Distribution, absmax: Array, u: Array) -> Array:
    """Of a weight that is not its block's largest, over absmax."""
    return absmax * of.density(absmax * u) / (1 - of.tail(absmax))


def _given(of: Distribution, table: Array, blocksize: int, absmax: Array) -> _Given:
    edges = np.concatenate([[-1.0], midpoints(table), [1.0]])
    nodes, node_weight = np.polynomial.legendre.leggauss(48 if len(table) <= 16 else 8)
    half = np.diff(edges)[:, None] / 2
    u = (edges[:-1, None] + half * (nodes[None, :] + 1)).ravel()
    du = (half * node_weight[None, :]).ravel()
    code = np.repeat(table, len(nodes))
    share = _density_of_u(of, absmax[:, None], u[None, :]) * du[None, :]
    # The truncated density integrates to one; dividing by what the rule gives takes off its error at very heavy tails.
    share *= (blocksize - 1) / blocksize / share.sum(axis=1, keepdims=True)
    largest_u = np.array([-1.0, 1.0])
    largest_code = table[[0, -1]]

    def mean(function: str) -> Array:
        moment = _MOMENTS[function]
        return share @ moment(u, code) + moment(largest_u, largest_code).mean() / blocksize

    return _Given(**{name: mean(name) for name in _MOMENTS})


_MOMENTS = {
    "error_squared": lambda u, code: (u - code) ** 2,
    "error_absolute": lambda u, code: np.abs(u - code),
    "code_error": lambda u, code: code * (u - code),
    "u_squared": lambda u, code: u**2,
    "u_code": lambda u, code: u * code,
    "code_squared": lambda u, code: code**2,
}


@cache
def _scale_error(of: Distribution, blocksize: int, steps: int = 4096) -> tuple[Array, Array]:
    """Mean and mean square of (stored scale - absmax) at the nodes of absmax, under double quantization.

    y = absmax - E absmax is stored in 8 bits beside the largest |y| of its 256 blocks: its own, or that of the others.
    """
    absmax, weight = _absmax_nodes(of, blocksize)
    centre = (weight * absmax).sum()
    y = absmax - centre
    chance = (np.arange(steps) + 0.5) / steps
    others = _largest_deviation(of, blocksize, centre, -np.expm1(np.log(chance) / (NESTED_BLOCK - 1)))
    scale = np.maximum(np.abs(y)[:, None], others[None, :])
    table = dynamic_map()
    stored = table[np.searchsorted(midpoints(table), y[:, None] / scale)] * scale
    off = stored - y[:, None]
    return off.mean(axis=1), (off**2).mean(axis=1)


def _largest_deviation(of: Distribution, blocksize: int, centre: float, tail: Array) -> Array:
    """The a with P(|absmax - centre| > a) = tail."""

    def beyond(a: Array) -> Array:
        above = -np.expm1(blocksize * np.log1p(-of.tail(centre + a)))
        below = (1 - of.tail(np.maximum(centre - a, 0))) ** blocksize
        return above + np.where(a < centre, below, 0)

    low, high = np.zeros_like(tail), np.full_like(tail, 1e9)
    for _ in range(120):
        middle = (low + high) / 2
        is_beyond = beyond(middle) > tail
        low, high = np.where(is_beyond, middle, low), np.where(is_beyond, high, middle)
    return (low + high) / 2


def _lloyd(edges: Array, mass: Array, codes: int, atom: float = 0.0, steps: int = 5000) -> float:
    """Lloyd's iteration on the masses of fine bins, and on two atoms at the ends; the mean squared error it ends at."""
    u, width = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    totals = [np.concatenate([[0.0], np.cumsum(mass * u**power)]) for power in range(3)]
    companded = np.cumsum((mass / width) ** (1 / 3) * width)
    table = np.interp((np.arange(codes) + 0.5) / codes * companded[-1], companded, u)
    error = np.inf
    for _ in range(steps):
        cut = np.concatenate([edges[:1], midpoints(table), edges[-1:]])
        cells = [np.diff(np.interp(cut, edges, total)) for total in totals]
        for power, cell in enumerate(cells):
            cell[0] += atom * edges[0] ** power
            cell[-1] += atom * edges[-1] ** power
        zeroth, first, second = cells
        table = first / zeroth
        before, error = error, float((second - 2 * table * first + table**2 * zeroth).sum())
        if before - error < 1e-9 * error:
            break
    return error
