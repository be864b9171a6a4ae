"""Layers of a static cache that take one token in one or two kernels instead of five.

Room: transformers' layer with another `update`; nothing of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from qkernels import token_attention

from .state import on_gpu

# Places up to which torch's three launches take longer: 10.5 us for 4.9 at 128, 14.4 for 15.5 at 512 (H100).
MOST_PLACES = 256


class _Length:
    """How many tokens are in each of a cache's layers, once for all of them.

    Attributes:
        tensor: int64[]; None until memory is taken.
    """

    tensor: Tensor | None = None


class TokenLayer(StaticLayer):
    """transformers computes the places of new tokens in each layer, and counts them there; that of a single one is the
    length itself, and the last layer counts for all."""

    keys: Any
    values: Any
    _length: _Length | None = None
    _counts = True

    @staticmethod
    def exchange(layers: Sequence[Any]) -> None:
        """Make new layers of transformers, empty and in the order in which a model has them, such layers."""
        own: list[Any] = [layer for layer in layers if type(layer) is StaticLayer]
        length = _Length()
        for layer in own:
            layer.__class__ = TokenLayer
            layer._length, layer._counts = length, layer is own[-1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As `StaticLayer`'s; the first layer's length is all layers'."""
        super().lazy_initialization(key_states, value_states)
        if self._length is not None:
            if self._length.tensor is None:
                self._length.tensor = self.cumulative_length
            self.cumulative_length = self._length.tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `StaticLayer.update`: keys and values [rows, heads, tokens, size] go in, all of the cache's come back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        places = self.cumulative_length.view(1)
        if tokens > 1:
            places = places + torch.arange(tokens, device=places.device)
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        self._count(tokens)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """As `StaticLayer.crop`."""
        if self._counts:
            super().crop(tokens_to_remove)

    def attends(self, query: Tensor) -> bool:
        """Whether `attend` is for a query [rows, heads, tokens, size]: of one token, on a GPU, without a gradient."""
        return (
            self.is_initialized
            and self.max_cache_len <= MOST_PLACES
            and query.shape[-2] == 1
            and query.dtype == self.keys.dtype
            and on_gpu(query)
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """`update` and the attention of the new token in one kernel: [rows, 1, heads * size]."""
        context = token_attention(query, key, value, self.keys, self.values, self.cumulative_length, bias)
        self._count(1)
        return context

    def _count(self, tokens: int) -> None:
        if self._counts:
            self.cumulative_length.add_(tokens)
