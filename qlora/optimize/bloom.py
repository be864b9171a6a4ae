"""Bloom's modules as `optimize_model` puts them in: transformers' classes with other forward passes.

Room: the only file that imports transformers' Bloom.  The classes keep transformers' names, which saving, device maps
and messages go by.  An object's class is exchanged in place: parameters, adapters and hooks stay where they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.models.bloom import modeling_bloom

from qkernels.errors import UserError

from .alibi import AttentionBias, alibi_attention, alibi_bias
from .autocast import without_casts
from .cache import CACHE
from .decoding import GeneratingModel
from .graphs import BUCKET, can_capture
from .norm import Norm, add_and_normalize, is_heard
from .recompute import RecomputedBlock, RecomputedModel
from .token_layer import TokenLayer


class BloomAttention(modeling_bloom.BloomAttention):
    """Attention through torch's fused kernels; see alibi.py."""

    query_key_value: Any
    dense: Any

    def attend(self, hidden: Tensor, bias: AttentionBias, cache: Any = None) -> Tensor:
        """attention(hidden), [batch, T, hidden size], which the residual is to be added to."""
        batch, length, _ = hidden.shape
        # unbind, and not three slices: its backward writes the three gradients side by side in one kernel.
        fused = self.query_key_value(hidden).view(batch, length, self.num_heads, 3, self.head_dim)
        query, key, value = (tensor.transpose(1, 2) for tensor in fused.unbind(dim=3))
        dropout = self.attention_dropout.p if self.training else 0.0
        layer: Any = cache.layers[self.layer_idx] if isinstance(cache, StaticCache) else None  # type: ignore[index]
        if isinstance(layer, TokenLayer) and dropout == 0.0 and layer.attends(query):
            context = layer.attend(query, key, value, bias.bias)
        else:
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            context = alibi_attention(query, key, value, bias, dropout).transpose(1, 2).reshape(batch, length, -1)
        return _dropped(self.dense(context), self.hidden_dropout, self.training)


class BloomMLP(modeling_bloom.BloomMLP):
    """The products; the sum after them is the block's, or left to a norm."""

    gelu_impl: Any
    dense_h_to_4h: Any
    dense_4h_to_h: Any

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        branch = self.dense_4h_to_h(self.gelu_impl(self.dense_h_to_4h(hidden_states)))
        return _dropped(branch, self.hidden_dropout, self.training)


