"""`Linear4bit`: a linear layer whose weight is kept in 4 bits, in bitsandbytes' format and under bitsandbytes' names.

Room: the module; torch and qkernels only.  Its differences from bitsandbytes 0.50 are listed in docs/linear4bit.md.

Y[..., N] = X[..., K] W[N, K]^T + bias[N]: the weight is decoded to the compute dtype in the forward and in the
backward pass alike, and never kept decoded.  It is frozen; the gradient flows to X and to the bias.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import nn

from qkernels import QuantState, matmul_4bit, matmul_4bit_lora
from qkernels.errors import UserError
from qkernels.functional import autocast_dtype

from .lora_product import Adapter, add_lora
from .module4bit import Module4bit
from .params4bit import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"]


class Linear4bit(Module4bit, nn.Linear):
    """`nn.Linear` with a frozen 4-bit weight.

    Build it, load a float state_dict or a quantized one, and move it: the first move to a device (`.to("cpu")` counts)
    quantizes.  `Linear4bit.from_linear` does all three.

    Args:
        input_features: K.
        output_features: N.
        bias: whether to add a bias; it stays float and trainable.
        compute_dtype: dtype of the products; the output has the input's dtype all the same.  None follows the input.
            Under autocast the layer computes in autocast's dtype and returns it, as `nn.Linear` does.
        compress_statistics: double quantization (8-bit scales).
        quant_type: "nf4" or "fp4".
        quant_storage: dtype the packed bytes are viewed as: uint8, float16, bfloat16 or float32.
        device: where the float weight is made; "meta" for a layer that a state_dict will fill.
        blocksize: elements a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096 (not in bitsandbytes' constructor).

    Raises:
        UserError: an unknown quant_type, blocksize or quant_storage; NaN or Inf in the weight when it is quantized.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        blocksize: int = 64,
    ) -> None:
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self._init_weight(
            self.weight.data,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )
        self.compute_dtype = compute_dtype

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str | None = None,
        blocksize: int = 64,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> Self:
        """Quantize a float layer; the layer itself is left as it is.

        Args:
            linear: float32, float16 or bfloat16 layer.
            quant_type: None is "nf4", or the type that the class is named after.
            device: where to quantize and keep the weight; None is where it is.  On "meta" it stays float and empty.
            blocksize, compress_statistics, quant_storage, compute_dtype: as in the constructor.

        Raises:
            UserError: not a float nn.Linear, a wrong format argument, or NaN or Inf in the weight.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise UserError(
                "linear",
                expected="a float torch.nn.Linear",
                got=type(linear).__name__,
                remedy="Pass the layer that is to be quantized.",
            )
        # No argument but the sizes: the subclasses' constructors differ, and on the meta device nothing is allocated.
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer._quantize_weight(
            linear.weight.data,
            device,
            quant_type=quant_type,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_storage=quant_storage,
        )
        if linear.bias is not None:
            bias = linear.bias.detach().to(layer.weight.device, copy=True)
            layer.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
        layer.compute_dtype = compute_dtype
        return layer.train(linear.training)

    def forward(self, x: torch.Tensor, adapter: Adapter | None = None) -> torch.Tensor:
        """Y = X W^T + bias, and an adapter's update.

        Args:
            x: float32, float16 or bfloat16 [..., K], any number of leading dimensions, none of them or empty ones too.
            adapter: added in the same product: scaling * (dropout(X) A^T) B^T.

        Returns:
            [..., N] in the dtype of x (under autocast: in autocast's dtype).

        Raises:
            UserError: the weight is not quantized yet; x has another last dimension, dtype or device.
        """
        return self._product(x, *self._packed(), self._parameter("bias"), adapter)

    def _product(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        quant_state: QuantState,
        bias: torch.Tensor | None,
        adapter: Adapter | None = None,
    ) -> torch.Tensor:
        """As `forward`, by this weight or rows of it."""
        given = x.dtype
        # Under autocast `matmul_4bit` computes in autocast's dtype and returns it.
        if self.compute_dtype is None or self.compute_dtype is given or autocast_dtype(x) is not None:
            if adapter is None:
                return matmul_4bit(x, packed, quant_state, bias=bias)
            lora_A, lora_B, scaling, p, seed = adapter
            return matmul_4bit_lora(x, packed, quant_state, lora_A, lora_B, scaling, bias, p, seed)
        y = matmul_4bit(x.to(self.compute_dtype), packed, quant_state, bias=bias).to(given)
        return y if adapter is None else add_lora(y, x, adapter)  # the adapter computes in x's dtype

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class _LinearOfOneType(Linear4bit):
    """What the classes named after a type share: a constructor without `quant_type`, as bitsandbytes' have it."""

    fixed_quant_type: ClassVar[str]

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        blocksize: int = 64,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            self.fixed_quant_type,
            quant_storage,
            device,
            blocksize=blocksize,
        )


class LinearNF4(_LinearOfOneType):
    """`Linear4bit` with NF4 codes: arguments as there, but for `quant_type`."""

    fixed_quant_type = "nf4"


class LinearFP4(_LinearOfOneType):
    """`Linear4bit` with bitsandbytes' FP4 codes: arguments as there, but for `quant_type`."""

    fixed_quant_type = "fp4"
