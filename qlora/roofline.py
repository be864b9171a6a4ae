"""How long a training step takes, from bytes, operations and a GPU's rated speeds.

Room: arithmetic over `Shapes` and a `Gpu`.  `ASSUMPTIONS` is printed with every prediction; `benchmarks.plan_check`
puts predictions beside measured steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gpus import Gpu
from .memory import LOGIT_TOKENS, Run
from .shapes import Shapes

# Shares of an H100's rated speed, by the profile of a Bloom-7B1 step of 4 x 512 tokens: products with decoded weights,
# the loss with its products, large copies, and attention's kernel for a bias.
PRODUCT_SHARE = 0.80
HEAD_SHARE = 0.62
BANDWIDTH_SHARE = 0.85
ATTENTION_SHARE = 0.07
# Elements a token that normalization, activation, adapters and residuals read and write in a block's forward pass, as a
# multiple of what they save; the backward pass moves half as much again.  And what each of their kernels takes at best.
TRAFFIC_FACTOR = 2.0
SMALL_KERNELS, SMALL_KERNEL_S = 25, 2e-6
# Seconds a block on the record's host: forward and backward, and recomputation with what torch's checkpointing does
# around it.  With graphs only what lies around the blocks, the trainer above all, which is not beside the GPU's work.
HOST_BLOCK_S = 3.1e-3
HOST_AGAIN_S = 3.7e-3
HOST_AROUND_S = 28e-3

ASSUMPTIONS = (
    f"products at {PRODUCT_SHARE:.0%} and copies at {BANDWIDTH_SHARE:.0%} of the GPU's rated speed, as on an H100; a "
    "GPU that lowers its clock under load (a T4 does) is slower",
    "a weight is decoded to 16 bits in memory for each product, and read back by it",
    f"with CUDA graphs the host takes {HOST_AROUND_S * 1e3:.0f} ms a step besides; without, it launches a block in "
    f"{HOST_BLOCK_S * 1e3:.1f} ms, and {HOST_AGAIN_S * 1e3:.1f} ms more for recomputation, beside the GPU's work",
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of each part of one training step.

    Attributes:
        products: with 4-bit weights, recomputation included.
        decode: writing decoded weights.
        head: output layer and loss.
        attention: scores and their gradients.
        rest: what normalization, activation, adapters and residuals read and write.
        host: launching all of it beside the GPU's work; with graphs, what it does before and after them.
        by_graphs: the host's part is one after the other with the GPU's.
    """

    products: float
    decode: float
    head: float
    attention: float
    rest: float
    host: float
    by_graphs: bool

    @property
    def device(self) -> float:
        """The GPU's parts, which follow one another."""
        return self.products + self.decode + self.head + self.attention + self.rest

    @property
    def total(self) -> float:
        """With graphs the sum of the GPU's and the host's time, else the longer of the two."""
        return self.device + self.host if self.by_graphs else max(self.device, self.host)


def step_time(shapes: Shapes, run: Run, gpu: Gpu) -> StepTime | None:
    """Predict a training step's time; None where the GPU's speeds are not known.

    Forward and backward multiply by each 4-bit weight once; recomputation once more, but for the frozen products that
    it need not reach.  The loss multiplies by the output layer three times: forward, again, and for the gradient.
    """
    if gpu.bandwidth_gbps is None or gpu.tensor_tflops is None:
        return None
    flops = gpu.tensor_tflops * 1e12
    bandwidth = gpu.bandwidth_gbps * 1e9 * BANDWIDTH_SHARE
    size = run.dtype.itemsize
    blocks_again = run.recomputed_blocks(shapes.layers) / shapes.layers
    left_out = shapes.ending + (shapes.middle if run.recompute == "parts" else 0)
    passes = 2 + blocks_again * (1 - left_out / shapes.quantized)
    attention_flops = 2 * run.tokens * run.length * shapes.hidden * shapes.layers  # a causal forward pass
    traffic = TRAFFIC_FACTOR * shapes.saved_width * shapes.layers * run.tokens * size
    again = 1 + 1.5 + blocks_again
    product = 2 * run.tokens / (flops * PRODUCT_SHARE)
    head = 2 * run.tokens / (flops * HEAD_SHARE)
    decode = (0.5 + 1 / 64 + size) / bandwidth  # of a weight
    # A 4-bit output layer is decoded once forward and once backward, for each tile of tokens.
    decoded_heads = 2 * math.ceil(run.tokens / LOGIT_TOKENS) if run.quantize_embeddings else 0
    read = size / bandwidth  # of a weight, where that takes longer than its products
    return StepTime(
        products=passes * shapes.quantized * max(product, read),
        decode=passes * shapes.quantized * decode,
        head=shapes.vocabulary * shapes.hidden * (3 * max(head, read) + decoded_heads * decode),
        attention=(1 + 2.5 + blocks_again) * attention_flops / (flops * ATTENTION_SHARE),
        rest=again * (traffic / bandwidth + shapes.layers * SMALL_KERNELS * SMALL_KERNEL_S),
        host=HOST_AROUND_S if run.by_graphs else shapes.layers * (HOST_BLOCK_S + blocks_again * HOST_AGAIN_S),
        by_graphs=run.by_graphs,
    )
