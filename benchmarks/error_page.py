"""Make the page of the error report, `error.html` and `error.md`, from the newest records of errors.

python -m benchmarks.error_page                      # or: make figures
python -m benchmarks.error_page --results /tmp/errors --out /tmp/errors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qkernels.errors import UserError

from .environment import ROOT
from .error import check, page, records
from .figures import FIGURES, RESULTS, draw, newest


def make(results: Path, out: Path) -> list[Path]:
    """Write the page; returns its files.  The Markdown shows the figures of `docs/figures/` if it lies in this project.

    Raises:
        UserError: there is no record of errors.
        DisagreementError: one contradicts the theory.
    """
    found = {level: record for level in page.LEVELS if (record := newest(results, f"error-{level}-*.csv"))}
    if not found:
        raise UserError(
            "--results",
            expected="a folder with error-*.csv",
            got=f"none in {results}",
            remedy="Make them by `python -m benchmarks.quant_error --out FOLDER`.",
        )
    return page.write(
        out, found, dict(draw(results, of=records.PREFIX)), FIGURES if out.resolve().is_relative_to(ROOT) else None
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; 0, 1 where a record contradicts the theory, 2 where there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.error_page", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page (default: %(default)s)")
    options = parser.parse_args(arguments)
    return check.exit_code(lambda: write(options.results, options.out))


def write(results: Path, out: Path) -> None:
    """`make`, and say what was written."""
    for path in make(results, out):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
