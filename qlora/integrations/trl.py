"""TRL's loss, which multiplies by slices of the output layer's weight: with one in 4 bits, and in idle memory.

Room: the only file that reaches into TRL's machinery; the command line uses its public names.  TRL is imported when a
model with such a layer is loaded, and not at all where it is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qkernels.errors import UserError
from qkernels.functional import autocast_dtype

from ..optimize.graphs import idle_memory
from ..output4bit import DecodedRows
from ..params4bit import Params4bit

LOGIT_TOKENS = 4096  # of TRL's tile of logits
# Of a tile in idle memory, which may be smaller than TRL's: below it, the sums over the tiles would take their time.
LEAST_WORDS = 4096
_NAME = "_ChunkedLogProbFunction"  # what TRL 1.16 calls it where it is used


def join_trl(required: bool = False) -> None:
    """Have TRL's trainers decode a 4-bit output layer slice by slice, and put a tile of logits where the blocks' CUDA
    graphs have memory that is idle; a second call changes nothing.

    Args:
        required: a model has such an output layer, so TRL is imported if it is installed.  Else only one that was
            imported already is joined.

    Raises:
        UserError: it is required, but a version whose loss is another one.
    """
    if importlib.util.find_spec("trl") is None or not (required or "trl.trainer.utils" in sys.modules):
        return
    import trl
    from trl.trainer import utils

    stock = getattr(utils, _NAME, None)
    if stock is None and required:
        raise UserError(
            "quantize_embeddings",
            expected="TRL 1.16, or a later version with its loss by slices of the vocabulary",
            got=f"TRL {trl.__version__}",
            remedy="Install trl>=1.16, or leave quantize_embeddings out.",
        )
    if stock is not None and not hasattr(stock, "joined"):
        setattr(utils, _NAME, _joined(stock))


def _joined(stock: Any) -> Any:
    class ChunkedLogProbFunction(stock):  # type: ignore[misc]
        """TRL's, whose weight may be a `Params4bit`."""

        joined = True

        @staticmethod
        def forward(
            ctx: Any,
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: Any,
            targets: Any,
            temperature: float,
            words: int,
            *others: Any,
        ) -> Any:
            dtype = autocast_dtype(hidden) or hidden.dtype
            if isinstance(weight, Params4bit):
                weight = DecodedRows(weight, dtype)
            words, memory = _tile(hidden, weight.shape[0], words, dtype)
            with memory:
                return stock.forward(ctx, hidden, weight, bias, targets, temperature, words, *others)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            hidden, weight = ctx.saved_tensors[:2]
            with _tile(hidden, weight.shape[0], ctx.chunk_size, ctx.compute_dtype)[1]:
                return stock.backward(ctx, *grads)

    return ChunkedLogProbFunction


def _tile(
    hidden: torch.Tensor, vocabulary: int, words: int, dtype: torch.dtype
) -> tuple[int, contextlib.AbstractContextManager[object]]:
    """How many words a tile of logits has, and where TRL finds memory for it.

    Args:
        hidden: [tokens, hidden size].
        words: of TRL's tile.
        dtype: of the logits.

    Returns:
        Words: as many, or fewer where that makes it fit into idle memory.
    """
    idle = idle_memory(hidden.device)
    rows = max(1, min(hidden.shape[0], LOGIT_TOKENS))
    most = 0 if idle is None else idle.numel() // (rows * dtype.itemsize)
    if idle is None or most < min(words, LEAST_WORDS):
        return words, contextlib.nullcontext()
    if most < words:
        # Tiles of one size, and of whole tiles of a product.
        tiles = -(-vocabulary // (most // 256 * 256))
        words = -(-vocabulary // (256 * tiles)) * 256
    return words, _Lend(idle, (rows, words), dtype)


class _Lend(TorchFunctionMode):
    """Within it the first `torch.empty` of this shape gets memory that is there, as the one buffer that TRL makes."""

    def __init__(self, memory: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self._shape = shape
        self._tensor: torch.Tensor | None = memory[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.empty and self._tensor is not None and args[:1] == (self._shape,):
            tensor, self._tensor = self._tensor, None
            return tensor
        return function(*args, **(kwargs or {}))
