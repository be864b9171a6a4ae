"""`NF4Config`: the arguments of 4-bit loading, and their form in config.json.

Room: values and their checks; no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qkernels import BLOCKSIZES, FLOAT_DTYPES, QUANT_STORAGES, QUANT_TYPES
from qkernels.errors import UserError

METHOD = "qkernels_nf4"

_BITSANDBYTES_NAMES = {
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "compress_statistics",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_quant_storage": "quant_storage",
    "llm_int8_skip_modules": "modules_to_not_convert",
    "load_in_4bit": "not needed, NF4Config always does",
}


@register_quantization_config(METHOD)
@dataclass(init=False)
class NF4Config(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a model; the counterpart of `BitsAndBytesConfig(load_in_4bit=True)`.

    Args:
        quant_type: "nf4" or "fp4" (`bnb_4bit_quant_type`, whose default is "fp4").
        compress_statistics: double quantization (`bnb_4bit_use_double_quant`, whose default is False).
        blocksize: weights that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096 (bitsandbytes fixes 64).
        quant_storage: dtype the packed bytes are viewed as (`bnb_4bit_quant_storage`).
        compute_dtype: dtype of the products; None is that of the activations (`bnb_4bit_compute_dtype`, whose default
            is float32).
        quantize_embeddings: also quantize the input embedding and the output layer, which otherwise stay float.
        modules_to_not_convert: names of modules that stay float, besides the output layer, what is tied to it, and
            what the architecture keeps in float32 (`llm_int8_skip_modules`, which replaces these instead).  A name
            stands for everything below it, may be the end of a module's name, and is a regular expression.

    dtypes may be given by name ("bfloat16").  The configuration goes through config.json and back unchanged.

    Raises:
        UserError: an unknown argument or a value outside the ones above.
    """

    quant_method: str  # type: ignore[assignment]  # transformers' enum has no member for a registered method
    quant_type: str
    compress_statistics: bool
    blocksize: int
    quant_storage: torch.dtype
    compute_dtype: torch.dtype | None
    quantize_embeddings: bool
    modules_to_not_convert: list[str] | None

    skips_are_added: ClassVar[bool] = True  # whether `modules_to_not_convert` adds to what stays float anyway

    def __init__(
        self,
        *,
        quant_type: str = "nf4",
        compress_statistics: bool = True,
        blocksize: int = 64,
        quant_storage: torch.dtype | str = torch.uint8,
        compute_dtype: torch.dtype | str | None = None,
        quantize_embeddings: bool = False,
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        _refuse_unknown(unknown)
        _check_choice("quant_method", quant_method, (METHOD,))
        _check_choice("quant_type", quant_type, QUANT_TYPES)
        _check_choice("compress_statistics", compress_statistics, (True, False))
        _check_choice("blocksize", blocksize, BLOCKSIZES)
        _check_choice("quantize_embeddings", quantize_embeddings, (False, True))
        _check_names("modules_to_not_convert", modules_to_not_convert)
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.compress_statistics = compress_statistics
        self.blocksize = blocksize
        self.quant_storage = as_dtype("quant_storage", quant_storage, QUANT_STORAGES)
        self.compute_dtype = None if compute_dtype is None else as_dtype("compute_dtype", compute_dtype)
        self.quantize_embeddings = quantize_embeddings
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; dtypes by name ("uint8")."""
        fields = super().to_dict()
        dtypes = {name: value for name, value in fields.items() if isinstance(value, torch.dtype)}
        return fields | {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}


# What a checkpoint's weights are packed as; the other fields say how to compute, or which modules are meant.
_FORMAT = (
    "quant_type",
    "compress_statistics",
    "blocksize",
    "quant_storage",
    "quantize_embeddings",
    "modules_to_not_convert",
)


def check_same_format(name: str, stored: NF4Config, asked: NF4Config) -> None:
    """A checkpoint that is 4-bit already keeps its format; asking for another one must not pass unnoticed.

    Args:
        name: how errors call the checkpoint.
        stored: how it is quantized.
        asked: what the user wrote; defaults ask for nothing.

    Raises:
        UserError: a field that is neither the default nor what is stored.
    """
    default = NF4Config()
    for field in _FORMAT:
        value = getattr(asked, field)
        if value != getattr(default, field) and value != getattr(stored, field):
            raise UserError(
                field,
                expected=f"{getattr(stored, field)!r}, as {name} was saved with",
                got=repr(value),
                remedy="Leave the argument out, or load the float checkpoint that it was made from.",
            )


def as_dtype(argument: str, value: torch.dtype | str, choices: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> torch.dtype:
    """`value`, a dtype or its name, if it is one of `choices`.

    Raises:
        UserError: it is not.
    """
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if dtype not in choices:
        names = ", ".join(map(str, choices))
        raise UserError(argument, expected=f"one of {names}", got=repr(value), remedy="Choose one of these.")
    return dtype


def _check_choice(argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        names = ", ".join(map(repr, choices))
        raise UserError(argument, expected=f"one of {names}", got=repr(value), remedy="Choose one of these.")


def _check_names(argument: str, value: Any) -> None:
    if value is not None and (isinstance(value, str) or not all(isinstance(name, str) for name in value)):
        raise UserError(
            argument, expected="a list of module names", got=repr(value), remedy=f"For one write {argument}=['name']."
        )


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        ours = _BITSANDBYTES_NAMES.get(name)
        raise UserError(
            name,
            expected="an argument of NF4Config",
            got=f"{name}={value!r}",
            remedy=f"That is BitsAndBytesConfig's name; here it is: {ours}." if ours else "See help(qlora.NF4Config).",
        )
