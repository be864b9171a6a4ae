"""peft's LoRA around `Linear4bit`, for `get_peft_model`, `SFTTrainer(peft_config=)` and `AutoPeftModelForCausalLM`.

Room: the only file that reaches into peft's machinery; others use its public names.  Importing it, or `qlora`, makes
peft wrap our layers in `LoraLinear4bit`.
peft's own wrapper for plain linear layers trains around packed codes as well, but would add the adapter to the codes
when it merges.  peft's registration by configuration (`_register_custom_module`) is not saved with an adapter, so
`AutoPeftModelForCausalLM` would not find it; the method that makes the wrappers is wrapped instead, once.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import nn

from qkernels.errors import UserError
from qkernels.functional import autocast_dtype

from ..checkpoint import is_local
from ..dequantize import float_layer
from ..dropout import SeededDropout
from ..linear4bit import Linear4bit
from ..lora_product import Adapter, add_lora

_INITIALIZATIONS = (True, False, "gaussian", "eva")
_FLOAT_ONLY_VARIANTS = ("use_bdlora", "velora_config", "monteclora_config", "kasa_config")


class LoraLinear4bit(Linear):
    """peft's LoRA layer around a `Linear4bit`: trains on the packed weight, merges into a float one.

    Merging dequantizes the base weight in float32, adds the adapter and rounds once, to the dtype that the weight had
    before quantization; the sum is not quantized again, so a merged layer takes the memory of a float layer.  The
    packed layer is kept and `unmerge` puts it back, exactly as it was.
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._packed: list[Linear4bit] = []  # in a list, so that it is no submodule: not in state_dict() while merged

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter (peft calls this).

        Raises:
            UserError: an initialization or a variant of LoRA that needs the float weight.
        """
        _refuse_float_only(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        dropout = self.lora_dropout[adapter_name]
        if type(dropout) is nn.Dropout:
            self.lora_dropout[adapter_name] = SeededDropout(dropout.p).train(dropout.training)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] to [..., N]; plain adapters here, all else (DoRA, merged, mixed batches) by peft."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        is_plain = not (args or kwargs or self.disable_adapters or self.merged)
        if not is_plain or any(name in self.lora_variant or self.lora_bias[name] for name in adapters):
            return super().forward(x, *args, **kwargs)
        x = x.to(autocast_dtype(x) or x.dtype)  # once, for the base layer and the adapters
        y = None
        for name in adapters:
            dropout: Any = self.lora_dropout[name]
            lora_A: Any = self.lora_A[name]
            lora_B: Any = self.lora_B[name]
            adapter, given = Adapter(lora_A.weight, lora_B.weight, self.scaling[name]), x
            if isinstance(dropout, SeededDropout):
                adapter = adapter._replace(p=dropout.p, seed=dropout.draw(x.device))
            else:
                given = dropout(x)
            if y is None and given is x and isinstance(self.base_layer, Linear4bit):
                y = self.base_layer(x, adapter)
            else:
                y = add_lora(self.base_layer(x) if y is None else y, given, adapter)
        return self.base_layer(x) if y is None else y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight.

        Args:
            safe_merge: refuse a sum that is not finite.
            adapter_names: which adapters; None is the active ones.

        Raises:
            UserError (a ValueError, as peft promises): the sum is not finite and `safe_merge` is set; nothing is
                merged then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._merge_one(name, safe_merge)

    def _merge_one(self, name: str, safe_merge: bool) -> None:
        base = self.base_layer
        is_packed = isinstance(base, Linear4bit)  # not if an adapter is merged, or dequantize_model was here
        merged: Any = float_layer(base) if is_packed else base
        weight = base.dequantize(torch.float32) if is_packed else base.weight.data.float()
        if name in self.lora_variant:
            weight = self.lora_variant[name].merge_safe(self, name, weight)
        else:
            weight = weight + self.get_delta_weight(name).float()
        bias = merged.bias
        if self.lora_bias[name]:
            if bias is None:
                raise UserError(
                    "lora_bias",
                    expected="False for a layer without a bias",
                    got="True",
                    remedy="Such an adapter cannot be merged; train with lora_bias=False.",
                )
            bias = nn.Parameter(bias + self.lora_B[name].bias * self.scaling[name], requires_grad=False)
        if safe_merge and not all(torch.isfinite(tensor).all() for tensor in (weight, bias) if tensor is not None):
            raise UserError(
                f"adapter {name}",
                expected="finite merged weights",
                got="NaN or Inf",
                remedy="It diverged in training, or the file is damaged: take an earlier checkpoint, or train again.",
            )
        if is_packed:
            self._packed = [base]
        merged.weight = nn.Parameter(weight.to(merged.weight.dtype), requires_grad=False)
        merged.bias = bias
        self.base_layer = merged
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the packed base layer back."""
        if not self._packed:
            super().unmerge()
            return
        self.base_layer = self._packed.pop().to(self.base_layer.weight.device)
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer that stays when peft takes its wrappers off: float where an adapter has been merged."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()


def register() -> None:
    """Make peft wrap `Linear4bit` in `LoraLinear4bit`; a second call changes nothing."""
    stock = LoraModel._create_new_module
    if getattr(stock, "wraps_linear4bit", False):
        return

    @functools.wraps(stock)
    def create(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, Linear4bit) and not lora_config._custom_modules:
            return LoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)
        return stock(lora_config, adapter_name, target, **kwargs)

    create.wraps_linear4bit = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create)  # type: ignore[method-assign]


