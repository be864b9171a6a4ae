"""The 4-bit format, written down once: code tables, decision thresholds, sizes and the 8-bit map of the scales.

Room: numbers only.  Every other file takes them from here; nothing here touches a GPU.

Layout (the one of bitsandbytes 0.50, so that files travel both ways):

* A tensor of n elements, read in row-major order, is cut into blocks of `blocksize` elements; the last may be short.
* Each block has one float32 scale, `absmax`, the largest magnitude in it.
* Each element is stored as a 4-bit index into a 16-entry code table; element 2j is the HIGH nibble of byte j, element
  2j + 1 the low one.
* decoded element = float32(code[index]) * float32(absmax), rounded once to the output dtype.
* Double quantization (`compress_statistics`): absmax minus its mean is stored in 8 bits with the signed dynamic map, in
  blocks of 256 with float32 scales of their own; decoded absmax = round(code8[index8] * absmax2) + mean, two roundings.

Sources: Dettmers et al., QLoRA, arXiv 2305.14314 (NF4, double quantization); Dettmers et al., 8-bit Optimizers via
Block-wise Quantization, arXiv 2110.02861 (dynamic map); bitsandbytes' CUDA kernels for the exact decisions.
"""

from __future__ import annotations

import torch

from .errors import UserError

QUANT_TYPES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANT_STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
# The smallest normal float32.  A block whose absmax is below it counts as all zero, as where the GPU flushes to zero.
SMALLEST_NORMAL = 2.0**-126

# NormalFloat4: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero at index 7.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# FP4, bitsandbytes' own (not OCP E2M1): sign, two exponent bits, one mantissa bit, in the order of the bit patterns.
# 1/192 stands for the subnormal; everything is divided by the largest magnitude, 12.
FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4_CODE = (*FP4_MAGNITUDES, *(-m for m in FP4_MAGNITUDES))

# index = how many thresholds lie strictly below the scaled value; a tie takes the lower index, NaN takes index 0.
# Both tables are the constants in the machine code of bitsandbytes 0.50.2, which its files follow.  They are the
# midpoints of neighbouring codes up to rounding: four of these fifteen are one ulp off the float32 midpoint.  (The last
# is written 0.8614784181118011 in bitsandbytes' source; as a double that lies half way and would round up.)
NF4_THRESHOLDS = (
    -0.8480964303016663,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552542090416,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016633868217468,
    0.6427869200706482,
    0.8614783883094788,
)
# On magnitudes, from small to large: six-to-eight-digit decimals, five of the seven off the float32 midpoint.
FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
# Bit pattern of the k-th smallest magnitude.
FP4_PATTERNS = (0, 1, 6, 7, 4, 5, 2, 3)

# The index that decodes to zero.  An all-zero block stores it, so that it stays zero whatever scale it is given.
ZERO_INDEX = {"nf4": 7, "fp4": 0}

_CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}


def code_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """The float32[16] code table of `quant_type` on `device`, shared: callers must not write to it."""
    return _shared_table(quant_type, device)


def byte_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """What each packed byte decodes to: float32[256, 2], (even element, odd element); shared like `code_table`."""
    return _shared_table(f"{quant_type} bytes", device)


def dynamic_map(device: torch.device) -> torch.Tensor:
    """The signed 8-bit dynamic map, float32[256], on `device`, shared: callers must not write to it."""
    return _shared_table("dynamic", device)


def _shared_table(name: str, device: torch.device) -> torch.Tensor:
    table = _TABLES.get((name, device))
    if table is None:
        table = _TABLES[name, torch.device("cpu")].to(device)
        # A tensor made inside a compiled graph may live in memory that the graph takes back: not to be kept.
        if not torch.compiler.is_compiling():
            _TABLES[name, device] = table
    return table


def blockwise_thresholds(code: torch.Tensor) -> torch.Tensor:
    """Decision thresholds of an 8-bit map: index = how many of them lie strictly below the scaled value.

    bitsandbytes searches by bisection, which always ends on an even index.  So a value exactly half way between two
    codes goes down from an even index and up from an odd one; moving the odd midpoints down by one ulp says the same.

    Args:
        code: float32[256], ascending.

    Returns:
        float32[255] on the device of `code`.
    """
    middle = (code[:-1] + code[1:]) * 0.5
    middle[1::2] = torch.nextafter(middle[1::2], torch.full_like(middle[1::2], -torch.inf))
    return middle


