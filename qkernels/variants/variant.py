"""One specialization of a kernel, and what all of them are written in.

Room: of the enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..tuning import (
    LaunchConfig,
)
from ..tuning.lora import DownConfig, TileConfig
from ..tuning.skinny import SkinnyConfig
from ..tuning.skinny_dx import SkinnyDxConfig
from ..tuning.wgmma import WgmmaConfig

DTYPES = ("fp32", "fp16", "bf16")
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NESTED_SCALES = {"absmax_8bit_ptr": "*u8", "absmax_code_ptr": "*fp32", "absmax_offset_ptr": "*fp32"}
LENGTHS = {"i32:16": "n%16==0", "i32": "n%16!=0", "i64:16": "n>=2**31"}


@dataclass(frozen=True)
class Variant:
    """One specialization of a kernel.

    Attributes:
        name: kernel and what distinguishes the variant.
        kernel: the jit function.
        signature: Triton type of each run-time argument; an argument left out is None.
        constants: the compile-time arguments.
        config: the launch configuration.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    config: LaunchConfig | SkinnyConfig | SkinnyDxConfig | WgmmaConfig | DownConfig | TileConfig


def optional(*pointers: tuple[dict[str, str], bool]) -> tuple[dict[str, str], dict[str, None]]:
    """Groups of pointers, each given or not: the types of those that are, and None for the others."""
    given = {name: kind for group, is_given in pointers if is_given for name, kind in group.items()}
    return given, {name: None for group, is_given in pointers if not is_given for name in group}
