"""The texts to train on: from the hub, a CSV, JSONL or text file, or the prompts that come with the package.

Room: data in, a `datasets.Dataset` with one column of strings out.  TRL tokenizes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from qkernels.errors import UserError

from .arguments import BUNDLED, DataArguments
from .checkpoint import is_local

# TRL reads a column named "prompt" as the first half of a prompt-completion pair, so the text gets a name of its own.
TEXT = "text"

# Not `load_dataset`, which reports every call to a server, that of a local file too.
_READERS: dict[str, Callable[[str], Dataset]] = {
    ".csv": Dataset.from_csv,
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".txt": Dataset.from_text,
}


def load_texts(data: DataArguments, column: str) -> tuple[Dataset, Dataset | None]:
    """Texts for training, and those held out.

    Args:
        data: where the data is and how much of it to take.
        column: name of the column that holds the text; a text file has none, and each line is a text.

    Returns:
        The first `max_samples` rows (all, if None, except the held-out ones at the end), and the `eval_samples` rows
        after them (None if 0), each with the one column "text".  Empty texts are left out before counting.

    Raises:
        UserError: the data cannot be found or read, lacks the column, holds something else than strings in it, or has
            too few rows.
    """
    rows = _read(data)
    if rows.column_names and data.dataset_name.endswith(".txt"):
        column = TEXT
    texts = _texts(rows, column, data.dataset_name)
    if not texts:
        raise UserError(
            "--dataset_name",
            expected=f"at least one text in {data.dataset_name}",
            got="none" if len(rows) == 0 else f"{len(rows)} rows whose {column!r} is empty",
            remedy="Choose another file, or another column by --dataset_text_field.",
        )
    end = len(texts) - data.eval_samples if data.max_samples is None else min(data.max_samples, len(texts))
    held_out = texts[end : end + data.eval_samples] if end > 0 else []
    if len(held_out) < data.eval_samples:
        raise UserError(
            "--eval_samples",
            expected=f"rows left after the first {max(end, 0)} for training",
            got=f"{data.eval_samples} asked for, {len(held_out)} left of {len(texts)}",
            remedy="Lower --max_samples or --eval_samples.",
        )
    return Dataset.from_dict({TEXT: texts[:end]}), Dataset.from_dict({TEXT: held_out}) if held_out else None


@contextmanager
def no_data_bars() -> Iterator[None]:
    """Without the bars of `datasets`: it shows one for each of many steps that take less than a second."""
    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def bundled_prompts() -> Path:
    """The file with the prompts that come with the package (columns act, prompt)."""
    return Path(str(resources.files("qlora") / "assets" / "prompts.csv"))


def _read(data: DataArguments) -> Dataset:
    name = data.dataset_name
    path = bundled_prompts() if name == BUNDLED else Path(name).expanduser()
    if path.suffix in _READERS or path.is_file():
        return _read_file(path)
    if is_local(name):
        got = "a folder" if path.is_dir() else "no such file"
        raise _not_found(name, got)
    return _read_hub(data)


def _read_file(path: Path) -> Dataset:
    if not path.is_file():
        raise _not_found(str(path), "no such file")
    if path.suffix not in _READERS:
        raise _not_found(str(path), f"a file that ends in {path.suffix!r}", "Convert it to .csv or .jsonl.")
    if not path.read_bytes().strip():
        return Dataset.from_dict({})
    try:
        with no_data_bars():
            return _READERS[path.suffix](str(path.resolve()))
    except (DatasetGenerationError, UnicodeDecodeError, ValueError) as error:
        if "corresponds to no data" in str(error):  # a table that is only a head
            return Dataset.from_dict({})
        cause = error.__cause__ or error
        raise UserError(
            "--dataset_name",
            expected=f"a readable {path.suffix} file",
            got=f"{path}: {' '.join(str(cause).split())}",
            remedy="Mend or convert the file.",
        ) from error


def _read_hub(data: DataArguments) -> Dataset:
    try:
        return load_dataset(data.dataset_name, data.dataset_config, split=data.dataset_train_split)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, DatasetGenerationError, ValueError) as error:
        # ValueError: an unknown configuration or split; the text names those there are.
        raise UserError(
            "--dataset_name",
            expected="a data set on the hub, a .csv, .jsonl or .txt file, or 'bundled'",
            got=f"{data.dataset_name!r}: {' '.join(str(error).split())}",
            remedy="Check the name and the network, or use --dataset_name bundled.",
        ) from error


def _not_found(name: str, got: str, remedy: str = "Check the path.") -> UserError:
    return UserError(
        "--dataset_name",
        expected="a data set on the hub, a .csv, .jsonl or .txt file, or 'bundled'",
        got=f"{name!r}, {got}",
        remedy=remedy,
    )


def _texts(rows: Dataset, column: str, name: str) -> list[str]:
    if len(rows) == 0:
        return []
    if column not in rows.column_names:
        near = difflib.get_close_matches(column, rows.column_names, n=1)
        columns = ", ".join(rows.column_names)
        raise UserError(
            "--dataset_text_field",
            expected=f"a column of {name} ({columns})",
            got=repr(column),
            remedy=f"Pass --dataset_text_field {(near or rows.column_names)[0]}, or another of these.",
        )
    values: list[Any] = rows[column][:]
    odd = next((value for value in values if value is not None and not isinstance(value, str)), None)
    if odd is not None:
        raise UserError(
            "--dataset_text_field",
            expected=f"text in column {column!r} of {name}",
            got=f"a {type(odd).__name__}: {str(odd)[:40]}",
            remedy="Choose a column that holds text.",
        )
    return [value for value in values if value is not None and value.strip()]
