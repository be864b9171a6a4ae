"""Three ways to time rivals on a GPU, and one on a CPU; each gives percentiles of repeated runs.

On a GPU rivals are timed in turns, so that what changes meanwhile, as the clock does, meets all alike.

* `flushed`: the L2 cache is emptied before every call, and events stand around the call.  Emptying it takes the GPU
  longer than the host takes to launch the call, so no wait for the host is in the time.
* `graph`: calls over enough different inputs to overflow the L2 cache, captured in one CUDA graph; no launch gaps.
* `host`: a CPU's clock around calls that are not waited for, rivals in turns: what the host spends on a call, where the
  GPU is faster.
* `wall`: a CPU's clock around the call, for trials.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

Call = Callable[[], object]
Look = Callable[[int], list[float]]  # so many repeats -> microseconds a call of each
Key = TypeVar("Key")
TURNS = 5
FLUSH_BYTES = 256 << 20  # several times any L2 cache


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, and the 20th and 80th percentiles."""

    median_us: float
    p20_us: float
    p80_us: float


def in_turns(looks: Mapping[Key, Look], repeats: Mapping[Key, int]) -> dict[Key, list[float]]:
    """Look at each so often, a share of it in each of several turns: a drift of the GPU's clock meets all alike.

    The clock falls by a third while large products run, and what is timed after them begins with it.
    """
    times: dict[Key, list[float]] = {name: [] for name in looks}
    for _ in range(TURNS):
        for name, look in looks.items():
            times[name] += look(-(-repeats[name] // TURNS))
    return times


def flushed(calls: Mapping[str, Call], seconds: float = 0.06) -> dict[str, Timing]:
    """Time one call at a time, each with a cold L2 cache, for about so many seconds each; in turns."""
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    fill_s = _seconds(buffer.zero_)
    looks: dict[str, Look] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        for _ in range(3):  # compiles and warms up
            call()
        begin = time.perf_counter()
        for _ in range(3):
            call()
        # Twice as long as the host takes now: it may be slower later.
        fills = 1 + math.ceil(2 * (time.perf_counter() - begin) / 3 / fill_s)
        repeats[name] = min(200, max(20, int(seconds / (fills * fill_s + _seconds(call)))))
        looks[name] = partial(_cold, call, buffer.zero_, fills)
    return {name: percentiles(times) for name, times in in_turns(looks, repeats).items()}


def _cold(call: Call, fill: Call, fills: int, repeats: int) -> list[float]:
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for before, after in pairs:
        for _ in range(fills):
            fill()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return [1e3 * before.elapsed_time(after) for before, after in pairs]


def _seconds(call: Call) -> float:
    """The GPU's time for a call, roughly."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(3):
        call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 3e3


def graph(calls: Mapping[str, Sequence[Call]], repeats: int = 30) -> dict[str, Timing]:
    """Time rotations of calls, each in one CUDA graph, in turns; microseconds a call.

    Raises:
        RuntimeError: a call cannot be captured.
    """
    looks = {name: rotation(those) for name, those in calls.items()}
    return {name: percentiles(times) for name, times in in_turns(looks, dict.fromkeys(calls, repeats)).items()}


def rotation(calls: Sequence[Call]) -> Look:
    """Capture a rotation of calls in one CUDA graph, for several looks at it.

    Raises:
        RuntimeError: a call cannot be captured.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()

    def look(repeats: int) -> list[float]:
        captured.replay()
        begins = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        for begin, end in zip(begins, ends, strict=True):
            begin.record()
            captured.replay()
            end.record()
        torch.cuda.synchronize()
        return [1e3 * b.elapsed_time(e) / len(calls) for b, e in zip(begins, ends, strict=True)]

    return look


def host(calls: Mapping[str, Call], repeats: int = 50, rounds: int = 101) -> dict[str, Timing]:
    """Time the host's part of several calls, in turns, so that what else the machine does meets all alike.

    In a round each is called so often, and waited for before and after only: too short a time for other processes to
    meet most rounds, and too few calls to fill the queue of launches, where the host would wait for the GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append(1e6 * (time.perf_counter() - begin) / repeats)
    torch.cuda.synchronize()
    return {name: percentiles(those[1:]) for name, those in times.items()}  # the first round warms up


def wall(calls: Mapping[str, Call], repeats: int = 5) -> dict[str, Timing]:
    """Time on a CPU; for trials of the script."""
    return {name: percentiles(clock(call, repeats)) for name, call in calls.items()}


def clock(call: Call, repeats: int) -> list[float]:
    """Microseconds of each call by a CPU's clock, after a first one."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return times


def percentiles(times_us: Sequence[float]) -> Timing:
    """Of repeated runs; of a single one that time, three times."""
    if len(times_us) == 1:
        return Timing(*3 * tuple(times_us))
    fifths = statistics.quantiles(times_us, n=5, method="inclusive")
    return Timing(statistics.median(times_us), fifths[0], fifths[3])
