"""How much GPU memory a training step takes at its peak, from sizes alone.

Room: arithmetic over `Shapes`; no model, no GPU.  What it assumes is in `ASSUMPTIONS`, printed with every plan.
tests/test_memory.py holds the parts to what torch keeps, and the whole to the records of `benchmarks.plan_check`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .optimize.graphs import LEAST_CAPABILITY, MOST_TOKENS
from .shapes import Shapes
from .units import GIB, MIB

CUDA_CONTEXT_BYTES = int(0.45 * GIB)
# cuBLAS takes a workspace for each thread that calls it, the forward's and the backward's: 32 MiB on Hopper, else 8.
WORKSPACES = 2
# Eager attention: scores, probabilities and their gradients, in the compute dtype and in float32 for the softmax.
EAGER_SCORE_FACTOR = 5
# TRL projects onto the vocabulary in tiles of so many words and tokens, in one buffer, and keeps no logits.
LOGIT_TILE = 32_768
LOGIT_TOKENS = 4096

ASSUMPTIONS = (
    "the model is optimized (qlora.optimize_model), as `qlora train` does it where it knows the architecture",
    "gradient checkpointing is on, but for the blocks that keep everything",
    "the loss is fused with the output head, as TRL does it: logits exist for "
    f"{LOGIT_TILE:,} words and {LOGIT_TOKENS:,} tokens at a time",
    "adapter, its gradients and AdamW's two moments are float32",
    "4-bit weights are decoded one layer at a time, of a 4-bit output layer as many rows as there are logits",
    "every text is as long as --max_length",
    "0.45 GiB for the CUDA context; the allocator's fragmentation is not counted",
)


@dataclass(frozen=True)
class Run:
    """One way to run a training step.

    Attributes:
        batch_size: texts at a time on the GPU.
        length: tokens a text.
        dtype: of activations and float weights.
        recompute, kept_blocks, offload: as in `optimize_model`.
        graphs: as in `optimize_model`; it counts where `by_graphs` says so.
        double_quantization: 8-bit scales; float32 ones otherwise.
        quantize_embeddings: as in `NF4Config`.
        capability: of the GPU.
    """

    batch_size: int
    length: int
    dtype: torch.dtype
    recompute: str = "block"
    kept_blocks: int = 0
    graphs: bool = True
    double_quantization: bool = True
    quantize_embeddings: bool = False
    offload: bool = False
    capability: tuple[int, int] = (7, 5)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length

    @property
    def by_graphs(self) -> bool:
        """Whether the step is replayed as CUDA graphs."""
        return self.graphs and not self.offload and self.capability >= LEAST_CAPABILITY and self.tokens <= MOST_TOKENS

    def recomputed_blocks(self, layers: int) -> int:
        """Of a model's `layers`, those that the backward pass computes again."""
        return 0 if self.recompute == "nothing" else layers - self.kept_blocks


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part of one training step at its peak.

    Attributes:
        quantized: packed 4-bit weights and their scales.
        kept: what stays float: normalizations, biases, and but for `quantize_embeddings` embedding and output layer.
        adapter: LoRA weights and their gradients.
        optimizer: AdamW's two moments.
        checkpoints: what is kept from the forward to the backward pass, whole blocks included.
        block: the block that is recomputed, or where that is more the hidden states around the loss.
        logits: the tile of logits, and the rows of a 4-bit output layer decoded for it; 0 where the recomputed block is
            the peak.
        decoded: the largest weight, decoded for its product; 0 where the loss is the peak.
        graphs: what CUDA graphs copy, and their own workspaces.
        workspace: cuBLAS' own.
        context: the CUDA context.
    """

    quantized: int
    kept: int
    adapter: int
    optimizer: int
    checkpoints: int
    block: int
    logits: int
    decoded: int
    graphs: int
    workspace: int
    context: int

    @property
    def total(self) -> int:
        """All parts, in bytes."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def allocated(self) -> int:
        """What torch's allocator has in use: all but the CUDA context."""
        return self.total - self.context


PARTS = {
    "quantized": "4-bit weights and scales",
    "kept": "what stays float",
    "adapter": "LoRA weights and gradients",
    "optimizer": "AdamW moments",
    "checkpoints": "kept for the backward pass",
    "block": "the block at work",
    "logits": "logits",
    "decoded": "largest weight, decoded",
    "graphs": "CUDA graphs: copies",
    "workspace": "cuBLAS workspaces",
    "context": "CUDA context",
}


def plan(shapes: Shapes, run: Run) -> MemoryPlan:
    """Estimate the peak memory of a training step.

    There are two candidates: the loss, while everything kept is alive, and the first block of the backward pass that is
    recomputed, when the blocks after it have given theirs back.  The graphs' memory is a pool of its own, beside which
    the loss has its.
    """
    size = run.dtype.itemsize
    per_token = run.tokens * size
    scale_bytes = 1 + 4 / 256 if run.double_quantization else 4
    recomputed = run.recomputed_blocks(shapes.layers)
    inputs = 0 if run.offload else recomputed * shapes.hidden * (2 if run.recompute == "parts" else 1) * per_token
    whole = (shapes.layers - recomputed) * (shapes.saved_width + shapes.hidden) * per_token
    decoded = shapes.largest * size
    scores = EAGER_SCORE_FACTOR * run.batch_size * shapes.heads * run.length**2 * (size + 4) / 2 if shapes.eager else 0
    # The last hidden states, normalized, those of them with labels, and their gradient in float32.
    around_loss = shapes.hidden * (3 * per_token + 4 * run.tokens)
    tile = min(run.tokens, LOGIT_TOKENS) * min(shapes.vocabulary, LOGIT_TILE) * size
    if run.quantize_embeddings:
        tile += min(shapes.vocabulary, LOGIT_TILE) * shapes.hidden * size
    working = max(shapes.working_width * per_token + decoded, shapes.transient_width * per_token)
    block = shapes.saved_width * per_token + scores if recomputed else 0.0
    workspace = WORKSPACES * (32 if run.capability >= (9, 0) else 8) * MIB
    copies = 0.0
    if run.by_graphs:
        # What the blocks return, where its gradient will lie.  Their input is the first one's checkpoint, the adapters'
        # gradients lie where blocks have worked, and the backward pass has the forward pass' workspace.
        copies = shapes.hidden * per_token + workspace / WORKSPACES
        kept = inputs + (whole if whole > block else 0)
        peak = {
            "checkpoints": kept,
            "block": (block if kept == inputs else 0) + working - decoded + around_loss,
            "logits": tile,
            "decoded": decoded,
        }
    elif inputs + block + working >= inputs + whole + around_loss + tile:
        # The kept blocks' activations are free again when the first recomputed one begins.
        peak = {"checkpoints": inputs, "block": block + working - decoded, "logits": 0, "decoded": decoded}
    elif whole and working > around_loss + tile:
        peak = {"checkpoints": inputs + whole, "block": working - decoded, "logits": 0, "decoded": decoded}
    else:
        peak = {"checkpoints": inputs + whole, "block": around_loss, "logits": tile, "decoded": 0}
    quantized = shapes.quantized + (shapes.embeddings if run.quantize_embeddings else 0)
    return MemoryPlan(
        quantized=int(quantized * (0.5 + scale_bytes / 64)),
        kept=(shapes.parameters - quantized) * size,
        adapter=shapes.trainable * 8,
        optimizer=shapes.trainable * 8,
        graphs=int(copies),
        workspace=workspace,
        context=CUDA_CONTEXT_BYTES,
        **{name: int(value) for name, value in peak.items()},
    )
