"""Write the tables of the README and of docs/benchmarks.md from the newest records, between the marks that name them.

    python -m benchmarks.readme            # or: make readme
    python -m benchmarks.readme --check    # only says whether they are current; ends with 1 where not

A mark is `<!-- table: NAME -->`, its end `<!-- end of table -->`.  A table without a record is left empty.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora.markdown import markdown_table

from .aims import short_of
from .compare import noise
from .environment import ROOT
from .error.sections import usual
from .figures import RESULTS, newest
from .readme_tables import (
    around,
    choice,
    exercise,
    host,
    kernels,
    learning,
    lora,
    matmul,
    models,
    not_run,
    ragged,
    rivals,
    training,
)
from .report import Row

PAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
MARKS = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)

Table = tuple[Sequence[str], list[Sequence[str]]]
# Name -> records, the command that makes them where a record does not say it (none for several), and their table.
TABLES: dict[str, tuple[tuple[str, ...], str | None, Callable[..., Table]]] = {
    "training": (("bloom-7b1-*.jsonl",), "python -m benchmarks.bloom7b1", training),
    "around": (("bloom-7b1-*.jsonl",), "python -m benchmarks.bloom7b1", around),
    "llama": (("llama-*.jsonl",), "python -m benchmarks.bloom7b1 --model llama-2-7b --layers 8", training),
    "kernels": (("dequantize-quantize-*.csv",), "python -m benchmarks.run --op dequantize --op quantize", kernels),
    "matmul": (("matmul*.csv",), "python -m benchmarks.run --op matmul", matmul),
    "ragged": (("ragged-matmul*.csv",), "python -m benchmarks.run --shapes ragged", ragged),
    "lora": (("matmul*lora*.csv",), "python -m benchmarks.run --op lora", lora),
    "rivals": (("rivals-*.csv",), "python -m benchmarks.run --all-rivals", rivals),
    "exercise": (("nf4-exercise-*.csv",), "python -m benchmarks.nf4_exercise", exercise),
    "learning": (("learning-curves-*.csv",), "python -m benchmarks.learning", learning),
    "choice": (("tune-*.csv",), "python -m benchmarks.tune", choice),
    "host": (("*linear4bit*.csv",), "python -m benchmarks.run --op linear4bit", host),
    "models": (("*train_step*.csv",), "python -m benchmarks.run --op train_step", models),
    "aims": (
        (
            *("matmul*lora*.csv", "bloom-7b1-*.jsonl", "llama-*.jsonl", "plan-*.jsonl", "fidelity-*.jsonl"),
            *("learning-curves-*.csv", "ragged-matmul*.csv"),
        ),
        None,
        short_of,
    ),
    "errors": (("error-weights-*.csv", "error-model-*.csv"), "python -m benchmarks.quant_error", usual),
}

# What a table is made without, while there is no such record.
DONE_WITHOUT = {"aims": ("ragged-matmul*.csv",)}
# Tables with a dash where somebody could not run: why, they say below.
WITH_REASONS = ("models", "ragged")
# What a table says before it, where there is a record.
INTRODUCTIONS = {
    "choice": "![What each implementation takes beside the chosen one, and what a choice loses](figures/choice.png)\n\n"
    "Geometric means over the weights; an implementation's time is that of its fastest configuration:",
    "ragged": "Weights whose rows are not whole blocks of 64, and blocks of 32:",
    "rivals": "Beside further rivals. INT4 is another format; a dash stands where one cannot run:",
    "learning": "**Learning**: held-out loss of a small model with LoRA, on NF4 as on 16 bits:",
}


def current(text: str, results: Path, to_results: str = "benchmarks/results") -> str:
    """A page with every table between marks made anew.

    Args:
        to_results: the way from the page to the records, for its links.

    Raises:
        DisagreementError: a record of errors contradicts the theory.
        KeyError: a mark names no table.
    """
    return MARKS.sub(lambda found: f"{found['begin']}{_table(found['name'], results, to_results)}{found['end']}", text)


def _table(name: str, results: Path, to_results: str) -> str:
    patterns, command, make = TABLES[name]
    found = {pattern: _newest(results, pattern) for pattern in patterns}
    records = [found[pattern] for pattern in patterns if found[pattern] or pattern not in DONE_WITHOUT.get(name, ())]
    if None in records:
        return ""
    head, body = make(*(rows for _, rows in records))
    links = ", ".join(f"[{path.name}]({to_results}/{path.name})" for path, _ in records)
    first_rows = records[0][1]
    first = first_rows[0]
    where = first["gpu"] or f"{first['processor']} (CPU)"
    source = f"From {links}"
    if command is not None:
        command = first.get("command") or command
        source += f": `{command}` at commit {first['commit'][:9]} on {where}, {first['date'][:10]}"
        source += "".join(map(_noise, (rows for _, rows in records)))
    reasons = not_run(first_rows) if name in WITH_REASONS else ""
    source += f". Not run: {reasons}" if reasons else ""
    introduction = f"\n{INTRODUCTIONS[name]}\n" if name in INTRODUCTIONS else ""
    return f"{introduction}\n{markdown_table(head, body)}\n\n{source}.\n\n"


def _noise(rows: list[Row]) -> str:
    """How far the same code timed twice was apart in the record's run; nothing where that was not measured."""
    found = noise(rows) if "method" in rows[0] else {}
    return f"; noise: {', '.join(f'{clock} {value:.1%}' for clock, value in found.items())}" if found else ""


def _newest(results: Path, pattern: str) -> tuple[Path, list[Row]] | None:
    if not pattern.endswith(".jsonl"):
        return newest(results, pattern)
    found = {
        path: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in results.glob(pattern)
    }
    return max(found.items(), key=lambda item: (item[1][0]["date"], item[0].name)) if found else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; 0, or 1 where a table is not current."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    stale = {}
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = current(before, RESULTS, os.path.relpath(RESULTS, page.parent))
        if before != after:
            stale[page] = after
    if not stale:
        print("the tables are current")
    for page, after in stale.items():
        if options.check:
            print(f"error: {page.name}'s tables are not the newest records'. Run `make readme`.", file=sys.stderr)
        else:
            page.write_text(after, encoding="utf-8")
            print(f"written: {page}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
