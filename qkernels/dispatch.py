"""Which implementation computes a 4-bit product, and why: the rules that the operators follow and `explain` tells.

Room: decisions, as pure functions of shape, dtype and compute capability; nothing is measured, tried or launched here.
A new implementation is one rule: a name, and a function that says why it is not for a product, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .format import FLOAT_DTYPES
from .tuning.lora import inner_parts, padded_rank
from .tuning.skinny import skinny_config, skinny_limit
from .tuning.skinny_dx import FEWEST_ROWS, skinny_dx_limit
from .tuning.wgmma import wgmma_limit

SKINNY = "fused skinny"
WGMMA = "fused wgmma"
DEQUANTIZE = "dequantize + cuBLAS"
REFERENCE = "dequantize + torch's CPU product"

ADAPTER_JOINED = "in the product's kernel"
ADAPTER_BESIDE = "kernels beside the product"
ADAPTER_APART = "torch's products"

_HIGHEST_RANK = 64  # of an adapter that the kernels take

Capability = tuple[int, int]
# B, shapeB, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset: as the operators take them.
Weight = tuple[Any, ...]
# How a product is computed: y of (A, bias, weight).
Plan = Callable[[Tensor, Tensor | None, Weight], Tensor]


class Product(NamedTuple):
    """A product with a 4-bit weight [N, K]: y[M, N] = x[M, K] W^T, or backward dx[M, K] = dy[M, N] W.

    Attributes:
        dtype: of x (dy) and of the result.
        capability: of the GPU, (7, 5) for a T4.
        blocksize: weights that share a scale.
        backward: whether it is dx.
        aligned: whether the packed weight begins at a multiple of 16 bytes, as every allocation does.
    """

    M: int
    N: int
    K: int
    dtype: torch.dtype
    capability: Capability
    blocksize: int = 64
    backward: bool = False
    aligned: bool = True

    @property
    def sm(self) -> int:
        """The compute capability as one number, 75 for (7, 5)."""
        return 10 * self.capability[0] + self.capability[1]


class Choice(NamedTuple):
    """Attributes:
    implementation: its name, one of this module's constants.
    reason: why this one, and why not those before it.
    """

    implementation: str
    reason: str


class Rule(NamedTuple):
    """Attributes:
    implementation: its name.
    refuse: why the implementation is not for this product; None when it is.
    """

    implementation: str
    refuse: Callable[[Product], str | None]


def _refuse_skinny(product: Product) -> str | None:
    M, N, K = product[:3]
    blocksize = product.blocksize
    limit_of = skinny_dx_limit if product.backward else skinny_limit
    limit = limit_of(product.sm, N, K, blocksize)
    if product.dtype == torch.float32 or (product.dtype == torch.bfloat16 and product.sm < 80):
        return f"sm_{product.sm} has no tensor cores for {product.dtype}".replace("torch.", "")
    if not 1 <= M <= limit:
        return f"M={M} is not in 1 to {limit}"
    if not product.aligned:
        return "the packed weight is not aligned to 16 bytes"
    if product.backward:
        return f"N={N} is below 8" if N < FEWEST_ROWS else None
    if skinny_config(M, N, K, product.sm, blocksize) is None:
        return f"N={N} is below 16, K={K} is below 64, or the scales of K={K} exceed shared memory"
    return None


def _refuse_wgmma(product: Product) -> str | None:
    M, N, K = product.M, product.N, product.K
    if product.sm != 90:
        return f"sm_{product.sm} has no wgmma instruction"
    if product.dtype == torch.float32:
        return "wgmma has no float32"
    if K % min(product.blocksize, 64):
        return f"rows of K={K} are not whole blocks, or whole 64"
    if min(N, K) < 128:
        return f"the weight [{N}, {K}] is smaller than a tile"
    if product.backward and N % 8:
        return f"rows of dy, N={N}, are not multiples of 16 bytes"
    if not product.aligned:
        return "the packed weight is not aligned to 16 bytes"
    limit = wgmma_limit(N, K)
    if not 1 <= M <= limit:
        return f"M={M} is not in 1 to {limit}, where it is faster than decoding apart"
    return None


# In this order; the first that does not refuse is chosen, and dequantize + cuBLAS computes everything.
RULES: tuple[Rule, ...] = (Rule(SKINNY, _refuse_skinny), Rule(WGMMA, _refuse_wgmma))


@lru_cache(maxsize=4096)
def choose(product: Product) -> Choice:
    """What computes this product on a GPU."""
    refusals: list[str] = []
    for implementation, refuse in RULES:
        reason = refuse(product)
        if reason is None:
            why = f"M={product.M} on sm_{product.sm} is within its range"
            return Choice(implementation, "; ".join([*refusals, why]))
        refusals.append(f"not {implementation}: {reason}")
    return Choice(DEQUANTIZE, "; ".join(refusals) or "nothing else is there")


def _refuse_adapter_kernels(M: int, dtype: torch.dtype, sm: int, r: int) -> str | None:
    if sm < 80:
        return f"tl.dot has no tensor cores on sm_{sm}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it is not for {dtype}".replace("torch.", "")
    if not 1 <= r <= _HIGHEST_RANK:
        return f"r={r} is not in 1 to {_HIGHEST_RANK}"
    if M == 0:
        return "there are no rows"
    return None


@lru_cache(maxsize=4096)
def choose_adapter(product: Product, r: int, dropout: bool) -> Choice:
    """Where the update of an adapter of rank r is added to this product on a GPU."""
    reason = _refuse_adapter_kernels(product.M, product.dtype, product.sm, r)
    if reason is not None:
        return Choice(ADAPTER_APART, f"not {ADAPTER_BESIDE}: {reason}")
    implementation = choose(product).implementation
    if implementation == SKINNY and not product.backward and skinny_limit(product.sm) < product.M:
        # One weight's product alone is faster so, by less than a launch beside it takes.
        implementation = WGMMA if _refuse_wgmma(product) is None else SKINNY
    if implementation != WGMMA:
        return Choice(ADAPTER_BESIDE, f"not {ADAPTER_JOINED}: {implementation} takes none")
    if product.blocksize < 64:
        return Choice(ADAPTER_BESIDE, f"not {ADAPTER_JOINED}: two scales a step leave no registers for it")
    if product.backward and dropout:
        return Choice(ADAPTER_BESIDE, f"not {ADAPTER_JOINED}: the mask multiplies the adapter's part of dx alone")
    return Choice(ADAPTER_JOINED, f"{implementation} takes it")


def inner_form(
    M: int, K: int, dtype: torch.dtype, r: int, capability: Capability | None
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what the forward pass of an adapter keeps of the inner product; None is the CPU.

    M may be a symbol of torch.compile.
    """
    if capability is None or _refuse_adapter_kernels(M, dtype, 10 * capability[0] + capability[1], r) is not None:
        return (M, r), dtype
    parts = inner_parts(M, K, r)
    return (parts, M, padded_rank(r)), torch.float32 if parts > 1 else dtype


