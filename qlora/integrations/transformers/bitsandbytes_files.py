"""Checkpoints and configurations of bitsandbytes on this project's layers, without bitsandbytes.

Room: `BitsAndBytesConfig` to `NF4Config` and back.  A 4-bit checkpoint that bitsandbytes wrote differs from one of
`NF4Config` only in the `quantization_config` of its config.json.  `BitsAndBytesNF4Config` is an `NF4Config` that reads
and writes that form, so a model loaded from such a checkpoint is saved as such a checkpoint again.

Who loads one: where bitsandbytes is not installed, always this project (transformers would refuse).  Where it is,
bitsandbytes, unless `quantization_config=NF4Config()` is passed with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import auto
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from qkernels.errors import UserError

from .config import NF4Config, check_same_format
from .quantizer import NF4Quantizer

BITSANDBYTES = "bitsandbytes"
_KIND = "bitsandbytes_4bit"  # transformers' key for both tables
_BLOCKSIZE = 64  # bitsandbytes has no argument for it; each stored weight says its own


class BitsAndBytesNF4Config(NF4Config):
    """An `NF4Config` with the meaning and the written form of a `BitsAndBytesConfig(load_in_4bit=True)`.

    Args:
        fields: of a `BitsAndBytesConfig`, as `to_dict` or config.json has them.

    Raises:
        UserError: not 4-bit, or a value that the format does not have (a quant_storage of int8, ...).
    """

    skips_are_added = False  # llm_int8_skip_modules replaces what stays float by default

    def __init__(self, fields: Mapping[str, Any]) -> None:
        if not is_4bit_of_bitsandbytes(fields):
            raise UserError(
                "quantization_config",
                expected="4-bit weights of bitsandbytes (load_in_4bit)",
                got=f"quant_method {fields.get('quant_method')!r} without load_in_4bit",
                remedy="Install bitsandbytes for its 8-bit weights, or load the float checkpoint.",
            )
        super().__init__(
            quant_type=fields.get("bnb_4bit_quant_type", "fp4"),
            compress_statistics=fields.get("bnb_4bit_use_double_quant", False),
            blocksize=_BLOCKSIZE,
            quant_storage=fields.get("bnb_4bit_quant_storage") or torch.uint8,
            compute_dtype=fields.get("bnb_4bit_compute_dtype") or torch.float32,
            modules_to_not_convert=fields.get("llm_int8_skip_modules"),
        )
        self._fields = BitsAndBytesConfig.from_dict(dict(fields)).to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The fields of a `BitsAndBytesConfig` as JSON types."""
        return self._fields | {"llm_int8_skip_modules": self.modules_to_not_convert, "quant_method": BITSANDBYTES}


class BitsAndBytesQuantizer(NF4Quantizer):
    """In the place of transformers' own for `BitsAndBytesConfig(load_in_4bit=True)`, where bitsandbytes is missing."""

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(BitsAndBytesNF4Config(quantization_config.to_dict()), **kwargs)


def as_bitsandbytes(model: PreTrainedModel) -> PreTrainedModel:
    """Have `save_pretrained` write a 4-bit model as bitsandbytes would, for programs that know only that form (vLLM).

    The tensors are the same in both forms; config.json then says `quant_method: bitsandbytes`.

    Args:
        model: loaded with NF4Config, or from a checkpoint of that or of bitsandbytes; changed in place.

    Returns:
        `model`.

    Raises:
        UserError: not such a model, or one with adapters on it.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, NF4Quantizer):
        raise UserError(
            "model",
            expected="a model with 4-bit layers, without adapters",
            got=f"a {type(model).__name__} that is not one",
            remedy="Load it with NF4Config or load_pretrained_4bit; merge adapters first (qlora merge --onto 4bit).",
        )
    old = quantizer.quantization_config
    if old.quantize_embeddings:
        raise UserError(
            "model",
            expected="a float embedding and output layer, as bitsandbytes' checkpoints have them",
            got="quantize_embeddings=True",
            remedy="Load the float checkpoint without quantize_embeddings.",
        )
    if not isinstance(old, BitsAndBytesNF4Config):
        config = BitsAndBytesNF4Config(
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": old.quant_type,
                "bnb_4bit_use_double_quant": old.compress_statistics,
                "bnb_4bit_quant_storage": str(old.quant_storage).removeprefix("torch."),
                "bnb_4bit_compute_dtype": str(old.compute_dtype or model.dtype).removeprefix("torch."),
                # Names in full: bitsandbytes' list replaces what stays float by default, and reads patterns otherwise.
                "llm_int8_skip_modules": [name for name, m in model.named_modules() if type(m) is nn.Linear],
            }
        )
        quantizer.quantization_config = model.config.quantization_config = config
    return model


def is_4bit_of_bitsandbytes(fields: Mapping[str, Any]) -> bool:
    """Whether config.json's `quantization_config` is that of a 4-bit checkpoint that bitsandbytes wrote."""
    return fields.get("quant_method", BITSANDBYTES) == BITSANDBYTES and bool(
        fields.get("load_in_4bit") or fields.get("_load_in_4bit")
    )


def register() -> None:
    """Let transformers hand over what is bitsandbytes' as the top of this file says; a second call changes nothing."""
    if not is_bitsandbytes_available():
        auto.AUTO_QUANTIZER_MAPPING[_KIND] = BitsAndBytesQuantizer
    stock = auto.AutoHfQuantizer.merge_quantization_configs
    if not getattr(stock, "knows_nf4config", False):
        auto.AutoHfQuantizer.merge_quantization_configs = _merging(stock)  # type: ignore[method-assign]


def _merging(stock: Callable[..., QuantizationConfigMixin]) -> Callable[..., QuantizationConfigMixin]:
    """transformers' merge of a stored with a given configuration, which refuses two classes."""

    @functools.wraps(stock)
    def merge(stored: Any, given: Any) -> QuantizationConfigMixin:
        fields = stored if isinstance(stored, Mapping) else stored.to_dict()
        if not (isinstance(given, NF4Config) and is_4bit_of_bitsandbytes(fields)):
            return stock(stored, given)
        config = BitsAndBytesNF4Config(fields)
        check_same_format("the checkpoint", config, given)
        config.compute_dtype = given.compute_dtype  # says how to compute, not what is stored
        return config

    merge.knows_nf4config = True  # type: ignore[attr-defined]
    return merge


register()
