"""Records of errors as CSV: none that contradicts the theory is written, or read to make a page or a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..report import Row, file_stem, read_csv, write_csv
from . import check, model, outputs, weights

# What is wrong with a level's rows, from the numbers alone: the same question before writing and after reading.
PROBLEMS: dict[str, Callable[[Iterable[Row]], Iterator[str]]] = {
    "weights": weights.problems,
    "outputs": outputs.problems,
    "model": model.problems,
}
PREFIX = "error"
DIGITS = 7


def write(folder: Path, level: str, rows: list[Row], common: Row) -> Path:
    """Write `FOLDER/error-LEVEL-DEVICE-DATE.csv`; returns its path.

    Raises:
        DisagreementError: the rows contradict the theory; nothing is written.
    """
    check.refuse(PROBLEMS[level](rows))
    stem = file_stem(
        folder, f"{PREFIX}-{level}", str(common["gpu"] or common["processor"]), str(common["date"]), ".csv"
    )
    return write_csv(stem, [{key: _short(value) for key, value in (row | common).items()} for row in rows])


def read(path: Path) -> list[Row]:
    """The rows of a record, numbers as numbers.

    Raises:
        DisagreementError: they contradict the theory, so that nothing may be made from them.
    """
    rows = read_csv(path)
    level = path.stem.removeprefix(f"{PREFIX}-").split("-")[0]
    check.refuse(f"{path.name}: {problem}" for problem in PROBLEMS[level](rows))
    return rows


def is_record(path: Path) -> bool:
    """Whether a file's name is that of a record of errors."""
    return path.name.startswith(f"{PREFIX}-")


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return f"{value:.{DIGITS}g}" if np.isfinite(value) else None
