"""The errors of weights as rows: a case is a weight, a format, a blocksize, with or without double quantization."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from ..report import Row
from . import check, theory
from .formats import FORMATS, RIVALS, Format, why_not
from .statistics import METRICS, Sums, estimates, group_size

Case = tuple[str, int, bool]  # format, blocksize, double quantization

POOLED = "all matrices"
CALIBRATION_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Cases:
    """What is measured on each weight."""

    formats: tuple[str, ...]
    blocksizes: tuple[int, ...]
    nested: tuple[bool, ...] = (False, True)

    def __iter__(self) -> Iterator[Case]:
        return ((f, b, n) for f in self.formats for b in self.blocksizes for n in self.nested)

    def count(self) -> int:
        return len(self.formats) * len(self.blocksizes) * len(self.nested)


def calibrate(formats: Iterable[str], device: str) -> None:
    """Hold each format against the theory on normal weights, before anything else is believed.

    Raises:
        DisagreementError: a quantizer or the measurement is wrong.
    """
    cases = Cases(tuple(formats), (64,))
    check.refuse(problems(list(synthetic_rows("normal", CALIBRATION_WEIGHTS, cases, device, total=cases.count()))))


def synthetic_rows(distribution: str, n: int, cases: Cases, device: str, total: int, seed: int = 0) -> Iterator[Row]:
    """Rows of drawn weights, beside the theory and the rivals.

    Args:
        n: weights; a multiple of every blocksize.
        total: cases that are compared with the theory in the whole run; the limit allows for so many.
    """
    weight = check.draw(distribution, n, seed).to(device)
    for format_name, blocksize, nested in cases:
        case = (distribution, format_name, blocksize, nested)
        ours = None
        for provider in _providers(format_name):
            decoded = provider.round_trip(weight, blocksize, nested)
            group = group_size(n, blocksize, nested)
            row = _row(distribution, "", provider, (format_name, blocksize, nested), Sums.of(weight, decoded, group))
            verdict = check.against_theory(weight, decoded, case, group, total)
            expected = theory.expected(*case)
            row |= {
                "max_error_allowed": None if nested else check.largest_error_allowed(weight, format_name, blocksize),
                **{f"{field.name}_theory": getattr(expected, field.name) for field in fields(expected)},
                "mse_best_table": theory.best_table_mse(distribution, blocksize) if provider.bits == 4 else None,
                "mse_controlled": verdict.controlled.value,
                "mse_controlled_error": verdict.controlled.standard_error,
                "z": verdict.z,
                "z_limit": verdict.limit,
                "rounding_excess": None if nested else check.rounding_excess(weight, decoded, format_name, blocksize),
                "values_differ": None if ours is None else int((ours != decoded).sum()),
            }
            ours = decoded if ours is None else ours
            yield row


def model_rows(
    name: str, matrices: Iterable[tuple[str, Tensor]], cases: Cases, shown: Cases, device: str
) -> Iterator[Row]:
    """Rows of all matrices of a model together, and of each.

    Args:
        cases: measured over all matrices, beside the rivals.
        shown: of these the cases that each matrix has a row of its own for, without rivals.
    """
    pooled: dict[tuple[Format, Case], list[Sums]] = {}
    differ: dict[tuple[Format, Case], int] = {}
    refused: dict[tuple[Format, Case], str] = {}
    each = set(shown)
    for tensor_name, stored in matrices:
        weight = stored.to(device)
        for case in cases:
            format_name, blocksize, nested = case
            ours = None
            for provider in _providers(format_name):
                if (reason := why_not(provider, weight, blocksize)) is not None:
                    refused[provider, case] = f"{tensor_name}: {reason}"
                    continue
                decoded = provider.round_trip(weight, blocksize, nested)
                sums = Sums.of(weight, decoded, group_size(weight.numel(), blocksize, nested))
                pooled.setdefault((provider, case), []).append(sums)
                if ours is not None:
                    differ[provider, case] = differ.get((provider, case), 0) + int((ours != decoded).sum())
                    continue
                ours = decoded
                row = _row(name, tensor_name, provider, case, sums)
                if not nested:
                    row["max_error_allowed"] = check.largest_error_allowed(weight, format_name, blocksize)
                if case in each:
                    yield row
                else:
                    check.refuse(problems([row]))
    for (provider, case), parts in pooled.items():
        if (provider, case) not in refused:
            row = _row(name, POOLED, provider, case, Sums.pooled(parts))
            yield row | {"values_differ": differ.get((provider, case))}
    for (provider, case), reason in refused.items():
        yield _blank(name, POOLED, provider, case, reason)


def problems(rows: Iterable[Row]) -> Iterator[str]:
    """What of measured rows cannot be right, a line each.  Looks at the numbers, not at a verdict that they carry."""
    for row in rows:
        if row["status"] != "ok":
            continue
        what = f"{row['weights']} {row['tensor']} {row['format']} {row['blocksize']} nested={row['nested']}"
        what += f" by {row['provider']}:"
        allowed = row["max_error_allowed"]
        if allowed is not None and not row["max_error"] <= allowed:
            yield f"{what} largest error {row['max_error']:.6g}, but rounding allows {allowed:.6g}"
        if row["rounding_excess"] is not None and not row["rounding_excess"] <= check.ROUNDING_EXCESS:
            yield f"{what} a weight is {row['rounding_excess']:.2g} further off than by the nearest code"
        if row["weights"] not in theory.DISTRIBUTIONS:
            continue
        expected = theory.expected(row["weights"], row["format"], row["blocksize"], row["nested"]).mse
        own = (row["mse_error"], row["mse_controlled_error"])
        for name, error in zip(("mse", "mse_controlled"), own, strict=True):
            z = check.distance(row[name], error, expected)
            if not abs(z) <= row["z_limit"]:
                yield f"{what} {name} {row[name]:.6g}, expected {expected:.6g}: {z:.1f} standard errors"


def _providers(format_name: str) -> list[Format]:
    return [FORMATS[format_name], *([RIVALS[format_name]] if format_name in RIVALS else [])]


_EXTRA = (
    *("max_error_allowed", "mse_theory", "mae_theory", "relative_rms_theory", "sqnr_db_theory", "cosine_theory"),
    *("mse_best_table", "mse_controlled", "mse_controlled_error", "z", "z_limit", "rounding_excess"),
    "values_differ",
)


def _identity(weights: str, tensor: str, provider: Format, case: Case) -> Row:
    format_name, blocksize, nested = case
    return {
        "weights": weights,
        "tensor": tensor,
        "format": format_name,
        "provider": provider.provider,
        "blocksize": blocksize,
        "nested": nested,
        "bits_per_weight": provider.bits_per_weight(blocksize, nested),
    }


def _row(weights: str, tensor: str, provider: Format, case: Case, sums: Sums) -> Row:
    row = _identity(weights, tensor, provider, case) | {"status": "ok", "reason": None}
    row |= {"count": int(sums.groups[:, 0].sum()), "groups": len(sums.groups), "max_error": sums.max_error}
    for name, estimate in estimates(sums).items():
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        if name == "mse":
            row["mse_error"] = estimate.standard_error
    return row | dict.fromkeys(_EXTRA)


def _blank(weights: str, tensor: str, provider: Format, case: Case, reason: str) -> Row:
    measured = [f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")]
    row = _identity(weights, tensor, provider, case) | {"status": "not run", "reason": reason}
    return row | dict.fromkeys(("count", "groups", "max_error", *measured, "mse_error", *_EXTRA))


def line(row: Row) -> str:
    """A row as text."""
    scale = "+dq" if row["nested"] else ""
    what = f"{row['weights']} {row['tensor']}".strip()
    result = row["reason"]
    if row["status"] == "ok":
        result = f"mse {row['mse']:.4e}  {row['sqnr_db']:.2f} dB  cosine {row['cosine']:.6f}"
        if row["mse_theory"] is not None:
            result += f"  expected {row['mse_theory']:.4e}, z {row['z']:+.1f}"
    return f"{what:44} {row['format']}{scale:3} {row['blocksize']:5} {row['provider']:12} {result}"
