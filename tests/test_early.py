"""A kernel that begins while the one before it ends touches no global memory before it has waited for that one."""

from __future__ import annotations

import re

import pytest

from qkernels import aot
from qkernels.variants import Variant, skinny_variant, variants, wgmma_variant

# Loads, stores, copies and atomics of global memory, by their PTX names; a TMA's descriptor is a parameter.
_GLOBAL = re.compile(r"\b(?:ld\.global|st\.global|atom\.|red\.|prefetch|cp\.async)")


def _named(beginning: str) -> Variant:
    return next(variant for variant in variants("sm_90") if variant.name.startswith(beginning))


@pytest.mark.parametrize(
    "variant",
    [
        skinny_variant(1, 4096, 4096, 90, "fp16", "nf4", 64, True, has_bias=True),
        skinny_variant(32, 4096, 4096, 90, "bf16", "nf4", 64, False, has_bias=False),
        wgmma_variant(64, "fp16", True, False),
        wgmma_variant(64, "bf16", False, True, rank=16),
        *(_named(name) for name in ("sum_parts", "lora_down", "lora_up", "lora_grads", "lora_sum")),
    ],
    ids=lambda variant: variant.name,
)
def test_it_waits_before_it_looks(variant):
    ptx = aot.compile_variant(variant, "sm_90").asm["ptx"]
    waits = [found.start() for found in re.finditer(r"griddepcontrol\.wait", ptx)]
    assert len(waits) == 1
    assert min(found.start() for found in _GLOBAL.finditer(ptx)) > waits[0]
    assert "griddepcontrol.launch_dependents" in ptx


def test_older_gpus_do_not_know_it():
    for M in (1, 32):
        variant = skinny_variant(M, 4096, 4096, 80, "fp16", "nf4", 64, True, has_bias=False)
        assert "griddepcontrol" not in aot.compile_variant(variant, "sm_80").asm["ptx"]
