"""Rounding a weight to 4 bits for the inputs that it will meet: GPTQ's error feedback, in bitsandbytes' NF4 and FP4.

Room: one weight as numbers; torch and qkernels only.  What comes out is an ordinary 4-bit weight: scales and codes are
chosen otherwise, and read by whatever reads the format.

`quantize_4bit` makes the error of each number least.  What a model feels is the error of a layer's outputs,
x (W - Q)^T; its square is tr((W - Q) H (W - Q)^T) with H = x^T x.  As in GPTQ (Frantar et al., 2022) the columns are
rounded one after the other, the one that matters most first, and those still to come make up for what it took away.
Then each is chosen once more, now that those after it are known too.
"""

from __future__ import annotations

import torch

from qkernels import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from qkernels.format import packed_length

# Of the mean of H's diagonal, added to it: H alone would fit the texts at hand, and may not be invertible.
DAMPING = 0.01
# Parts of a block's largest magnitude that its scale may be: a smaller one cuts that number and serves all others.
SCALES = (1.03, 1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75)
# Of rounding and an adapter's part, where there is to be one.
TURNS = 2
SUBSPACE_STEPS = 4
# Columns after which the rest of the weight is brought up to date, by one product.
COLUMNS = 128
_SMALLEST_BLOCK = 32


