"""`qlora compare`: the base model beside the tuned one, on the same prompts.

Room: one model in memory; peft switches the adapter off for the base's turn.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from qkernels.errors import UserError

from .arguments import AdapterArguments, GenerationArguments, check_numbers
from .config import Parser, parse
from .generate import continue_prompts, device_of, load_with_adapter
from .precision import choose_precision


def side_by_side(left: str, right: str, headings: tuple[str, str]) -> str:
    """Two texts side by side under their headings, wrapped to the terminal (at most 160 columns)."""
    width = max(20, (min(shutil.get_terminal_size().columns, 160) - 3) // 2)
    columns = []
    for heading, text in zip(headings, (left, right), strict=True):
        lines = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, width) or [""]]
        columns.append([heading, "-" * len(heading), *lines])
    return "\n".join(f"{a:<{width}} | {b}".rstrip() for a, b in zip_longest(*columns, fillvalue=""))


def main(argv: Sequence[str]) -> None:
    """`qlora compare`.

    Raises:
        UserError: wrong flags, no such model or adapter, or an adapter of another base.
    """
    parser = Parser((AdapterArguments, GenerationArguments), prog="qlora compare")
    arguments, generation = parse(parser, argv, check_numbers)
    if arguments.adapter_path is None:
        raise UserError(
            "--adapter_path",
            expected="an adapter to compare",
            got="none",
            remedy="Pass --adapter_path RUN_FOLDER.",
        )
    device = device_of(generation.use_cpu)
    model, tokenizer = load_with_adapter(arguments, choose_precision(device).dtype, device)
    tuned = continue_prompts(model, tokenizer, generation.prompt, generation)
    with model.disable_adapter():
        base = continue_prompts(model, tokenizer, generation.prompt, generation)
    for prompt, before, after in zip(generation.prompt, base, tuned, strict=True):
        print(f"{prompt}\n\n{side_by_side(before, after, ('base', 'tuned'))}\n")
