"""Results as files: CSV; or JSON lines, one row a case of a stack, and a Markdown page made from the same rows."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from qlora.checkpoint import atomic_file
from qlora.markdown import markdown_table

from .environment import LIBRARIES
from .jobs import Job
from .processes import Outcome
from .timing import Timing, percentiles

Row = dict[str, Any]

# What a row of `benchmarks.run` has beside a time, and none where nothing was timed.
UNMEASURED: Row = dict.fromkeys(
    (*Timing.__dataclass_fields__, "gbps", "tflops", "peak_mib", "sm_mhz", "implementation"),
)

RECIPE = "recipe"
GENERATE = "generate"


def rows_of(job: Job, outcome: Outcome, common: Row) -> list[Row]:
    """One row for each finished case, and one more for a failure.  `common` goes into each."""
    base = {**common, "stack": job.provider, "precision": job.precision}
    cases, after = [], []
    for phase in outcome.phases:
        fields = {key: value for key, value in phase.items() if key != "phase"}
        if phase["phase"] == "case":
            cases.append(fields)
        elif phase["phase"] == GENERATE:
            after.append({**fields, "name": GENERATE})
        else:
            renamed = {f"{phase['phase']}_{key}" if key in _PER_PHASE else key: v for key, v in fields.items()}
            base |= renamed
    if "load_seconds" in base:
        base["load_gbps"] = base["checkpoint_bytes"] / base["load_seconds"] / 1e9
    rows = [{**base, **case, "status": "ok"} for case in (*cases, *after)]
    if outcome.failure is not None:
        failed_in = outcome.failed_in
        if failed_in == "case":
            failed_in = job.cases[len(cases)].name
        rows.append({**base, "name": failed_in, "status": "failed", "reason": outcome.failure})
    return rows


_PER_PHASE = ("seconds", "times_s", "sm_mhz", "host_peak_gib", "gpu_peak_allocated_gib", "gpu_peak_reserved_gib")


def file_stem(folder: Path, model: str, device: str, date: str, suffix: str = ".jsonl") -> Path:
    """`folder/MODEL-DEVICE-DATE`, with a number added where results of that name exist: none is overwritten."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = folder / f"{model}-{slug}-{date[:10]}"
    number = 1
    while (candidate := stem if number == 1 else Path(f"{stem}-{number}")).with_suffix(suffix).exists():
        number += 1
    return candidate


def write_csv(stem: Path, rows: list[Row]) -> Path:
    """Write `STEM.csv` whole, its columns those of the first row; returns its path."""
    path = stem.with_suffix(".csv")
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV: numbers and truth values as such, an empty cell as None."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def write(stem: Path, rows: list[Row], page: Callable[[list[Row], str], str]) -> None:
    """Write `STEM.jsonl` and `STEM.md` whole, replacing what this run wrote before.

    Args:
        page: makes the Markdown of the rows and the name of their file.
    """
    with atomic_file(stem.with_suffix(".jsonl")) as file:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with atomic_file(stem.with_suffix(".md")) as file:
        file.write_text(page(rows, stem.with_suffix(".jsonl").name), encoding="utf-8")


def plain_table(keys: Sequence[str], rows: list[Row]) -> str:
    """The rows' values under these keys, as Markdown; a dash where there is none."""
    return markdown_table(keys, [[_cell(row.get(key)) for key in keys] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.3f}"


def markdown(rows: list[Row], source: str) -> str:
    """The page: environment, loading and gate, the recipe, the fixed lengths, what failed."""
    first = rows[0]
    done = [row for row in rows if row["status"] == "ok"]
    sections = [
        f"# {first['model']}: QLoRA beside other stacks on {first['gpu'] or first['processor']}",
        f"Made by `python -m benchmarks.bloom7b1` from `{source}`; every row there carries all of this. "
        "What each column means: `docs/benchmarks.md`.",
        _environment(first),
        "## Loading the checkpoint, and the gate",
        _table(_LOAD_COLUMNS, _one_per_stack(row for row in rows if "load_seconds" in row)),
        "## The tutorial's recipe",
        _table(_RECIPE_COLUMNS, [row for row in done if row["name"] == RECIPE]),
        "## Fixed lengths",
        _table(_LENGTH_COLUMNS, [row for row in done if row["name"] not in (RECIPE, GENERATE)]),
        "## Generating with the adapter",
        _table(_GENERATE_COLUMNS, [row for row in done if row["name"] == GENERATE]),
        "## What failed",
        _table(_FAILURE_COLUMNS, [row for row in rows if row["status"] != "ok"]),
    ]
    return "\n\n".join(sections) + "\n"


def _one_per_stack(rows: Iterable[Row]) -> list[Row]:
    return list({(row["stack"], row["precision"]): row for row in rows}.values())


Column = tuple[str, Callable[[Row], Any]]


def _number(key: str, digits: int) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(key)
        return "-" if value is None else f"{value:,.{digits}f}"

    return show


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) is None else str(row[key])


