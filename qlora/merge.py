"""`qlora merge`: base and adapter as one model.

Room: flags and folders; merging.py does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qkernels.errors import UserError

from .arguments import AdapterArguments, MergeArguments, check_numbers
from .checkpoint import atomic_folder, check_writable, refuse_existing
from .config import Parser, parse
from .generate import adapter_folder, load_tokenizer
from .integrations.peft import read_adapter_config
from .integrations.transformers import NF4Config
from .merging import merge_adapter


def main(argv: Sequence[str]) -> None:
    """`qlora merge`.

    Works on the CPU, one weight at a time.

    Raises:
        UserError: wrong flags, no such model or adapter, an adapter of another base, or no place to write.
    """
    parser = Parser((AdapterArguments, MergeArguments), prog="qlora merge")
    arguments, merge = parse(parser, argv, check_numbers)
    for name, value in (("adapter_path", arguments.adapter_path), ("output_dir", merge.output_dir)):
        if value is None:
            raise UserError(f"--{name}", expected="a folder", got="none", remedy=f"Pass --{name} FOLDER.")
    refuse_existing(merge.output_dir)
    check_writable(merge.output_dir)
    adapter = adapter_folder(arguments.adapter_path)
    base = arguments.model_name_or_path or read_adapter_config(adapter)["base_model_name_or_path"]
    config = NF4Config(
        quant_type=arguments.bnb_4bit_quant_type,
        compress_statistics=arguments.use_bnb_nested_quant,
        quantize_embeddings=arguments.quantize_embeddings,
    )
    tokenizer = load_tokenizer(base, arguments.model_revision)
    with atomic_folder(merge.output_dir) as folder:
        report = merge_adapter(
            base,
            adapter,
            folder,
            onto=merge.onto,
            dtype=getattr(torch, merge.dtype),
            config=config,
            revision=arguments.model_revision,
        )
        tokenizer.save_pretrained(folder)
    print(f"merged model ({report.total_bytes / 1e9:.2f} GB, {merge.dtype}): {merge.output_dir}")
    print(report)
