"""What the error page says, as titles, sentences, figures and tables; `page.py` makes HTML and Markdown of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..report import Row
from . import theory
from .distributions import DISTRIBUTIONS
from .figures import NAMES
from .weights import POOLED

USUAL_BLOCKSIZE = 64


@dataclass(frozen=True)
class Section:
    """Attributes:
    figure: file name of a picture, or None.
    head, body: a table; none where `body` is empty.
    """

    title: str
    text: str
    figure: str | None = None
    head: tuple[str, ...] = ()
    body: tuple[tuple[str, ...], ...] = ()


def with_interval(row: Row, key: str, digits: Callable[[float], str]) -> str:
    """A value and its 95% interval."""
    value, low, high = (row[f"{key}{end}"] for end in ("", "_low", "_high"))
    return digits(value) if low is None else f"{digits(value)} ({digits(low)} to {digits(high)})"


def percent(value: float) -> str:
    return f"{100 * value:.3f}%"


def usual(weights: list[Row], models: list[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table: the formats at the usual blocksize with double quantization, on normal weights, on a model's, and what
    they cost it.

    Args:
        weights, models: rows of the levels of these names; of the same formats.
    """
    body = []
    for row in weights:
        is_usual = row["nested"] and row["blocksize"] == USUAL_BLOCKSIZE and row["provider"] != "bitsandbytes"
        if not is_usual or row["weights"] != "normal":
            continue
        pooled = next(one for one in weights if one["tensor"] == POOLED and _peers(one) == _peers(row))
        model = next(one for one in models if _peers(one) == _peers(row))
        body.append(
            (
                NAMES[row["format"]],
                f"{row['bits_per_weight']:.2f}",
                percent(row["relative_rms"]),
                percent(row["relative_rms_theory"]),
                percent(pooled["relative_rms"]),
                with_interval(model, "kl", "{:.4f}".format),
                with_interval(model, "perplexity_ratio", "{:.3f}".format),
            )
        )
    name = models[0]["model"]
    return (
        f"blocks of {USUAL_BLOCKSIZE}, double quantization",
        "bits a weight",
        "RMS error, normal weights",
        "expected",
        f"{name}'s weights",
        "its KL from float32, nats",
        "its perplexity over float32's",
    ), body


def _peers(row: Row) -> tuple[object, ...]:
    return row["format"], row["blocksize"], row["nested"], row["provider"]


def in_short(weights: list[Row], models: list[Row]) -> list[Section]:
    """The table of `usual`; nothing where a run left out what it shows."""
    shown = {_peers(row) for row in weights if row["tensor"] == POOLED} & {_peers(row) for row in models}
    head, body = usual([row for row in weights if _peers(row) in shown], models)
    text = (
        "The error of weights beside what a theory expects of it, and what it costs a language model; 95% intervals in "
        "brackets. KL says how far the model is from itself in float32; perplexity, how well it predicts these texts, "
        "need not order the formats alike."
    )
    return [Section("In short", text, None, head, tuple(body))] if body else []


def definitions() -> list[Section]:
    return [
        Section(
            "The codes",
            "The values that a weight over its block's absmax is rounded to, on the density of what they stand for. "
            "FP4's two values beside zero are at 1/192.",
            figure="code-tables.png",
        ),
        Section(
            "A cosine, there and back",
            "512 values of a cosine in one block. Evenly spaced codes suit it better than NF4's, which are made for "
            "normal weights.",
            figure="cosine.png",
        ),
    ]


def of_weights(rows: list[Row]) -> list[Section]:
    """Drawn weights beside the theory, then real ones."""
    compared = [row for row in rows if row["mse_theory"] is not None]
    worst = max(compared, key=lambda row: abs(row["z"]) / row["z_limit"])
    sections = [
        Section(
            "Weights of known distributions",
            f"{compared[0]['count']:,} weights of each. {len(compared)} cases were compared with the theory; the "
            f"furthest off is {_case(worst)} of {worst['provider']} on {worst['weights']} weights, "
            f"{abs(worst['z']):.1f} standard errors of {worst['z_limit']:.1f} allowed.",
            "error-blocksize.png",
        )
    ]
    for name, distribution in DISTRIBUTIONS.items():
        body = [_beside_theory(row) for row in compared if row["weights"] == name and _is_shown(row)]
        bound = theory.unblocked_lloyd_max(name)
        text = f"16 codes for all weights, without blocks, cannot do better than MSE {bound:.4g} (Lloyd-Max)."
        head = (
            "format",
            "blocksize",
            "by",
            "bits",
            "MSE, measured",
            "expected",
            "RMS error",
            "MAE",
            "largest",
            "SQNR, dB",
            "cosine",
        )
        sections.append(Section(distribution.description, text, None, head, tuple(body)))
    if any(row["tensor"] == POOLED for row in rows):
        sections.append(_of_model_weights(rows))
    return sections


