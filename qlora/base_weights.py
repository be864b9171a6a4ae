"""The weights of a base model for merging: as the adapter was trained on them, and as they are written.

Room: `BaseWeights` reads a float or a 4-bit checkpoint by name (`tensor_files.py`) and quantizes and decodes one weight
at a time; what is done with them is in merging.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qkernels import QuantState, dequantize_4bit, quantize_4bit
from qkernels.errors import UserError

from .integrations.transformers import NF4Config
from .integrations.transformers.conversion import STORED_NAMES
from .integrations.transformers.quantizer import NF4Quantizer
from .tensor_files import TensorReader


class BaseWeights:
    """The weights of a base model, as an adapter was trained on them and in the form that they are written in.

    Args:
        reader: its checkpoint, float or 4-bit.
        model_config: its configuration; left as it is.
        config: how a float checkpoint was quantized in training.
        onto: "dequantized", "16bit" or "4bit", see `merge_adapter`.
        dtype: of what is written as float.

    Attributes:
        skeleton: the model, with float32 weights of the right shapes and no size.
        model_config: of the model that is written.

    Raises:
        UserError: a 4-bit checkpoint and onto "16bit"; a model that cannot be quantized.
    """

    def __init__(
        self, reader: TensorReader, model_config: Any, config: NF4Config, onto: str, dtype: torch.dtype
    ) -> None:
        self.reader, self.onto, self.dtype = reader, onto, dtype
        stored = getattr(model_config, "quantization_config", None)
        self.stored = stored
        if stored is not None and onto == "16bit":
            raise UserError(
                "base",
                expected="a float checkpoint, since onto is '16bit'",
                got=f"{reader.name!r}, which is 4-bit",
                remedy="Give the float model that it was made from, or merge onto the dequantized base.",
            )
        self.model_config = copy.deepcopy(model_config)
        if stored is not None:
            del self.model_config.quantization_config
        self.model_config.dtype = dtype
        with torch.device("meta"):
            self.skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(self.model_config)
        self.config = config
        self._quantizable = (
            set() if stored else set(NF4Quantizer(config, pre_quantized=False).find_layers(self.skeleton))
        )
        for module in self.skeleton.modules():
            for name, parameter in module.named_parameters(recurse=False):
                # Real, so that peft keeps the adapter beside it on the CPU, and of no size.
                new = nn.Parameter(torch.zeros((), dtype=torch.float32).expand(parameter.shape), requires_grad=False)
                setattr(module, name, new)

    @property
    def prefix(self) -> str:
        return self.skeleton.base_model_prefix

    def name_of(self, parameter: str) -> str:
        """The stored name of a parameter.

        Raises:
            UserError: it is not there.
        """
        name = self.reader.find(parameter, self.prefix)
        if name is None:
            raise UserError(
                "base",
                expected=f"a weight {parameter}",
                got=f"{self.reader.name!r} without it",
                remedy="The checkpoint is incomplete, or the adapter is of another model.",
            )
        return name

    def weights(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's weight in float32: as the adapter was trained on it, and as it is merged onto."""
        name = self.name_of(f"{module}.weight")
        if self.is_packed(name):
            trained = self._decoded(name)
            return trained, trained
        value = self.reader.read(name).to(self.dtype)
        trained = dequantized(*self.quantized(value)) if module in self._quantizable else value.float()
        return trained, value.float() if self.onto == "16bit" else trained

    def untouched(self, written: set[str]) -> Iterator[str]:
        """Names of the stored parameters that no adapter has changed."""
        for name in self.reader:
            if name not in written and not any(name.endswith(f".{part}") for part in STORED_NAMES[:-1]):
                yield name

    def kept(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """A parameter without an adapter, as it is written."""
        value = self.reader.read(name)
        if self.is_packed(name):
            if self.onto == "4bit":
                yield name, value
                for part in self._scales(name):
                    yield f"{name}.{part}", self.reader.read(f"{name}.{part}")
            else:
                yield name, self._decoded(name).to(self.dtype)
            return
        value = value.to(self.dtype) if value.is_floating_point() else value
        module = self._module_of(name)
        if module not in self._quantizable or self.onto == "16bit":
            yield name, value
        elif self.onto == "4bit":
            yield from stored_form(name, *self.quantized(value))
        else:
            yield name, dequantized(*self.quantized(value)).to(self.dtype)

    def quantized(self, weight: torch.Tensor, like: str | None = None) -> tuple[torch.Tensor, QuantState]:
        """`weight` in 4 bits, in the format of the stored weight `like`, or that of the configuration."""
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options: dict[str, Any] = {name: getattr(self.config, name) for name in names}
        if like is not None and self.is_packed(like):
            state = self._state(like)
            values = (state.blocksize, state.nested, state.quant_type, self.reader.read(like).dtype)
            options = dict(zip(names, values, strict=True))
        return quantize_4bit(weight, **options)

    def is_packed(self, name: str) -> bool:
        """Whether 4-bit codes are stored under `name`."""
        return f"{name}.absmax" in self.reader

    def is_4bit(self, module: str, name: str) -> bool:
        """Whether the adapter was trained on 4-bit codes of this module's weight, which is stored under `name`."""
        return self.is_packed(name) or module in self._quantizable

    def _module_of(self, name: str) -> str | None:
        """The module whose weight is stored under `name`."""
        module = name.removesuffix(".weight")
        return next((each for each in (module, f"{self.prefix}.{module}") if each in self._quantizable), None)

    def _scales(self, name: str) -> list[str]:
        parts = [part.removeprefix("weight.") for part in STORED_NAMES[:-1]]
        return [part for part in parts if f"{name}.{part}" in self.reader]

    def _state(self, name: str) -> QuantState:
        return QuantState.from_dict({part: self.reader.read(f"{name}.{part}") for part in self._scales(name)}, "cpu")

    def _decoded(self, name: str) -> torch.Tensor:
        return dequantized(self.reader.read(name), self._state(name))


def stored_form(name: str, packed: torch.Tensor, state: QuantState) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that stand for a 4-bit weight in a checkpoint, by name."""
    yield name, packed
    for part, tensor in state.as_dict(packed=True).items():
        yield f"{name}.{part}", tensor


def dequantized(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The decoded weight in float32."""
    state = copy.copy(state)
    state.dtype = torch.float32
    return dequantize_4bit(packed, state)
