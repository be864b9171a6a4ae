"""A weight that was checked, kept at its state until something of it is exchanged, and how its products are computed.

Room: the memory of `functional.py` and `joined.py`, which ask it at every call; no address outlives a call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import checks
from .dispatch import Plan, Weight
from .ops import PLAIN, nothing_listens
from .quant_state import QuantState


def scales_of(quant_state: QuantState) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The operators' `absmax` and (absmax_8bit, absmax_code, absmax_offset)."""
    if quant_state.state2 is None:
        return quant_state.absmax, (None, None, None)
    return quant_state.state2.absmax, (quant_state.absmax, quant_state.state2.code, quant_state.offset)


class Known:
    """A weight that was checked, and products with it: both checks take longer than a small product, and a layer is
    called with the same kinds of x again and again.

    Attributes:
        address, n: of the packed codes; n is the number of elements.
        nested_absmax, nested_code: what double quantization adds, None without.
        weight: as the operators take it.
        plans: by `kind_of` of A and bias, the dtype of the product and how the GPU computes it; no address is in it.
    """

    __slots__ = ("address", "n", "nested_absmax", "nested_code", "plans", "weight")

    def __init__(self, address: int, n: int, quant_state: QuantState, weight: Weight) -> None:
        self.address, self.n, self.weight = address, n, weight
        self.nested_absmax = quant_state.state2 and quant_state.state2.absmax
        self.nested_code = quant_state.state2 and quant_state.state2.code
        self.plans: dict[object, tuple[torch.dtype, Plan]] = {}

    def keep(self, kind: object, dtype: torch.dtype, plan: Plan) -> None:
        if kind is None:
            return
        if len(self.plans) >= _MOST_PLANS:
            self.plans.clear()
        self.plans[kind] = dtype, plan


_MOST_PLANS = 64  # a training run has as many kinds of x as lengths of batches


def known_weight(B: Tensor, quant_state: QuantState) -> Known | None:
    """What is known of the weight, which is checked first if that is nothing, or something of it was exchanged; None
    while something listens, which sees the tensors and not what they were before."""
    if not nothing_listens() or not isinstance(B, Tensor) or isinstance(B, FakeTensor):
        return None
    with torch._C.DisableTorchFunctionSubclass():  # a parameter's subclass would take longer to say where it lies
        address, n = B.data_ptr(), B.numel()
    known = quant_state.checked if isinstance(quant_state, QuantState) else None
    if known is not None and known.address == address and known.n == n:
        state2 = quant_state.state2
        if state2 is None or (known.nested_absmax is state2.absmax and known.nested_code is state2.code):
            return known
    weight = checked_weight(B, quant_state)
    known = quant_state.checked = Known(address, n, quant_state, weight)
    return known


def weight_of(B: Tensor, quant_state: QuantState) -> Weight:
    """A checked weight as the operators take it."""
    known = known_weight(B, quant_state)
    return checked_weight(B, quant_state) if known is None else known.weight


def kind_of(A: Tensor, bias: Tensor | None) -> object:
    """All that a product's checks and plan depend on besides the weight; None for what is no plain tensor."""
    if type(A) is not Tensor or (bias is not None and type(bias) not in PLAIN):
        return None
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    if bias is None:
        return A.shape, A.dtype, A.device, autocast
    return A.shape, A.dtype, A.device, autocast, bias.shape, bias.dtype, bias.device


def checked_weight(B: Tensor, quant_state: QuantState) -> Weight:
    checks.check_tensor("B", B)
    packed = B.data.view(-1)
    checks.check_weight("B", packed, quant_state)
    scales, nested = scales_of(quant_state)
    return packed, quant_state.shape, scales, quant_state.blocksize, quant_state.quant_type, *nested
