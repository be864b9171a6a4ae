"""`calibrate_from_float`: round a 4-bit model's weights again, for the texts that it will meet.

Room: a model's 4-bit layers, block by block, and the float checkpoint, one weight at a time; the mathematics of one
weight is in rounding.py.  The float model is never in memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedModel

from qkernels.errors import UserError

from .layer_inputs import Batches, see_inputs
from .linear4bit import Linear4bit
from .params4bit import Params4bit
from .rounding import quantize_4bit_for_inputs
from .tensor_files import TensorReader

# The block that a layer is in: its name up to the first number.
_BLOCK = re.compile(r"(.*?\.\d+)\.")


@dataclass
class CalibrationReport:
    """The error of the layers' outputs on the inputs, relative to the outputs (Frobenius norms).

    Attributes:
        before: of the weights as they were.
        after: as they are now.
        layers: 4-bit linear layers.
    """

    before: float
    after: float
    layers: int


@torch.no_grad()
def calibrate_from_float(
    model: PreTrainedModel,
    checkpoint: str | os.PathLike[str],
    inputs: Batches,
    *,
    rank: int = 0,
    revision: str = "main",
) -> CalibrationReport:
    """Choose codes and scales of a model's 4-bit linear layers anew, so that their outputs on `inputs` change least.

    The format and the size stay what they are: the model is saved, trained and served as before, and bitsandbytes
    reads it.  An adapter that is trained on it belongs to it: save the model too (`save_pretrained`).  Each block is
    measured with the blocks before it rounded anew already, so the inputs are read through half of the model for each.

    Args:
        model: from `load_pretrained_4bit`, without adapters; changed in place.
        checkpoint: folder or hub id of the float model that it was quantized from.
        inputs: batches for the model, as {"input_ids": int64[batch, T]}, and "attention_mask" where some of it is
            padding; texts of the kind that it will be used on, some ten thousand tokens.
        rank: of the adapter, if it is to start with `initialize_from_float(..., "qera")`: the weights are then rounded
            for what that start leaves, and without it are worse.
        revision: of the checkpoint, on the hub.

    Returns:
        The error before and after, without an adapter.

    Raises:
        UserError: a model with adapters or without 4-bit layers, a rank below 0, no inputs, or a checkpoint without one
            of the weights.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    if not layers or hasattr(model, "peft_config"):
        raise UserError(
            "model",
            expected="a model with 4-bit linear layers and without adapters",
            got="one with adapters" if layers else "no 4-bit linear layer",
            remedy="Load it by load_pretrained_4bit, and add adapters afterwards.",
        )
    if rank < 0:
        raise UserError("rank", expected="0 or more", got=str(rank), remedy="Pass the rank of the adapter, or 0.")
    reader, batches = TensorReader(checkpoint, revision), list(inputs)
    squares = torch.zeros(3, dtype=torch.float64)
    for block, names in groupby(layers, _block_of):
        group = {name: layers[name] for name in names}
        for name, gram in _grams(model, block, group, batches).items():
            layer = group[name]
            weight = reader.read_float(f"{name}.weight", model.base_model_prefix, layer.weight_shape)
            squares += _round(layer, weight.to(layer.weight.device, torch.float32), gram, rank)
    before, after, whole = squares.tolist()
    return CalibrationReport(math.sqrt(before / whole), math.sqrt(after / whole), len(layers))


def _block_of(name: str) -> str:
    found = _BLOCK.match(name)
    return found[1] if found else name


def _grams(
    model: PreTrainedModel, block: str, layers: Mapping[str, Linear4bit], batches: Batches
) -> dict[str, torch.Tensor]:
    """x^T x of what goes into each layer, float32[K, K]."""
    grams: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        x = x.float()
        if name in grams:
            grams[name].addmm_(x.t(), x)
        else:
            grams[name] = x.t() @ x

    see_inputs(model, layers, batches, add, until=model.get_submodule(block))
    return grams


def _round(layer: Linear4bit, weight: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """One layer; its outputs' squared errors before and after, and their own square."""
    old = layer.weight
    assert isinstance(old, Params4bit)
    assert old.quant_state is not None
    before = weight - layer.dequantize(torch.float32)
    packed, state = quantize_4bit_for_inputs(
        weight,
        gram,
        rank=rank,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    state.dtype = old.quant_state.dtype
    layer.weight = old._rebuilt(packed, quant_state=state)
    layer.quant_state = state
    after = weight - layer.dequantize(torch.float32)
    return torch.stack([((part @ gram) * part).sum().double().cpu() for part in (before, after, weight)])
