"""The Llama family's modules (Llama, Mistral, SmolLM2) as `optimize_model` puts them in.

Room: the only file that imports transformers' Llama and Mistral, whose modules differ by name only.  The classes keep
transformers' names, and an object's class is exchanged in place: parameters, adapters and hooks stay where they are.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from .autocast import without_casts
from .cache import CACHE
from .decoding import GeneratingModel
from .graphs import BUCKET, Graphs, can_capture
from .norm import Norm, add_and_normalize, is_heard
from .recompute import RecomputedBlock, RecomputedModel
from .swiglu import swiglu


class _Norm(Norm):
    """Root-mean-square normalization in one kernel: float32 inside, rounded once to the dtype of the input."""

    centered = False
    variance_epsilon: float

    @property
    def _eps(self) -> float:
        return self.variance_epsilon


class _Mlp:
    """down(silu(gate(x)) * up(x)), of which the backward pass keeps two activations instead of three."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(RecomputedBlock):
    """A block in two parts, whose recomputation can be chosen (recompute.py), and without casts (autocast.py).

    Attributes:
        casts: leave autocast on inside.
    """

    casts = True
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.recomputes:
            kwargs |= {CACHE: None, "use_cache": False}  # a second run would put the keys in twice
        if not torch.is_grad_enabled():
            branch, residual = self.open(None, hidden_states, kwargs)
            return residual + branch
        with contextlib.nullcontext() if self.casts else without_casts(hidden_states):
            return self._run((self._attention_part, self._mlp_part), hidden_states, kwargs)

    def open(self, branch: Tensor | None, residual: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Branch and residual that the block ends with, from those before it: a norm takes the sum along."""
        with contextlib.nullcontext() if self.casts else without_casts(residual):
            hidden, normalized = add_and_normalize(self.input_layernorm, branch, residual)
            branch = self.self_attn(hidden_states=normalized, **kwargs)[0]
            hidden, normalized = add_and_normalize(self.post_attention_layernorm, branch, hidden)
            return self.mlp(normalized), hidden

    def _attention_part(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return hidden + self.self_attn(hidden_states=self.input_layernorm(hidden), **kwargs)[0]

    def _mlp_part(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Blocks(nn.ModuleList):
    """A model's list of blocks, whose training step is CUDA graphs where `graphs` says so.

    The model takes all blocks as a slice and runs one after the other; then the slice is one callable for all of them.

    Attributes:
        graphs: of the training step; None runs it launch by launch.
    """

    graphs: Graphs | None = None

    def __getitem__(self, index: Any) -> Any:
        # In this order: torch.compile, which captures nothing here, cannot trace `slice.indices`.
        captures = self.graphs is not None and not torch.compiler.is_compiling() and isinstance(index, slice)
        if captures and index.indices(len(self)) == (0, len(self), 1):
            return [self._all]
        return super().__getitem__(index)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self.graphs is not None:
            self.graphs.forget()
        return super()._apply(*args, **kwargs)

    def _all(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        inputs = self._inputs(hidden, kwargs)
        if inputs is None:
            return self._each(hidden, kwargs)

        def run(hidden: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor | None = None) -> Tensor:
            for block in self:
                hidden = block(hidden, position_embeddings=(cosine, sine), attention_mask=mask)
            return hidden

        assert self.graphs is not None
        return self.graphs(run, self, *inputs)[:, : hidden.shape[1]]

    def _each(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        blocks: list[Any] = list(self)
        if torch.is_grad_enabled() or any(map(is_heard, blocks)):
            for block in blocks:
                hidden = block(hidden, **kwargs)
            return hidden
        branch = None
        for block in blocks:
            branch, hidden = block.open(branch, hidden, kwargs)
        return hidden if branch is None else hidden + branch

    def _inputs(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """What `run` takes, padded at the sequences' end, where causality hides it; None where it is not all.

        Hidden states [batch, T, hidden size], cosine and sine [1 or batch, T, size], and perhaps a mask
        [batch, 1, T, T], True where a query sees a key.
        """
        given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        cosine, sine = given.pop("position_embeddings")
        mask = given.pop("attention_mask", None)
        given.pop("position_ids", None)  # for attention without a mask for packed texts; here the mask has them
        if self[0].recomputes:
            given.pop(CACHE, None)
            given.pop("use_cache", None)
        is_mask = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 4)
        if given or not is_mask or not can_capture(self, hidden):
            return None
        padding = -hidden.shape[1] % BUCKET
        hidden, cosine, sine = (F.pad(tensor, (0, 0, 0, padding)) for tensor in (hidden, cosine, sine))
        if mask is None:
            return hidden, cosine, sine
        # The queries of the padding see everything: softmax over nothing is not a number.
        return hidden, cosine, sine, F.pad(F.pad(mask, (0, padding)), (0, 0, 0, padding), value=True)


class LlamaRMSNorm(_Norm, modeling_llama.LlamaRMSNorm):
    """See `_Norm`."""


class LlamaMLP(_Mlp, modeling_llama.LlamaMLP):
    """See `_Mlp`."""


class LlamaDecoderLayer(Block, modeling_llama.LlamaDecoderLayer):
    """See `Block`."""


class MistralRMSNorm(_Norm, modeling_mistral.MistralRMSNorm):
    """See `_Norm`."""


class MistralMLP(_Mlp, modeling_mistral.MistralMLP):
    """See `_Mlp`."""


class MistralDecoderLayer(Block, modeling_mistral.MistralDecoderLayer):
    """See `Block`."""


class LlamaForCausalLM(RecomputedModel, GeneratingModel, modeling_llama.LlamaForCausalLM):
    """See `RecomputedModel` and `GeneratingModel`."""


class MistralForCausalLM(RecomputedModel, GeneratingModel, modeling_mistral.MistralForCausalLM):
    """See `RecomputedModel` and `GeneratingModel`."""


NORMS = {modeling_llama.LlamaRMSNorm: LlamaRMSNorm, modeling_mistral.MistralRMSNorm: MistralRMSNorm}
MLPS = {modeling_llama.LlamaMLP: LlamaMLP, modeling_mistral.MistralMLP: MistralMLP}
BLOCKS = {
    modeling_llama.LlamaDecoderLayer: LlamaDecoderLayer,
    modeling_mistral.MistralDecoderLayer: MistralDecoderLayer,
}
LANGUAGE_MODELS = {
    modeling_llama.LlamaForCausalLM: LlamaForCausalLM,
    modeling_mistral.MistralForCausalLM: MistralForCausalLM,
}
MODELS = (modeling_llama.LlamaModel, modeling_mistral.MistralModel)