@torch.no_grad()
def quantize_4bit_for_inputs(
    weight: torch.Tensor,
    gram: torch.Tensor,
    *,
    rank: int = 0,
    blocksize: int = 64,
    compress_statistics: bool = True,
    quant_type: str = "nf4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize a weight so that its products with certain inputs change little.

    Args:
        weight: float32[N, K].
        gram: float32[K, K], x^T x of the inputs x[n, K], on the same device; n far below K is too few.
        rank: of an adapter that will start with the best part of what is lost: then only the rest has to be small.
            Rounding and that part are found in turns.
        blocksize, compress_statistics, quant_type, quant_storage: as in `quantize_4bit`.

    Returns:
        packed codes and QuantState, as of `quantize_4bit`; the dtype of the state is float32.
    """
    values, order = get_4bit_type(quant_type, device=weight.device).sort()
    thresholds = (values[1:] + values[:-1]) / 2
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (DAMPING * mean)
    left = weight
    for turn in reversed(range(TURNS if rank else 1)):
        scales = _scales(left, gram.diagonal(), values, thresholds, blocksize)
        state, scales = _stored(scales, compress_statistics, quant_type)
        scales = scales.repeat_interleave(blocksize)[: weight.numel()].view_as(weight)
        ranks = _ranks(left, gram, scales, values, thresholds)
        if turn:
            left = weight - _best_part(weight - values[ranks] * scales, gram, rank)
    state.blocksize, state.shape = blocksize, weight.shape
    return _packed(order[ranks], quant_storage), state


def _best_part(error: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix of this rank with which x error^T is approximated best, by a few steps of subspace iteration."""
    matrix = error @ torch.linalg.cholesky(gram)
    generator = torch.Generator(error.device).manual_seed(0)
    width = min(rank + 8, *error.shape)
    basis = torch.randn(len(error), width, generator=generator, dtype=error.dtype, device=error.device)
    for _ in range(SUBSPACE_STEPS):
        basis = torch.linalg.qr(matrix @ (matrix.t() @ basis)).Q
    U = basis @ torch.linalg.svd(basis.t() @ matrix, full_matrices=False).U[:, :rank]
    return U @ (U.t() @ error)


def _scales(
    weight: torch.Tensor, importance: torch.Tensor, values: torch.Tensor, thresholds: torch.Tensor, blocksize: int
) -> torch.Tensor:
    """For each block of the flat weight that part of its largest magnitude with the least error, the squares weighted
    by the columns' importance[K]."""
    blocks = -(-weight.numel() // blocksize)
    padded = weight.new_zeros(2, blocks * blocksize)
    padded[0, : weight.numel()] = weight.reshape(-1)
    padded[1, : weight.numel()] = importance.expand_as(weight).reshape(-1)
    numbers, factors = padded.view(2, blocks, blocksize)
    largest = numbers.abs().amax(1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for part in SCALES:
        scale = (largest * part)[:, None]
        rounded = values[torch.bucketize(numbers / scale.clamp_min(torch.finfo(scale.dtype).tiny), thresholds)]
        error = ((rounded * scale - numbers).square() * factors).sum(1)
        best, least = torch.where(error < least, scale[:, 0], best), torch.minimum(error, least)
    return best


def _stored(scales: torch.Tensor, compress_statistics: bool, quant_type: str) -> tuple[QuantState, torch.Tensor]:
    """A state with these scales, and the scales as it decodes them: what the format makes of blocks with one number."""
    blocks = scales.new_zeros(len(scales), _SMALLEST_BLOCK)
    blocks[:, 0] = scales
    packed, state = quantize_4bit(
        blocks, blocksize=_SMALLEST_BLOCK, compress_statistics=compress_statistics, quant_type=quant_type
    )
    return state, dequantize_4bit(packed, state)[:, 0]


def _ranks(
    weight: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, thresholds: torch.Tensor
) -> torch.Tensor:
    """Which of the ascending `values` each number becomes, int64[N, K]; scales are those of the numbers, [N, K]."""
    order = gram.diagonal().argsort(descending=True)
    columns = weight[:, order].t().contiguous()  # a column of the weight is a row here, and lies in one piece
    scale = scales[:, order].t().contiguous()
    gram = gram[order][:, order]
    # The upper triangle U with U^T U the inverse of the Gram matrix: row k tells how the rows after k make up for k.
    feedback = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    feedback = feedback / feedback.diagonal()[:, None]
    ranks = _swept(columns.clone(), None, scale, feedback, values, thresholds)
    # Each once more, with all others as they are now: the best choice is where the error's slope is zero.
    current, steep = values[ranks] * scale, gram.diagonal()
    best = current + gram @ (columns - current) / steep[:, None]
    ranks = _swept(best, current, scale, gram / -steep, values, thresholds)
    found = torch.empty_like(ranks)
    found[order] = ranks
    return found.t()


def _swept(
    rest: torch.Tensor,
    current: torch.Tensor | None,
    scale: torch.Tensor,
    feedback: torch.Tensor,
    values: torch.Tensor,
    thresholds: torch.Tensor,
) -> torch.Tensor:
    """The ranks of the rows, one rounded after the other: those still to come take a part of what each has lost.

    Args:
        rest: float32[K, N], what to round; overwritten.
        current: float32[K, N], what a loss is counted from; None: from `rest` as it is then.
        scale: float32[K, N].
        feedback: float32[K, K], right of the diagonal: which part of row k's loss is taken from row j.
        values, thresholds: float32[16] and float32[15].
    """
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    whole = rest if current is None else current
    ranks = torch.empty_like(rest, dtype=torch.int64)
    for begin in range(0, len(rest), COLUMNS):
        end = min(begin + COLUMNS, len(rest))
        losses = torch.empty_like(rest[begin:end])
        for row, loss in enumerate(losses, start=begin):
            torch.bucketize(rest[row] * inverse[row], thresholds, out=ranks[row])
            torch.addcmul(whole[row], values[ranks[row]], scale[row], value=-1, out=loss)
            rest[row + 1 : end].addr_(feedback[row, row + 1 : end], loss, alpha=-1)
        rest[end:].addmm_(feedback[begin:end, end:].t(), losses, alpha=-1)
    return ranks


def _packed(index: torch.Tensor, quant_storage: torch.dtype) -> torch.Tensor:
    """4-bit indices, two a byte, the even one in the high half, as `quantize_4bit` packs them."""
    flat = index.reshape(-1).to(torch.uint8)
    padded = flat.new_zeros(2 * packed_length(flat.numel(), quant_storage) * quant_storage.itemsize)
    padded[: flat.numel()] = flat
    return (padded[::2] << 4 | padded[1::2]).view(quant_storage).unsqueeze(1)
