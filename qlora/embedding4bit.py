"""`Embedding4bit`: an embedding table kept in 4 bits, in bitsandbytes' format; unlike bitsandbytes' it can be saved.

Room: the module; torch and qkernels only.

A look-up decodes only the rows asked for, as long as a row is a whole number of quantization blocks
(`embedding_dim % blocksize == 0`).  Otherwise a block holds the end of one row and the start of the next, rows have no
scales of their own to hand out, and the whole table is decoded before the look-up: right, but slow and as large as the
float table for the length of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from qkernels import QuantState, dequantize_4bit
from qkernels.errors import UserError
from qkernels.format import NESTED_BLOCKSIZE

from .module4bit import Module4bit

__all__ = ["Embedding4bit", "EmbeddingFP4", "EmbeddingNF4"]


class Embedding4bit(Module4bit, nn.Embedding):
    """`nn.Embedding` with a frozen 4-bit table.

    Args:
        num_embeddings: rows.
        embedding_dim: values a row.
        dtype: float32, float16 or bfloat16, of the float table and of the output; None is torch's default.
            `module.half()` and the like change the output's dtype and nothing else.
        quant_type: "nf4" or "fp4".
        quant_storage: dtype the packed bytes are viewed as.
        device: where the float table is made; "meta" for a table that a state_dict will fill.
        padding_idx: row that starts as zeros (and then stays exactly zero: the format has a zero).
        blocksize: elements a scale.
        compress_statistics: double quantization.

    Raises:
        UserError: an unknown quant_type, blocksize or quant_storage; NaN or Inf in the table when it is quantized.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        padding_idx: int | None = None,
        blocksize: int = 64,
        compress_statistics: bool = False,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._init_weight(
            self.weight.data,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        quant_type: str | None = None,
        blocksize: int = 64,
        compress_statistics: bool = False,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> Self:
        """Quantize a float embedding; it is left as it is.

        Args:
            embedding: float32, float16 or bfloat16 table, without `max_norm`.
            quant_type: None is "nf4", or the type that the class is named after.
            device: where to quantize and keep the table; None is where it is.
            blocksize, compress_statistics, quant_storage: as in the constructor.

        Raises:
            UserError: not such an embedding, a wrong format argument, or NaN or Inf in the table.
        """
        max_norm = getattr(embedding, "max_norm", None)
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding, Embedding4bit) or max_norm is not None:
            raise UserError(
                "embedding",
                expected="a float torch.nn.Embedding without max_norm (which rewrites rows at every look-up)",
                got=type(embedding).__name__ + ("" if max_norm is None else f" with max_norm={max_norm}"),
                remedy="Pass the table that is to be quantized.",
            )
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            dtype=embedding.weight.dtype,
            device="meta",
            padding_idx=embedding.padding_idx,
        )
        layer._quantize_weight(
            embedding.weight.data,
            device,
            quant_type=quant_type,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_storage=quant_storage,
        )
        return layer.train(embedding.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look rows up.

        Args:
            input: int64 or int32 row numbers [...].

        Returns:
            [..., embedding_dim] in `self.dtype`.

        Raises:
            UserError: the table is not quantized yet.
            IndexError: a row number outside the table.
        """
        packed, quant_state = self._packed()
        if quant_state.blocksize and self.embedding_dim % quant_state.blocksize == 0:
            return self._decode_rows(packed.data, quant_state, input)
        return F.embedding(input, self.dequantize(self.dtype))

    def _decode_rows(self, packed: torch.Tensor, quant_state: QuantState, rows: torch.Tensor) -> torch.Tensor:
        n = self.num_embeddings
        codes = F.embedding(rows, packed.view(torch.uint8).view(n, -1))
        scales = F.embedding(rows, quant_state.absmax.view(n, -1))
        state2 = quant_state.state2
        if state2 is not None:
            assert state2.code is not None
            assert quant_state.offset is not None
            first = rows.long()[..., None] * scales.shape[-1]
            scale_blocks = (first + torch.arange(scales.shape[-1], device=rows.device)) // NESTED_BLOCKSIZE
            scales = state2.code[scales.int()] * state2.absmax[scale_blocks] + quant_state.offset
        state = QuantState(
            absmax=scales.reshape(-1),
            shape=torch.Size((*rows.shape, self.embedding_dim)),
            code=quant_state.code,
            blocksize=quant_state.blocksize,
            quant_type=quant_state.quant_type,
            dtype=self.dtype,
        )
        return dequantize_4bit(codes.reshape(-1, 1), state)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # The codes have no dtype to cast; what `half()` and the like mean here is the output.
        cast = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.dtype = cast if cast.is_floating_point else self.dtype
        return self

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim


class _EmbeddingOfOneType(Embedding4bit):
    """What the classes named after a type share: a constructor without `quant_type`, as bitsandbytes' have it."""

    fixed_quant_type: ClassVar[str]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        padding_idx: int | None = None,
        blocksize: int = 64,
        compress_statistics: bool = False,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            dtype,
            self.fixed_quant_type,
            quant_storage,
            device,
            padding_idx=padding_idx,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
        )


class EmbeddingNF4(_EmbeddingOfOneType):
    """`Embedding4bit` with NF4 codes: arguments as there, but for `quant_type`."""

    fixed_quant_type = "nf4"


class EmbeddingFP4(_EmbeddingOfOneType):
    """`Embedding4bit` with bitsandbytes' FP4 codes: arguments as there, but for `quant_type`."""

    fixed_quant_type = "fp4"
