"""LoftQ and PiSSA: adapters on a 4-bit base that begin with what the float weights say.

Room: peft's layers and the float checkpoint, one weight at a time.  peft computes both from a float model in memory,
and LoftQ with bitsandbytes on a GPU only; here the base is 4-bit already and any device will do.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from qkernels.errors import UserError

from ..params4bit import Params4bit
from ..tensor_files import TensorReader
from .peft import LoraLinear4bit

_METHOD = re.compile(r"(loftq|pissa)(?:_niter_(\d+))?")


@dataclass
class InitReport:
    """What the initialization did to the distance from the float weights, relative to them (Frobenius norms).

    Attributes:
        before: of the 4-bit base alone.
        after: of base and adapter together.
        layers: adapted layers.
    """

    before: float
    after: float
    layers: int


@torch.no_grad()
def initialize_from_float(
    model: PeftModel,
    checkpoint: str | os.PathLike[str],
    method: str = "loftq",
    *,
    adapter_name: str = "default",
    revision: str = "main",
) -> InitReport:
    """Start an adapter on a 4-bit base from the float weights; call it between `get_peft_model` and training.

    Args:
        model: of `get_peft_model` with `init_lora_weights=True` on a 4-bit base; changed in place.
        checkpoint: folder or hub id of the float model that the base was quantized from.
        method: "loftq": the adapter becomes the best approximation, of its rank, of the quantization error; the base
            stays as it is.  "pissa": the adapter becomes the principal part of the weight and the base the rest,
            quantized; save the base too (`model.unload().save_pretrained(folder)`), for the adapter belongs to it.
            With "_niter_N" (4 is usual) a fast approximation of the singular value decomposition.
        adapter_name: which adapter.
        revision: of the checkpoint, on the hub.

    Returns:
        The distance from the float weights before and after.

    Raises:
        UserError: another method, no adapted 4-bit layer, or a checkpoint without one of the weights.
    """
    parsed = _METHOD.fullmatch(method)
    if parsed is None:
        raise UserError(
            "method", expected="'loftq' or 'pissa', or these with '_niter_N'", got=repr(method), remedy="Choose one."
        )
    kind, iterations = parsed[1], int(parsed[2] or 0)
    base: Any = model.get_base_model()
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLinear4bit) and adapter_name in module.lora_A
    }
    if not layers:
        raise UserError(
            "model",
            expected=f"4-bit layers with the adapter {adapter_name!r}",
            got="none",
            remedy="Load the base in 4 bits and call get_peft_model first.",
        )
    reader = TensorReader(checkpoint, revision)
    squares = torch.zeros(3, dtype=torch.float64)
    for name, layer in layers.items():
        stored = reader.find(f"{name}.weight", base.base_model_prefix)
        weight = None if stored is None else reader.read(stored)
        shape = (layer.out_features, layer.in_features)
        if weight is None or not weight.is_floating_point() or weight.shape != shape:
            raise UserError(
                "checkpoint",
                expected=f"the float weight {name}.weight of shape {shape}",
                got="none" if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}",
                remedy="Give the float model that the base was quantized from.",
            )
        squares += _initialize(layer, weight.to(layer.weight.device, torch.float32), kind, iterations, adapter_name)
    before, after, whole = squares.tolist()
    return InitReport(math.sqrt(before / whole), math.sqrt(after / whole), len(layers))


def _initialize(layer: Any, weight: torch.Tensor, kind: str, iterations: int, adapter: str) -> torch.Tensor:
    """One layer; its squared errors before and after, and the weight's square."""
    error = weight - layer.base_layer.dequantize(torch.float32)
    scaling, rank = layer.scaling[adapter], layer.r[adapter]
    B, A = _factors(error if kind == "loftq" else weight, rank, iterations)
    for factor, parameter in ((A, layer.lora_A[adapter].weight), (B, layer.lora_B[adapter].weight)):
        parameter.data = (factor / math.sqrt(scaling)).to(parameter.dtype).contiguous()
    adapted = layer.get_delta_weight(adapter).float()
    if kind == "pissa":
        _requantize(layer.base_layer, weight - adapted)
    if adapter in layer.lora_magnitude_vector:  # DoRA: the length of each row, adapter included
        _reset_magnitude(layer, adapter)
    rest = weight - layer.base_layer.dequantize(torch.float32) - adapted
    return torch.stack([part.double().square().sum().cpu() for part in (error, rest, weight)])


def _factors(matrix: torch.Tensor, rank: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B [N, rank] and A [rank, K] whose product is the best approximation of `matrix` [N, K]."""
    if iterations:
        U, S, V = torch.svd_lowrank(matrix, rank, niter=iterations)
        Vh = V.t()
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def _requantize(layer: Any, weight: torch.Tensor) -> None:
    """Put `weight` into a 4-bit layer, in the format that it has."""
    old = layer.weight
    dtype = old.quant_state.dtype
    layer.weight = Params4bit(
        weight.to(dtype),
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=layer,
    ).to(old.device)


def _reset_magnitude(layer: Any, adapter: str) -> None:
    layer.lora_magnitude_vector[adapter].update_layer(
        base_layer=layer.base_layer,
        lora_A=layer.lora_A[adapter].weight,
        lora_B=layer.lora_B[adapter].weight,
        scaling=layer.scaling[adapter],
    )