def _refuse_float_only(config: LoraConfig) -> None:
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise UserError(
            "init_lora_weights",
            expected=f"one of {', '.join(map(repr, _INITIALIZATIONS))} on a 4-bit base",
            got=repr(config.init_lora_weights),
            remedy="The others need the float weight. For LoftQ and PiSSA take True here and call "
            "qlora.initialize_from_float; an adapter that is trained already needs true in its adapter_config.json.",
        )
    for variant in _FLOAT_ONLY_VARIANTS:
        if getattr(config, variant, None):
            raise UserError(
                variant,
                expected="no such setting on a 4-bit base",
                got=repr(getattr(config, variant)),
                remedy="Plain LoRA, rsLoRA (use_rslora) and DoRA (use_dora) work.",
            )


def check_adapter_matches(model: nn.Module, adapter_folder: str | os.PathLike[str]) -> None:
    """Refuse an adapter that was trained on another base model, before it is loaded.

    The names of the modules and their sizes must fit; where both base models are named by a hub id, so must the ids.
    A local folder may have been moved or be a quantized copy, so a difference of its name is only a warning.

    Args:
        model: base model without adapters.
        adapter_folder: folder with adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        UserError: no adapter there, a damaged one, or one of another base.
    """
    folder = Path(adapter_folder)
    config = read_adapter_config(folder)
    recorded = config["base_model_name_or_path"]
    weights = _adapter_weights(folder)
    _check_ranks(folder, config, weights)
    for name, found, wanted in _misfits(model, weights):
        raise UserError(
            str(folder),
            expected=f"an adapter of this base model ({name} has {wanted})",
            got=f"one of {recorded} ({found})",
            remedy="Load the base model that the adapter was trained on.",
        )
    present = getattr(model, "name_or_path", "")
    if not present or recorded == present:
        return
    if is_local(recorded) or is_local(present):
        if Path(recorded).name != Path(present).name:
            warnings.warn(f"the adapter {folder} was trained on {recorded}; the base is {present}", stacklevel=2)
        return
    raise UserError(
        str(folder),
        expected=f"an adapter of {present}",
        got=f"one of {recorded}",
        remedy=f"Load {recorded} as the base model.",
    )


def read_adapter_config(adapter_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a LoRA adapter's adapter_config.json; "base_model_name_or_path" is among them.

    Args:
        adapter_folder: folder with adapter_config.json.

    Raises:
        UserError: no such file, not a JSON object, not of a LoRA adapter, or without the name of its base model.
    """
    folder = Path(adapter_folder)
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(
            str(folder),
            expected="a folder with an adapter (adapter_config.json)",
            got="no such file" if folder.is_dir() else "no such folder",
            remedy="Give the folder that save_pretrained or `qlora train` wrote the adapter to.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(config, dict):
        raise UserError(
            str(path), expected="a JSON object", got=type(config).__name__, remedy="Copy or save the adapter again."
        )
    if config.get("peft_type") != "LORA":
        raise UserError(
            str(path), expected="a LoRA adapter", got=f"peft_type {config.get('peft_type')!r}", remedy="Choose another."
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            str(path),
            expected="the name of the base model under base_model_name_or_path",
            got=repr(base),
            remedy="Write it into the file: the folder or the hub id of the model that the adapter was trained on.",
        )
    return config


def _adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((folder / name).is_file() for name in names):
        raise UserError(
            str(folder),
            expected=f"{names[0]} beside adapter_config.json",
            got="no such file",
            remedy="The adapter was not saved completely: save it again.",
        )
    try:
        return load_peft_weights(str(folder), device="cpu")  # .bin files by torch.load(weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise _damaged(folder, error) from error


def _factors(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The A [r, K] and B [N, r] of an adapter: (module, "lora_A" or "lora_B", tensor)."""
    for key, tensor in weights.items():
        name, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if part in ("lora_A", "lora_B"):
            yield name, part, tensor


def _check_ranks(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Refuse weights of another rank than adapter_config.json says: peft would end in a report of mismatched sizes."""
    ranks = config.get("rank_pattern") or {}
    for name, part, tensor in _factors(weights):
        wanted = ranks.get(get_pattern_key(list(ranks), name), config.get("r"))
        rank = tensor.shape[0] if part == "lora_A" else tensor.shape[-1]
        if rank != wanted:
            raise UserError(
                str(folder),
                expected=f"rank {wanted} in {name}, as adapter_config.json says",
                got=f"rank {rank} in its {part}",
                remedy="The configuration and the weights are of two adapters: copy or save it again.",
            )


def _misfits(model: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, str, str]]:
    """What of an adapter does not fit: (module, what the adapter has, what the model has)."""
    modules = dict(model.named_modules())
    for name, part, tensor in _factors(weights):
        module = modules.get(name)
        if module is None:
            yield name, f"weights for {name}", "no such module"
            return
        side, size = ("inputs", tensor.shape[-1]) if part == "lora_A" else ("outputs", tensor.shape[0])
        wanted = getattr(module, "in_features" if side == "inputs" else "out_features", None)
        if size != wanted:
            yield name, f"{size} {side}", f"{wanted} {side}"


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(str(path), expected="a readable adapter", got=str(error), remedy="Copy or save it again.")


register()
