"""Normalizations of few rows without a gradient, as in generation: one kernel, with the sum before it.

Room: which rows go there.  torch's own kernels are made for many rows, and take as long for one as for a thousand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkernels import normalize

from .state import on_gpu

FEW_ROWS = 128


class Norm:
    """Mixin for a normalization over the last dimension.

    Attributes:
        centered: LayerNorm; otherwise RMSNorm.
    """

    centered: bool
    weight: Any
    _forward_hooks: Any
    _forward_pre_hooks: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As torch's, in float32 and rounded once to the dtype of the input."""
        if _is_for_kernel(hidden_states):
            return normalize(hidden_states, self.weight, self._bias, eps=self._eps, centered=self.centered)[1]
        if self.centered:
            return F.layer_norm(hidden_states, self.weight.shape, self.weight, self._bias, self._eps)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self._eps)

    @property
    def _eps(self) -> float:
        raise NotImplementedError

    @property
    def _bias(self) -> Any:
        return getattr(self, "bias", None)


def add_and_normalize(norm: nn.Module, branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """residual + branch (or the residual alone), and that normalized."""
    if branch is None:
        return residual, norm(residual)
    if isinstance(norm, Norm) and not is_heard(norm) and branch.dtype == residual.dtype and _is_for_kernel(branch):
        return normalize(branch, norm.weight, norm._bias, eps=norm._eps, centered=norm.centered, residual=residual)
    total = residual + branch
    return total, norm(total)


def is_heard(module: nn.Module) -> bool:
    """Whether something waits for a call of this module, or has replaced its forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_for_kernel(hidden: Tensor) -> bool:
    return (
        on_gpu(hidden)
        and not torch.is_grad_enabled()
        and hidden.numel() <= FEW_ROWS * hidden.shape[-1]
        and not torch.is_autocast_enabled(hidden.device.type)
        and not torch.compiler.is_compiling()
    )
