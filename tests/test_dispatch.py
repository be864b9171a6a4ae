"""Which implementation takes a product: a pure function, the one that the operators ask, with a reason."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels import dispatch
from qkernels.dispatch import (
    ADAPTER_BESIDE,
    ADAPTER_JOINED,
    SKINNY,
    Choice,
    Product,
    Rule,
    choose,
    choose_adapter,
)

CAPABILITIES = [(7, 5), (8, 0), (9, 0)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", qkernels.FLOAT_DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_every_product_has_an_implementation_and_a_reason(capability, dtype, backward):
    for shape in [(0, 1, 1), (1, 4096, 4096), (33, 999, 100), (4096, 12288, 4096)]:
        implementation, reason = qkernels.explain(*shape, dtype, capability, backward=backward)
        assert implementation
        assert reason


def test_the_first_rule_that_does_not_refuse_is_taken_and_the_refusals_are_told(monkeypatch):
    rules = (Rule("one", lambda p: f"M={p.M} > 8" if p.M > 8 else None), Rule("two", lambda p: "never"))
    monkeypatch.setattr(dispatch, "RULES", rules)
    choose = dispatch.choose.__wrapped__
    few, many = (Product(M, 64, 64, torch.float16, (9, 0)) for M in (8, 9))
    assert choose(few) == Choice("one", "M=8 on sm_90 is within its range")
    assert choose(many) == Choice(dispatch.DEQUANTIZE, "not one: M=9 > 8; not two: never")


def test_on_the_cpu():
    assert qkernels.explain(1, 64, 64, device="cpu") == (dispatch.REFERENCE, "x is on cpu")
    assert qkernels.explain(1, 64, 64, device=torch.device("cpu")) == (dispatch.REFERENCE, "x is on cpu")


def test_wrong_questions():
    with pytest.raises(qkernels.UserError, match="float32, float16 or bfloat16"):
        qkernels.explain(1, 64, 64, torch.float64, (9, 0))
    if not torch.cuda.is_available():
        with pytest.raises(qkernels.UserError, match="Pass a capability"):
            qkernels.explain(1, 64, 64, device="cuda")


def test_an_adapter_is_in_hoppers_product_where_the_product_alone_is_faster_otherwise():
    for M, joined in ((32, False), (33, True), (64, True), (65, True)):
        product = Product(M, 4096, 4096, torch.float16, (9, 0))
        assert (choose(product).implementation == SKINNY) == (M <= 64)
        assert (choose_adapter(product, 16, False).implementation == ADAPTER_JOINED) == joined
    for product in (
        Product(40, 4096, 4096, torch.float16, (9, 0), backward=True),
        Product(40, 4096, 4095, torch.float16, (9, 0)),
    ):
        assert choose_adapter(product, 16, False).implementation == ADAPTER_BESIDE
