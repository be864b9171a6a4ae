"""What quantized weights do to a language model: KL divergence, top-1 agreement and perplexity on held-out text.

Every case is the same float32 model with its matrices replaced by what the format decodes to, so what is measured is
the format's error, not that of a product in 16 bits; that has a row of its own (bfloat16, unquantized).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..report import Row
from .distributions import Array
from .formats import Format
from .sources import is_quantized
from .statistics import Estimate, Sums, jackknife

UNQUANTIZED = ("float32", "bfloat16")


@dataclass(frozen=True)
class Replacement:
    """A case: every matrix goes through a format's round trip.  `format` None: none does."""

    name: str
    format: Format | None = None
    blocksize: int | None = None
    nested: bool | None = None


def model_error_rows(
    name: str, model: PreTrainedModel, texts: list[Tensor], replacements: Iterable[Replacement]
) -> Iterator[Row]:
    """Rows of each case, the float32 model first.

    Args:
        model: float32; its matrices are replaced and put back.
        texts: token ids [1, length] of each text, at least two tokens.
    """
    reference = [_log_probabilities(model, ids) for ids in texts]
    matrices = {n: p for n, p in model.named_parameters() if is_quantized(n, tuple(p.shape))}
    originals = {n: p.detach().clone() for n, p in matrices.items()}
    for case in (*(Replacement(dtype) for dtype in UNQUANTIZED), *replacements):
        error = _replace(matrices, originals, case)
        # A copy: what else the model holds would not come back from bfloat16.
        run = copy.deepcopy(model).bfloat16() if case.name == "bfloat16" else model
        sums = np.stack([_sums(run, ids, truth) for ids, truth in zip(texts, reference, strict=True)])
        yield _row(name, case, sums, error)
    _replace(matrices, originals, Replacement("float32"))


def _replace(matrices: dict[str, Tensor], originals: dict[str, Tensor], case: Replacement) -> float:
    """Put what the case makes of each original in its place; returns the relative RMS error of all weights."""
    parts = []
    with torch.no_grad():
        for name, parameter in matrices.items():
            original = originals[name]
            decoded = original
            if case.format is not None:
                decoded = case.format.round_trip(original, case.blocksize, case.nested)
            parameter.copy_(decoded)
            parts.append(Sums.of(original, decoded, original.numel()))
    _, squares, _, power, _, _ = Sums.pooled(parts).groups.sum(axis=0)
    return float(np.sqrt(squares / power))


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32[length - 1, vocabulary] of each next token."""
    return model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)


def _sums(model: PreTrainedModel, ids: Tensor, truth: Tensor) -> Array:
    """Over a text's tokens: how many, KL(truth | model), top-1 agreements, -log p of both models."""
    found = _log_probabilities(model, ids)
    following = ids[0, 1:, None]
    divergence = (truth.exp() * (truth - found)).sum(dim=-1).double().sum()
    agreements = (truth.argmax(dim=-1) == found.argmax(dim=-1)).sum()
    losses = [-one.gather(1, following).double().sum() for one in (found, truth)]
    return np.array([len(following), *(float(value) for value in (divergence, agreements, *losses))])


def _row(name: str, case: Replacement, sums: Array, weight_error: float) -> Row:
    row: Row = {
        "model": name,
        "format": case.name,
        "provider": case.format.provider if case.format else "torch",
        "blocksize": case.blocksize,
        "nested": case.nested,
        "bits_per_weight": case.format.bits_per_weight(case.blocksize, case.nested) if case.format else None,
        "texts": len(sums),
        "tokens": int(sums[:, 0].sum()),
        "weights_relative_rms": weight_error,
    }
    if case.name in UNQUANTIZED:
        row["bits_per_weight"] = torch.finfo(getattr(torch, case.name)).bits
    for metric, estimate in _estimates(sums).items():
        row |= {metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
    return row


def _estimates(sums: Array) -> dict[str, Estimate]:
    return {
        "kl": jackknife(sums, lambda s: s[..., 1] / s[..., 0]),
        "top1_agreement": jackknife(sums, lambda s: s[..., 2] / s[..., 0]),
        "perplexity": jackknife(sums, lambda s: np.exp(s[..., 3] / s[..., 0])),
        # Over the same tokens as float32's, so that the scatter between texts is left out.
        "perplexity_ratio": jackknife(sums, lambda s: np.exp((s[..., 3] - s[..., 4]) / s[..., 0])),
    }


def problems(rows: Iterable[Row]) -> Iterator[str]:
    """What of measured rows cannot be right, a line each."""
    for row in rows:
        what = f"{row['model']} {row['format']} {row['blocksize']} nested={row['nested']} by {row['provider']}:"
        if row["format"] == "float32" and not (row["kl"] == 0 and row["top1_agreement"] == 1):
            yield f"{what} differs from itself by {row['kl']:.3g} nats"
        if not (row["kl"] >= 0 and 0 <= row["top1_agreement"] <= 1 and row["perplexity"] >= 1):
            yield f"{what} KL {row['kl']:.3g}, top-1 {row['top1_agreement']:.3g}, perplexity {row['perplexity']:.3g}"


def line(row: Row) -> str:
    """A row as text."""
    scale = "+dq" if row["nested"] else ""
    return (
        f"{row['model']} {row['format']}{scale:3} {row['blocksize'] or '':5} {row['provider']:12} KL {row['kl']:.4f} "
        f"({row['kl_low']:.4f} to {row['kl_high']:.4f})  top-1 {100 * row['top1_agreement']:.1f}%  "
        f"perplexity {row['perplexity']:.2f}, {row['perplexity_ratio']:.4f} of float32's"
    )
