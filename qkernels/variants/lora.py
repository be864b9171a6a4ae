"""Specializations of the kernels of an adapter.

Room: of the enumeration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..dropout import threshold_and_scale
from ..kernels.lora import _lora_down_kernel, _lora_sum_kernel, _lora_up_kernel
from ..kernels.lora_grads import _lora_grads_kernel
from ..tuning.lora import down_config, grads_config, inner_parts, up_config
from .variant import Variant, optional

_NO_DROPOUT = {"DROPOUT": False, "THRESHOLD": 0, "KEPT_SCALE": 1.0}


def adapters() -> Iterator[Variant]:
    """Few and many rows (u in parts and in one), float32 and 16-bit factors, with dropout and without."""
    threshold, kept_scale = threshold_and_scale(0.05)
    for M, dtype, factors, rank in (
        (128, "fp16", "fp32", 16),
        (128, "bf16", "fp32", 64),
        (2048, "bf16", "bf16", 64),
        (2048, "fp16", "fp32", 16),
    ):
        parts = inner_parts(M, 4096, rank)
        inner = "*fp32" if parts > 1 else f"*{dtype}"
        for dropout in (False, True):
            tag = f"M={M} {dtype} factors {factors} rank={rank}{' dropout' if dropout else ''}"
            seed, no_seed = optional(({"seed_ptr": "*i64"}, dropout))
            mask: dict[str, Any] = no_seed | (
                {"DROPOUT": True, "THRESHOLD": threshold, "KEPT_SCALE": kept_scale} if dropout else _NO_DROPOUT
            )
            sizes = dict.fromkeys(("M", "C", "r"), "i32:16")
            for tall in (False, True):
                w = {"w_ptr": f"*{factors}", **seed}
                factor = {"TALL": tall, "RANK": rank, **mask}
                bias, no_bias = optional(({"bias_ptr": f"*{dtype}"}, tall))
                down, up = down_config(M, 4096, rank, dropout), up_config(M)
                yield Variant(
                    f"lora_down {'B' if tall else 'A'} {tag}",
                    _lora_down_kernel,
                    {"x_ptr": f"*{dtype}", **w, "out_ptr": "*fp32", **sizes, "part_steps": "i32"},
                    {"SCALING": 2.0, "ROWS": down.rows, "COLUMNS": down.columns, **factor},
                    down,
                )
                yield Variant(
                    f"lora_up {'B' if tall else 'A'} {tag}",
                    _lora_up_kernel,
                    {"inner_ptr": inner, **w, **bias, "out_ptr": f"*{dtype}", **sizes},
                    {"PARTS": parts, "ROWS": up.rows, "COLUMNS": up.columns, **factor}
                    | {"HAS_BIAS": tall, "ACCUMULATE": M == 128, **no_bias},
                    up,
                )
            grads = grads_config(M, dropout)
            pointers = {"dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "u_ptr": inner, "v_ptr": inner, **seed}
            yield Variant(
                f"lora_grads {tag}",
                _lora_grads_kernel,
                pointers
                | {"grad_A_ptr": f"*{factors}", "grad_B_ptr": f"*{factors}"}
                | dict.fromkeys(("M", "N", "K", "r"), "i32:16")
                | {"tiles_B": "i32"},
                {
                    "RANK": rank,
                    "PARTS_U": parts,
                    "PARTS_V": parts,
                    "ROWS": grads.rows,
                    "COLUMNS": grads.columns,
                    **mask,
                },
                grads,
            )
    config = down_config(2048, 4096, 16, False)
    yield Variant(
        "lora_sum",
        _lora_sum_kernel,
        {"parts_ptr": "*fp32", "out_ptr": "*fp16", "M": "i32:16"},
        {"RANK": 16, "PARTS": config.parts, "ROWS": 64},
        config,
    )
