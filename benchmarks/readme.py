"""Write the README's tables from the newest records, between the marks that name them.

    python -m benchmarks.readme            # or: make readme
    python -m benchmarks.readme --check    # only says whether they are current; ends with 1 where not

A mark is `<!-- table: NAME -->`, its end `<!-- end of table -->`.  A table without a record is left empty.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora.markdown import markdown_table

from .aims import short_of
from .environment import ROOT
from .error.sections import usual
from .figures import RESULTS, newest
from .readme_tables import around, exercise, kernels, learning, lora, matmul, rivals, training
from .report import Row

README = ROOT / "README.md"
MARKS = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)

Table = tuple[Sequence[str], list[Sequence[str]]]
# Name -> records, the command that makes them (none for several), and the table of their rows.
TABLES: dict[str, tuple[tuple[str, ...], str | None, Callable[..., Table]]] = {
    "training": (("bloom-7b1-*.jsonl",), "python -m benchmarks.bloom7b1", training),
    "around": (("bloom-7b1-*.jsonl",), "python -m benchmarks.bloom7b1", around),
    "llama": (("llama-*.jsonl",), "python -m benchmarks.bloom7b1 --model llama-2-7b --layers 8", training),
    "kernels": (("dequantize-quantize-*.csv",), "python -m benchmarks.run --op dequantize --op quantize", kernels),
    "matmul": (("matmul*.csv",), "python -m benchmarks.run --op matmul", matmul),
    "lora": (("matmul*lora*.csv",), "python -m benchmarks.run --op lora", lora),
    "rivals": (("rivals-*.csv",), "python -m benchmarks.run --all-rivals", rivals),
    "exercise": (("nf4-exercise-*.csv",), "python -m benchmarks.nf4_exercise", exercise),
    "learning": (("learning-curves-*.csv",), "python -m benchmarks.learning", learning),
    "aims": (
        (
            *("matmul*lora*.csv", "bloom-7b1-*.jsonl", "llama-*.jsonl", "plan-*.jsonl", "fidelity-*.jsonl"),
            "learning-curves-*.csv",
        ),
        None,
        short_of,
    ),
    "errors": (("error-weights-*.csv", "error-model-*.csv"), "python -m benchmarks.quant_error", usual),
}

# What a table says before it, where there is a record.
INTRODUCTIONS = {
    "rivals": "Beside further rivals. INT4 is another format; a dash stands where one cannot run:",
    "learning": "**Learning**: held-out loss of a small model with LoRA, on NF4 as on 16 bits:",
}


def current(text: str, results: Path) -> str:
    """The README with every table between marks made anew.

    Raises:
        DisagreementError: a record of errors contradicts the theory.
        KeyError: a mark names no table.
    """
    return MARKS.sub(lambda found: f"{found['begin']}{_table(found['name'], results)}{found['end']}", text)


def _table(name: str, results: Path) -> str:
    patterns, command, make = TABLES[name]
    records = [_newest(results, pattern) for pattern in patterns]
    if None in records:
        return ""
    head, body = make(*(rows for _, rows in records))
    links = ", ".join(f"[{path.name}](benchmarks/results/{path.name})" for path, _ in records)
    first = records[0][1][0]
    where = first["gpu"] or f"{first['processor']} (CPU)"
    source = f"From {links}"
    if command is not None:
        source += f": `{command}` at commit {first['commit'][:9]} on {where}, {first['date'][:10]}"
    introduction = f"\n{INTRODUCTIONS[name]}\n" if name in INTRODUCTIONS else ""
    return f"{introduction}\n{markdown_table(head, body)}\n\n{source}.\n\n"


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
    before = README.read_text(encoding="utf-8")
    after = current(before, RESULTS)
    if before == after:
        print("the README's tables are current")
        return 0
    if options.check:
        print("error: the README's tables are not those of the newest records. Run `make readme`.", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    print(f"written: {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