@lru_cache
def capability_of(index: int) -> Capability:
    """Of the CUDA device with this index; asking the driver each time takes longer than a launch."""
    return torch.cuda.get_device_capability(index)


def explain(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | Capability = "cuda",
    *,
    blocksize: int = 64,
    backward: bool = False,
) -> Choice:
    """Which implementation `matmul_4bit` (backward: `matmul_4bit_dx`) takes for a product, and why.

    Args:
        M: rows of x, its leading dimensions multiplied.
        N, K: the weight's shape.
        dtype: of x: float32, float16 or bfloat16.
        device: where x is, or a compute capability: (7, 5) is a T4, (9, 0) an H100.  A capability needs no GPU.
        blocksize: quantization block.
        backward: the product of the backward pass.

    Returns:
        Choice(implementation, reason); the operators choose by the same function.

    Raises:
        UserError: a dtype that no product has, or a CUDA device that is not there.
    """
    if dtype not in FLOAT_DTYPES:
        raise UserError("dtype", expected="float32, float16 or bfloat16", got=dtype, remedy="Pass the dtype of x.")
    if isinstance(device, tuple):
        return choose(Product(M, N, K, dtype, device, blocksize, backward))
    device = torch.device(device)
    if device.type != "cuda":
        return Choice(REFERENCE, f"x is on {device.type}")
    if not torch.cuda.is_available():
        raise UserError(
            "device", expected="a GPU", got=f"{device}, and no GPU is here", remedy="Pass a capability, as (9, 0)."
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    return choose(Product(M, N, K, dtype, capability_of(index), blocksize, backward))
