"""What a row of results must say about the machine and the software that made it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "bitsandbytes",
    "torchao",
    "gemlite",
)


def environment(
    device: str, *, commit: str | None = None, command: str | None = None
) -> dict[str, str | bool | int | float | None]:
    """Where and with what a measurement is made.

    Args:
        device: "cuda" or "cpu".
        commit: the commit of a copy that has no `.git`, with `+` appended when files differ from it; None asks git.
        command: that makes the record; None where none does.

    Returns:
        A flat dictionary: commit, dirty, command, date (UTC), python, a version for each library (None: not
        installed), device name, compute capability, driver and CUDA versions (None on the CPU), processor, cores, host
        memory in GiB.
    """
    revision, dirty = _commit(commit)
    return {
        "commit": revision,
        "dirty": dirty,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else None,
        "driver": _driver() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "host_memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def _commit(given: str | None) -> tuple[str | None, bool | None]:
    """The revision and whether the files differ from it; (None, None) where neither git nor the caller knows."""
    if given is not None:
        return given.rstrip("+"), given.endswith("+")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None, None
    git = ["git", "-C", str(ROOT)]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    return revision, bool(status.strip())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