def _differing(kind: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        if row.get(f"{kind}_differ") is None:
            return "-"
        return f"{row[f'{kind}_differ']:,} of {row[f'{kind}_compared']:,}"

    return show


def _middle_ms(row: Row) -> str:
    if "times_s" not in row:
        return "-"
    timing = percentiles([1e6 * seconds for seconds in row["times_s"]])
    return f"{timing.p20_us / 1e3:.1f} to {timing.p80_us / 1e3:.1f}"


_STACK: list[Column] = [("stack", _text("stack")), ("precision", _text("precision"))]
_SPEED: list[Column] = [
    ("tokens/s", _number("tokens_per_s", 0)),
    ("step, ms (median)", _number("step_ms", 1)),
    ("20th to 80th percentile", _middle_ms),
    ("GPU peak allocated, GiB", _number("gpu_peak_allocated_gib", 2)),
    ("reserved, GiB", _number("gpu_peak_reserved_gib", 2)),
    ("host peak, GiB", _number("host_peak_gib", 2)),
]
_LOAD_COLUMNS = [
    *_STACK,
    ("load, s", _number("load_seconds", 1)),
    ("GB/s", _number("load_gbps", 2)),
    ("model on GPU, GiB", _number("gpu_model_gib", 2)),
    ("GPU peak, GiB", _number("load_gpu_peak_allocated_gib", 2)),
    ("host peak, GiB", _number("load_host_peak_gib", 2)),
    ("gate", _text("gate")),
    ("first batch's loss", _number("first_batch_loss", 4)),
    ("token losses differ, nats rms", _number("token_loss_rms_difference", 4)),
    ("packed bytes differ", _differing("packed_bytes")),
    ("scale codes differ", _differing("scale_codes")),
]
_RECIPE_COLUMNS = [
    *_STACK,
    ("batch", _text("batch")),
    ("steps", _text("steps")),
    ("tokens", _number("tokens", 0)),
    ("all steps, s", _number("train_s", 1)),
    *_SPEED,
    ("loss, first step", _number("first_loss", 3)),
    ("last step", _number("final_loss", 3)),
    ("mean", _number("mean_loss", 3)),
]
_LENGTH_COLUMNS = [*_STACK, ("batch", _text("batch")), ("length", _text("length")), *_SPEED]
_GENERATE_COLUMNS = [
    *_STACK,
    ("new tokens", _text("new_tokens")),
    ("settings", _text("generation")),
    ("tokens/s", _number("new_tokens_per_s", 1)),
    ("GPU peak allocated, GiB", _number("gpu_peak_allocated_gib", 2)),
]
_FAILURE_COLUMNS = [*_STACK, ("in", _text("name")), ("reason", _text("reason"))]


def _table(columns: list[Column], rows: list[Row]) -> str:
    if not rows:
        return "Nothing."
    return markdown_table([title for title, _ in columns], [[show(row) for _, show in columns] for row in rows])


def _environment(row: Row) -> str:
    shown = [key for key in row if key in _ENVIRONMENT and row[key] is not None]
    return _table([("", _text("key")), ("", _text("value"))], [{"key": key, "value": row[key]} for key in shown])


_ENVIRONMENT = frozenset(
    (
        *("commit", "dirty", "command", "date", "python", *LIBRARIES),
        *("gpu", "capability", "driver", "cuda", "processor", "cores", "host_memory_gib"),
        *("layers", "hidden", "heads", "vocab", "checkpoint_bytes"),
    )
)