def _is_shown(row: Row) -> bool:
    return row["blocksize"] == USUAL_BLOCKSIZE or (row["provider"] != "bitsandbytes" and not row["nested"])


def _case(row: Row) -> str:
    return f"{NAMES[row['format']]} {row['blocksize']}" + (" with double quantization" if row["nested"] else "")


def _beside_theory(row: Row) -> tuple[str, ...]:
    return (
        *_what(row),
        with_interval(row, "mse", "{:.4g}".format),
        f"{row['mse_theory']:.4g}",
        percent(row["relative_rms"]),
        f"{row['mae']:.4g}",
        f"{row['max_error']:.3g}",
        f"{row['sqnr_db']:.2f}",
        f"{row['cosine']:.6f}",
    )


def _what(row: Row) -> tuple[str, ...]:
    scales = "+ double quantization" if row["nested"] else ""
    return (
        f"{NAMES[row['format']]} {scales}".strip(),
        str(row["blocksize"]),
        row["provider"],
        f"{row['bits_per_weight']:.3f}",
    )


def _of_model_weights(rows: list[Row]) -> Section:
    pooled = [row for row in rows if row["tensor"] == POOLED]
    body = []
    for row in pooled:
        if row["status"] != "ok":
            body.append((*_what(row), f"not run: {row['reason']}", "", "", "", ""))
            continue
        normal = theory.expected("normal", row["format"], row["blocksize"], row["nested"]).sqnr_db
        body.append(
            (
                *_what(row),
                with_interval(row, "relative_rms", percent),
                with_interval(row, "sqnr_db", "{:.2f}".format),
                f"{normal:.2f}",
                f"{row['cosine']:.6f}",
                "" if row["values_differ"] is None else f"{row['values_differ']:,} of {row['count']:,}",
            )
        )
    return Section(
        f"The weights of {pooled[0]['weights']}",
        f"{pooled[0]['count']:,} weights. The last column counts values that bitsandbytes decodes to other bits: its "
        "CPU path searches the map of the scales in another way than its GPU kernels.",
        "error-layers.png",
        ("format", "blocksize", "by", "bits", "RMS error", "SQNR, dB", "normal weights", "cosine", "differ from ours"),
        tuple(body),
    )


def of_outputs(rows: list[Row]) -> list[Section]:
    """A layer's output, in two parts."""
    few, many = min(row["m"] for row in rows), max(row["m"] for row in rows)
    body = [
        (
            f"{row['weights']}, {row['rows']} x {row['columns']}",
            row["dtype"],
            str(row["m"]),
            f"{row['provider']}, {row['implementation']}" if row.get("implementation") else row["provider"],
            *(f"{row[key]:.3e}" for key in ("total", "quantization", "quantization_expected")),
            with_interval(row, "arithmetic", "{:.3e}".format),
            f"{row['arithmetic_expected']:.3e}",
        )
        for row in rows
        if row["m"] in (few, many)
    ]
    device = "GPU" if rows[0]["device"] == "cuda" else "CPU"
    text = (
        f"y = x W^T on a {device}, x normal, NF4 in blocks of 64 with double quantization, against float64; "
        "relative to the RMS of y. torch multiplies by the weight in 16 bits, unquantized. Expected of rounding: that "
        "of the decoded weight and of y to 16 bits; a kernel that never rounds the weight can be below it."
    )
    head = ("weight", "dtype", "M", "by", "total", "quantization", "expected", "arithmetic", "expected of rounding")
    return [Section("A layer's output", text, "error-outputs.png", head, tuple(body))]


def of_model(rows: list[Row]) -> list[Section]:
    """The whole model on held-out text."""
    body = []
    for row in rows:
        quantized = row["blocksize"] is not None
        name = (
            f"{NAMES[row['format']]}{' + double quantization' if row['nested'] else ''}" if quantized else row["format"]
        )
        body.append(
            (
                name,
                str(row["blocksize"]) if quantized else "",
                row["provider"],
                f"{row['bits_per_weight']:.3f}",
                with_interval(row, "kl", "{:.4f}".format),
                with_interval(row, "top1_agreement", lambda value: f"{100 * value:.1f}%"),
                with_interval(row, "perplexity", "{:.2f}".format),
                with_interval(row, "perplexity_ratio", "{:.4f}".format),
            )
        )
    text = (
        f"{rows[0]['model']} with its matrices replaced by what they decode to, in float32, on {rows[0]['texts']} "
        f"held-out prompts ({rows[0]['tokens']:,} tokens predicted). Intervals: between texts; the last column "
        "compares token by token."
    )
    head = ("weights", "blocksize", "by", "bits", "KL, nats", "same first choice", "perplexity", "over float32's")
    return [Section("The whole model", text, "error-model.png", head, tuple(body))]
