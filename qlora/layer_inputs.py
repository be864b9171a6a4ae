"""What goes into a model's layers while it reads texts.

Room: hooks around forward passes; torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from qkernels.errors import UserError

_REMEDY = "Pass inputs=[tokenizer(text, return_tensors='pt') for text in texts]."

Batches = Iterable[Mapping[str, torch.Tensor]]


class _SeenEnough(Exception):
    """The last module of interest has returned; what comes after it need not be computed."""


@torch.no_grad()
def see_inputs(
    model: Any,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    see: Callable[[str, torch.Tensor], None],
    until: nn.Module | None = None,
) -> None:
    """Call `see(name, x)` for what goes into each layer, x[n, K] with one row a token that is no padding.

    Args:
        model: takes the batches by keyword.
        layers: modules of it by name, each with one tensor [..., K] as its input.
        batches: as {"input_ids": int64[batch, T]}, and "attention_mask" where some of it is padding.
        until: a module of it, after which the forward pass may end.

    Raises:
        UserError: a batch that is no mapping, or a layer that no batch goes through.
    """
    seen: set[str] = set()
    mask: torch.Tensor | None = None

    def add(name: str, x: torch.Tensor) -> None:
        seen.add(name)
        see(name, x[mask] if mask is not None and x.shape[:2] == mask.shape else x.flatten(0, -2))

    def stop(*_: Any) -> None:
        raise _SeenEnough

    was_training = model.training
    model.eval()
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda _, arguments, name=name: add(name, arguments[0]))
            hooks.callback(hook.remove)
        if until is not None:
            hooks.callback(until.register_forward_hook(stop).remove)
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise UserError("inputs", expected="batches of tokens", got=type(batch).__name__, remedy=_REMEDY)
            batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            try:
                model(**batch, use_cache=False)
            except _SeenEnough:
                continue
    model.train(was_training)
    if missing := [name for name in layers if name not in seen]:
        raise UserError(
            "inputs",
            expected="batches that go through every layer",
            got=f"none that reaches {missing[0]}",
            remedy=_REMEDY,
        )
