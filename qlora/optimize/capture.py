"""Capturing into a CUDA graph while nothing else of the process gets in its way.

Room: the context in which this package's graphs are captured; torch only.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """`torch.cuda.graph(graph, **how)` with Python's garbage collector off.

    To destroy a graph ends every capture of its thread with an error, and in any line the collector may come upon an
    older one, of a model that is no longer used.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        # Other threads, such as a data loader's, may do as they like.
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **how):
            yield
    finally:
        if collects:
            gc.enable()
