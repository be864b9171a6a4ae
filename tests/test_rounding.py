"""Rounding for the inputs at hand: GPTQ's own mathematics, in a format that every decoder reads."""

from __future__ import annotations

import pytest
import torch

from qkernels import QuantState, dequantize_4bit, dequantize_blockwise, get_4bit_type, quantize_4bit
from qlora import rounding
from qlora.rounding import DAMPING, quantize_4bit_for_inputs

FORMATS = [
    {},
    {"compress_statistics": False},
    {"quant_type": "fp4"},
    {"blocksize": 128, "quant_storage": torch.bfloat16},
]


def problem(rows=24, columns=80, texts=200):
    """A weight, and inputs of which few directions carry the most; a row is no whole number of blocks."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1)
    x = torch.randn(texts, columns, generator=generator) @ mixing.t()
    return torch.randn(rows, columns, generator=generator), x


def output_error(weight, decoded, x):
    return (x @ (weight - decoded).t()).norm() / (x @ weight.t()).norm()


def without_second_choice(monkeypatch):
    """Only the sweep that counts losses from what is left to round, GPTQ's."""
    swept, first = rounding._swept, []

    def once(rest, current, *others):
        if current is None:
            first[:] = [swept(rest, None, *others)]
        return first[0]

    monkeypatch.setattr(rounding, "_swept", once)


@pytest.mark.parametrize("settings", FORMATS)
def test_outputs_change_less_than_by_rounding_to_the_nearest(settings):
    weight, x = problem()
    plain = dequantize_4bit(*quantize_4bit(weight, **{"quant_type": "nf4", "compress_statistics": True, **settings}))
    packed, state = quantize_4bit_for_inputs(weight, x.t() @ x, **settings)
    decoded = dequantize_4bit(packed, state)
    assert output_error(weight, decoded, x) < 0.6 * output_error(weight, plain, x)
    assert packed.dtype == settings.get("quant_storage", torch.uint8)


@pytest.mark.parametrize("settings", FORMATS)
def test_the_format_is_that_of_quantize_4bit(settings):
    weight, x = problem()
    packed, state = quantize_4bit_for_inputs(weight, x.t() @ x, **settings)
    plain, expected = quantize_4bit(weight, **{"quant_type": "nf4", "compress_statistics": True, **settings})
    assert (packed.shape, packed.dtype) == (plain.shape, plain.dtype)
    ours, theirs = state.as_dict(), expected.as_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        elif key != "nested_offset":
            assert ours[key] == value, key
    again = QuantState.from_dict(state.as_dict(packed=True), device="cpu")
    assert torch.equal(dequantize_4bit(packed, again), dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_size_that_fills_no_storage(quant_storage):
    weight, x = problem(rows=3, columns=7)
    packed, state = quantize_4bit_for_inputs(weight, x.t() @ x, quant_storage=quant_storage)
    plain, _ = quantize_4bit(weight, quant_type="nf4", quant_storage=quant_storage)
    assert (packed.shape, packed.dtype) == (plain.shape, plain.dtype)
    assert (weight - dequantize_4bit(packed, state)).norm() < 0.2 * weight.norm()


def test_codes_are_chosen_for_the_scales_as_they_are_stored():
    """Where no input tells of another, each number takes the nearest that its 8-bit scale leaves it."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    packed, state = quantize_4bit_for_inputs(weight, torch.eye(256))
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    choices = get_4bit_type("nf4", device="cpu") * scales.repeat_interleave(64).view(64, 256, 1)
    nearest = (choices - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((dequantize_4bit(packed, state) - weight).abs(), nearest)


def test_the_feedback_is_the_best_there_is(monkeypatch):
    """Column by column against least squares: after each, the rest of the row takes the values that are best then."""
    monkeypatch.setattr(rounding, "SCALES", (1.0,))
    monkeypatch.setattr(rounding, "COLUMNS", 7)
    without_second_choice(monkeypatch)
    weight, x = problem(rows=4, columns=64)
    gram = x.t() @ x
    packed, state = quantize_4bit_for_inputs(weight, gram, compress_statistics=False)
    damped = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    table = get_4bit_type("nf4", device="cpu").double()
    order = gram.diagonal().argsort(descending=True).tolist()
    current, left = weight.double().clone(), list(order)
    expected = torch.empty_like(current)
    for column in order:
        left.remove(column)
        scale = weight.double().abs().amax(1)
        index = (current[:, column, None] / scale[:, None] - table).abs().argmin(1)
        expected[:, column] = table[index] * scale
        error = expected[:, column] - current[:, column]
        if left:
            inner = damped[left][:, left]
            current[:, left] -= torch.linalg.solve(inner, damped[left][:, [column]] @ error[None]).t()
    torch.testing.assert_close(dequantize_4bit(packed, state).double(), expected, rtol=1e-5, atol=1e-6)


def test_every_number_is_chosen_again_with_the_others_known(monkeypatch):
    """Against trying all 16 values for one number after the other, the column that matters most first."""
    monkeypatch.setattr(rounding, "COLUMNS", 7)
    weight, x = problem(rows=4, columns=64)
    gram = x.t() @ x
    damped = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(64, dtype=torch.float64)
    again = dequantize_4bit(*quantize_4bit_for_inputs(weight, gram, compress_statistics=False)).double()
    without_second_choice(monkeypatch)
    packed, state = quantize_4bit_for_inputs(weight, gram, compress_statistics=False)
    values = get_4bit_type("nf4", device="cpu").double()[:, None] * state.absmax.double()
    expected = dequantize_4bit(packed, state).double()

    def errors(numbers):
        return ((numbers - weight) @ damped * (numbers - weight)).sum(-1)

    first = errors(expected)
    for column in gram.diagonal().argsort(descending=True).tolist():
        tried = expected.repeat(16, 1, 1)
        tried[:, :, column] = values
        expected = tried[errors(tried).argmin(0), torch.arange(4)]
    assert errors(expected).sum() < 0.98 * first.sum()
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)


def test_a_cut_scale_is_taken_where_it_serves_the_block():
    """One number far out, in a column without inputs: the others get the finer steps."""
    weight, x = problem(rows=1, columns=64)
    weight[0, 63], x[:, 63] = 9.0, 0.0
    _, state = quantize_4bit_for_inputs(weight, x.t() @ x, compress_statistics=False)
    assert state.absmax.item() == pytest.approx(9.0 * min(rounding.SCALES))


def test_with_a_rank_less_is_left_for_the_adapter_to_miss(monkeypatch):
    weight, x = problem(rows=256, columns=192, texts=600)
    gram = x.t() @ x
    monkeypatch.setattr(rounding, "TURNS", 4)
    left = []
    for rank in (0, 8):
        decoded = dequantize_4bit(*quantize_4bit_for_inputs(weight, gram, rank=rank))
        left.append(torch.linalg.svdvals(x @ (weight - decoded).t())[8:].norm())
    assert left[1] < 0.99 * left[0]


@pytest.mark.parametrize("x_scale", [0.0, 1.0])
def test_zeros_stay_zeros(x_scale):
    weight, x = problem(columns=64)
    weight[3] = 0
    gram = (x * x_scale).t() @ (x * x_scale)
    packed, state = quantize_4bit_for_inputs(weight, gram, compress_statistics=False)
    decoded = dequantize_4bit(packed, state)
    assert decoded.isfinite().all()
    assert (packed.view(24, 32)[3] == 0x77).all()  # as `quantize_4bit` has them
    assert (weight - decoded).norm() < 0.2 * weight.norm()
