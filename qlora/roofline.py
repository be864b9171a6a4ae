"""How long a training step takes, from bytes, operations and a GPU's rated speeds.

Room: arithmetic over `Shapes` and a `Gpu`.  `ASSUMPTIONS` is printed with every prediction; `benchmarks.plan_check`
puts predictions beside measured steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gpus import Gpu
from .memory import Run
from .shapes import Shapes

# What 16-bit products of 2,048 tokens and large copies reach of an H100's rated speed.
PRODUCT_SHARE = 0.70
BANDWIDTH_SHARE = 0.85
# Attention's kernel for a bias reaches less of it: an estimate.
ATTENTION_SHARE = 0.25
# Elements a token that normalization, activation, adapters and residuals read and write in a block's forward pass, as a
# multiple of what they save; the backward pass moves half as much again.
TRAFFIC_FACTOR = 4.0
# A block's forward pass on the host, with the adapters' Python, and its backward pass, in C++: estimates.
HOST_FORWARD_S = 0.9e-3
HOST_BACKWARD_S = 0.6e-3

ASSUMPTIONS = (
    f"products at {PRODUCT_SHARE:.0%} and copies at {BANDWIDTH_SHARE:.0%} of the GPU's rated speed, as on an H100; a "
    "GPU that lowers its clock under load (a T4 does) is slower",
    "a weight is decoded to 16 bits in memory for each product, and read back by it",
    "the host prepares a block in "
    f"{HOST_FORWARD_S * 1e3:.1f} ms forward and {HOST_BACKWARD_S * 1e3:.1f} ms backward, beside the GPU's work",
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of each part of one training step.

    Attributes:
        products: with 4-bit weights, recomputation included.
        decode: writing decoded weights, and reading them.
        head: output layer and loss.
        attention: scores and their gradients.
        rest: what normalization, activation, adapters and residuals read and write.
        host: launching all of it, which happens beside the GPU's work.
    """

    products: float
    decode: float
    head: float
    attention: float
    rest: float
    host: float

    @property
    def device(self) -> float:
        """The GPU's parts, which follow one another."""
        return self.products + self.decode + self.head + self.attention + self.rest

    @property
    def total(self) -> float:
        """The longer of the GPU's and the host's time."""
        return max(self.device, self.host)


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
    return StepTime(
        products=passes * 2 * shapes.quantized * run.tokens / (flops * PRODUCT_SHARE),
        decode=passes * shapes.quantized * (0.5 + 1 / 64 + 2 * size) / bandwidth,
        head=3 * 2 * shapes.vocabulary * shapes.hidden * run.tokens / (flops * PRODUCT_SHARE),
        attention=(1 + 2.5 + blocks_again) * attention_flops / (flops * ATTENTION_SHARE),
        rest=(1 + 1.5 + blocks_again) * traffic / bandwidth,
        host=shapes.layers * ((1 + blocks_again) * HOST_FORWARD_S + HOST_BACKWARD_S),
    )
