"""`qlora quantize`: a 4-bit checkpoint of a model, its weights rounded for texts of the kind that it will read.

Room: flags and folders; loading.py and calibration.py do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from qkernels.errors import UserError

from .arguments import DataArguments, ModelArguments, QuantizeArguments, check_numbers
from .calibration import calibrate_from_float
from .checkpoint import atomic_folder, check_writable, refuse_existing
from .config import Parser, parse
from .data import TEXT, load_texts
from .generate import device_of, load_base, load_tokenizer
from .integrations.transformers import as_bitsandbytes
from .precision import choose_precision

TEXTS_AT_ONCE = 8


def main(argv: Sequence[str]) -> None:
    """`qlora quantize`.

    Raises:
        UserError: wrong flags, no such model or data, or no place to write.
    """
    parser = Parser((ModelArguments, QuantizeArguments), prog="qlora quantize")
    model_arguments, options = parse(parser, argv, check_numbers)
    if options.output_dir is None:
        raise UserError("--output_dir", expected="a folder", got="none", remedy="Pass --output_dir FOLDER.")
    refuse_existing(options.output_dir)
    check_writable(options.output_dir)
    name = model_arguments.model_name_or_path
    data = DataArguments(dataset_name=options.dataset_name, max_samples=options.max_samples)
    texts = load_texts(data, options.dataset_text_field)[0][TEXT] if options.calibrate else []
    device = device_of(options.use_cpu)
    model, _ = load_base(model_arguments, choose_precision(device).dtype, device)
    tokenizer = load_tokenizer(name, model_arguments.model_revision)
    if texts:
        print(f"calibrating on {len(texts)} texts of {options.dataset_name} ...")
        report = calibrate_from_float(
            model, name, _batches(texts, tokenizer, options.max_length), revision=model_arguments.model_revision
        )
        print(f"error of the layers' outputs: {report.before:.2%} -> {report.after:.2%} ({report.layers} layers)")
    if options.bitsandbytes:
        as_bitsandbytes(model)
    with atomic_folder(options.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"4-bit model: {options.output_dir}")


def _batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[dict[str, torch.Tensor]]:
    ordered = sorted(texts, key=len)
    tokenizer.padding_side = "right"  # padding behind a text changes nothing in it
    for begin in range(0, len(ordered), TEXTS_AT_ONCE):
        batch = tokenizer(
            ordered[begin : begin + TEXTS_AT_ONCE],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=length,
        )
        yield {key: batch[key] for key in ("input_ids", "attention_mask")}
