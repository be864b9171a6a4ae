"""Draw every figure of `docs/figures/` from the newest record of its kind.

    python -m benchmarks.figures                      # or: make figures
    python -m benchmarks.figures --results /tmp/errors --out /tmp/figures

A figure whose record is not there is not drawn, and said so.  A record of errors that contradicts the theory stops it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from qlora.checkpoint import atomic_file

from . import choice_figure, learning_curves, plotting, throughput_figures
from .compare import RESULTS
from .environment import ROOT
from .error import check, figures, records
from .error.distributions import DISTRIBUTIONS
from .report import Row, read_csv

FIGURES = ROOT / "docs" / "figures"


@dataclass(frozen=True)
class Drawn:
    """Attributes:
    pattern: of the records that it is drawn from.
    make: draws it from a record's rows.
    needs: whether a row is of those that it shows; without any it is not drawn.
    """

    pattern: str
    make: Callable[[list[Row]], Figure]
    needs: Callable[[Row], bool]


DRAWN = {
    "error-blocksize.png": Drawn(
        "error-weights-*.csv", figures.error_by_blocksize, lambda row: row["weights"] in DISTRIBUTIONS
    ),
    "error-layers.png": Drawn("error-weights-*.csv", figures.layers, figures.is_of_layer),
    "error-outputs.png": Drawn("error-outputs-*.csv", figures.outputs, lambda row: True),
    "error-model.png": Drawn("error-model-*.csv", figures.model, lambda row: True),
    "choice.png": Drawn("tune-*.csv", choice_figure.figure_of, lambda row: True),
    "learning.png": Drawn("learning-curves-*.csv", learning_curves.figure_of, lambda row: True),
}
for _op, _pattern in {"matmul": "matmul*.csv", "matmul_dx": "matmul*_dx*.csv", "lora": "matmul*lora*.csv"}.items():
    for _dtype in ("float16", "bfloat16"):
        DRAWN[f"throughput-{_op}-{_dtype}.png"] = Drawn(
            _pattern,
            partial(throughput_figures.against_rows, _op, _dtype),
            throughput_figures.is_of(_op, _dtype),
        )
DEFINED: dict[str, Callable[[], Figure]] = {"code-tables.png": figures.code_tables, "cosine.png": figures.cosine}


def newest(results: Path, pattern: str) -> tuple[Path, list[Row]] | None:
    """The record of that name measured last, and its rows; None where there is none.

    Raises:
        DisagreementError: it holds errors that contradict the theory.
    """
    found = {path: _date(path) for path in results.glob(pattern)}
    if not found:
        return None
    path = max(found, key=lambda one: (found[one], one.name))
    return path, records.read(path) if records.is_record(path) else read_csv(path)


def draw(results: Path, of: str = "") -> Iterator[tuple[str, bytes]]:
    """File name and PNG of every figure that can be drawn.

    Args:
        of: what the names of figures from records begin with.

    Raises:
        DisagreementError: a record of errors contradicts the theory.
    """
    for name, make in DEFINED.items():
        yield name, plotting.picture(make, "from the definitions")
    for name, drawn in ((name, drawn) for name, drawn in DRAWN.items() if name.startswith(of)):
        record = newest(results, drawn.pattern)
        if record is None or not any(drawn.needs(row) for row in record[1]):
            print(f"not drawn: {name}, for no {drawn.pattern} in {results} has what it shows")
            continue
        path, rows = record
        yield name, plotting.picture(partial(drawn.make, rows), plotting.source_of(path, rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; 0, or 1 where a record contradicts the theory."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the figures (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, picture in draw(options.results):
            with atomic_file(options.out / name) as file:
                file.write_bytes(picture)
            print(f"written: {options.out / name}")
    except check.DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _date(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.DictReader(file))["date"]


if __name__ == "__main__":
    sys.exit(main())
