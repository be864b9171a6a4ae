"""The Llama family's modules (Llama, Mistral, SmolLM2) as `optimize_model` puts them in.

Room: the only file that imports transformers' Llama and Mistral, whose modules differ by name only.  The classes keep
transformers' names, and an object's class is exchanged in place: parameters, adapters and hooks stay where they are.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from .autocast import without_casts
from .cache import CACHE
from .decoding import GeneratingModel
from .recompute import RecomputedBlock
from .swiglu import swiglu


class _Norm:
    """Root-mean-square normalization in one kernel: float32 inside, rounded once to the dtype of the input."""

    weight: Any
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


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
        with contextlib.nullcontext() if self.casts else without_casts(hidden_states):
            return self._run((self._attention_part, self._mlp_part), hidden_states, kwargs)

    def _attention_part(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return hidden + self.self_attn(hidden_states=self.input_layernorm(hidden), **kwargs)[0]

    def _mlp_part(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


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


class LlamaForCausalLM(GeneratingModel, modeling_llama.LlamaForCausalLM):
    """See `GeneratingModel`."""


class MistralForCausalLM(GeneratingModel, modeling_mistral.MistralForCausalLM):
    """See `GeneratingModel`."""


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
