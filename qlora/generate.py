"""Continuing prompts with a 4-bit model and perhaps an adapter; `qlora generate`.

Room: thin over transformers' `generate` and peft's `PeftModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from qkernels.errors import UserError

from .arguments import DEFAULT_MODEL, AdapterArguments, GenerationArguments, ModelArguments, check_numbers
from .config import Parser, parse
from .integrations.peft import check_adapter_matches, read_adapter_config
from .loading import load_pretrained_4bit
from .optimize import can_optimize, optimize_model
from .precision import choose_precision

ADAPTER_FOLDER = "adapter"


def continue_prompts(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], generation: GenerationArguments
) -> list[str]:
    """What the model writes after each prompt, without the prompt; all prompts go through the model together.

    Args:
        model: a causal language model; its training mode is left as it was.
        tokenizer: its tokenizer.
        prompts: texts; an empty list gives an empty list.
        generation: length and sampling; its own prompts are not used.
    """
    if not prompts:
        return []
    # On the left, so that every prompt ends where the new text begins.
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    set_seed(generation.seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if generation.temperature:
        sampling = {"do_sample": True, "temperature": generation.temperature}
    if batch["input_ids"].is_cuda and can_optimize(model):
        sampling["cache_implementation"] = "static"  # with it a token is one launch: see optimize/decoding.py
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tokens = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=generation.max_new_tokens,
                repetition_penalty=generation.repetition_penalty,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
    finally:
        model.train(was_training)
    # Decoded with the prompt and cut after it: many tokenizers drop the space before the first word they decode.
    given, whole = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (batch["input_ids"], tokens))
    return [text.removeprefix(start) for start, text in zip(given, whole, strict=True)]


def load_base(model: ModelArguments, dtype: torch.dtype, device: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model in 4 bits, optimized where it can be, and its tokenizer with a padding token.

    With an attention that the user chose the model stays as transformers has it.

    Raises:
        UserError: no such model, or it cannot be quantized.
    """
    options: dict[str, Any] = (
        {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
    )
    loaded = load_pretrained_4bit(
        model.model_name_or_path,
        quant_type=model.bnb_4bit_quant_type,
        compress_statistics=model.use_bnb_nested_quant,
        quantize_embeddings=model.quantize_embeddings,
        dtype=dtype,
        device=device,
        revision=model.model_revision,
        **options,
    )
    if model.attn_implementation is None and can_optimize(loaded):
        optimize_model(loaded)
    return loaded, load_tokenizer(model.model_name_or_path, model.model_revision)


def load_tokenizer(name: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """The tokenizer of a model or folder; a missing padding token becomes the end-of-text token.

    Raises:
        UserError: there is none, or it has neither token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            "--model_name_or_path",
            expected="a model with its tokenizer",
            got=f"{name!r}: {shorten(str(error), 200)}",
            remedy="Put the tokenizer's files beside the model's.",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            "--model_name_or_path",
            expected="a tokenizer with an end-of-text or padding token",
            got=f"none in {name!r}",
            remedy="Set eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def adapter_folder(path: str) -> Path:
    """The folder with `adapter_config.json`: `path` itself, or what `qlora train` left below it.

    Raises:
        UserError: there is no adapter.
    """
    for folder in (Path(path), Path(path) / ADAPTER_FOLDER):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise UserError(
        "--adapter_path",
        expected="a run folder of `qlora train`, or a folder with adapter_config.json",
        got=f"{path!r}, {'which has none' if Path(path).exists() else 'which does not exist'}",
        remedy="Check the path, or finish the run with `qlora train --resume`.",
    )


def load_with_adapter(
    arguments: AdapterArguments, dtype: torch.dtype, device: str | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Base model and adapter, and the tokenizer; the base alone if there is no adapter.

    The base model's name is filled in from the adapter if it is None.

    Raises:
        UserError: no such model or adapter, a damaged adapter, or one of another base.
    """
    if arguments.adapter_path is None:
        arguments.model_name_or_path = arguments.model_name_or_path or DEFAULT_MODEL
        return load_base(arguments, dtype, device)
    folder = adapter_folder(arguments.adapter_path)
    if arguments.model_name_or_path is None:
        arguments.model_name_or_path = read_adapter_config(folder)["base_model_name_or_path"]
    base, tokenizer = load_base(arguments, dtype, device)
    check_adapter_matches(base, folder)
    return PeftModel.from_pretrained(base, folder), tokenizer


def device_of(use_cpu: bool) -> str | None:
    """The device that --use_cpu means; None is the GPU if there is one."""
    return "cpu" if use_cpu else None


def main(argv: Sequence[str]) -> None:
    """`qlora generate`.

    Raises:
        UserError: wrong flags, no such model or adapter, or an adapter of another base.
    """
    parser = Parser((AdapterArguments, GenerationArguments), prog="qlora generate")
    arguments, generation = parse(parser, argv, check_numbers)
    device = device_of(generation.use_cpu)
    model, tokenizer = load_with_adapter(arguments, choose_precision(device).dtype, device)
    for prompt, text in zip(
        generation.prompt, continue_prompts(model, tokenizer, generation.prompt, generation), strict=True
    ):
        print(f"{prompt}{text}\n")
