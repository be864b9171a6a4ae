"""From a 4-bit layer back to the float layer it stands for.

Room: torch and the 4-bit modules only; the transformers and peft integrations build on it.
"""

from __future__ import annotations

import torch
from torch import nn

from .embedding4bit import Embedding4bit
from .linear4bit import Linear4bit


def float_layer(layer: Linear4bit | Embedding4bit, dtype: torch.dtype | None = None) -> nn.Linear | nn.Embedding:
    """The `nn.Linear` or `nn.Embedding` that computes what `layer` computes.

    Args:
        layer: quantized layer; left as it is.
        dtype: float32, float16 or bfloat16 of the new weight and bias; None is the dtype of the weight that was
            quantized.

    Returns:
        Layer with frozen parameters of its own, on the device of `layer` and in its training mode.

    Raises:
        UserError: the layer is not quantized yet, or another dtype.
    """
    weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    new: nn.Linear | nn.Embedding
    if isinstance(layer, Linear4bit):
        new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().to(weight.dtype, copy=True), requires_grad=False)
    else:
        new = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    new.weight = weight
    return new.train(layer.training)
