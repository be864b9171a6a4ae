"""Hold a run of `benchmarks.run` against the committed record: has anything become slower beside its rival?

    python -m benchmarks.compare build/bench/matmul-....csv            # or: make bench-compare

Times differ from machine to machine, so ratios are compared: a rival's time over ours in the same run, on the same
inputs.  bitsandbytes is the rival; where it has no such row, the copy of the same weight.  A ratio may fall by twice
the noise, which each run measures by timing the same code twice (rows "..., again"); further, and it ends with 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .environment import ROOT
from .report import Row, read_csv

RESULTS = ROOT / "benchmarks" / "results"
# This project's provider of an operation and of a whole model; what follows its name where it is timed once more.
OURS, AGAIN = ("qkernels", "qlora"), ", again"
RIVAL = "bitsandbytes"
Case = tuple[object, ...]


def ratios(rows: Iterable[Row]) -> dict[Case, float]:
    """(op, weight or model, dtype, M, method) -> the rival's time over ours."""
    times = {(_case(row), row["provider"]): row["median_us"] for row in rows if row["status"] == "ok"}
    found = {}
    for (case, provider), ours in times.items():
        if provider not in OURS:
            continue
        names = [name for one, name in times if one == case and RIVAL in name]
        copy = times.get((("copy", *case[1:3], None, case[-1]), "torch"))
        rival = times[case, names[0]] if names else copy
        if rival is not None:
            found[case] = rival / ours
    return found


def noise(rows: Iterable[Row]) -> dict[str, float]:
    """Clock (`_clock`) -> what 19 of 20 repetitions of the same code differ by at most, relative; at least 1%."""
    times = {(_case(row), row["provider"]): row["median_us"] for row in rows if row["status"] == "ok"}
    differences: dict[str, list[float]] = {}
    for (case, provider), again in times.items():
        if provider.endswith(AGAIN):
            first = times[case, provider.removesuffix(AGAIN)]
            differences.setdefault(_clock(case), []).append(abs(again / first - 1))
    return {clock: max(0.01, float(np.quantile(values, 0.95))) for clock, values in differences.items()}


def compare(before: list[Row], after: list[Row]) -> tuple[list[str], bool]:
    """A line for each case that both runs have, and whether none became slower beside its rival."""
    old, new = ratios(before), ratios(after)
    spread = [noise(before), noise(after)]
    lines, fine = [], True
    for case in [case for case in new if case in old]:
        known = [one[_clock(case)] for one in spread if _clock(case) in one]
        if not known:
            lines.append(f"{_text(case)}: neither run measured its noise, not compared")
            continue
        change, allowed = new[case] / old[case] - 1, 2 * max(known)
        slower = change < -allowed
        fine &= not slower
        verdict = "SLOWER" if slower else "faster" if change > allowed else "the same"
        lines.append(f"{_text(case)}: {old[case]:.2f} -> {new[case]:.2f} times its rival ({change:+.1%}), {verdict}")
    for name, one in zip(("the record", "this run"), spread, strict=True):
        lines += [f"noise of {name}, {clock}: {value:.1%}" for clock, value in one.items()]
    return lines, fine


def record_for(rows: list[Row], results: Path) -> Path | None:
    """The committed record with most cases in common with these rows, of the same GPU; of several the newest."""
    cases = set(ratios(rows))
    found = []
    for path in results.glob("*.csv"):
        known = read_csv(path)
        if "provider" not in known[0] or "method" not in known[0] or known[0]["gpu"] != rows[0]["gpu"]:
            continue
        if common := cases & set(ratios(known)):
            found.append((len(common), str(known[0]["date"]), path))
    return max(found)[-1] if found else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; 0, 1 where something became slower, 2 where there is nothing to compare with."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", metavar="run", type=Path, nargs="+", help="CSVs that benchmarks.run has just made")
    parser.add_argument("--record", type=Path, help="the CSV to hold them against; default: of each the one that fits")
    options = parser.parse_args(arguments)
    if missing := [str(run) for run in options.runs if not run.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    return max(_compare_run(run, options.record) for run in options.runs)


def _compare_run(run: Path, record: Path | None) -> int:
    after = read_csv(run)
    record = record or record_for(after, RESULTS)
    if record is None:
        print(f"error: no record in {RESULTS} has these cases on {after[0]['gpu'] or 'a CPU'}.", file=sys.stderr)
        return 2
    lines, fine = compare(read_csv(record), after)
    print(f"{run.name} against {record.name}:", *lines, sep="\n  ")
    return 0 if fine else 1


def _case(row: Row) -> Case:
    what = f"{row['rows']}x{row['columns']}" if row["rows"] else row["model"]
    return row["op"], what, row["dtype"], row["m"], row["method"]


def _clock(case: Case) -> str:
    """The cases that share a noise: those of a method; of whole models each operation's, for a step of training is
    timed more often than a load."""
    op, what, _, _, method = case
    return str(method) if re.fullmatch(r"\d+x\d+", str(what)) else f"{op} ({method})"


def _text(case: Case) -> str:
    op, what, dtype, m, method = case
    return f"{op} {what} {dtype}" + (f" M={m}" if m else "") + f", {method}"


if __name__ == "__main__":
    sys.exit(main())
