"""What a record of `benchmarks.learning` says: curves, how far they are apart, how sure that is, and the figure.

Room: rows in, numbers, text and a figure out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from . import plotting
from .learning_runs import BOTH, CALIBRATED, EMBEDDINGS, PLAIN, QERA, RIVAL, WEIGHTS, ZERO
from .report import Row

COLORS = {
    PLAIN: plotting.BLACK,
    RIVAL: plotting.BLUE,
    ZERO: plotting.RED,
    QERA: plotting.ORANGE,
    CALIBRATED: plotting.SKY,
    BOTH: plotting.GREEN,
    EMBEDDINGS: plotting.PURPLE,
}
RESAMPLES = 2000

Floats = NDArray[np.float64]


class Curve:
    """The losses of one kind of weights on the prompts to test on.

    Args:
        rows: of a record, of these weights and this part of the prompts.

    Attributes:
        steps: int[steps].
        seeds: int[seeds].
        losses: nats of each prompt, float64[seeds, steps, prompts].
        tokens: of each prompt, float64[prompts].
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.steps = sorted({int(row["step"]) for row in rows})
        self.seeds = sorted({int(row["seed"]) for row in rows})
        found = {(row["seed"], row["step"]): _numbers(row["losses"]) for row in rows}
        self.losses: Floats = np.array([[found[seed, step] for step in self.steps] for seed in self.seeds])
        self.tokens = _numbers(rows[0]["tokens"])

    def by_seed(self) -> Floats:
        """Nats a token, float64[seeds, steps]."""
        return self.losses.sum(2) / self.tokens.sum()

    def above(self, plain: Curve, step: int) -> tuple[float, float, float]:
        """How far the loss at a step (an index) is above `plain`'s, as a part of it, and its 95% interval.

        Of the mean over the seeds that both have; the interval is over seeds and prompts drawn again, for both
        the same.
        """
        common = [seed for seed in self.seeds if seed in plain.seeds]
        ours, theirs = (curve.losses[[curve.seeds.index(seed) for seed in common], step] for curve in (self, plain))
        random = np.random.default_rng(0)
        drawn = []
        for _ in range(RESAMPLES):
            seeds = random.integers(len(ours), size=len(ours))
            prompts = random.integers(len(self.tokens), size=len(self.tokens))
            drawn.append(ours[seeds][:, prompts].sum() / theirs[seeds][:, prompts].sum() - 1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        return float(ours.sum() / theirs.sum() - 1), float(low), float(high)


def _numbers(text: object) -> Floats:
    return np.array([float(word) for word in str(text).split()])


def curves_of(rows: Iterable[Row], part: str = "test") -> dict[str, Curve]:
    """The curves of a record by kind of weights, with the learning rate that was chosen."""
    of_part = [row for row in rows if row["part"] == part]
    rate = of_part[0]["chosen_rate"]
    chosen = [row for row in of_part if row["learning_rate"] == rate]
    of_kind = {kind: [row for row in chosen if row["weights"] == kind] for kind in WEIGHTS}
    return {kind: Curve(found) for kind, found in of_kind.items() if found}


def figure_of(rows: list[Row]) -> Figure:
    """The losses with their range over the seeds, and how far they are above those on 16 bits."""
    found = curves_of(rows)
    figure, (losses, above) = plotting.panels(1, 2, 10, 4.2)
    for kind, curve in found.items():
        by_seed, color, dashes = curve.by_seed(), COLORS[kind], "--" if kind == RIVAL else "-"
        order = 4 if kind == RIVAL else 3  # it lies on the curve of the same weights in our layers
        mean = by_seed.mean(0)
        losses.plot(
            curve.steps, mean, dashes, color=color, zorder=order, label=f"{kind}: {mean[0]:.3f} to {mean[-1]:.3f}"
        )
        losses.fill_between(curve.steps, by_seed.min(0), by_seed.max(0), color=color, alpha=0.15, linewidth=0)
        if kind != PLAIN and PLAIN in found:
            bands = np.array([curve.above(found[PLAIN], step) for step in range(len(curve.steps))]) * 100
            above.plot(curve.steps, bands[:, 0], dashes, color=color, zorder=order)
            above.fill_between(curve.steps, bands[:, 1], bands[:, 2], color=color, alpha=0.15, linewidth=0)
    losses.set(xlabel="step", ylabel="loss on held-out prompts (nats a token)", title=_title(rows, found))
    losses.legend(title="LoRA on", fontsize=8)
    above.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    above.axhline(0, color=plotting.BLACK, linewidth=0.8)
    above.set(xlabel="step", ylabel="above LoRA on 16 bits (%)", title="with 95% intervals over seeds and prompts")
    return figure


def _title(rows: list[Row], found: dict[str, Curve]) -> str:
    curve = next(iter(found.values()))
    return f"{rows[0]['model']}, {len(curve.losses)} seeds, {len(curve.tokens)} prompts to test on"


def summary(rows: list[Row]) -> str:
    """The test losses before and at the end, and how far each is above that on 16 bits."""
    found = curves_of(rows)
    prompts = len(next(iter(found.values())).tokens)
    lines = [
        f"learning rate {rows[0]['chosen_rate']:g}, {rows[0]['steps']} steps; loss on {prompts} held-out prompts, mean "
        "over the seeds (above 16 bits, 95% interval)"
    ]
    for kind, curve in found.items():
        mean = curve.by_seed().mean(0)
        cells = []
        for step in (0, -1):
            share = curve.above(found[PLAIN], step) if PLAIN in found else (0.0, 0.0, 0.0)
            cells.append(f"{mean[step]:.4f} ({share[0]:+.2%}, {share[1]:+.2%} to {share[2]:+.2%})")
        spread = np.ptp(curve.by_seed()[:, -1])
        lines.append(f"{kind:30} {cells[0]} -> {cells[1]}, seeds within {spread:.4f}")
    return "\n".join(lines)
