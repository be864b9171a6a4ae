"""Dropout by a seed: the mask's statistics, what makes it again, and that recomputation is given the same one."""

from __future__ import annotations

import pytest
import torch
from models import TARGETS, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from torch import nn

from qkernels import UserError, seeded_dropout
from qlora import NF4Config, optimize_model, prepare_model_for_training, quantize_model
from qlora.dropout import SeededDropout, draw_seeds, randomness, seeded
from qlora.lora_product import Adapter, add_lora

SEED = torch.tensor([2**62 + 12345])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_the_share_that_is_dropped_and_the_mean(p):
    dropped = seeded_dropout(torch.ones(1_000_000), p, SEED)
    # Six standard deviations of a mean of a million.
    assert abs((dropped == 0).float().mean().item() - p) < 6 * (p * (1 - p) / 1e6) ** 0.5 + 1e-9
    if p < 1:
        torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / (1 - p)]))


def test_masks_of_two_seeds_and_of_neighbours_are_independent():
    first, second = (seeded_dropout(torch.ones(1_000_000), 0.5, SEED + more) == 0 for more in (0, 1))
    high = seeded_dropout(torch.ones(1_000_000), 0.5, SEED + 2**32) == 0
    for other in (second, high, first.roll(1), first.roll(64), first.roll(4096)):
        assert abs((first & other).float().mean().item() - 0.25) < 0.003


def test_the_mask_depends_on_seed_and_number_alone():
    x = torch.randn(60, 50)
    mask = seeded_dropout(torch.ones(60, 50), 0.3, SEED)
    torch.testing.assert_close(seeded_dropout(x, 0.3, SEED), x * mask)
    torch.testing.assert_close(seeded_dropout(x.half(), 0.3, SEED), (x.half().float() * mask).half())
    transposed = x.t()
    torch.testing.assert_close(seeded_dropout(transposed, 0.3, SEED), transposed * mask.view(50, 60))


@pytest.mark.parametrize(
    ("p", "seed"), [(1.5, SEED), (-0.1, SEED), (0.1, SEED.int()), (0.1, SEED.repeat(2)), (float("nan"), SEED)]
)
def test_what_is_no_probability_or_seed(p, seed):
    with pytest.raises(UserError, match="p, seed"):
        seeded_dropout(torch.ones(3), p, seed)


def test_the_gradient_is_by_the_same_mask():
    dropout = SeededDropout(0.4)
    x = torch.randn(200, dtype=torch.float64).float().requires_grad_()
    y = dropout(x)
    upstream = torch.randn(200)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream * torch.where(y == 0, 0.0, 1 / 0.6))
    assert dropout.eval()(x) is x


def test_seeds_are_handed_in_one_after_the_other_and_only_within():
    dropout, x = SeededDropout(0.5), torch.ones(1000)
    seeds = draw_seeds(2, x.device)
    with seeded(seeds):
        first, second = dropout(x), dropout(x)
        with pytest.raises(StopIteration):
            dropout.draw(x.device)
    assert torch.equal(first, seeded_dropout(x, 0.5, seeds[:1]))
    assert torch.equal(second, seeded_dropout(x, 0.5, seeds[1:]))
    torch.manual_seed(1)
    outside = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(outside, dropout(x))
    assert not torch.equal(outside, dropout(x))


def test_randomness():
    plain, by_seed = nn.Dropout(0.1), SeededDropout(0.1)
    assert randomness(nn.Sequential(by_seed, by_seed.__class__(0.2), nn.Dropout(0.0))) == (2, False)
    assert randomness(nn.Sequential(by_seed, plain)) == (1, True)
    assert randomness(nn.Sequential(by_seed, plain).eval()) == (0, False)


def test_an_adapters_product_with_dropout():
    """Against autograd through the dropped input."""
    x, y = torch.randn(5, 12, requires_grad=True), torch.randn(5, 7)
    A, B = torch.randn(3, 12, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    mask = seeded_dropout(torch.ones(5, 12), 0.3, SEED)
    upstream = torch.randn(5, 7)
    found = torch.autograd.grad(add_lora(y.clone(), x, Adapter(A, B, 2.0, 0.3, SEED)), (x, A, B), upstream)
    expected = torch.autograd.grad(y + 2.0 * (x * mask) @ A.t() @ B.t(), (x, A, B), upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("recompute", ["block", "parts"])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_recomputation_drops_the_same(family, recompute, monkeypatch):
    """Gradients with recomputation equal those without, where each block has the same seeds in both."""
    drawn = 0

    def draw_by_block(draws_a_block: int):
        def draw(count: int, device: torch.device) -> torch.Tensor:
            nonlocal drawn
            drawn += 1
            return torch.full((count,), (drawn - 1) // draws_a_block)

        return draw

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        nonlocal drawn
        drawn = 0
        model = quantize_model(tiny_model(family), NF4Config())
        optimize_model(prepare_model_for_training(model, gradient_checkpointing=checkpointing), recompute=recompute)
        torch.manual_seed(4)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=TARGETS[family], lora_dropout=0.5, init_lora_weights=False
        )
        tuned = get_peft_model(model, config).train()
        tuned(tokens(), labels=tokens()).loss.backward()
        return {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}

    monkeypatch.setattr("qlora.optimize.recompute.draw_seeds", draw_by_block(2 if recompute == "parts" else 1))
    monkeypatch.setattr("qlora.dropout.draw_seeds", draw_by_block(len(TARGETS[family])))
    found, expected = gradients(True), gradients(False)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)
