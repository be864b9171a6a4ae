"""LoftQ, QERA and PiSSA: adapters on a 4-bit base that begin with what the float weights say.

Room: peft's layers and the float checkpoint, one weight at a time.  peft computes both from a float model in memory,
and LoftQ with bitsandbytes on a GPU only; here the base is 4-bit already and any device will do.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from qkernels.errors import UserError

from ..layer_inputs import Batches, see_inputs
from ..params4bit import Params4bit
from ..tensor_files import TensorReader
from .peft import LoraLinear4bit

_METHOD = re.compile(r"(loftq|pissa|qera)(?:_niter_(\d+))?")


@dataclass
class InitReport:
    """What the initialization did to the distance from the float weights, relative to them (Frobenius norms; for "qera"
    the distance of the layers' outputs on the inputs instead).

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
    inputs: Batches = (),
    rank: int | None = None,
    adapter_name: str = "default",
    revision: str = "main",
) -> InitReport:
    """Start an adapter on a 4-bit base from the float weights; call it between `get_peft_model` and training.

    Args:
        model: of `get_peft_model` with `init_lora_weights=True` on a 4-bit base; changed in place.
        checkpoint: folder or hub id of the float model that the base was quantized from.
        method: "loftq": the adapter becomes the best approximation, of its rank, of the quantization error; the base
            stays as it is.  "qera": of the error of the layer's output on `inputs`, which a language model feels far
            more (Zhang et al., 2024, "QERA"); what goes into each layer is kept in host memory meanwhile.  "pissa": the
            adapter becomes the principal part of the weight and the base the rest, quantized; save the base too
            (`model.unload().save_pretrained(folder)`), for the adapter belongs to it.
            With "_niter_N" (4 is usual) a fast approximation of the singular value decomposition.
        inputs: for "qera": batches for the model, as {"input_ids": int64[batch, T]}, and "attention_mask" where some of
            it is padding; the texts to train on, some thousands of tokens.
        rank: how much of the adapter's rank begins so; the rest begins as peft has it, A random and B zero, and learns
            as fast as if the other part were not there.  None: all of it.
        adapter_name: which adapter.
        revision: of the checkpoint, on the hub.

    Returns:
        The distance from the float weights before and after.

    Raises:
        UserError: another method, no adapted 4-bit layer, a rank that one has not, "qera" without inputs, or a
            checkpoint without one of the weights.
    """
    parsed = _METHOD.fullmatch(method)
    if parsed is None:
        raise UserError(
            "method",
            expected="'loftq', 'qera' or 'pissa', or these with '_niter_N'",
            got=repr(method),
            remedy="Choose one.",
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
    least = min(layer.r[adapter_name] for layer in layers.values())
    if rank is not None and not 1 <= rank <= least:
        raise UserError("rank", expected=f"1 to {least}, the adapter's rank", got=repr(rank), remedy="Leave it out.")
    seen = _inputs_of(model, layers, inputs) if kind == "qera" else {}
    reader = TensorReader(checkpoint, revision)
    squares = torch.zeros(3, dtype=torch.float64)
    for name, layer in layers.items():
        weight = reader.read_float(f"{name}.weight", base.base_model_prefix, layer.base_layer.weight_shape)
        weight = weight.to(layer.weight.device, torch.float32)
        of_layer = layer.r[adapter_name] if rank is None else rank
        squares += _initialize(layer, weight, kind, iterations, adapter_name, seen.pop(name, None), of_layer)
    before, after, whole = squares.tolist()
    return InitReport(math.sqrt(before / whole), math.sqrt(after / whole), len(layers))


def _inputs_of(model: PeftModel, layers: Mapping[str, Any], inputs: Batches) -> dict[str, torch.Tensor]:
    """Of what goes into each layer, rows x [n, in_features] on the CPU with its x^T x, n at most twice in_features."""
    seen: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        rows = torch.cat([seen[name].to(x.device), x]) if name in seen else x
        seen[name] = (_fewer(rows) if len(rows) > 2 * rows.shape[1] else rows).cpu()

    see_inputs(model, layers, inputs, add)
    return seen


def _fewer(rows: torch.Tensor) -> torch.Tensor:
    """As many rows as columns, float32, with the same x^T x.

    By a Cholesky decomposition in float64, where squaring loses nothing that float32 had: one product and a small
    decomposition, where a QR decomposition goes through all rows column by column.
    """
    x = rows.double()
    gram = x.t() @ x
    # So much is added that it exists where columns are zero or depend on each other.
    gram.diagonal().add_(gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny) * 1e-10)
    return torch.linalg.cholesky(gram, upper=True).float()


def _initialize(
    layer: Any, weight: torch.Tensor, kind: str, iterations: int, adapter: str, inputs: torch.Tensor | None, rank: int
) -> torch.Tensor:
    """One layer; its squared errors before and after, and the square of what they are of.

    Args:
        inputs: [n, in_features]: the errors are those of the outputs for these; None: of the weights.
        rank: of the part; the rest of the adapter stays as it is.
    """
    x = None if inputs is None else inputs.to(weight.device, torch.float32)
    error = weight - layer.base_layer.dequantize(torch.float32)
    scaling = layer.scaling[adapter]
    if x is None:
        B, A = _factors(weight if kind == "pissa" else error, rank, iterations)
    else:
        B, A = _factors_for(error, x, rank, iterations)
    layer.lora_A[adapter].weight[: len(A)] = A / math.sqrt(scaling)
    layer.lora_B[adapter].weight[:, : len(A)] = B / math.sqrt(scaling)
    adapted = layer.get_delta_weight(adapter).float()
    if kind == "pissa":
        _requantize(layer.base_layer, weight - adapted)
    if adapter in layer.lora_magnitude_vector:  # DoRA: the length of each row, adapter included
        _reset_magnitude(layer, adapter)
    rest = weight - layer.base_layer.dequantize(torch.float32) - adapted
    parts = [part if x is None else x @ part.t() for part in (error, rest, weight)]
    return torch.stack([part.double().square().sum().cpu() for part in parts])


def _factors_for(
    matrix: torch.Tensor, x: torch.Tensor, rank: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [N, rank] and A [rank, K] for which x A^T B^T is the best approximation of x matrix^T, x [n, K].

    With the first left singular vectors U of matrix x^T it is x matrix^T U U^T.  A and B are made equally large.
    """
    U, _ = _factors(matrix @ x.t(), rank, iterations)
    U = U / U.norm(dim=0).clamp_min(torch.finfo(U.dtype).tiny)
    A = U.t() @ matrix
    root = A.norm(dim=1).sqrt()
    return U * root, A / root.clamp_min(torch.finfo(A.dtype).tiny)[:, None]


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
