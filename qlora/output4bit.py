"""`OutputLayer4bit`: a language model's output layer in 4 bits, decoded some thousand rows at a time.

Room: the module, and `DecodedRows`, its weight for a loss that multiplies by slices of rows; torch and qkernels only.
A vocabulary is long: decoded at once, Bloom-7B1's weight takes the 1.9 GiB that keeping it in 4 bits was to spare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from qkernels import QuantState, dequantize_4bit, explain
from qkernels.dispatch import SKINNY, WGMMA
from qkernels.errors import UserError
from qkernels.format import NESTED_BLOCKSIZE
from qkernels.functional import autocast_dtype

from .linear4bit import Linear4bit
from .lora_product import Adapter, add_lora
from .params4bit import Params4bit

__all__ = ["ROWS", "DecodedRows", "OutputLayer4bit", "rows_of"]

# Decoded at a time, as many as TRL's loss asks for: 256 MiB in 16 bits at 4,096 features.
ROWS = 32_768


class OutputLayer4bit(Linear4bit):
    """`Linear4bit` for a long weight of whole quantization blocks a row; its arguments are `Linear4bit`'s.

    Attributes:
        is_tied: the weight is that of the input embedding, whose state_dict holds its scales; this one's has the codes
            only, and takes none.
    """

    is_tied = False

    def forward(self, x: torch.Tensor, adapter: Adapter | None = None) -> torch.Tensor:
        """As `Linear4bit`; where the weight has to be decoded for the product, by `ROWS` rows at a time."""
        packed, quant_state = self._packed()
        if self.out_features <= ROWS or self._is_fused(x, quant_state):
            return super().forward(x, adapter)
        parts = []
        for start in range(0, self.out_features, ROWS):
            rows = slice(start, min(start + ROWS, self.out_features))
            bias = None if self.bias is None else self.bias[rows]
            parts.append(self._product(x, *rows_of(packed.data, quant_state, rows), bias))
        y = torch.cat(parts, dim=-1)
        return y if adapter is None else add_lora(y, x.to(y.dtype), adapter)

    def split_weight(self) -> None:
        raise UserError(
            self.weight_name,
            expected="a float output layer for sharding",
            got="one in 4 bits",
            remedy="Load the model without quantize_embeddings.",
        )

    def _is_fused(self, x: torch.Tensor, quant_state: QuantState) -> bool:
        """Whether one kernel decodes and multiplies, so that nothing decoded reaches memory."""
        if not x.is_cuda:
            return False
        assert quant_state.blocksize is not None
        tokens = x.numel() // self.in_features
        dtype = autocast_dtype(x) or self.compute_dtype or x.dtype
        shape = (tokens, self.out_features, self.in_features)
        directions = (False, True) if torch.is_grad_enabled() and x.requires_grad else (False,)
        return all(
            explain(*shape, dtype, x.device, blocksize=quant_state.blocksize, backward=backward).implementation
            in (SKINNY, WGMMA)
            for backward in directions
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.is_tied:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        else:
            torch.nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not self.is_tied:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        rest = {key: tensor for key, tensor in state_dict.items() if key != f"{prefix}weight"}
        with self._weight_set_aside():
            torch.nn.Module._load_from_state_dict(self, rest, prefix, *args)


class DecodedRows(torch.Tensor):
    """A 4-bit weight [N, K] as a matrix of which only slices of rows can be had, each decoded when it is asked for.

    All slices lie in one buffer: the next one overwrites the last.

    Args:
        weight: quantized, of whole quantization blocks a row.
        dtype: float32, float16 or bfloat16 of the rows.
    """

    _weight: Params4bit
    _buffer: torch.Tensor | None

    def __new__(cls, weight: Params4bit, dtype: torch.dtype) -> DecodedRows:
        assert weight.quant_state is not None
        shape = torch.Size(weight.quant_state.shape or ())
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=weight.device)
        self._weight, self._buffer = weight, None
        return self

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """Rows [n, K] of a slice without a step."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise _only_rows(f"[{rows}]")
        state = self._weight.quant_state
        assert state is not None
        start, stop, _ = rows.indices(self.shape[0])
        first = start - start % _row_step(state)
        if self._buffer is None or len(self._buffer) < stop - first:
            self._buffer = torch.empty(max(stop - first, 0), self.shape[1], dtype=self.dtype, device=self.device)
        codes, part = rows_of(self._weight.data, state, slice(first, stop))
        part.dtype = self.dtype
        with torch.no_grad():
            return dequantize_4bit(codes, part, out=self._buffer[: stop - first])[start - first :]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._weight, args[0].dtype)
        raise _only_rows(str(func))


def rows_of(packed: torch.Tensor, quant_state: QuantState, rows: slice) -> tuple[torch.Tensor, QuantState]:
    """The codes and scales of some rows of a 4-bit weight [N, K], without a copy.

    Args:
        packed: codes of all rows.
        quant_state: of a weight whose rows are whole quantization blocks.
        rows: from a multiple of 256 on (of less, where a row has several blocks).
    """
    shape: Sequence[int] = quant_state.shape or ()
    assert quant_state.blocksize is not None
    assert rows.start % _row_step(quant_state) == 0
    columns, blocks = shape[1], shape[1] // quant_state.blocksize
    codes = packed.view(torch.uint8).view(-1)[rows.start * columns // 2 : rows.stop * columns // 2]
    state2 = quant_state.state2
    if state2 is not None:
        first, last = rows.start * blocks // NESTED_BLOCKSIZE, -(-rows.stop * blocks // NESTED_BLOCKSIZE)
        count = (rows.stop - rows.start) * blocks
        state2 = QuantState(state2.absmax[first:last], (count,), state2.code, state2.blocksize, dtype=state2.dtype)
    return codes, QuantState(
        absmax=quant_state.absmax[rows.start * blocks : rows.stop * blocks],
        shape=(rows.stop - rows.start, columns),
        code=quant_state.code,
        blocksize=quant_state.blocksize,
        quant_type=quant_state.quant_type,
        dtype=quant_state.dtype,
        offset=quant_state.offset,
        state2=state2,
    )


def _row_step(quant_state: QuantState) -> int:
    """Rows after which a row begins with a scale of the scales, and with a whole byte."""
    assert quant_state.blocksize is not None
    if quant_state.state2 is None:
        return 1
    blocks = torch.Size(quant_state.shape or ())[1] // quant_state.blocksize
    return NESTED_BLOCKSIZE // math.gcd(NESTED_BLOCKSIZE, blocks)


def _only_rows(asked: str) -> UserError:
    return UserError(
        "output layer",
        expected="slices of rows, weight[start:stop], of a 4-bit weight",
        got=asked,
        remedy="Load the model without quantize_embeddings for a loss that needs more.",
    )
