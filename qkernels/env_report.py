"""`python -m qkernels.env_report`: what is installed, and what each operation runs on here and why.

Room: a report for people and bug reports.  It looks; it launches nothing and imports no other library than torch.
"""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

import torch

from .bitsandbytes_backend import OPERATORS, reason_not_to
from .dispatch import Capability, explain
from .ops import SCHEMAS

LIBRARIES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "bitsandbytes")
_PRODUCTS = ("gemm_4bit", "gemm_4bit_dx")
_ROWS = (1, 16, 128, 512, 4096)


def report() -> str:
    """The whole report, several lines."""
    lines = ["versions", *(f"  {name:<16}{version}" for name, version in versions().items()), "", "GPU"]
    lines += [f"  {line}" for line in gpus()]
    lines += ["", "operation of qkernels       runs as, and why"]
    lines += [f"  {name:<26}{backend}" for name, backend in backends().items()]
    lines += ["", "bitsandbytes", f"  {bitsandbytes()}"]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries around it; "not installed" where one is missing."""
    return {
        "qkernels": _version("qkernels-qlora"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: _version(name) for name in LIBRARIES},
        "CUDA of torch": torch.version.cuda or "none: a build of torch without CUDA",
    }


def gpus() -> list[str]:
    """One line a GPU that torch sees, or one that says there is none."""
    if not torch.cuda.is_available():
        return ["none that torch can use"]
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"{index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
        f"{gpu.total_memory / 2**30:.1f} GiB"
        for index, gpu in enumerate(found)
    ]


def backends(capability: Capability | None = None) -> dict[str, str]:
    """For each operation what runs it, and why; the products by rows of x, for Bloom-7B1's largest weight in float16.

    Args:
        capability: compute capability of a GPU; None is that of this machine's, or the CPU if it has none.
    """
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    result = {}
    for name in (name for name in SCHEMAS if "." not in name):
        if name not in _PRODUCTS or capability is None or importlib.util.find_spec("triton") is None:
            result[name] = _backend(capability)
            continue
        for rows in _ROWS:
            choice = explain(rows, 16384, 4096, torch.float16, capability, backward=name.endswith("_dx"))
            result[f"{name}, M={rows}"] = f"{choice.implementation}: {choice.reason}"
    return result


def bitsandbytes() -> str:
    """Whether an installed bitsandbytes runs on this project's kernels, and why or why not."""
    if _version("bitsandbytes") == "not installed":
        return "not installed, and not needed"
    reason = reason_not_to()
    here = any(entry.value.startswith("qkernels.") for entry in metadata.entry_points(group="bitsandbytes.backends"))
    if reason is None and not here:
        reason = "this package is not installed (pip install), so that bitsandbytes does not find it"
    if reason is not None:
        return f"runs on its own kernels: {reason}"
    names = ", ".join(name for name in OPERATORS if "." not in name)
    return f"runs on these kernels for tensors on a GPU (entry point bitsandbytes.backends): {names}"


def _backend(capability: Capability | None) -> str:
    if importlib.util.find_spec("triton") is None:
        return "plain torch: Triton is not installed"
    if capability is None:
        return "plain torch: no GPU; tensors on the CPU are handled by the reference"
    return "Triton kernel: tensors on a GPU"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
