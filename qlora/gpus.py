"""The GPUs that a run can be planned for.

Room: a table of published figures and the choice of a row; nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qkernels.errors import UserError

from .units import GIB


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: how `--gpu` calls it, or the driver's name of the one that is here.
        memory_gib: what torch reports, below the nominal size.
        capability: CUDA compute capability.
        bandwidth_gbps: rated memory bandwidth, 10^9 bytes a second; None where it is not known.
        tensor_tflops: rated dense 16-bit tensor-core products with float32 sums, 10^12 a second; None likewise.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]
    bandwidth_gbps: float | None = None
    tensor_tflops: float | None = None


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 14.56, (7, 5), 320, 65),
        Gpu("v100-16", 15.77, (7, 0), 900, 125),
        Gpu("rtx3090", 23.69, (8, 6), 936, 71),
        Gpu("rtx4090", 23.65, (8, 9), 1008, 165),
        Gpu("a10", 22.02, (8, 6), 600, 125),
        Gpu("l4", 22.03, (8, 9), 300, 121),
        Gpu("a100-40", 39.39, (8, 0), 1555, 312),
        Gpu("a100-80", 79.15, (8, 0), 2039, 312),
        Gpu("h100", 79.19, (9, 0), 3350, 989),
        Gpu("h200", 139.81, (9, 0), 4800, 989),
    )
}
# What torch.cuda calls them.
_DRIVER_NAMES = {"Tesla T4": "t4", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA L4": "l4"}


def find_gpu(asked: str | None, memory_gib: float | None = None) -> Gpu:
    """The GPU to plan for.

    Args:
        asked: a name of `GPUS`, or GiB of memory of some GPU with bfloat16; None is this machine's, or a T4 if it has
            none.
        memory_gib: plan for so much of its memory only; alone, for some GPU with bfloat16.

    Raises:
        UserError: an unknown name.
    """
    if asked is None and memory_gib is not None:
        return Gpu("a GPU with bfloat16", memory_gib, (8, 0))
    gpu = _present() if asked is None and torch.cuda.is_available() else _named(asked or "t4")
    return gpu if memory_gib is None else replace(gpu, memory_gib=memory_gib)


def _present() -> Gpu:
    properties = torch.cuda.get_device_properties(0)
    known = GPUS.get(_DRIVER_NAMES.get(properties.name, ""))
    here = Gpu(properties.name, properties.total_memory / GIB, (properties.major, properties.minor))
    if known is None:
        return here
    return replace(here, bandwidth_gbps=known.bandwidth_gbps, tensor_tflops=known.tensor_tflops)


def _named(asked: str) -> Gpu:
    name = asked.lower()
    if name in GPUS:
        return GPUS[name]
    try:
        memory = float(name)
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):
        raise UserError(
            "--gpu", expected=f"one of {', '.join(GPUS)}, or GiB", got=repr(asked), remedy="For example --gpu 24."
        )
    return Gpu("a GPU with bfloat16", memory, (8, 0))
