"""Which activations of a block are recomputed in the backward pass, and where the kept ones lie.

Room: checkpointing; torch only.  A block is two parts, attention and MLP, each a residual branch with its sum.
transformers switches recomputation for whole blocks by an attribute; `RecomputedBlock` takes that switch over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ..dropout import draw_seeds, randomness, seeded

RECOMPUTE = ("block", "parts", "nothing")


class RecomputedBlock:
    """Mixin for a transformer block that recomputes by a choice of its own while gradient checkpointing is on.

    Attributes:
        recompute: "block" keeps the block's input only; "parts" also what the attention part returns, so that its
            output projection is not computed again; "nothing" keeps everything.
        offload: what is kept for recomputation lies in pinned host memory.
    """

    training: bool
    recompute = "block"
    offload = False
    _checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """False always: transformers would recompute the whole block around this one's choice.  Setting it is heard."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self._checkpointing = enabled

    @property
    def recomputes(self) -> bool:
        """Whether this forward pass is one that the backward pass repeats."""
        active = self._checkpointing and self.training and torch.is_grad_enabled()
        return active and self.recompute != "nothing"

    def _run(self, parts: tuple[Callable[..., Tensor], ...], hidden: Tensor, *arguments: Any) -> Tensor:
        """The parts one after the other, each called with the hidden states and the arguments."""
        whole = _all_of(parts)
        if not self.recomputes:
            return whole(hidden, *arguments)
        by_seed, by_generator = randomness(self)  # type: ignore[arg-type]
        pieces = parts if self.recompute == "parts" else (whole,)
        with save_on_cpu(pin_memory=hidden.is_cuda) if self.offload else contextlib.nullcontext():
            for piece in pieces:
                seeds = draw_seeds(by_seed, hidden.device) if by_seed else None
                hidden = checkpoint(  # type: ignore[assignment]
                    _seeded, piece, seeds, hidden, *arguments, use_reentrant=False, preserve_rng_state=by_generator
                )
        return hidden


class RecomputedModel:
    """Mixin for a causal language model of such blocks."""

    def enable_input_require_grads(self) -> None:
        """Nothing.

        Trainers ask for a gradient of the embedding's output, because torch's first form of checkpointing (reentrant)
        has none without.  These blocks take the other form, and the first one would compute a gradient for nobody.
        """


def _seeded(piece: Callable[..., Tensor], seeds: Tensor | None, hidden: Tensor, *arguments: Any) -> Tensor:
    with contextlib.nullcontext() if seeds is None else seeded(seeds):
        return piece(hidden, *arguments)


def _all_of(parts: tuple[Callable[..., Tensor], ...]) -> Callable[..., Tensor]:
    def run(hidden: Tensor, *arguments: Any) -> Tensor:
        for part in parts:
            hidden = part(hidden, *arguments)
        return hidden

    return run
