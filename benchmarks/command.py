"""What the benchmarks' commands share: flags, the model and the texts they ask for, and the way from rows to a CSV."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qkernels.errors import UserError
from qkernels.format import BLOCKSIZES
from qlora.checkpoint import check_writable

from . import data, report
from .checkpoint import MODELS, ModelSize
from .environment import environment
from .weights import BLOCKSIZE, LISTS, Size

# Flags whose values name places of a machine, or a commit, which has a column of its own.
_PLACES = ("--out", "--commit", "--checkpoint", "--figure")
_SIZES = ("layers", "hidden", "heads", "vocab")
# Rows of activations beside ragged weights, which are for few.
RAGGED_ROWS = (1, 4, 16, 64, 256)


def parser_of(name: str, description: str | None, out_required: bool = True) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.NAME`, with the flags that every benchmark has."""
    parser = _Parser(
        prog=f"python -m benchmarks.{name}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=out_required, help="folder for the results")
    parser.add_argument("--commit", help="for a copy without .git: the commit, with + appended when files differ")
    return parser


class _Parser(argparse.ArgumentParser):
    """Leaves in `options.command` what was asked, as a record may say it."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options = super().parse_args(args, namespace)
        options.command = f"{self.prog} {shlex.join(_anywhere(sys.argv[1:] if args is None else args))}".rstrip()
        return options


def _anywhere(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments without what is of one machine only: of a file its name, of the results their place here."""
    given = iter(arguments)
    for argument in given:
        flag, _, value = argument.partition("=")
        if flag not in _PLACES:
            yield argument.rpartition("/")[2]
            continue
        if not value:
            next(given, None)
        if flag == "--out":
            yield from ("--out", "benchmarks/results")


def environment_of(options: argparse.Namespace, device: str) -> report.Row:
    """What every row of a record says of the machine, the software and the command."""
    return environment(device, commit=options.commit, command=options.command)


def written(run: Callable[[argparse.Namespace], Path], options: argparse.Namespace, suffix: str) -> int:
    """Make a record and show its page.

    Args:
        run: makes it; returns its path without suffix.
        suffix: of the rows, beside the page in Markdown.

    Returns:
        0, or 2 on wrong arguments, which `run` raises as UserError.
    """
    try:
        stem = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{stem.with_suffix('.md').read_text(encoding='utf-8')}\nwritten: {stem}.md and .{suffix}")
    return 0


def add_data_flag(parser: argparse.ArgumentParser) -> None:
    """Where the prompts are."""
    parser.add_argument(
        "--data", type=Path, help="the CSV of fka/awesome-chatgpt-prompts; for a trial qlora/assets/prompts.csv"
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a full-size model with random weights, and of the prompts."""
    add_data_flag(parser)
    parser.add_argument("--checkpoint", type=Path, help="build it here and keep it, or take the one there")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)), help="default: %(default)s")
    for name in _SIZES:
        parser.add_argument(f"--{name}", type=positive, help="instead of the model's own")


def model_size(model: str, **given: int | None) -> ModelSize:
    """The sizes of a published model, but for what is given; Llama's MLP is as much smaller as its hidden size."""
    full = MODELS[model]
    size = replace(full, **{name: value for name, value in given.items() if value is not None})
    if full.intermediate is None:
        return size
    blocks = round(full.intermediate * size.hidden / full.hidden / 64)
    return replace(size, intermediate=64 * blocks)


@dataclass(frozen=True)
class ModelRun:
    """What the flags of `add_model_flags` say.

    Attributes:
        device: "cuda" or "cpu".
        size: of the model.
        texts: every prompt of the data set.
        common: what goes into each row: versions, commit, model.
        stem: the results' path without suffix.
    """

    device: str
    size: ModelSize
    texts: list[str]
    common: report.Row
    stem: Path


def model_run(options: argparse.Namespace, prefix: str = "") -> ModelRun:
    """Look at the flags and at what they name, before anything takes minutes.

    Args:
        prefix: of the results' name, before the model's.

    Raises:
        UserError: no such data, or nothing can be written there.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = model_size(options.model, **{name: getattr(options, name) for name in _SIZES})
    texts = data.read_prompts(options.data)
    check_writable(options.out)
    common = {**environment_of(options, device), "model": size.name, **asdict(size)}
    stem = report.file_stem(options.out, prefix + size.name, str(common["gpu"] or "cpu"), str(common["date"]))
    return ModelRun(device, size, texts, common, stem)


def add_trial_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smoke", action="store_true", help="small sizes: a trial of the script")


def add_shape_flags(parser: argparse.ArgumentParser) -> None:
    """Which weights; `sizes_of` reads the answer."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shape", action="append", type=_shape, help="rows x columns of a weight, 4096x4096; repeat it for several"
    )
    which.add_argument(
        "--shapes",
        choices=LISTS,
        default="models",
        help="models: Bloom's and Llama's (the default); ragged: rows\n"
        "that are not whole blocks of 64, and Bloom's in blocks of 32",
    )
    parser.add_argument(
        "--blocksize", type=int, choices=BLOCKSIZES, default=BLOCKSIZE, help="weights a scale (default: %(default)s)"
    )


def sizes_of(options: argparse.Namespace) -> dict[Size, str]:
    """The weights that the flags ask for -> the first model that has such a one.

    Raises:
        argparse.ArgumentTypeError: a blocksize for a list that has its own.
    """
    if options.shapes == "ragged" and options.blocksize != BLOCKSIZE:
        raise argparse.ArgumentTypeError("--shapes ragged has blocks of its own: without --blocksize")
    if options.smoke and options.shapes == "models":
        return {Size((64, 128), options.blocksize): "trial"}
    if options.smoke:  # one of each kind
        return {Size((64, 80)): "trial", Size((64, 128), 32): "trial"}
    known: dict[Size, str] = {}
    for model, sizes in LISTS[options.shapes].items():
        for size in sizes:
            known.setdefault(size if options.shapes == "ragged" else size._replace(blocksize=options.blocksize), model)
    if not options.shape:
        return known
    given = (Size(shape, options.blocksize) for shape in options.shape)
    return {size: known.get(size, "given") for size in given}


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags, those of `add_shape_flags` too; what does not go together ends the command."""
    options = parser.parse_args(arguments)
    try:
        sizes_of(options)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return options


def record_name(options: argparse.Namespace, name: str) -> str:
    """A record's name; one of a list of its own is no newer record of the models' weights."""
    return name if options.shapes == "models" else f"{options.shapes}-{name}"


def rows_of(options: argparse.Namespace, usual: Sequence[int]) -> Sequence[int]:
    """The rows of activations that the flags ask for; of `usual` where they say nothing."""
    if options.m or options.smoke:
        return options.m or (1, 16)
    return RAGGED_ROWS if options.shapes == "ragged" else usual


def add_rows_flag(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--m", action="append", type=positive, help=f"rows of activations; repeat it; default {default}"
    )


def positive(text: str) -> int:
    """A whole number from 1 on, as a flag's type."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    try:
        return positive(rows), positive(columns)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected rows x columns, as 4096x4096, got {text!r}") from error


def measure_to_csv(
    options: argparse.Namespace,
    name: str,
    rows_on: Callable[[str], Iterator[report.Row]],
    line: Callable[[report.Row], str],
    closing: Callable[[list[report.Row]], str] | None = None,
) -> int:
    """Measure, print a line a row, write a CSV; 0, or 2 where there is no GPU to measure on, or no place to write.

    Args:
        name: of the results.
        rows_on: the rows, measured on "cuda" or "cpu".
        line: a row as text.
        closing: what to say of all rows at the end.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        print("error: there is no GPU here; --smoke tries the script at a small size.", file=sys.stderr)
        return 2
    try:
        check_writable(options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    common = environment_of(options, device)
    stem = report.file_stem(options.out, name, str(common["gpu"] or "cpu"), str(common["date"]), ".csv")
    rows: list[report.Row] = []
    try:
        for row in rows_on(device):
            rows.append({**row, **common})
            print(line(row), flush=True)
        if closing is not None:
            print(closing(rows))
    finally:  # what was measured before a gate refused, or somebody lost patience
        if rows:
            print(f"written: {report.write_csv(stem, rows)}")
    return 0
