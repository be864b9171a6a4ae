"""Labels whose places are known before the GPU has computed anything.

Room: which positions of a batch have a label, handed down with the labels; torch only.  TRL's loss picks these
positions by a mask.  To learn how many there are the host waits for the whole forward pass, twice, and once more in the
backward pass, and meanwhile launches nothing.  The collator, which makes the labels on the host, knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
NAME = "label_places"


class PlacedLabels(Tensor):
    """Labels [batch, T] that hand `places` on to the mask that is made of labels[:, 1:]; else a tensor as any."""

    places: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _plainly(func, args, kwargs)
        if func is Tensor.__getitem__ and args[1] == (slice(None), slice(1, None)):
            return _with(args[0].places, result.as_subclass(_NextLabels))
        return result


class _NextLabels(Tensor):
    """labels[:, 1:], the next token of each."""

    places: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], _PlacedMask):
            return args[1].pick(args[0])
        result = _plainly(func, args, kwargs)
        if func is Tensor.to:
            return _with(args[0].places, result.as_subclass(cls))
        if func in (Tensor.ne, Tensor.__ne__) and args[1] == IGNORED:
            return _with(args[0].places, result.as_subclass(_PlacedMask))
        return result


class _PlacedMask(Tensor):
    """True at `places`: picks them, and puts values there, by their numbers."""

    places: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], cls):
            return args[1].pick(args[0])
        if func is Tensor.masked_scatter:
            into, mask, values = args
            return into.flatten().index_put((mask.places,), values).view(into.shape)
        return _plainly(func, args, kwargs)

    def pick(self, tensor: Tensor) -> Tensor:
        """tensor[self]."""
        return tensor.as_subclass(Tensor).flatten(0, 1)[self.places]


def _plainly(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


def _with(places: Tensor, tensor: Any) -> Any:
    tensor.places = places
    return tensor


def placed(labels: Tensor, places: Tensor) -> Tensor:
    """The labels, of which it is known where one counts."""
    return _with(places, labels.as_subclass(PlacedLabels))


class PlacingCollator:
    """A collator whose batches also tell where their labels are.

    Args:
        collator: examples -> a batch; that of a causal language model, with labels [batch, T].
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: Any) -> Any:
        batch = self.collator(examples)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2 and "shift_labels" not in batch:
            batch[NAME] = (labels[:, 1:] != IGNORED).flatten().nonzero().flatten()
        return batch
