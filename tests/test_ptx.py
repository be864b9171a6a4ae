"""The PTX for a T4 takes the arguments that `ptx.py` would give it.  Running it needs a GPU: `gpu/test_sm75_ptx.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ptx import scratch_pointers

from qkernels.aot import compile_variant
from qkernels.variants import variants

VARIANTS = {variant.kernel: variant for variant in variants() if "blocksize=64 n>=2**31" in variant.name}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_parameters_are_the_signature_and_scratch_pointers(variant):
    compiled = compile_variant(variant, "sm_75")
    assert ".target sm_75\n" in compiled.asm["ptx"]
    assert scratch_pointers(compiled, variant) == 2
    wrong = replace(variant, signature=variant.signature | {"n": "i32"})
    with pytest.raises(AssertionError, match="the PTX takes"):
        scratch_pointers(compiled, wrong)
