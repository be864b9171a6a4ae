"""The correctness gate: before a stack is timed it must compute the same thing as bitsandbytes.

The first bitsandbytes stack of a precision leaves a yardstick: the packed weights of a few layers and the loss of every
token of the first batch.  Each later stack must hold the same nibbles, and losses within the tolerance.  The loss of
single tokens is compared, not the batch's mean: on random weights the mean hides a wrong layer among hundreds of
tokens, while the losses of single tokens move by about their own spread.

What a stack generates must be what its own forward pass finds best, and so must the first stack's tokens: two stacks
need not agree in a choice between two tokens that are as good as equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

# Root mean square over the tokens, in nats; a model of other weights differs by about 1.8 at full size.  The stacks
# keep norms and residuals in different precisions, so equal weights still leave each its own rounding.
LOSS_RMS_TOLERANCE = {"bf16": 0.2, "fp16": 0.05, "fp32": 0.001}
# How far below the best token's logit a generated one's may be: decoding token by token rounds in other places than
# one pass over all of them, and near the best there are others.  A token taken at random is 5 below.
REGRET_TOLERANCE = {precision: 4 * tolerance for precision, tolerance in LOSS_RMS_TOLERANCE.items()}

# One layer of each kind, first to last.
_SAMPLED = {
    "bloom": (
        "transformer.h.{}.self_attention.query_key_value",
        "transformer.h.{}.self_attention.dense",
        "transformer.h.{}.mlp.dense_h_to_4h",
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "llama": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.o_proj",
        "model.layers.{}.mlp.up_proj",
        "model.layers.{}.mlp.down_proj",
    ),
}


class GateError(AssertionError):
    """A stack computes something else than the yardstick; timing it would be meaningless."""


@dataclass(frozen=True)
class Sample:
    """What a stack is compared by.

    Attributes:
        packed: by module name, uint8[n/2], two NF4 codes a byte.
        scales: by module name, uint8[n/64], the doubly quantized scales' codes.
        token_loss: float32[tokens], cross-entropy of each real token of the first batch, in nats.
    """

    packed: dict[str, Tensor]
    scales: dict[str, Tensor]
    token_loss: Tensor

    def save(self, path: Path) -> None:
        tensors = {f"packed.{name}": tensor for name, tensor in self.packed.items()}
        tensors |= {f"scales.{name}": tensor for name, tensor in self.scales.items()}
        save_file({**tensors, "token_loss": self.token_loss}, path)

    @classmethod
    def load(cls, path: Path) -> Sample:
        tensors = load_file(path)
        loss = tensors.pop("token_loss")
        packed = {key.removeprefix("packed."): t for key, t in tensors.items() if key.startswith("packed.")}
        scales = {key.removeprefix("scales."): t for key, t in tensors.items() if key.startswith("scales.")}
        return cls(packed, scales, loss)


def sample_weights(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Packed codes and scale codes of one layer of each kind, spread over the depth; call it before any forward."""
    last = model.config.num_hidden_layers - 1
    depths = (0, last // 2, last // 2, last)
    names = [kind.format(depth) for kind, depth in zip(_SAMPLED[model.config.model_type], depths, strict=True)]
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in names}
    packed = {name: weight.data.reshape(-1).view(torch.uint8).cpu() for name, weight in weights.items()}
    scales = {name: weight.quant_state.absmax.reshape(-1).cpu() for name, weight in weights.items()}
    return packed, scales


@torch.no_grad()
def token_losses(model: PeftModel, batch: dict[str, Tensor], autocast_dtype: torch.dtype | None) -> Tensor:
    """Cross-entropy of each next token that is not padding, float32[tokens] on the CPU.

    The model stays in training mode (bitsandbytes' CPU path rearranges its weights in an eval-mode forward); dropout
    acts on the adapters' input only, and their B is still zero.

    Args:
        model: with fresh adapters, in training mode.
        batch: `input_ids` and `attention_mask`, int64[batch, length], on the model's device.
        autocast_dtype: what the stack trains in; None for float32.
    """
    device_type = batch["input_ids"].device.type
    with torch.autocast(device_type, autocast_dtype, enabled=autocast_dtype is not None):
        logits = model(**batch, use_cache=False).logits
    losses = []
    for row_logits, row_ids, row_mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):
        row_losses = F.cross_entropy(row_logits[:-1].float(), row_ids[1:], reduction="none")
        losses.append(row_losses[row_mask[1:].bool()])
    return torch.cat(losses).float().cpu()


def compare(sample: Sample, yardstick: Sample, precision: str) -> dict[str, float | int | str]:
    """Hold a stack's sample against the yardstick.

    Returns:
        The differences: packed bytes and scale codes that differ (and of how many), and the token losses' root mean
        square difference in nats.

    Raises:
        GateError: other nibbles, or losses out of tolerance.
    """
    packed_differ = sum(_count_differing(sample.packed[name], other) for name, other in yardstick.packed.items())
    scales_differ = sum(_count_differing(sample.scales[name], other) for name, other in yardstick.scales.items())
    loss_rms = (sample.token_loss - yardstick.token_loss).square().mean().sqrt().item()
    if packed_differ:
        raise GateError(f"{packed_differ} bytes of the sampled packed weights differ from bitsandbytes'")
    tolerance = LOSS_RMS_TOLERANCE[precision]
    if not loss_rms <= tolerance:  # NaN fails too
        raise GateError(f"token losses differ from bitsandbytes' by {loss_rms:.3g} nats rms, tolerance {tolerance}")
    return {
        "packed_bytes_differ": packed_differ,
        "packed_bytes_compared": sum(tensor.numel() for tensor in yardstick.packed.values()),
        "scale_codes_differ": scales_differ,
        "scale_codes_compared": sum(tensor.numel() for tensor in yardstick.scales.values()),
        "token_loss_rms_difference": loss_rms,
    }


@torch.no_grad()
def must_be_greedy(model: PreTrainedModel | PeftModel, tokens: Tensor, prompt: int, precision: str) -> float:
    """Hold generated tokens against one forward pass over all of them, without a cache.

    Args:
        model: what generated them, or another that must agree.
        tokens: int64[1, prompt + new].
        prompt: how many were given.

    Returns:
        By how much the logits of the tokens taken are below the best ones, at most.

    Raises:
        GateError: by more than rounding explains.
    """
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0, prompt - 1 :].float()
    logits[:, model.config.eos_token_id] = -torch.inf  # which generating to a fixed length leaves out
    regret = (logits.amax(1) - logits.gather(1, tokens[0, prompt:, None])[:, 0]).max().item()
    tolerance = REGRET_TOLERANCE[precision]
    if not regret <= tolerance:  # NaN fails too
        raise GateError(f"a generated token's logit is {regret:.3g} below the best one's, tolerance {tolerance}")
    return regret


def _count_differing(ours: Tensor, theirs: Tensor) -> int:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise GateError(f"{ours.dtype}{tuple(ours.shape)} instead of bitsandbytes' {theirs.dtype}{tuple(theirs.shape)}")
    return int((ours != theirs).sum())
