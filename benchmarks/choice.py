"""Do the dispatch and its tables choose the fastest of what was measured?

    python -m benchmarks.choice benchmarks/results/tune-....csv       # default: the newest record of `benchmarks.tune`,
                                                                     # and the newest of `--shapes ragged`

At every measured point the time of what is chosen now may exceed that of the fastest candidate of all, whatever its
implementation and configuration, by 3%.  It ends with 1 where it exceeds it by more, or where what is chosen was not
measured.  No GPU is needed: a changed rule or table is held against the record.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import torch

from qkernels.dispatch import Product

from . import candidates
from .compare import RESULTS, weight_of
from .report import Row, read_csv
from .weights import BLOCKSIZE

TOLERANCE = 0.03
# Of the models' weights, and of those whose rows are not whole blocks.
RECORDS = ("tune-*.csv", "ragged-tune-*.csv")
# Implementation and configuration, as they stand in a record.
Name = tuple[str, str]


class Point(NamedTuple):
    """What a record says of one point.

    Attributes:
        product: the measured point.
        chosen: what was chosen for it when it was measured.
        times: microseconds of every candidate, as of `times`.
    """

    product: Product
    chosen: Name
    times: dict[Name, float]

    @property
    def slower(self) -> float:
        """How many times the fastest candidate's time the chosen one takes."""
        return self.times[self.chosen] / min(self.times.values())

    def over_chosen(self, implementation: str) -> float | None:
        """The time of an implementation's fastest candidate over that of the chosen one; None without a candidate."""
        found = [us for name, us in self.times.items() if name[0] == implementation]
        return min(found) / self.times[self.chosen] if found else None


class Loss(NamedTuple):
    """Attributes:
    product: the measured point.
    chosen, best: what is chosen for it, and the fastest candidate.
    chosen_us, best_us: their times; None where what is chosen was not measured.
    other_us: the time of the fastest candidate of another implementation; infinite where there is no other.
    """

    product: Product
    chosen: Name
    best: Name
    chosen_us: float | None
    best_us: float
    other_us: float

    @property
    def share(self) -> float:
        """By how much the chosen one is slower: 0.03 is 3%."""
        return math.inf if self.chosen_us is None else self.chosen_us / self.best_us - 1

    @property
    def beside_others(self) -> float:
        """By how much it is slower than every other implementation; negative where it is faster."""
        return math.inf if self.chosen_us is None else self.chosen_us / self.other_us - 1


def product_of(row: Row) -> Product:
    """The point that a row was measured at."""
    major, minor = str(row["capability"] or "0.0").split(".")
    dtype = getattr(torch, row["dtype"])
    backward = row["op"] == "matmul_dx"
    capability, blocksize = (int(major), int(minor)), row.get("blocksize") or BLOCKSIZE
    return Product(row["m"], row["rows"], row["columns"], dtype, capability, blocksize, backward=backward)


def name_of(row: Row) -> Name:
    return row["implementation"], row["configuration"] or ""


def times(rows: Iterable[Row]) -> dict[Product, dict[Name, float]]:
    """Microseconds of each candidate at each point: of those that were timed twice the second time.

    What had only the first, short look counts as no faster than the fastest of the second: that look proves no more.
    """
    looks: dict[Product, tuple[dict[Name, float], dict[Name, float]]] = {}
    for row in rows:
        looks.setdefault(product_of(row), ({}, {}))[row["round"] - 1][name_of(row)] = row["median_us"]
    found = {}
    for product, (first, second) in looks.items():
        fastest = min(second.values(), default=0)
        found[product] = {name: max(us, fastest) for name, us in first.items()} | second
    return found


def points(rows: list[Row]) -> list[Point]:
    """Every point of a record, in its order."""
    taken = {product_of(row): name_of(row) for row in rows if row["chosen"]}
    return [Point(product, taken[product], measured) for product, measured in times(rows).items()]


def choose(product: Product) -> Name:
    """What the dispatch and the tables choose."""
    taken = candidates.chosen(product)
    return taken.implementation, taken.configuration


