"""`optimize_model`: the forward and backward pass of a model without what costs time or memory and changes nothing.

Room: which parts, and the exchange of classes; the parts are in their own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from qkernels.errors import UserError

from . import bloom, llama
from .decoding import GeneratingModel
from .graphs import Graphs
from .recompute import RECOMPUTE, RecomputedBlock, RecomputedModel

__all__ = ["RECOMPUTE", "can_optimize", "optimize_model"]

_Module = TypeVar("_Module", bound=nn.Module)
_Exchange = Mapping[Any, Any]


def optimize_model(
    model: _Module,
    *,
    attention: bool = True,
    norm: bool = True,
    activation: bool = True,
    autocast: bool = True,
    recompute: str = "block",
    kept_blocks: int = 0,
    offload: bool = False,
    graphs: bool = True,
) -> _Module:
    """Make a language model faster and smaller in training and generation; what it computes stays the same.

    Equal within the rounding of the model's dtype: what differs is where intermediate values are rounded.  A part that
    is off is left as it is; a second call can choose other blocks to recompute.  docs/optimize.md says what each part
    does.

    Args:
        model: Bloom, Llama (SmolLM2 too) or Mistral as transformers has it, quantized or not, alone or with peft's
            adapters; changed in place.
        attention: torch's fused attention; for Bloom with ALiBi as a small bias, and packed texts.
        norm: a root-mean-square normalization in one kernel (Llama, Mistral); of few rows LayerNorm's too, with the sum
            before it.
        activation: Bloom's GELU in one kernel; of Llama's and Mistral's gated one less is kept for the backward pass.
        autocast: no casts where autocast's dtype is the model's anyway, so the residual stream stays in 16 bits; for
            Bloom it comes with `attention`.
        recompute: what the backward pass computes again while gradient checkpointing is on: "block" (all of a block;
            its input is kept), "parts" (what its attention part returned is kept as well) or "nothing".
        kept_blocks: so many of the last blocks recompute nothing, whatever `recompute` says.
        offload: what is kept for recomputation lies in pinned host memory.
        graphs: on a GPU, the blocks' part of a training step is replayed as CUDA graphs from the second batch of a size
            on, and the step of `generate` likewise where it has a static cache.

    Returns:
        `model`.

    Raises:
        UserError: another architecture; a choice that it cannot follow; a module whose forward pass something else has
            replaced already.
    """
    base = _language_model(model)
    blocks: list[Any] = [module for module in base.modules() if isinstance(module, (bloom.BLOCK, *llama.BLOCKS))]
    _check_recomputation(recompute, kept_blocks, len(blocks))
    is_bloom = isinstance(blocks[0], bloom.BLOCK)
    by_default = (recompute, kept_blocks, offload) == ("block", 0, False)
    if is_bloom and not (attention and autocast) and (attention or autocast or not by_default):
        raise UserError(
            "attention",
            expected="attention and autocast both on, or both off with the default recomputation, for Bloom",
            got=f"attention={attention}, autocast={autocast}, recompute={recompute!r}, kept_blocks={kept_blocks}, "
            f"offload={offload}",
            remedy="Leave the arguments at their defaults; Bloom's fused attention, casts and recomputation are one.",
        )
    if is_bloom:
        _refuse_sliced_products(base)
    exchanges: list[tuple[bool, _Exchange]] = [
        (attention, bloom.ATTENTION),
        (norm and is_bloom, bloom.NORMS),
        (norm, llama.NORMS),
        (activation and getattr(base.config, "hidden_act", None) == "silu", llama.MLPS),
        (True, llama.BLOCKS),
        (True, llama.LANGUAGE_MODELS),
    ]
    for exchange in (exchange for wanted, exchange in exchanges if wanted):
        for module in [module for module in base.modules() if type(module) in exchange]:
            _exchange_class(module, exchange[type(module)])
    if activation and is_bloom:
        for block in blocks:
            block.mlp.gelu_impl = nn.GELU(approximate="tanh")
    if attention and not is_bloom:
        base.set_attn_implementation("sdpa")
    for module in base.modules():
        if isinstance(module, bloom.BloomModel):
            module.graphs = Graphs() if graphs else None
        if isinstance(module, llama.MODELS):
            layers: Any = module.layers
            layers.__class__ = llama.Blocks
            layers.graphs = Graphs() if graphs else None
        if isinstance(module, GeneratingModel):
            module.graphed_decoding = graphs
        if isinstance(module, RecomputedModel):
            base.disable_input_require_grads()  # asked for before it was one
    for number, block in enumerate(blocks):
        if isinstance(block, RecomputedBlock):
            block.recompute = "nothing" if number >= len(blocks) - kept_blocks else recompute
            block.offload = offload
        if isinstance(block, llama.Block):
            block.casts = not autocast
    return model


def can_optimize(model: nn.Module) -> bool:
    """Whether `optimize_model` knows the model's architecture."""
    return any(isinstance(module, (bloom.MODEL, *llama.MODELS)) for module in model.modules())


def _language_model(model: nn.Module) -> Any:
    """The transformers model, alone or inside adapters."""
    if can_optimize(model):
        return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    raise UserError(
        "model",
        expected="Bloom, Llama (SmolLM2 too) or Mistral from transformers, alone or with peft's adapters",
        got=type(model).__name__,
        remedy="Other architectures train as well, without optimize_model.",
    )


def _check_recomputation(recompute: str, kept_blocks: int, blocks: int) -> None:
    if recompute not in RECOMPUTE:
        names = ", ".join(map(repr, RECOMPUTE))
        raise UserError("recompute", expected=f"one of {names}", got=repr(recompute), remedy="Choose one of these.")
    if not isinstance(kept_blocks, int) or not 0 <= kept_blocks <= blocks:
        raise UserError(
            "kept_blocks", expected=f"0 to {blocks}, the model's blocks", got=repr(kept_blocks), remedy="Choose one."
        )


def _refuse_sliced_products(base: Any) -> None:
    if base.config.pretraining_tp > 1 and base.config.slow_but_exact:
        raise UserError(
            "model",
            expected="a Bloom whose products are not sliced",
            got=f"pretraining_tp={base.config.pretraining_tp} with slow_but_exact",
            remedy="Set slow_but_exact=False in its configuration.",
        )


def _exchange_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Give an object another class with the same parameters and other methods."""
    if "forward" in vars(module):
        raise UserError(
            "model",
            expected="modules with their own forward passes",
            got=f"a {type(module).__name__} whose forward pass was replaced (by a trainer, or a device map's hooks)",
            remedy="Call optimize_model right after loading, before a trainer is made, on a model on one device.",
        )
    was_checkpointing = vars(module).pop("gradient_checkpointing", False) if issubclass(new, RecomputedBlock) else None
    module.__class__ = new
    if was_checkpointing is not None:
        module.gradient_checkpointing = was_checkpointing  # type: ignore[assignment]
