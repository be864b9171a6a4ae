"""`merge_adapter`: base and adapter as one checkpoint, weight by weight, and the error that was made.

Room: peft does the mathematics of a layer, `tensor_files.py` reads and writes; this file decides what base a weight is
merged onto.  The model is never whole in memory: its skeleton has weights of no size, and each adapted layer gets its
float weight for as long as it takes to merge and write it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from qkernels.errors import UserError

from .base_weights import BaseWeights, dequantized, stored_form
from .checkpoint import check_writable
from .integrations.peft import check_adapter_matches
from .integrations.transformers import NF4Config
from .load_errors import one_error
from .tensor_files import ShardWriter, TensorReader

ONTO = ("dequantized", "16bit", "4bit")


@dataclass
class MergeReport:
    """What merging changed, over the adapted layers.  `trained` is the weight that the adapter was trained with: the
    4-bit base, decoded, plus the adapter.

    Attributes:
        onto: what the adapter was merged onto.
        layers: adapted layers.
        error: |merged - trained| / |trained|, Frobenius norms.
        lost: |merged - trained| / |adapter|: 0 keeps all that was trained, 1 is an error as large as it.
        worst: the layer with the largest `lost`, and its value.
        total_bytes: of the weights written.
    """

    onto: str
    layers: int = 0
    error: float = 0.0
    lost: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    total_bytes: int = 0
    _squares: dict[str, float] = field(default_factory=lambda: {"error": 0.0, "trained": 0.0, "adapter": 0.0})

    def add(self, name: str, merged: torch.Tensor, trained: torch.Tensor, base: torch.Tensor) -> None:
        """Take a layer in."""
        squares = {
            "error": _square(merged.float() - trained),
            "trained": _square(trained),
            "adapter": _square(trained - base),
        }
        for key, value in squares.items():
            self._squares[key] += value
        lost = _ratio(squares["error"], squares["adapter"])
        if lost >= self.worst[1]:
            self.worst = (name, lost)
        self.layers += 1
        self.error = _ratio(self._squares["error"], self._squares["trained"])
        self.lost = _ratio(self._squares["error"], self._squares["adapter"])

    def __str__(self) -> str:
        reason = {
            "dequantized": "rounding to the output's dtype",
            "16bit": "the base's quantization error, with which the adapter was trained",
            "4bit": "the sum rounded to 4 bits again",
        }[self.onto]
        return (
            f"{self.layers} layers merged onto the {self.onto} base; error against what was trained: {self.error:.3g} "
            f"of the weights, {self.lost:.3g} of the adapter ({reason}); worst {self.worst[0]} with {self.worst[1]:.3g}"
        )


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    folder: Path,
    *,
    onto: str = "dequantized",
    dtype: torch.dtype = torch.float16,
    config: NF4Config | None = None,
    revision: str = "main",
    max_shard_bytes: int = 2 * 2**30,
) -> MergeReport:
    """Write base and adapter as one checkpoint, one weight at a time.

    Args:
        base: folder or hub id of the base model, float or 4-bit.
        adapter: folder of a PEFT LoRA adapter.
        folder: where to write; exists, without weights.
        onto: "dequantized", the 4-bit base decoded, which is what the adapter was trained on: nothing is lost but a
            rounding.  "16bit", the float base, which the adapter has not seen.  "4bit": the first, quantized again.
        dtype: of what is written as float.
        config: how a float base was quantized in training; None is `NF4Config()`.
        revision: of the base, on the hub.
        max_shard_bytes: size of the files.

    Returns:
        The error made.

    Raises:
        UserError: no such base or adapter, an adapter of another base, a 4-bit base and onto "16bit", a weight that is
            missing, or a merged weight that is not finite.
    """
    if onto not in ONTO:
        raise UserError("onto", expected=f"one of {', '.join(map(repr, ONTO))}", got=repr(onto), remedy="Choose one.")
    with one_error(os.fspath(base), {}):
        model_config = AutoConfig.from_pretrained(base, revision=revision)
    source = BaseWeights(TensorReader(base, revision), model_config, config or NF4Config(), onto, dtype)
    if onto != "4bit":
        check_writable(folder, need_bytes=sum(p.numel() for p in source.skeleton.parameters()) * dtype.itemsize)
    model = _adapted(source.skeleton, adapter)
    writer, report = ShardWriter(folder, max_shard_bytes), MergeReport(onto)
    with torch.no_grad():
        written = set(_write_adapted(model, source, writer, report))
        for name in source.untouched(written):
            for part, tensor in source.kept(name):
                writer.add(part, tensor)
    writer.close()
    report.total_bytes = writer.total_bytes
    _write_config(base, revision, source, folder)
    return report


def _adapted(skeleton: PreTrainedModel, adapter: str | os.PathLike[str]) -> PeftModel:
    check_adapter_matches(skeleton, adapter)
    config = LoraConfig.from_pretrained(os.fspath(adapter))
    config.init_lora_weights = True  # others would decompose weights that are not there; the adapter's are loaded
    return PeftModel.from_pretrained(skeleton, os.fspath(adapter), config=config)  # type: ignore[arg-type]


def _write_adapted(model: PeftModel, base: BaseWeights, writer: ShardWriter, report: MergeReport) -> Iterator[str]:
    """Write every weight that the adapter changes; yields the names that are done."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield from _write_merged(name, module, base, writer, report)
        elif isinstance(module, ModulesToSaveWrapper):
            for part, parameter in module.modules_to_save[module.active_adapters[0]].named_parameters():
                stored = base.reader.find(f"{name}.{part}", base.prefix)
                if stored is None:  # it was tied to another weight
                    base.model_config.tie_word_embeddings = False
                    stored = f"{name}.{part}"
                writer.add(stored, parameter.detach().to(base.dtype))
                yield stored


