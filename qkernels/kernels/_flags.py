"""Flags by which programs of one launch wait for each other, zero before a launch and zero after it.

To clear them would be a launch of its own.  So a kernel leaves every flag as it found it, and launches that follow one
another, as those of a stream do, share flags.  A launch that is captured in a CUDA graph may be replayed beside others
on any stream: it has flags of its own, which no other launch gets.  They come from a reserve, which launches outside of
graphs fill up: within a graph, making zeros would be a launch at each replay.
"""

from __future__ import annotations

import torch

from ..tuning.wgmma import PROCESSORS

_RESERVED = 4096  # launches in graphs; 2 MiB

_of_stream: dict[tuple[int, int], torch.Tensor] = {}
_reserve: dict[int, list[torch.Tensor]] = {}
_blocks: list[torch.Tensor] = []  # what the reserve's flags are parts of: graphs know their addresses only


def cleared_flags(device: torch.device) -> torch.Tensor:
    """Int32[PROCESSORS] of zeros for one launch on the device's current stream.

    Nothing is cleared within a graph, unless more launches are captured without one outside of graphs than the reserve
    has flags for.
    """
    if device.type != "cuda":  # where a launch is compiled only
        return _zeros(1, device)[0]
    reserve = _reserve.setdefault(device.index, [])
    if torch.cuda.is_current_stream_capturing():
        return reserve.pop() if reserve else _zeros(1, device)[0]
    if len(reserve) <= _RESERVED // 2:
        _blocks.append(_zeros(_RESERVED, device))
        reserve.extend(_blocks[-1])
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    if key not in _of_stream:
        _of_stream[key] = _zeros(1, device)[0]
    return _of_stream[key]


def _zeros(launches: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(launches, PROCESSORS, dtype=torch.int32, device=device)
