"""4-bit models over several GPUs: what FSDP2 has to find, so that it shards the codes.

Room: torch and the 4-bit modules only.  accelerate leaves parameters of the class name `Params4bit` with uint8 codes
unsharded, and torch casts float codes as mixed precision asks, which destroys them.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from packaging.version import Version
from torch import nn

from qkernels.errors import UserError

from .module4bit import Module4bit

# Before it FSDP2 has every parameter require a gradient first, which integers cannot (pytorch issue 177844).
FIRST_TORCH = Version("2.12")

_Module = TypeVar("_Module", bound=nn.Module)


def prepare_for_fsdp(model: _Module) -> _Module:
    """Make the 4-bit weights of a model plain uint8 parameters, which FSDP2 shards; call it before a trainer is made or
    `Accelerator.prepare` is called, with or without adapters on the model.

    Any `quant_storage` will do, and so will `cpu_ram_efficient_loading`.  The model's state_dict is not that of a
    checkpoint any more: save the adapters, and keep the checkpoint of the base.  Parameters are to be counted before:
    peft counts a packed weight by its class.

    Args:
        model: a model with quantized layers; changed in place.

    Returns:
        `model`.

    Raises:
        UserError: no 4-bit layers, or some that are not quantized yet; a torch whose FSDP2 shards floats only.
    """
    if not shards_integers():
        raise UserError(
            "torch",
            expected=f"{FIRST_TORCH} or later, whose FSDP2 takes integer parameters",
            got=str(torch.__version__),
            remedy="Install a later torch, or train with DDP if the model fits on one GPU.",
        )
    layers = [module for module in model.modules() if isinstance(module, Module4bit)]
    if not layers:
        raise UserError(
            "model",
            expected="a model with 4-bit layers",
            got=f"a {type(model).__name__} without any",
            remedy="Load it with NF4Config or load_pretrained_4bit; a float model needs no preparation.",
        )
    for layer in layers:
        layer.split_weight()
    return model


def shards_integers() -> bool:
    """Whether this torch's FSDP2 takes integer parameters."""
    return Version(torch.__version__) >= FIRST_TORCH
