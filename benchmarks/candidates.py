"""Every way to compute a product with a 4-bit weight that the dispatch could choose, each ready to be launched.

`benchmarks.tune` measures them; what the tables choose is one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import qkernels
from qkernels.dense import linear
from qkernels.dispatch import DEQUANTIZE, SKINNY, WGMMA, Product, choose, fused_share
from qkernels.kernels.matmul_skinny import matmul_skinny_triton
from qkernels.kernels.matmul_skinny_dx import matmul_skinny_dx_triton
from qkernels.kernels.matmul_wgmma import matmul_wgmma_triton
from qkernels.known import scales_of
from qkernels.ops_cuda import product_shared
from qkernels.tuning.skinny import SkinnyConfig, skinny_candidates, skinny_config
from qkernels.tuning.skinny_dx import SkinnyDxConfig, skinny_dx_candidates, skinny_dx_config
from qkernels.tuning.wgmma import WgmmaConfig, expected_us, wgmma_candidates, wgmma_config

# Tilings that are expected to be so much slower than the best one are not measured.
WORTH_MEASURING = 1.5


@dataclass(frozen=True)
class Candidate:
    """Attributes:
    implementation: one of `qkernels.dispatch`'s names.
    config: of the launch; None where there is none to choose.
    """

    implementation: str
    config: SkinnyConfig | SkinnyDxConfig | WgmmaConfig | None = None

    @property
    def configuration(self) -> str:
        """The configuration as text, the same for the same one."""
        fields = {} if self.config is None else self.config._asdict()
        return " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)


def candidates(product: Product) -> list[Candidate]:
    """All that can compute the product, dequantizing first."""
    found = [Candidate(DEQUANTIZE)]
    sizes = *product[:3], product.sm
    configs = skinny_dx_candidates if product.backward else skinny_candidates
    found += [Candidate(SKINNY, config) for config in configs(*sizes, product.blocksize)]
    if product.sm == 90 and product.K % min(product.blocksize, 64) == 0:
        tilings = wgmma_candidates(*product[:3], product.backward)
        rows_and_depth = (product.K, product.N) if product.backward else (product.N, product.K)
        result = (product.M, *rows_and_depth, product.backward)
        limit = WORTH_MEASURING * expected_us(tilings[0], *result)
        found += [Candidate(WGMMA, config) for config in tilings if expected_us(config, *result) <= limit]
    return found


def chosen(product: Product) -> Candidate:
    """The one that the dispatch and the tables choose."""
    implementation = choose(product).implementation
    if implementation == SKINNY:
        config_of = skinny_dx_config if product.backward else skinny_config
        return Candidate(SKINNY, config_of(*product[:3], product.sm, product.blocksize))
    if implementation == WGMMA:
        return Candidate(WGMMA, wgmma_config(*product[:3], product.backward))
    return Candidate(implementation)


def call_of(
    candidate: Candidate, product: Product, x: Tensor, packed: Tensor, state: qkernels.QuantState, out: Tensor | None
) -> Callable[[], Tensor]:
    """The product by this candidate.

    Args:
        x: [M, K], backward [M, N]; contiguous and aligned to 16 bytes.
        packed, state: of a weight [N, K].
        out: what a fused product is written to; None allocates it anew at each call.
    """
    config: Any = candidate.config
    bias: tuple[None, ...] = (None,)
    if candidate.implementation == SKINNY and product.backward:
        launch, options, bias = matmul_skinny_dx_triton, {}, ()
        weight: tuple[Any, ...] = (packed,)
    elif candidate.implementation == SKINNY:
        launch, options = matmul_skinny_triton, {}
        weight = (packed,)
    elif candidate.implementation == WGMMA:
        launch, options = matmul_wgmma_triton, {"backward": product.backward}
        weight = (packed, (product.N, product.K))
    elif fused_share(product):
        absmax, nested = scales_of(state)
        return lambda: product_shared(x, packed, product, absmax, state.quant_type, *nested)
    elif product.backward:
        return lambda: x @ qkernels.dequantize_4bit(packed, state)
    else:
        return lambda: linear(x, qkernels.dequantize_4bit(packed, state), None)
    absmax, nested = scales_of(state)
    scales = (absmax, state.blocksize, state.quant_type)
    size = (product.M, product.K if product.backward else product.N)

    def call() -> Tensor:
        result = torch.empty(size, dtype=x.dtype, device=x.device) if out is None else out
        launch(x, *weight, *scales, *bias, result, config, *nested, **options)
        return result

    return call
