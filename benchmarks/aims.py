"""What this project aims at, held against the records: the README's table of what it falls short of.

The aims are the only numbers in here.  A mean is geometric, over the weights of the record, in the worse of its dtypes;
an aim for several M is held against the worst of them, if it is not one for their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from .learning_curves import curves_of
from .learning_runs import PLAIN, RIVAL
from .readme_tables import OURS, THEIRS, Table, done_of, stacks_of
from .report import GENERATE, Row

CUBLAS = "torch"
NAMES = {"matmul": "product", "matmul_dx": "gradient of the activations"}
SMALL = (2, 4, 8, 16, 32, 64)
# (M, rival, times as fast as it): of products, forward and for the gradient of the activations alike.
PRODUCTS = (
    ((1,), THEIRS, 1.6),
    ((128, 256, 512), THEIRS, 1.5),
    ((1024,), THEIRS, 1.12),
    ((2048,), THEIRS, 1.06),
    ((4096,), THEIRS, 1.03),
    (SMALL[:-1], CUBLAS, 1.8),
    ((64,), CUBLAS, 1.2),
    ((128, 256, 512), CUBLAS, 0.9),
    ((1024,), CUBLAS, 0.8),
    ((2048,), CUBLAS, 0.88),
    ((4096,), CUBLAS, 0.91),
)
SMALL_MEAN = 3.0  # times bitsandbytes, all of these M together
# The same of weights whose rows are not whole blocks.
RAGGED = ((1, 4, 16), THEIRS, 1.6)
READ_ONLY = 0.6
ADAPTER = ((128, 2.5), (2048, 1.3))
HOST_US = 12.0
# (case, at least so many tokens a second, at most so many GiB).
TRAINING = (("4x512", 9_500, 6.3), ("8x512", 10_000, 7.8))
SMALL_STEP, GENERATING, LLAMA = 4.0, 6.0, 1.5
FP16_TO_BF16 = 1.0  # tokens a second, the worst of these cases
FIXED_LENGTHS = ("1x128", "4x512", "8x512")
PREDICTED, LOSSES, LEARNING = 0.05, 1e-3, 0.01


@dataclass(frozen=True)
class Aim:
    """Attributes:
    what: is measured.
    wanted: the least or, with `at_most`, the largest value that is aimed at.
    measured: by the newest record.
    show: a value as text.
    where: the measured one was the worst.
    """

    what: str
    wanted: float
    measured: float
    show: Callable[[float], str]
    at_most: bool = False
    where: str = ""

    @property
    def reached(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def cells(self) -> tuple[str, str, str]:
        bound = "at most" if self.at_most else "at least"
        return self.what, f"{bound} {self.show(self.wanted)}", f"{self.show(self.measured)}{self.where}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def percent(value: float) -> str:
    return f"{value:.2%}"


def short_of(*records: list[Row]) -> Table:
    """A line for each aim that is not reached, and one that counts.

    Args:
        records: rows of the products, of training Bloom and Llama, of the plan, of the steps beside peft, of what a
            small model learns, and of products with weights whose rows are not whole blocks, if there are any.
    """
    found = list(aims_of(*records))
    missed = [aim.cells() for aim in found if not aim.reached]
    count = f"{len(found) - len(missed)} of {len(found)} aims", "", "reached"
    return ("what", "aim", "measured"), [*missed, count]


def aims_of(
    products: list[Row],
    bloom: list[Row],
    llama: list[Row],
    plan: list[Row],
    steps: list[Row],
    learning: list[Row],
    ragged: Sequence[Row] = (),
) -> Iterator[Aim]:
    """Every aim, reached or not; arguments as of `short_of`."""
    yield from _of_products(products)
    for op, name in NAMES.items() if ragged else ():
        yield _of_rows(ragged, op, f"{name} with rows that are not whole blocks", *RAGGED)
    yield from _of_training(bloom)
    yield Aim(f"training Llama-2-7B's shapes, over {THEIRS}", LLAMA, min(_speed_ups(llama, "4x512")), times)
    error = max(abs(row["memory_error"]) for row in plan if row.get("memory_error") is not None)
    yield Aim("`qlora plan`'s error of peak memory", PREDICTED, error, percent, at_most=True)
    for precision in ("fp16", "bf16"):
        differences = [row.get("largest_loss_difference") for row in steps if row["precision"] == precision]
        apart = max(value for value in differences if value is not None)
        what = f"losses step by step apart from those on {THEIRS}, {precision}"
        yield Aim(what, LOSSES, apart, lambda value: f"{value:.2g}", at_most=True)
    curves = curves_of(learning)
    above = {kind: curve.above(curves[PLAIN], -1)[0] for kind, curve in curves.items() if kind not in (PLAIN, RIVAL)}
    best = min(above, key=above.__getitem__)
    yield Aim(f"held-out loss of a small model over LoRA on 16 bits ({best})", LEARNING, above[best], percent, True)


def _of_products(rows: list[Row]) -> Iterator[Aim]:
    for op, name in NAMES.items():
        for sizes, rival, wanted in PRODUCTS:
            yield _of_rows(rows, op, name, sizes, rival, wanted)
        mean = geometric_mean(_mean(rows, op, m, THEIRS) for m in SMALL)
        yield Aim(f"{name}, mean of M = {SMALL[0]} to {SMALL[-1]}, over {THEIRS}", SMALL_MEAN, mean, times)
    yield Aim("product, M = 1, of a reader's speed", READ_ONLY, _mean(rows, "matmul", 1, "read only"), percent)
    for m, wanted in ADAPTER:
        mean = _mean(rows, "lora", m, f"{THEIRS} + peft")
        yield Aim(f"layer with an adapter, M = {m}, over {THEIRS} + peft", wanted, mean, times)
    host = [row["median_us"] for row in _timed(rows, "linear4bit", 1, "host") if row["provider"] == OURS]
    yield Aim("host's time of `Linear4bit`, M = 1", HOST_US, max(host), lambda value: f"{value:.1f} µs", at_most=True)


def _of_rows(rows: Sequence[Row], op: str, name: str, sizes: Sequence[int], rival: str, wanted: float) -> Aim:
    """Of the worst of several numbers of rows of activations."""
    means = {m: _mean(rows, op, m, rival) for m in sizes}
    worst = min(sizes, key=means.__getitem__)
    several = len(sizes) > 1
    what = f"{name}, M = {sizes[0]}{f' to {sizes[-1]}' if several else ''}, over " + (
        THEIRS if rival == THEIRS else "16-bit cuBLAS"
    )
    return Aim(what, wanted, means[worst], times, where=f" (M = {worst})" if several else "")


def _of_training(rows: list[Row]) -> Iterator[Aim]:
    ours = {case: row for (stack, case), row in done_of(rows).items() if stack == "qlora"}
    for case, speed, memory in TRAINING:
        row = ours[case]
        name = f"training Bloom-7B1, {_spaced(case)}"
        yield Aim(f"{name}, tokens/s", speed, row["tokens_per_s"], lambda value: f"{value:,.0f}")
        peak = row["gpu_peak_allocated_gib"]
        yield Aim(f"{name}, GPU peak", memory, peak, lambda value: f"{value:.2f} GiB", at_most=True)
    others = (("training Bloom-7B1, 1 x 128", "1x128", SMALL_STEP), ("generating", GENERATE, GENERATING))
    for what, case, wanted in others:
        yield Aim(f"{what}, over {THEIRS}", wanted, min(_speed_ups(rows, case)), times)
    in_fp16 = done_of(rows, "fp16")
    speeds = {case: in_fp16["qlora", case]["tokens_per_s"] / ours[case]["tokens_per_s"] for case in FIXED_LENGTHS}
    worst = min(speeds, key=speeds.__getitem__)
    what = "training Bloom-7B1, speed in fp16 to that in bf16"
    yield Aim(what, FP16_TO_BF16, speeds[worst], times, where=f" ({_spaced(worst)})")


def _spaced(case: str) -> str:
    return case.replace("x", " x ")


def _speed_ups(rows: list[Row], case: str) -> list[float]:
    """Ours over each stack on bitsandbytes."""
    measured = done_of(rows)
    key = "new_tokens_per_s" if case == GENERATE else "tokens_per_s"
    theirs = [stack for stack in stacks_of(measured) if THEIRS in stack]
    return [measured["qlora", case][key] / measured[stack, case][key] for stack in theirs]


def _timed(rows: Sequence[Row], op: str, m: int, method: str) -> list[Row]:
    return [row for row in rows if (row["op"], row["m"], row["method"], row["status"]) == (op, m, method, "ok")]


def _mean(rows: Sequence[Row], op: str, m: int, rival: str) -> float:
    """How many times as fast as the rival, in the worse dtype."""
    found = {
        (row["dtype"], row["rows"], row["columns"], row["provider"]): row["median_us"]
        for row in _timed(rows, op, m, "graph")
    }
    ratios: dict[str, list[float]] = {}
    for (dtype, *shape, provider), median in found.items():
        if provider == OURS and (other := found.get((dtype, *shape, rival))):
            ratios.setdefault(dtype, []).append(other / median)
    return min(map(geometric_mean, ratios.values()))
