"""The step that `generate` repeats for each token, as a CUDA graph.

Room: capture and replay around transformers' models; no architecture's own.  With a static cache a step is the same
kernels on the same addresses each time, a thousand small ones, and Python needs several times as long to launch them as
they run.  transformers would compile such a step by itself, which takes a minute; capturing takes one step.

A graph and the cache that it works on stay for the next call of `generate`.  Each call first compares the model with
what it was when its step was captured (state.py), and training, moving or converting the model gives both back.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from .cache import CACHE
from .capture import capture
from .modes import stays_in_mode
from .state import is_listened_to, on_gpu, state_of
from .stopping import can_defer, deferred
from .token_layer import TokenLayer

# A cache's length is a multiple of it, so that prompts and answers of many lengths meet in one graph.
LENGTHS = 128
_TENSORS = ("attention_mask", "position_ids")
# What a base model is called with beside the tokens.  Anything else that is asked for makes a step run as ever.
_EXPECTED = {*_TENSORS, CACHE, "use_cache", "return_dict"}


class Decoding:
    """One model's captured step and the cache that it works on.  A copy of the model begins without any."""

    def __init__(self) -> None:
        self._state: Any = None
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Decoding, ()

    def forget(self) -> None:
        """Give the graph and the cache back; the next call of `generate` captures anew."""
        self._layers: list[Any] = []
        self._has_layers: Callable[[], Any] = lambda: None
        self._forget_graph()

    def _forget_graph(self) -> None:
        self._graph: Any = None
        self._key: Any = None
        self._keys: list[Tensor] = []  # of the cache, each layer's; held, so that none of another cache is taken for it
        self._static: dict[str, Tensor] = {}
        self._out: Any = None

    def __len__(self) -> int:
        """Captured steps that are kept: 0 or 1."""
        return int(self._graph is not None)

    def begin(self, base: Any) -> None:
        """Before a call of `generate`: whether the model is what it was.

        Args:
            base: the model without its output layer.
        """
        state = state_of(base)
        if state != self._state:
            self.forget()
        self._state, self._listened = state, is_listened_to(base)

    def end(self) -> None:
        """After it: what works on a cache of the caller's is not kept."""
        if len(self._keys) != len(self._layers) or not _have(self._layers, self._keys):
            self._forget_graph()

    def with_kept_layers(self, cache: StaticCache, rows: int) -> StaticCache:
        """A new cache, with the kept one's memory if it has the same sizes and nobody else has it any more.

        Args:
            cache: of transformers, empty.
            rows: sequences.
        """
        kept = self._layers
        new: list[Any] = cache.layers
        TokenLayer.exchange(new)
        is_free = bool(kept) and self._has_layers() is None and all(layer.is_initialized for layer in kept)
        if is_free and list(map(_size, kept)) == list(map(_size, new)) and kept[0].keys.shape[0] == rows:
            for layer, old in zip(new, kept, strict=True):
                old.reset()
                layer.lazy_initialization = functools.partial(_take, layer, old)
        else:
            self._forget_graph()
        self._layers, self._has_layers = new, weakref.ref(cache)
        return cache

    def step(self, run: Callable[..., Any], input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """A forward pass: of a kind that comes for the first time as it is, then captured, and from there on replayed.

        Args:
            run: the forward pass of the model without its output layer, whose arguments the others are.
        """
        if args or input_ids is None or self._listened or not _fits(input_ids, kwargs):
            return run(input_ids, *args, **kwargs)
        layers = kwargs[CACHE].layers
        tensors = {name: kwargs[name] for name in _TENSORS if kwargs.get(name) is not None}
        key = _key({"input_ids": input_ids, **tensors})
        if key != self._key or not _have(layers, self._keys):
            # Kernels are compiled, and a kind that never comes again costs nothing: beam search exchanges the keys.
            self._forget_graph()
            self._key, self._keys = key, [layer.keys for layer in layers]
            return run(input_ids, **kwargs)
        if self._graph is None:
            self._capture(run, input_ids, tensors, kwargs)
        else:
            for layer in layers:
                if isinstance(layer, StaticSlidingWindowLayer):
                    layer.cumulative_length_int += 1  # on the host, where a replay does nothing
        for name, tensor in {"input_ids": input_ids, **tensors}.items():
            self._static[name].copy_(tensor)
        self._graph.replay()
        kind, hidden = self._out
        return kind(last_hidden_state=hidden.clone(), **{CACHE: kwargs[CACHE]})

    def _capture(
        self, run: Callable[..., Any], input_ids: Tensor, tensors: dict[str, Tensor], kwargs: dict[str, Any]
    ) -> None:
        self._static = {"input_ids": input_ids.clone()} | {name: tensor.clone() for name, tensor in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            out = run(**(kwargs | self._static))
        self._graph, self._out = graph, (type(out), out.last_hidden_state)


def _take(layer: Any, old: Any, *states: Tensor) -> None:
    """What a layer does instead of asking for memory.  Until then it is empty, and prompts go the same way."""
    del layer.lazy_initialization
    vars(layer).update(vars(old))


def _size(layer: Any) -> tuple[Any, ...]:
    return type(layer), layer.max_cache_len


def _have(layers: list[Any], keys: list[Tensor]) -> bool:
    return len(layers) == len(keys) and all(layer.keys is one for layer, one in zip(layers, keys, strict=True))


def _key(tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """What must not change from one step to the next, beside the model and the cache."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (autocast, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()))


def _fits(input_ids: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this is a step for the graph: one token a row, on a GPU, with a static cache and nothing unusual."""
    return (
        on_gpu(input_ids)
        and input_ids.dim() == 2
        and input_ids.shape[1] == 1
        and _is_static(kwargs.get(CACHE))
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and kwargs.get("return_dict") is not False
        and all(value is None or value is False for name, value in kwargs.items() if name not in _EXPECTED)
    )


def _is_static(cache: Any) -> bool:
    """Whether a step writes to this cache as every other one: into whole layers, or windows that are not full yet."""
    return isinstance(cache, StaticCache) and not cache.offloading and all(map(_is_written_as_ever, cache.layers))


def _is_written_as_ever(layer: Any) -> bool:
    has_room = type(layer) in (StaticLayer, TokenLayer) or (
        type(layer) is StaticSlidingWindowLayer and layer.cumulative_length_int < layer.max_cache_len
    )
    return has_room and layer.is_initialized


class GeneratingModel:
    """Mixin for a causal language model.

    Attributes:
        graphed_decoding: whether to do so.
    """

    base_model: Any
    graphed_decoding = True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'.  With cache_implementation="static" a step is a CUDA graph instead of compiled."""
        base, decoding = self.base_model, self._decoding
        plain = vars(base).get("forward")
        if decoding is None or isinstance(plain, _Graphed):
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        decoding.begin(base)
        base.forward = _Graphed(decoding.step, base.forward)
        try:
            return super().generate(*args, **({"disable_compile": True} | kwargs))  # type: ignore[misc]
        finally:
            decoding.end()
            if plain is None:
                del base.forward
            else:
                base.forward = plain

    def train(self, mode: bool = True) -> Any:
        """`nn.Module.train`, which a model all of which is in this mode is spared; training gives the memory of
        `generate` back.
        """
        if mode and self._decoding is not None:
            self._decoding.forget()
        return self if stays_in_mode(self, mode) else super().train(mode)  # type: ignore[misc,arg-type]

    @property
    def _decoding(self) -> Decoding | None:
        """None where the step is not to be captured."""
        kept = vars(self)
        if not self.graphed_decoding:
            kept.pop("_kept_decoding", None)
            return None
        if "_kept_decoding" not in kept:
            kept["_kept_decoding"] = Decoding()
        return kept["_kept_decoding"]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What `to`, `half` and the like end in."""
        if self._decoding is not None:
            self._decoding.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', whose `generate` asks for it: of a rounded length, and the kept one where it can be."""
        decoding = self._decoding
        if decoding is None:
            return super()._prepare_static_cache(*args, **kwargs)  # type: ignore[misc]
        kwargs["max_cache_len"] = -(-kwargs["max_cache_len"] // LENGTHS) * LENGTHS
        cache = super()._prepare_static_cache(*args, **kwargs)  # type: ignore[misc]
        is_plain = type(cache) is StaticCache and not cache.offloading
        return decoding.with_kept_layers(cache, kwargs["batch_size"]) if is_plain else cache

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop over the tokens; see stopping.py."""
        loop = functools.partial(super()._sample, input_ids, *args)  # type: ignore[misc]
        if args or self._decoding is None or not (on_gpu(input_ids) and can_defer(**kwargs)):
            return loop(**kwargs)
        processors = kwargs.pop("logits_processor")
        return deferred(
            lambda those: loop(logits_processor=LogitsProcessorList(those), **kwargs), input_ids, processors
        )


class _Graphed(functools.partial):  # type: ignore[type-arg]
    """A forward pass that may be captured."""
