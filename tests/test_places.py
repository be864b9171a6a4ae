"""Labels that bring along where they are: what TRL does with a mask of them, without asking how many."""

from __future__ import annotations

import pytest
import torch

from qlora.places import IGNORED, NAME, PlacingCollator, placed


@pytest.fixture
def labels():
    made = torch.randint(0, 9, (3, 7), generator=torch.Generator().manual_seed(0))
    made[0, 4:], made[1, :3], made[2, 2] = IGNORED, IGNORED, IGNORED
    return made


def with_places(labels):
    return placed(labels, PlacingCollator(lambda examples: {"labels": labels})(None)[NAME])


def picked(labels, hidden):
    """As TRL: the labels of the next tokens, the rows that have one, and values put back where they came from."""
    labels = labels[:, 1:].to(hidden.device)
    mask = labels != IGNORED
    rows, targets = hidden[:, :-1][mask], labels[mask]
    values = (rows * targets[:, None]).sum(-1)
    return rows, targets, values.new_zeros(mask.shape).masked_scatter(mask, values), mask.sum(), mask + 0


def test_they_pick_and_put_what_a_mask_does(labels):
    hidden = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found, expected = picked(with_places(labels), hidden), picked(labels, hidden)
    grads = [torch.autograd.grad(out[2].square().sum(), hidden)[0] for out in (found, expected)]
    for mine, other in [*zip(found, expected, strict=True), grads]:
        assert type(mine) is torch.Tensor
        assert torch.equal(mine, other)


def test_a_batch_without_labels_and_one_with_all(labels):
    hidden = torch.randn(3, 7, 5)
    for value in (IGNORED, 4):
        filled = torch.full_like(labels, value)
        for mine, other in zip(picked(with_places(filled), hidden), picked(filled, hidden), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: labels,  # not those of the next tokens
        lambda labels: labels[:, :-1],
        lambda labels: labels[1:, 1:],
        lambda labels: labels[:, 1:][:, 1:],
        lambda labels: torch.cat([labels[:, 1:], labels[:, 1:]]),
        lambda labels: labels[:, 1:].clone(),
    ],
)
def test_any_other_labels_are_as_ever(labels, change):
    mask = change(with_places(labels)) != IGNORED
    assert torch.equal(mask, change(labels) != IGNORED)
    assert type(mask) is torch.Tensor


def test_they_are_known_on_another_device_too(labels):
    moved = with_places(labels)[:, 1:].to("cpu", copy=True)
    assert type(moved != IGNORED) is not torch.Tensor


def test_another_mask_is_as_ever(labels):
    mask = with_places(labels)[:, 1:] != 0
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, labels[:, 1:] != 0)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(2, 3)},
        {"labels": torch.ones(2)},
        {"labels": torch.ones(2, 3), "shift_labels": torch.ones(2, 3)},
        {"labels": [1, 2]},
    ],
)
def test_batches_of_another_kind_pass_through(batch):
    assert PlacingCollator(dict)(batch).keys() == batch.keys()
