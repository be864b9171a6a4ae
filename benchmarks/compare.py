"""Hold a run of `benchmarks.run` against the committed record: has anything become slower beside its rival?

    python -m benchmarks.compare build/bench/matmul-....csv            # or: make bench-compare

Times differ from machine to machine, so ratios are compared: the time of whatever else was timed in the same run, on
the same inputs, over ours.  That is bitsandbytes, torch in 16 bits, the copy of the same weight.  These do not stay
equally fast from run to run either (bitsandbytes' quantizer waits for the host, cuBLAS loses to a lower clock), so ours
has become slower only where it lost to all of them: by more than twice the noise, which each run measures by timing the
same code twice (rows "..., again"), or twice 2% where that is less, since processes differ by more than one does from
itself.  Then it ends with 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .environment import ROOT
from .report import Row, read_csv
from .weights import BLOCKSIZE

RESULTS = ROOT / "benchmarks" / "results"
# This project's provider of an operation and of a whole model; what follows its name where it is timed once more.
OURS, AGAIN = ("qkernels", "qlora"), ", again"
RIVAL, COPY = "bitsandbytes", "a copy"
Case = tuple[object, ...]
# Quantizing 4096 x 4096 took 28.1, 28.8 and 29.0 us in three processes, each of which repeated itself within 1%.
BETWEEN_PROCESSES = 0.02


def ratios(rows: Iterable[Row]) -> dict[Case, dict[str, float]]:
    """(op, weight or model, dtype, M, method) -> others' times over ours, bitsandbytes first and the copy last."""
    times: dict[Case, dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok":
            times.setdefault(_case(row), {})[row["provider"]] = row["median_us"]
    found = {}
    for case, providers in times.items():
        others = {name: us for name, us in providers.items() if not name.startswith(OURS)}
        others = dict(sorted(others.items(), key=lambda item: RIVAL not in item[0]))
        if copy := times.get(("copy", *case[1:3], None, case[-1])):
            others[COPY] = copy["torch"]
        for ours in OURS:
            if ours in providers and others:
                found[case] = {name: us / providers[ours] for name, us in others.items()}
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
    """A line for each case that both runs have, and whether none became slower beside all that both timed."""
    old, new = ratios(before), ratios(after)
    spread = [noise(before), noise(after)]
    lines, verdicts = [], []
    for case in new:
        changes = {name: new[case][name] / was - 1 for name, was in old.get(case, {}).items() if name in new[case]}
        if not changes:
            continue
        known = [one[_clock(case)] for one in spread if _clock(case) in one]
        if not known:
            lines.append(f"{_text(case)}: neither run measured its noise, not compared")
            continue
        allowed = 2 * max(*known, BETWEEN_PROCESSES)
        slower, faster = max(changes.values()) < -allowed, min(changes.values()) > allowed
        verdicts.append("SLOWER" if slower else "faster" if faster else "the same")
        shown = (f"{name} {old[case][name]:.2f} -> {new[case][name]:.2f} ({by:+.1%})" for name, by in changes.items())
        lines.append(f"{_text(case)}: {verdicts[-1]}; times ours, {', '.join(shown)}")
    if verdicts:
        lines.append(
            f"noise between processes, at least: {BETWEEN_PROCESSES:.1%}; twice the largest noise is no change"
        )
    for name, one in zip(("the record", "this run"), spread, strict=True):
        lines += [f"noise of {name}, {clock}: {value:.1%}" for clock, value in one.items()]
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in Counter(verdicts).items()) or "nothing compared")
    return lines, "SLOWER" not in verdicts


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


def weight_of(row: Row) -> str:
    """ "4096x4096", "4096x4096/32" in blocks of 32 instead of 64; or a model's name."""
    if not row["rows"]:
        return str(row["model"])
    blocksize = row.get("blocksize") or BLOCKSIZE  # no column in records that are older
    return f"{row['rows']}x{row['columns']}" + (f"/{blocksize}" if blocksize != BLOCKSIZE else "")


def _case(row: Row) -> Case:
    return row["op"], weight_of(row), row["dtype"], row["m"], row["method"]


def _clock(case: Case) -> str:
    """The cases that share a noise: those of a method; of whole models each operation's, for a step of training is
    timed more often than a load."""
    op, what, _, _, method = case
    return str(method) if re.match(r"\d+x\d", str(what)) else f"{op} ({method})"


def _text(case: Case) -> str:
    op, what, dtype, m, method = case
    return f"{op} {what} {dtype}" + (f" M={m}" if m else "") + f", {method}"


if __name__ == "__main__":
    sys.exit(main())