class BloomBlock(RecomputedBlock, modeling_bloom.BloomBlock):
    """A block in two parts, whose recomputation can be chosen; see recompute.py."""

    self_attention: BloomAttention

    def forward(self, hidden: Tensor, bias: AttentionBias, cache: Any = None) -> Tensor:  # type: ignore[override]
        if torch.is_grad_enabled():
            return self._run((self._attention_part, self._mlp_part), hidden, bias, cache)
        branch, residual = self.open(None, hidden, bias, cache)
        return residual + branch

    def open(
        self, branch: Tensor | None, residual: Tensor, bias: AttentionBias, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Branch and residual that the block ends with, from those before it: a norm takes the sum along."""
        branch, residual = self._attention(branch, residual, bias, cache)
        hidden, normalized = add_and_normalize(self.post_attention_layernorm, branch, residual)
        return self.mlp(normalized), self._residual(normalized, hidden)

    def _attention(
        self, branch: Tensor | None, residual: Tensor, bias: AttentionBias, cache: Any
    ) -> tuple[Tensor, Tensor]:
        hidden, normalized = add_and_normalize(self.input_layernorm, branch, residual)
        return self.self_attention.attend(normalized, bias, cache), self._residual(normalized, hidden)

    def _attention_part(self, hidden: Tensor, bias: AttentionBias, cache: Any) -> Tensor:
        branch, residual = self._attention(None, hidden, bias, cache)
        return residual + branch

    def _mlp_part(self, hidden: Tensor, bias: AttentionBias, cache: Any) -> Tensor:
        normalized = self.post_attention_layernorm(hidden)
        return self._residual(normalized, hidden) + self.mlp(normalized)

    def _residual(self, normalized: Tensor, hidden: Tensor) -> Tensor:
        return normalized if self.apply_residual_connection_post_layernorm else hidden


class BloomModel(modeling_bloom.BloomModel):
    """The transformer with one bias for all layers, without autocast's casts, and with packing.

    Attributes:
        graphs: of the training step; None runs it launch by launch.
    """

    graphs: Any = None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, and `position_ids` [batch, T] of packed texts: each starts at 0 and sees itself only.

        Raises:
            UserError: packed texts with a cache; attention weights are asked for.
        """
        config = self.config
        if output_attentions or config.output_attentions:
            raise UserError(
                "output_attentions",
                expected="False after optimize_model",
                got="True",
                remedy="The fused attention never has the weights: load the model again and leave it as it is.",
            )
        keep_states = bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        use_cache = config.use_cache if use_cache is None else use_cache
        return_dict = config.return_dict if return_dict is None else return_dict
        cache = past_key_values if cache is None else cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache, cache = False, None
        embedded = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None and position_ids is None:
            cache = DynamicCache(config=config)
        states: list[Tensor] = []
        with without_casts(embedded):
            hidden = self.word_embeddings_layernorm(embedded)
            bias = self._bias(hidden, cache, attention_mask, position_ids)
            if self._is_for_graphs(hidden, bias, cache, keep_states):
                hidden = self.ln_f(self._graphed(hidden, bias))
            elif torch.is_grad_enabled() or keep_states or any(map(is_heard, self.h)):
                for block in self.h:
                    if keep_states:
                        states.append(hidden)
                    hidden = block(hidden, bias, cache)
                hidden = self.ln_f(hidden)
            else:
                branch = None
                blocks: Any = self.h
                for block in blocks:
                    branch, hidden = block.open(branch, hidden, bias, cache)
                hidden = add_and_normalize(self.ln_f, branch, hidden)[1]
        all_states = (*states, hidden) if keep_states else None
        if not return_dict:
            return tuple(value for value in (hidden, cache, all_states) if value is not None)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden, hidden_states=all_states, **{CACHE: cache}
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What `to`, `half` and the like end in."""
        if self.graphs is not None:
            self.graphs.forget()
        return super()._apply(*args, **kwargs)

    def _is_for_graphs(self, hidden: Tensor, bias: AttentionBias, cache: Any, keep_states: bool) -> bool:
        is_plain = bias.causal and cache is None and not keep_states
        return self.graphs is not None and is_plain and can_capture(self.h, hidden)

    def _graphed(self, hidden: Tensor, bias: AttentionBias) -> Tensor:
        """The blocks by CUDA graphs: sequences padded at their end, where causality hides it."""
        batch, length, _ = hidden.shape
        padding = -length % BUCKET
        values = bias.bias.expand(batch, -1, -1, -1)
        if padding:
            hidden = F.pad(hidden, (0, 0, 0, padding))
            values = F.pad(values, (0, padding))

        def run(hidden: Tensor, values: Tensor) -> Tensor:
            for block in self.h:
                hidden = block(hidden, AttentionBias(values, True))
            return hidden

        return self.graphs(run, self.h, hidden, values)[:, :length]

    def _bias(self, hidden: Tensor, cache: Any, attention_mask: Tensor | None, packed: Tensor | None) -> AttentionBias:
        queries = hidden.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        keys = queries if cache is None else cache.get_mask_sizes(queries, 0)[0]
        if packed is not None and cache is not None:
            raise UserError(
                "position_ids",
                expected="no position_ids where there is a cache",
                got="both",
                remedy="Packed texts are for training: pass use_cache=False, or generate without position_ids.",
            )
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask.to(hidden.device), (0, keys - attention_mask.shape[-1]))
        return alibi_bias(
            self.num_heads,
            hidden.dtype,
            hidden.device,
            queries=queries,
            keys=keys,
            past=past,
            attention_mask=attention_mask,
            position_ids=packed,
        )


class BloomForCausalLM(RecomputedModel, GeneratingModel, modeling_bloom.BloomForCausalLM):
    """Hands `position_ids` of packed texts down to the transformer, which transformers' own does not."""

    @functools.wraps(modeling_bloom.BloomForCausalLM.forward)  # `generate` reads the signature
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        outputs = self.transformer(input_ids, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithCrossAttentions(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


def _dropped(branch: Tensor, dropout: float, training: bool) -> Tensor:
    return F.dropout(branch, dropout, training) if dropout else branch


class LayerNorm(Norm, nn.LayerNorm):
    """See `Norm`."""

    centered = True

    @property
    def _eps(self) -> float:
        return self.eps


MODEL = modeling_bloom.BloomModel
BLOCK = modeling_bloom.BloomBlock
NORMS = {nn.LayerNorm: LayerNorm}
ATTENTION = {
    modeling_bloom.BloomForCausalLM: BloomForCausalLM,
    modeling_bloom.BloomModel: BloomModel,
    modeling_bloom.BloomBlock: BloomBlock,
    modeling_bloom.BloomMLP: BloomMLP,
    modeling_bloom.BloomAttention: BloomAttention,
}
