"""`LoRALinear`: a low-rank adapter around any linear layer, 4-bit or float.

Room: the module; torch and qkernels only.  Hu et al., LoRA, arXiv 2106.09685; Kalajdzievski, rsLoRA, arXiv 2312.03732;
initialization and names are peft's.

    y = base(x) + scaling * B(A(dropout(x)))        A: [r, K], B: [N, r], scaling = lora_alpha / r

B starts at zero, so a fresh adapter changes nothing.  Around a 4-bit layer this is QLoRA: exactly LoRA around the
layer's dequantized weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from qkernels import FLOAT_DTYPES
from qkernels.errors import UserError
from qkernels.functional import autocast_dtype

from .dropout import SeededDropout
from .linear4bit import Linear4bit
from .lora_product import Adapter
from .module4bit import Module4bit
from .targets import resolve_target_modules

__all__ = ["LoRALinear", "apply_lora"]


class LoRALinear(nn.Module):
    """A frozen linear layer and a trainable low-rank correction of it.

    Args:
        base_layer: a layer with `in_features`, `out_features` and a weight; its parameters are frozen.
        r: rank, at least 1.
        lora_alpha: strength, positive.
        lora_dropout: probability in [0, 1) with which the adapter's inputs are dropped in training.
        use_rslora: scale by lora_alpha / sqrt(r) instead of lora_alpha / r.
        adapter_dtype: dtype of A and B and of the adapter's arithmetic outside autocast.

    Attributes:
        base_layer, lora_A, lora_B: the layers; state_dict keys base_layer.*, lora_A.weight, lora_B.weight.
        scaling: the factor in front of B(A(x)).
        merged: whether the forward pass uses one merged float weight; see `merge`.

    Raises:
        UserError: a base layer of another kind, one that has an adapter, or an argument outside its range.
    """

    merged_weight: torch.Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 16,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check(base_layer, r, lora_alpha, lora_dropout, adapter_dtype)
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.r = r
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        device = next(base_layer.parameters()).device
        self.lora_dropout = SeededDropout(lora_dropout)
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=device, dtype=adapter_dtype)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=device, dtype=adapter_dtype)
        # Not persistent: a state_dict is the same merged or not.
        self.register_buffer("merged_weight", None, persistent=False)
        self.reset_lora_parameters()
        self.train(base_layer.training)

    def reset_lora_parameters(self) -> None:
        """A from peft's distribution (Kaiming uniform with a = sqrt(5)), B zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N], in the dtype that the base layer returns."""
        if self.merged_weight is not None:
            bias = self._bias()
            bias = None if bias is None else bias.to(self.merged_weight.dtype)
            y = F.linear(x.to(self.merged_weight.dtype), self.merged_weight, bias)
            return y.to(autocast_dtype(x) or x.dtype)
        # The product adds the update in one dtype; elsewhere the adapter computes in its own.
        dtype = autocast_dtype(x)
        if isinstance(self.base_layer, Linear4bit) and (dtype or self.lora_A.weight.dtype) == (dtype or x.dtype):
            seed = self.lora_dropout.draw(x.device)
            factors = self.lora_A.weight, self.lora_B.weight
            return self.base_layer(x, Adapter(*factors, self.scaling, self.lora_dropout.p, seed))
        y = self.base_layer(x)
        if dtype is None:
            x = x.to(self.lora_A.weight.dtype)
        inner = self.lora_A(self.lora_dropout(x))
        # Scaled at rank r, not at N.  The sum is in the wider of the two dtypes and rounded once.
        return (y + self.lora_B(inner * self.scaling)).to(y.dtype)

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    @torch.no_grad()
    def get_delta_weight(self) -> torch.Tensor:
        """What the adapter adds to the weight, scaling * B A: float32 [N, K]."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Use one float weight, base + adapter, from now on.

        The base layer is not touched: back in 4 bits the sum would lose much of what the adapter learnt.  So this
        buys speed with memory (the base stays, packed, beside the float weight), and `unmerge` gives the exact base
        back.  `train()` unmerges, because a merged adapter cannot learn.  Merging again takes up a changed adapter.

        Args:
            dtype: of the merged weight; None is the dtype of the weight that was quantized, or of the float weight.

        Raises:
            UserError: the base layer cannot give its weight, or the sum is not finite.
        """
        self.merged_weight = self._merged(dtype)

    def unmerge(self) -> None:
        """Go back to base and adapter; the base is what it was, bit for bit."""
        self.merged_weight = None

    def merged_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain `nn.Linear` that computes the same, for keeping without the adapter.  Arguments as for `merge`."""
        weight, bias = self._merged(dtype), self._bias()
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(weight.dtype, copy=True))
        return linear.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """`nn.Module.train`; training mode unmerges."""
        if mode:
            self.unmerge()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, merged={self.merged}"

    def _bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    @torch.no_grad()
    def _merged(self, dtype: torch.dtype | None) -> torch.Tensor:
        base = self.base_layer
        if isinstance(base, Module4bit):
            # In float32 straight from the codes: the sum is rounded once, to the merged dtype.
            weight = base.dequantize(torch.float32)
            assert base.quant_state is not None
            dtype = dtype or base.quant_state.dtype
        else:
            weight = base.weight  # type: ignore[assignment]
            if not weight.is_floating_point() or weight.shape != (self.out_features, self.in_features):
                raise UserError(
                    "base_layer",
                    expected=f"a float weight of shape ({self.out_features}, {self.in_features})",
                    got=f"{type(base).__name__} with a {weight.dtype} weight of shape {tuple(weight.shape)}",
                    remedy="Only float linear layers and qlora's 4-bit ones can be merged.",
                )
            dtype = dtype or weight.dtype
        merged = (weight.float() + self.get_delta_weight()).to(dtype)
        if not torch.isfinite(merged).all():
            raise UserError(
                "lora_A, lora_B",
                expected="an adapter that leaves the merged weight finite",
                got=f"{int((~torch.isfinite(merged)).sum())} NaN or Inf of {merged.numel()} in {merged.dtype}",
                remedy="The adapter diverged in training, or the dtype is too narrow: try dtype=torch.float32.",
            )
        return merged


def apply_lora(model: nn.Module, target_modules: str | Iterable[str], **options: Any) -> list[str]:
    """Freeze a model and put a `LoRALinear` around each of its target layers, in place.

    Args:
        model: any model; adapters that it has already stay trainable.
        target_modules: as peft's; see `targets.resolve_target_modules`.
        options: `LoRALinear`'s: r, lora_alpha, lora_dropout, use_rslora, adapter_dtype.

    Returns:
        Full names of the layers that were wrapped.

    Raises:
        UserError: an unknown target (the likely ones are listed), a wrong option, or a model that is a linear layer
            itself; the model is then unchanged.
    """
    names = resolve_target_modules(model, target_modules)
    if "" in names:
        raise UserError(
            "model",
            expected="a model with linear layers in it",
            got=f"{type(model).__name__}, which is the layer to wrap itself and cannot be replaced in place",
            remedy="Wrap it with LoRALinear(layer).",
        )
    wrapped = {name: LoRALinear(model.get_submodule(name), **options) for name in names}
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            parameter.requires_grad_(False)
    for name, layer in wrapped.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return names


def _check(base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout: float, adapter_dtype: torch.dtype) -> None:
    sizes = [getattr(base_layer, name, None) for name in ("in_features", "out_features")]
    if not isinstance(base_layer, nn.Module) or not all(isinstance(size, int) for size in sizes):
        raise UserError(
            "base_layer",
            expected="a linear layer, with in_features and out_features",
            got=type(base_layer).__name__,
            remedy="Wrap an nn.Linear or a Linear4bit.",
        )
    if isinstance(base_layer, LoRALinear):
        raise UserError(
            "base_layer",
            expected="a layer without an adapter",
            got="LoRALinear",
            remedy="Train the adapter that is there, or wrap its merged_linear().",
        )
    checks = (
        ("r", r, _number(r) and isinstance(r, int) and r >= 1, "an integer of at least 1", "8, 16 and 64 are usual."),
        ("lora_alpha", lora_alpha, _number(lora_alpha) and lora_alpha > 0, "a positive number", "r or 2 r is usual."),
        (
            "lora_dropout",
            lora_dropout,
            _number(lora_dropout) and 0 <= lora_dropout < 1,
            "a probability in [0, 1)",
            "0 and 0.05 are usual.",
        ),
        (
            "adapter_dtype",
            adapter_dtype,
            adapter_dtype in FLOAT_DTYPES,
            f"one of {', '.join(map(str, FLOAT_DTYPES))}",
            "Leave it at torch.float32.",
        ),
    )
    for argument, value, valid, expected, remedy in checks:
        if not valid:
            raise UserError(argument, expected=expected, got=repr(value), remedy=remedy)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
