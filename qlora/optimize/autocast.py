"""Leave out autocast where it changes nothing but inserts casts.

Room: one context; torch only.  Under autocast, normalizations return float32, the residual stream becomes float32
(twice the memory of what checkpointing keeps), and every product casts its input back.  A model whose weights already
have autocast's dtype needs none of it: torch's normalizations and softmax compute in float32 whatever the dtype.
"""

from __future__ import annotations

import contextlib

import torch


def without_casts(hidden: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast, if autocast is to the dtype that these activations have; else no change."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == hidden.dtype:
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
