"""`qlora merge`: base and adapter as one ordinary model, which any library loads.

Room: peft merges, `dequantize_model` takes the 4-bit layers out; this file checks and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qkernels.errors import UserError

from .arguments import AdapterArguments, MergeArguments, check_numbers
from .checkpoint import atomic_folder, check_writable, refuse_existing
from .config import Parser, parse
from .generate import load_with_adapter
from .integrations.transformers import dequantize_model


def main(argv: Sequence[str]) -> None:
    """`qlora merge`.

    Works on the CPU: the merged model takes four times the memory of the 4-bit one, more than a small GPU has.

    Raises:
        UserError: wrong flags, no such model or adapter, an adapter of another base, or no place to write.
    """
    parser = Parser((AdapterArguments, MergeArguments), prog="qlora merge")
    arguments, merge = parse(parser, argv, check_numbers)
    for name, value in (("adapter_path", arguments.adapter_path), ("output_dir", merge.output_dir)):
        if value is None:
            raise UserError(f"--{name}", expected="a folder", got="none", remedy=f"Pass --{name} FOLDER.")
    dtype = getattr(torch, merge.dtype)
    refuse_existing(merge.output_dir)
    check_writable(merge.output_dir)
    model, tokenizer = load_with_adapter(arguments, dtype, "cpu")
    merged: Any = dequantize_model(model.merge_and_unload(safe_merge=True), dtype)
    need_bytes = sum(parameter.numel() * parameter.itemsize for parameter in merged.parameters())
    check_writable(merge.output_dir, need_bytes=need_bytes)
    with atomic_folder(merge.output_dir) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"merged model ({need_bytes / 1e9:.2f} GB, {merge.dtype}): {merge.output_dir}")
