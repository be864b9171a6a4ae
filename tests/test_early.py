"""A kernel that begins while the one before it ends touches no global memory before it has waited for that one."""

from __future__ import annotations

import re

import pytest
from triton import JITFunction

from qkernels import aot
from qkernels.kernels import matmul_skinny, matmul_skinny_dx, matmul_wgmma, norm, token_attention
from qkernels.tuning.skinny import skinny_config
from qkernels.variants import Variant, skinny_dx_variant, skinny_variant, variants, wgmma_variant

# Loads, stores, copies and atomics of global memory, by their PTX names; a TMA's descriptor is a parameter.  What is
# brought into the L2 cache is not looked at, and what is written goes there too.
_GLOBAL = re.compile(r"\b(?:ld\.global|st\.global|atom\.|red\.|prefetch(?!\.global\.L2 )|cp\.async)")


def _named(beginning: str) -> Variant:
    return next(variant for variant in variants("sm_90") if variant.name.startswith(beginning))


@pytest.mark.parametrize(
    "variant",
    [
        skinny_variant(1, 4096, 4096, 90, "fp16", "nf4", 64, True, has_bias=False),
        skinny_variant(17, 4096, 4096, 90, "fp16", "nf4", 64, True, has_bias=True),
        skinny_variant(32, 4096, 4096, 90, "bf16", "nf4", 64, False, has_bias=False),
        skinny_dx_variant(3, 4096, 4096, 90, "fp16", "nf4", 64, nested=True),
        skinny_dx_variant(32, 4096, 4096, 90, "bf16", "nf4", 64, nested=False),
        skinny_dx_variant(9, 333, 1001, 90, "bf16", "nf4", 64, nested=True),
        wgmma_variant(64, "fp16", True, False),
        wgmma_variant(64, "bf16", False, False, rank=16),
        _named("sum_parts"),
        _named("norm layer after a sum bf16 of 4096"),
        _named("norm rms fp16 of 333"),
        _named("token_attention fp16"),
    ],
    ids=lambda variant: variant.name,
)
def test_it_waits_before_it_looks(variant):
    ptx = aot.compile_variant(variant, "sm_90").asm["ptx"]
    waits = [found.start() for found in re.finditer(r"griddepcontrol\.wait", ptx)]
    assert len(waits) == 1
    assert min(found.start() for found in _GLOBAL.finditer(ptx)) > waits[0]
    assert "griddepcontrol.launch_dependents" in ptx


@pytest.mark.parametrize("module", [matmul_skinny, matmul_skinny_dx, matmul_wgmma, norm, token_attention])
def test_the_gpu_is_told_of_those_that_wait_and_of_no_others(module, monkeypatch):
    told = []

    class Kernel(JITFunction):
        """One that is not compiled."""

        def __init__(self):
            pass

        def __getitem__(self, grid):
            return lambda *arguments, **options: told.append(options["launch_pdl"])

    for name in ("_LAUNCHERS", "_SUM_LAUNCHERS", "_ARRANGE_LAUNCHERS"):
        launchers = getattr(module, name, {})
        for early, launcher in launchers.items():
            monkeypatch.setattr(launcher, "_kernel", Kernel())
            launcher._first((1, 1, 1), (), (), (), skinny_config(1, 4096, 4096, 90))
            assert told.pop() is early


def test_who_does_not_begin_early():
    for variant in (
        skinny_variant(32, 4096, 4096, 80, "fp16", "nf4", 64, True, has_bias=False),
        skinny_variant(8, 4096, 4096, 90, "fp16", "nf4", 64, True, has_bias=False),
        wgmma_variant(256, "fp16", True, False),
        wgmma_variant(64, "fp16", True, True),
    ):
        assert variant.constants["EARLY"] is False