def losses(rows: Iterable[Row], choose: Callable[[Product], Name] = choose) -> Iterator[Loss]:
    """What is chosen beside the fastest, at every point."""
    for product, measured in times(rows).items():
        best = min(measured, key=lambda name: measured[name])
        taken = choose(product)
        other = min((us for name, us in measured.items() if name[0] != taken[0]), default=math.inf)
        yield Loss(product, taken, best, measured.get(taken), measured[best], other)


def too_slow(rows: Iterable[Row], choose: Callable[[Product], Name] = choose) -> list[Loss]:
    """The points at which what is chosen is slower than allowed, or was not measured."""
    return [loss for loss in losses(rows, choose) if not loss.share <= TOLERANCE]


def line(point: Point) -> str:
    """A point as it was measured: what was chosen, what is the fastest, and the fastest of each implementation."""
    best = min(point.times, key=lambda name: point.times[name])
    shown = [f"{_where(point.product):42} {' '.join(point.chosen).strip()}: {point.times[point.chosen]:.1f} us"]
    if point.slower > 1:
        shown.append(f"{point.slower - 1:.1%} slower than {' '.join(best).strip()}")
    for implementation in dict.fromkeys(name[0] for name in point.times):
        least = min(us for name, us in point.times.items() if name[0] == implementation)
        shown.append(f"{implementation} {least:.1f}")
    return "; ".join(shown)


def _where(product: Product) -> str:
    op = "matmul_dx" if product.backward else "matmul"
    dtype = str(product.dtype).removeprefix("torch.")
    weight = {"rows": product.N, "columns": product.K, "blocksize": product.blocksize}
    return f"{op} {weight_of(weight)} {dtype} M={product.M}"


def text(loss: Loss) -> str:
    """A line."""
    where = _where(loss.product)
    best = f"{' '.join(loss.best).strip()}, {loss.best_us:.1f} us"
    if loss.chosen_us is None:
        return f"{where}: {' '.join(loss.chosen).strip()} is chosen and was not measured; the fastest is {best}"
    taken = f"{' '.join(loss.chosen).strip()}, {loss.chosen_us:.1f} us"
    return f"{where}: {taken} is {100 * loss.share:.1f}% slower than {best}"


def summary(rows: list[Row]) -> str:
    """What the choices lose in the mean and at most, and every point at which it is too much."""
    found = list(losses(rows))
    known = [loss for loss in found if loss.chosen_us is not None]
    lines = [text(loss) for loss in too_slow(rows)]
    if known:
        mean = geometric_mean(1 + loss.share for loss in known) - 1
        beside = max(max(0.0, loss.beside_others) for loss in known)
        lines.append(
            f"{len(found)} points: what is chosen is {mean:.1%} slower than the fastest measured (geometric mean), "
            f"{max(loss.share for loss in known):.1%} at most; than the other implementations {beside:.1%} at most"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; 0, 1 where something slower is chosen, 2 without a record."""
    parser = record_parser("choice", __doc__)
    parser.add_argument("--points", action="store_true", help="a line for every point as it was measured")
    options = parser.parse_args(arguments)
    status = 0 if (records := records_of(options)) else 2
    for record in records:
        rows = read_csv(record)
        if options.points:
            print(*map(line, points(rows)), sep="\n")
        print(f"{record.name}:", summary(rows), sep="\n")
        status |= bool(too_slow(rows))
    return status


def record_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.NAME`, which reads a record."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("record", type=Path, nargs="?", help="CSV of benchmarks.tune (default: the newest ones)")
    return parser


def records_of(options: argparse.Namespace) -> list[Path]:
    """The record that was given, or the newest of each kind; none, and said, without any."""
    newest_ones = (newest(RESULTS, pattern) for pattern in RECORDS)
    records = [options.record] if options.record else [record for record in newest_ones if record is not None]
    if not records:
        print(f"error: no record of benchmarks.tune in {RESULTS}.", file=sys.stderr)
    return records


def newest(results: Path, pattern: str) -> Path | None:
    """The record of `benchmarks.tune` measured last, of one of `RECORDS`."""
    found = {path: str(read_csv(path)[0]["date"]) for path in results.glob(pattern)}
    return max(found, key=lambda path: (found[path], path.name)) if found else None


if __name__ == "__main__":
    sys.exit(main())
