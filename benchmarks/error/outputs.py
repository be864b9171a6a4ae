"""The error of a layer's output y = x W^T with W in 4 bits, and where it comes from, against the rows M of x.

    y - x W^T (float64)  =  (y - x D^T)  +  x (D - W)^T,      D: the decoded weight, exactly
                            arithmetic      quantization

The quantization error is a property of the format: for white x its mean square over that of x W^T is |D - W|^2 / |W|^2,
which the check holds it to.  The arithmetic error is the provider's: rounding D and y to 16 bits is expected of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels

from ..report import Row
from . import check
from .statistics import Estimate, jackknife

FORMAT = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
# Rows of x that a case has in all, so that its interval is as narrow for one row a call as for many.
FEWEST_ROWS = 256

Product = Callable[[Tensor], Tensor]
PARTS = ("total", "quantization", "arithmetic")


def output_rows(
    name: str, stored: Tensor, dtype: torch.dtype, ms: tuple[int, ...], device: str, total: int
) -> Iterator[Row]:
    """Rows for each M and provider, errors relative to the root mean square of x W^T.

    Args:
        stored: W [N, K]; taken in `dtype`, and that is what all are compared with.
        dtype: of x, of y and of the products: float16 or bfloat16.
        ms: rows of x in a call.
        total: cases compared with the theory in the whole run.
    """
    weight = stored.to(device, dtype)
    exact = weight.double()
    packed, state = qkernels.quantize_4bit(weight.float(), **FORMAT)
    decoded = qkernels.dequantize_4bit(packed, state).double()
    rounded = decoded.to(dtype).double()
    expected = _relative_norm(decoded - exact, exact)
    for m in ms:
        calls = -(-FEWEST_ROWS // m)
        kernel = qkernels.explain(m, weight.shape[0], weight.shape[1], dtype, device).implementation
        x = torch.randn(calls, m, weight.shape[1], generator=torch.Generator().manual_seed(m)).to(device, dtype)
        truth, of_decoded = x.double() @ exact.t(), x.double() @ decoded.t()
        for provider, product in _providers(weight, packed, state).items():
            y = torch.stack([product(one) for one in x]).double()
            quantized = provider != "torch"
            in_float64 = of_decoded if quantized else truth
            row: Row = {
                "weights": name,
                "rows": weight.shape[0],
                "columns": weight.shape[1],
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "m": m,
                "provider": provider,
                "implementation": kernel if provider == "qkernels" else None,
                "x_rows": calls * m,
            }
            errors = {"total": y - truth, "quantization": in_float64 - truth, "arithmetic": y - in_float64}
            for part in PARTS:
                estimate = _relative_rms(errors[part], truth)
                row |= {part: estimate.value, f"{part}_low": estimate.low, f"{part}_high": estimate.high}
                row[f"{part}_error"] = estimate.standard_error
            output_rounding = _relative_norm(in_float64.to(dtype).double() - in_float64, truth)
            weight_rounding = _relative_norm(rounded - decoded, decoded) if quantized else 0.0
            row |= {
                "quantization_expected": expected if quantized else 0.0,
                "arithmetic_expected": math.hypot(output_rounding, weight_rounding),
                "z_limit": check.z_limit(calls * m, total),
            }
            yield row


def problems(rows: Iterable[Row]) -> Iterator[str]:
    """What of measured rows cannot be right, a line each."""
    for row in rows:
        what = f"{row['weights']} {row['dtype']} M={row['m']} by {row['provider']}:"
        if (expected := row["quantization_expected"]) > 0:
            z = check.distance(row["quantization"], row["quantization_error"], expected)
            if not abs(z) <= row["z_limit"]:
                yield f"{what} quantization {row['quantization']:.6g}, expected {expected:.6g}: {z:.1f} standard errors"
        if not abs(row["quantization"] - row["arithmetic"]) <= row["total"] <= row["quantization"] + row["arithmetic"]:
            yield f"{what} total error {row['total']:.6g} is not between the difference and the sum of its parts"


def _providers(weight: Tensor, packed: Tensor, state: qkernels.QuantState) -> dict[str, Product]:
    """torch multiplies by the unquantized weight: its quantization error is zero."""
    bnb_state = bnb.QuantState.from_dict(state.as_dict(), weight.device)
    bnb_state.dtype = weight.dtype
    return {
        "qkernels": lambda x: qkernels.matmul_4bit(x, packed, state),
        "bitsandbytes": lambda x: bitsandbytes.matmul_4bit(x, packed.t(), bnb_state),
        "torch": lambda x: F.linear(x, weight),
    }


def _relative_norm(error: Tensor, of: Tensor) -> float:
    return (error.norm() / of.norm()).item()


def _relative_rms(error: Tensor, truth: Tensor) -> Estimate:
    """Root of the mean square of the error over that of the truth; a row of x is a group."""
    columns = [part.square().sum(dim=-1).view(-1).cpu().numpy() for part in (error, truth)]
    return jackknife(np.stack(columns, axis=1), lambda s: np.sqrt(s[..., 0] / s[..., 1]))


def line(row: Row) -> str:
    """A row as text."""
    parts = "  ".join(f"{part} {row[part]:.3e}" for part in PARTS)
    return (
        f"{row['weights']:40} {row['dtype']:8} M={row['m']:<5} {row['provider']:12} {parts}  "
        f"expected {row['quantization_expected']:.3e}, {row['arithmetic_expected']:.3e}"
    )