def packed_length(n: int, storage: torch.dtype = torch.uint8) -> int:
    """Elements of dtype `storage` that hold `n` nibbles, rounded up to whole storage elements."""
    n_bytes = (n + 1) // 2
    return -(-n_bytes // storage.itemsize)


def block_count(n: int, blocksize: int) -> int:
    """Blocks, and so scales, of `n` elements."""
    return -(-n // blocksize)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> torch.Tensor:
    """The code table of a 4-bit type.

    Args:
        typename: "nf4" or "fp4".
        device: where the tensor goes; None is torch's default device (bitsandbytes: "cuda").
        blocksize: accepted for bitsandbytes' signature; no table here depends on it.

    Returns:
        float32[16], in index order (for FP4 the order of the bit patterns).

    Raises:
        UserError (a ValueError): another typename.
    """
    if typename not in _CODES:
        raise UserError("typename", expected=f"one of {', '.join(_CODES)}", got=repr(typename), remedy="Use 'nf4'.")
    return torch.tensor(_CODES[typename], dtype=torch.float32, device=device)


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Derive the NormalFloat table from the normal distribution's quantiles (QLoRA, section 3).

    Args:
        offset: outermost quantile, a probability in (0.5, 1); 0.9677083 gives NF4.
        use_extra_value: one more positive than negative value (NF4); False gives a symmetric table.

    Returns:
        float32[256] ascending: the 15 (or 14) non-zero values and zeros between them, as bitsandbytes lays it out.
    """
    from scipy.stats import norm

    if not 0.5 < offset < 1:
        raise UserError("offset", expected="a probability between 0.5 and 1", got=offset, remedy="Use 0.9677083.")
    positive = norm.ppf(torch.linspace(offset, 0.5, 9 if use_extra_value else 8)[:-1])
    negative = -norm.ppf(torch.linspace(offset, 0.5, 8)[:-1])
    zeros = [0.0] * (256 - len(positive) - len(negative))
    values = torch.tensor([*positive.tolist(), *zeros, *negative.tolist()], dtype=torch.float32).sort().values
    return values / values.max()


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """The dynamic 8-bit data type: a unary exponent whose length leaves the rest of the bits to the fraction.

    Args:
        signed: half the values are negative.
        max_exponent_bits: decades covered, 10^-(max_exponent_bits - 1) to 1.
        total_bits: 2^total_bits values, at most 8 bits.

    Returns:
        float32[256] ascending, zeros added when total_bits < 8; index 127 is 0.0 and 255 is 1.0 for the signed default.
    """
    if not 1 <= max_exponent_bits < total_bits <= 8:
        raise UserError(
            "max_exponent_bits, total_bits",
            expected="1 <= max_exponent_bits < total_bits <= 8",
            got=f"{max_exponent_bits}, {total_bits}",
            remedy="Use 7, 8.",
        )
    values = [0.0, 1.0]
    fraction_bits = total_bits - 1 - max_exponent_bits

    def add_decade(exponent: int, steps: int) -> None:
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32)
        means = 10.0 ** (exponent - max_exponent_bits + 1) * ((edges[:-1] + edges[1:]) / 2)
        values.extend(means.tolist())
        if signed:
            values.extend((-means).tolist())

    for exponent in range(max_exponent_bits):
        add_decade(exponent, int(2.0 ** (exponent + fraction_bits + (0 if signed else 1))))
    if (additional := 2**fraction_bits - 1) > 0:
        add_decade(max_exponent_bits - 1, int(additional))
    values.extend([0.0] * (256 - len(values)))
    return torch.tensor(sorted(values), dtype=torch.float32)


_TABLES: dict[tuple[str, torch.device], torch.Tensor] = {
    ("nf4", torch.device("cpu")): torch.tensor(NF4_CODE, dtype=torch.float32, device="cpu"),
    ("fp4", torch.device("cpu")): torch.tensor(FP4_CODE, dtype=torch.float32, device="cpu"),
    ("dynamic", torch.device("cpu")): create_dynamic_map(),
}
for _name in QUANT_TYPES:
    _code = _TABLES[_name, torch.device("cpu")]
    _TABLES[f"{_name} bytes", torch.device("cpu")] = torch.cartesian_prod(_code, _code)
