"""What stands beside a time: the memory that a call takes, and the GPU's clock while it was measured."""

from __future__ import annotations

import gc
import shutil
import subprocess
import threading
import time
from types import TracebackType

import torch

from .timing import Call

PERIOD_MS = 200  # of the clock's samples; asking more often would disturb what is measured


def peak_mib(call: Call, device: torch.device) -> float | None:
    """MiB that one call holds at most above what was held before it, its result included; None on a CPU.

    torch's own count: what a library allocates past torch's allocator is not in it.
    """
    if device.type != "cuda":
        return None
    call()  # compiles, tunes, and allocates what stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def empty(device: str) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peaks_gib(device: str) -> dict[str, float]:
    """A row's columns, since the peaks were reset; none without a GPU."""
    if device != "cuda":
        return {}
    return in_gib(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def in_gib(allocated: int, reserved: int) -> dict[str, float]:
    """Peaks in bytes as a row's columns."""
    return {"gpu_peak_allocated_gib": allocated / 2**30, "gpu_peak_reserved_gib": reserved / 2**30}


class Clock:
    """The SM clock of the first GPU that torch sees, as nvidia-smi samples it beside the measurements."""

    def __init__(self) -> None:
        self._mhz: float | None = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clock:
        if torch.cuda.is_available() and shutil.which("nvidia-smi") is not None:
            uuid = torch.cuda.get_device_properties(0).uuid  # nvidia-smi counts those too that torch may not use
            query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
            self._process = subprocess.Popen([*query, f"-lms={PERIOD_MS}"], stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def mhz(self) -> float | None:
        """The last sample; None where nothing tells it."""
        return self._mhz

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit():  # and not "[N/A]", as virtual GPUs answer
                self._mhz = float(line)
