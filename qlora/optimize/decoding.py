"""The step that `generate` repeats for each token, as a CUDA graph.

Room: capture and replay around transformers' models; no architecture's own.  With a static cache a step is the same
kernels on the same addresses each time, a thousand small ones, and Python needs several times as long to launch them as
they run.  transformers would compile such a step by itself, which takes a minute; capturing takes one step.

A graph lives as long as one call of `generate`: nobody changes adapters or weights within.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import StaticCache

from .cache import CACHE
from .capture import capture

_TENSORS = ("attention_mask", "position_ids", "cache_position")
# What a base model is called with beside the tokens.  Anything else that is asked for makes a step run as ever.
_EXPECTED = {*_TENSORS, CACHE, "use_cache", "return_dict"}


class Decoding:
    """A base model's forward pass within one call of `generate`.

    Args:
        run: the forward pass of the model without its output layer.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._warm = False
        self._graph: Any = None
        self._ids: Any = None
        self._static: dict[str, Tensor] = {}
        self._out: Any = None
        self._where = 0

    def __call__(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The step that comes first as it is; then captured, and from there on replayed."""
        if args or input_ids is None or not _fits(input_ids, kwargs) or not self._warm:
            self._warm = input_ids is not None and input_ids.shape[1] == 1
            return self._run(input_ids, *args, **kwargs)
        tensors = {name: kwargs[name] for name in _TENSORS if kwargs.get(name) is not None}
        if self._graph is None or self._where != _address(kwargs[CACHE]):
            self._capture(input_ids, tensors, kwargs)
        self._ids.copy_(input_ids)
        for name, tensor in tensors.items():
            self._static[name][..., : tensor.shape[-1]].copy_(tensor)
        self._graph.replay()
        return type(self._out)(last_hidden_state=self._out.last_hidden_state.clone(), **{CACHE: kwargs[CACHE]})

    def _capture(self, input_ids: Tensor, tensors: dict[str, Tensor], kwargs: dict[str, Any]) -> None:
        self._where = _address(kwargs[CACHE])
        self._ids = input_ids.clone()
        self._static = {name: tensor.clone() for name, tensor in tensors.items()}
        if "attention_mask" in tensors:
            # As long as the cache: the tokens to come are hidden by causality.
            room = kwargs[CACHE].layers[0].max_cache_len - tensors["attention_mask"].shape[1]
            self._static["attention_mask"] = F.pad(tensors["attention_mask"], (0, room))
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph):
            self._out = self._run(self._ids, **(kwargs | self._static))


def _address(cache: Any) -> int:
    """Beam search puts other tensors into a cache."""
    return cache.layers[0].keys.data_ptr()


def _fits(input_ids: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this is a step for the graph: one token a row, on a GPU, with a static cache and nothing unusual."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    return (
        input_ids.is_cuda
        and input_ids.shape[1] == 1
        and isinstance(kwargs.get(CACHE), StaticCache)
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and kwargs.get("return_dict") is not False
        and (mask is None or mask.dim() == 2)
        and (positions is None or positions.shape[-1] == 1)
        and all(value is None or value is False for name, value in kwargs.items() if name not in _EXPECTED)
    )


class GeneratingModel:
    """Mixin for a causal language model.

    Attributes:
        graphed_decoding: whether to do so.
    """

    base_model: Any
    graphed_decoding = True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'.  With cache_implementation="static" a step is a CUDA graph instead of compiled."""
        if not self.graphed_decoding:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        base = self.base_model
        plain = vars(base).get("forward")
        base.forward = Decoding(base.forward)
        try:
            return super().generate(*args, **({"disable_compile": True} | kwargs))  # type: ignore[misc]
        finally:
            if plain is None:
                del base.forward
            else:
                base.forward = plain
