"""Which floating-point type to compute in, and why.

Room: hardware facts that decide the dtype of training and generation.  It answers with a reason that the
command line prints, because the QLoRA tutorials ask for bf16 everywhere and on a T4 that is the wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qkernels.errors import UserError

# bf16 tensor cores came with Ampere.  torch.cuda.is_bf16_supported() also says yes on Turing, where every
# bf16 operation is emulated in float32, so it must not decide.
BF16_CAPABILITY = (8, 0)
FP16_TENSOR_CORE_CAPABILITY = (7, 0)


@dataclass(frozen=True)
class PrecisionPolicy:
    """Attributes:
    dtype: compute dtype of the model (activations, non-quantized weights, dequantized tiles).
    reason: one printable sentence that says why.
    fp16: train with float16 autocast and a loss scaler (`TrainingArguments.fp16`).
    bf16: train with bfloat16 autocast (`TrainingArguments.bf16`).
    """

    dtype: torch.dtype
    reason: str
    fp16: bool
    bf16: bool


def choose_precision(
    device: torch.device | str | int | None = None, *, capability: tuple[int, int] | None = None
) -> PrecisionPolicy:
    """Choose the compute dtype for `device`.

    Args:
        device: where the model will run; None takes CUDA if there is one, else the CPU.
        capability: CUDA compute capability `(major, minor)`; given, no GPU is asked and `device` is taken to be
            a CUDA device (for planning a run on a GPU that is not present).

    Returns:
        bfloat16 from compute capability 8.0, float16 from 7.0 to 7.5, float32 below and on the CPU.

    Raises:
        UserError: a CUDA device is asked for on a machine without CUDA, or another kind of device.
    """
    if capability is None:
        resolved = resolve_device(device)
        if resolved.type == "cpu":
            return PrecisionPolicy(
                torch.float32,
                "float32, because the model runs on the CPU, where 16-bit matrix products are slower and less exact",
                fp16=False,
                bf16=False,
            )
        capability = torch.cuda.get_device_capability(resolved)
        name = torch.cuda.get_device_name(resolved)
    else:
        name = "the GPU"
    sm = f"{capability[0]}.{capability[1]}"
    if capability >= BF16_CAPABILITY:
        reason = f"bfloat16, because {name} has compute capability {sm} and so bfloat16 tensor cores (8.0 and later)"
        return PrecisionPolicy(torch.bfloat16, reason, fp16=False, bf16=True)
    if capability >= FP16_TENSOR_CORE_CAPABILITY:
        reason = (
            f"float16 with loss scaling, because {name} has compute capability {sm}: float16 tensor cores, "
            "but bfloat16 only by emulation (tensor cores for it came with 8.0)"
        )
        return PrecisionPolicy(torch.float16, reason, fp16=True, bf16=False)
    reason = f"float32, because {name} has compute capability {sm} and no tensor cores (they came with 7.0)"
    return PrecisionPolicy(torch.float32, reason, fp16=False, bf16=False)


def resolve_device(device: torch.device | str | int | None = None) -> torch.device:
    """The device asked for, or CUDA if there is one, else the CPU; a CUDA device always with its index.

    The index matters: the Trainer compares devices, and takes a model on "cuda" for one spread over several GPUs.

    Raises:
        UserError: the device does not parse, is neither CPU nor CUDA, or CUDA is not available.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # A bare index means CUDA; torch.device(0) raises on a machine without an accelerator.
        resolved = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise UserError(
            "device", expected="'cpu', 'cuda' or 'cuda:N'", got=repr(device), remedy="Name one of these."
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise UserError("device", expected="'cpu', 'cuda' or 'cuda:N'", got=repr(device), remedy="Name one of these.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device",
            expected="a device of this machine",
            got=repr(str(resolved)),
            remedy="torch sees no CUDA GPU here: install a CUDA build and the NVIDIA driver, or use device='cpu'.",
        )
    if resolved.type == "cpu":
        return resolved
    if resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if resolved.index >= count:
        raise UserError(
            "device",
            expected=f"a CUDA index below {count}",
            got=repr(str(resolved)),
            remedy="List the GPUs with nvidia-smi -L.",
        )
    return resolved