def _write_merged(name: str, layer: Any, base: BaseWeights, writer: ShardWriter, report: MergeReport) -> Iterator[str]:
    _refuse_tied(name, base)
    stored = base.name_of(f"{name}.weight")
    trained_base, merged_base = base.weights(name)
    bias = base.reader.find(f"{name}.bias", base.prefix)
    old_bias = None if bias is None else base.reader.read(bias)
    trained, new_bias = _merged(layer, trained_base, old_bias)
    if not torch.isfinite(trained).all():
        raise UserError(
            "adapter",
            expected="finite merged weights",
            got=f"NaN or Inf in {name}",
            remedy="It diverged in training, or the file is damaged: take an earlier checkpoint, or train again.",
        )
    merged = trained if merged_base is trained_base else _merged(layer, merged_base, old_bias)[0]
    if base.onto == "4bit" and base.is_4bit(name, stored):
        packed, state = base.quantized(merged.to(base.dtype), like=stored)
        tensors = dict(stored_form(stored, packed, state))
        result = dequantized(packed, state)
    else:
        result = merged.to(base.dtype)
        tensors = {stored: result}
    if bias is not None and new_bias is not None:
        tensors[bias] = new_bias.to(base.dtype)
    for part, tensor in tensors.items():
        writer.add(part, tensor)
    report.add(name, result, trained, trained_base)
    yield from tensors


def _merged(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What peft makes of a layer's weight [N, K] and bias [N] in float32; the layer is left as it was."""
    inner = layer.get_base_layer()
    empty = inner.weight, getattr(inner, "bias", None)
    inner.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        inner.bias = nn.Parameter(bias.float().clone(), requires_grad=False)
    try:
        layer.merge()
        return inner.weight.data, None if bias is None else inner.bias.data
    finally:
        layer.merged_adapters.clear()
        inner.weight = empty[0]
        if bias is not None:
            inner.bias = empty[1]


def _refuse_tied(name: str, base: BaseWeights) -> None:
    tied = base.skeleton.all_tied_weights_keys
    if f"{name}.weight" in {*tied, *tied.values()}:
        raise UserError(
            "adapter",
            expected="no adapter on a weight that two modules share",
            got=f"one on {name}",
            remedy="Merging it would change both. Train with that module in modules_to_save, or without tied weights.",
        )


def _write_config(base: str | os.PathLike[str], revision: str, source: BaseWeights, folder: Path) -> None:
    config = source.model_config
    if source.onto == "4bit":
        config.quantization_config = source.stored or source.config.to_dict()
    config.architectures = [type(source.skeleton).__name__]
    config.save_pretrained(folder)
    try:
        GenerationConfig.from_pretrained(base, revision=revision).save_pretrained(folder)
    except OSError:
        return  # a model without one


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def _ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else 0.0
