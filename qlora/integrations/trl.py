"""TRL's loss, which multiplies by slices of the output layer's weight, on an output layer in 4 bits.

Room: the only file that reaches into TRL's machinery; the command line uses its public names.  TRL is imported when a
model with such a layer is loaded, and not at all where it is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from qkernels.errors import UserError
from qkernels.functional import autocast_dtype

from ..output4bit import DecodedRows
from ..params4bit import Params4bit

_NAME = "_ChunkedLogProbFunction"  # what TRL 1.16 calls it where it is used


@functools.cache
def join_trl() -> None:
    """Have TRL's trainers decode a 4-bit output layer slice by slice; a second call changes nothing.

    Raises:
        UserError: TRL is installed, but a version whose loss is another one.
    """
    if importlib.util.find_spec("trl") is None:
        return
    import trl
    from trl.trainer import utils

    stock = getattr(utils, _NAME, None)
    if stock is None:
        raise UserError(
            "quantize_embeddings",
            expected="TRL 1.16, or a later version with its loss by slices of the vocabulary",
            got=f"TRL {trl.__version__}",
            remedy="Install trl>=1.16, or leave quantize_embeddings out.",
        )
    setattr(utils, _NAME, _on_slices(stock))


def _on_slices(stock: Any) -> Any:
    class ChunkedLogProbFunction(stock):  # type: ignore[misc]
        """TRL's, whose weight may be a `Params4bit`."""

        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, *arguments: Any) -> Any:
            if isinstance(weight, Params4bit):
                weight = DecodedRows(weight, autocast_dtype(hidden) or hidden.dtype)
            return stock.forward(ctx, hidden, weight, *arguments)

    return ChunkedLogProbFunction
