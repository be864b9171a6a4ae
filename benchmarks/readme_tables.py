"""The README's tables: from the rows of records to a head and lines of cells.  Nothing is typed in but words."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from qkernels.dispatch import DEQUANTIZE, SKINNY, WGMMA

from .choice import Point, points
from .compare import AGAIN, weight_of
from .learning_curves import curves_of
from .learning_runs import PLAIN
from .report import GENERATE, Row

Table = tuple[Sequence[str], list[Sequence[str]]]

OURS, THEIRS = "qkernels", "bitsandbytes"
_PRODUCTS = {"matmul": "y", "matmul_dx": "dX"}
SHOWN_ROWS = (1, 4, 16, 64, 256, 1024, 4096)


def training(rows: list[Row]) -> Table:
    """Tokens a second and peak memory of each stack, a line a case."""
    done = {key: row for key, row in done_of(rows).items() if "tokens_per_s" in row}  # generating is no training
    stacks = stacks_of(done)
    body = []
    for name in dict.fromkeys(name for _, name in done):
        cells = [
            f"{row['tokens_per_s']:,.0f} ({row['gpu_peak_allocated_gib']:.1f})"
            if (row := done.get((stack, name)))
            else ""
            for stack in stacks
        ]
        body.append((name.replace("x", " x ") if name[0].isdigit() else f"the tutorial's {name}", *cells))
    return ("batch x length; tokens/s (GPU peak, GiB), bf16", *stacks), body


def around(rows: list[Row]) -> Table:
    """What is before and after training: seconds to load, and tokens a second to generate, with the peak memory."""
    done = done_of(rows)
    stacks = stacks_of(done)
    loaded = {stack: row for (stack, _), row in done.items()}
    generated = {stack: done.get((stack, GENERATE)) for stack in stacks}
    body = [
        (
            "loading, s",
            *(f"{loaded[s]['load_seconds']:.1f} ({loaded[s]['load_gpu_peak_allocated_gib']:.1f})" for s in stacks),
        ),
        (
            "generating, tokens/s",
            *(
                f"{row['new_tokens_per_s']:.0f} ({row['gpu_peak_allocated_gib']:.1f})" if (row := generated[s]) else ""
                for s in stacks
            ),
        ),
    ]
    return ("bf16 (GPU peak, GiB)", *stacks), body


def done_of(rows: list[Row], precision: str = "bf16") -> dict[tuple[str, str], Row]:
    """(stack, case) -> what was measured in this precision."""
    return {(row["stack"], row["name"]): row for row in rows if row["status"] == "ok" and row["precision"] == precision}


def stacks_of(done: Iterable[tuple[str, str]]) -> list[str]:
    return sorted(dict.fromkeys(stack for stack, _ in done), key=lambda stack: stack != "qlora")


def kernels(rows: list[Row]) -> Table:
    """Dequantize in a CUDA graph, quantize with a flushed cache, which is how both can be timed."""
    body = []
    for shape in dict.fromkeys((row["rows"], row["columns"]) for row in rows):
        line = [f"{shape[0]} x {shape[1]}"]
        for op, method in (("dequantize", "graph"), ("quantize", "flushed")):
            ours, theirs = (_only(rows, shape, op, method, provider) for provider in (OURS, THEIRS))
            line += [f"{ours['median_us']:.1f}", f"{theirs['median_us']:.1f}"]
            line += [f"{theirs['median_us'] / ours['median_us']:.2f}x", f"{ours['percent_of_copy']:.0f}%"]
        body.append(line)
    parts = (OURS, THEIRS, "speed-up", "of a copy's bandwidth")
    return (
        f"weight, {rows[0]['dtype']}; µs",
        *(f"{op}: {part}" for op in ("dequantize", "quantize") for part in parts),
    ), body


def matmul(rows: list[Row]) -> Table:
    """One shape, a line for each M."""
    method = "graph" if any(row["method"] == "graph" for row in rows) else "wall"
    shape = next((row["rows"], row["columns"]) for row in rows)
    found = [
        row
        for row in rows
        if (row["rows"], row["columns"], row["method"], row["op"]) == (*shape, method, "matmul")
        and row["dtype"] == rows[0]["dtype"]
    ]
    shown = [provider for provider in (OURS, THEIRS, "torch") if any(row["provider"] == provider for row in found)]
    body = []
    for m in sorted({row["m"] for row in found} & set(SHOWN_ROWS)):
        times = {row["provider"]: row["median_us"] for row in found if row["m"] == m and row["status"] == "ok"}
        speed = f"{times[THEIRS] / times[OURS]:.2f}x" if {OURS, THEIRS} <= times.keys() else ""
        body.append((str(m), *(f"{times[one]:.1f}" if one in times else "" for one in shown), speed))
    return (f"M; {shape[0]} x {shape[1]}, {rows[0]['dtype']}; µs", *shown, f"over {THEIRS}"), body


def ragged(rows: list[Row]) -> Table:
    """Weights whose rows are not whole blocks of 64: a line for each weight and product, a column for each M."""
    method = "graph" if any(row["method"] == "graph" for row in rows) else "wall"
    found = [
        row
        for row in rows
        if (row["method"], row["dtype"], row["status"]) == (method, rows[0]["dtype"], "ok") and row["op"] in _PRODUCTS
    ]
    times = {(row["op"], weight_of(row), row["m"], row["provider"]): row["median_us"] for row in found}
    ms = sorted({row["m"] for row in found})
    body = []
    for op, weight in dict.fromkeys((row["op"], weight_of(row)) for row in found):
        cells = []
        for m in ms:
            ours, *others = (times.get((op, weight, m, one)) for one in (OURS, THEIRS, "torch"))
            faster = ("-" if other is None else f"{other / ours:.2f}x" for other in others)
            cells.append("" if ours is None else f"{ours:.1f} ({', '.join(faster)})")
        shape, _, blocksize = weight.partition("/")
        name = shape.replace("x", " x ") + (f", blocks of {blocksize}" if blocksize else "")
        body.append((f"{_PRODUCTS[op]}, {name}", *cells))
    return (f"{rows[0]['dtype']}; µs (over {THEIRS}, over 16-bit cuBLAS)", *(f"M = {m}" for m in ms)), body


def not_run(rows: list[Row]) -> str:
    """Who could not run, and why; empty where all could."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault((row["provider"], row["dtype"], row["reason"]), []).append(row["op"])
    return "; ".join(
        f"{provider}, {dtype}, {' and '.join(dict.fromkeys(ops))}: {reason}"
        for (provider, dtype, reason), ops in found.items()
    )


def lora(rows: list[Row]) -> Table:
    """Forward and backward pass of one layer with an adapter, a line for each weight and M."""
    theirs, unquantized = f"{THEIRS} + peft", "torch + peft, 16 bits"
    method = "graph" if any(row["method"] == "graph" for row in rows) else "wall"
    found = [
        row
        for row in rows
        if (row["op"], row["method"], row["dtype"], row["status"]) == ("lora", method, rows[0]["dtype"], "ok")
    ]
    body = []
    for n, k, m in dict.fromkeys((row["rows"], row["columns"], row["m"]) for row in found):
        times = {
            row["provider"]: row["median_us"] for row in found if (row["rows"], row["columns"], row["m"]) == (n, k, m)
        }
        cells = (f"{times[one]:.1f}" for one in (OURS, theirs, unquantized))
        body.append((f"{n} x {k}, M = {m}", *cells, f"{times[theirs] / times[OURS]:.2f}x"))
    return (f"r = 16, {rows[0]['dtype']}; µs", OURS, theirs, unquantized, f"over {theirs}"), body


def rivals(rows: list[Row]) -> Table:
    """A line for each operation and M, a column for each provider; a dash where it cannot run."""
    shown = [row for row in rows if row["op"] in ("quantize", "dequantize", "matmul")]
    # Ours once, and without what is no rival: the reading alone.
    hidden = {row["provider"] for row in shown if row["provider"].startswith(f"{OURS}, ")} | {"read only"}
    providers = [name for name in dict.fromkeys(row["provider"] for row in shown) if name not in hidden]
    body = []
    for op, m in dict.fromkeys((row["op"], row["m"]) for row in shown):
        method = "flushed" if op == "quantize" else "graph"  # bitsandbytes' quantizer fits no graph
        times = {
            row["provider"]: f"{row['median_us']:.1f}"
            for row in shown
            if (row["op"], row["m"], row["method"]) == (op, m, method)
        }
        name = op if m is None else f"product, M = {m}"
        body.append((name, *(times.get(provider, "-") for provider in providers)))
    first = rows[0]
    return (f"{first['rows']} x {first['columns']}, {first['dtype']}; µs", *providers), body


def exercise(rows: list[Row]) -> Table:
    """The three MLPs together."""
    body = [
        (row["provider"], f"{row['seconds']:.3f}", f"{row['times_bitsandbytes']:.2f}x")
        for row in rows
        if row["hidden"] == "all"
    ]
    return ("by", "seconds for all", f"speed-up over {THEIRS}"), body


def choice(rows: list[Row]) -> Table:
    """A line for each direction and M, over all weights: what was chosen, what it loses, and what the others take."""
    groups: dict[tuple[bool, int], list[Point]] = {}
    for point in points(rows):
        groups.setdefault((point.product.backward, point.product.M), []).append(point)
    body = []
    for (backward, m), those in sorted(groups.items()):
        counts = Counter(point.chosen[0] for point in those)
        taken = ", ".join(name if len(counts) == 1 else f"{name} ({count})" for name, count in counts.items())
        slower = [point.slower for point in those]
        others = []
        for name in (DEQUANTIZE, SKINNY, WGMMA):
            factors = [factor for point in those if (factor := point.over_chosen(name)) is not None]
            others.append(f"{statistics.geometric_mean(factors):.2f}" if factors else "-")
        losses = f"{statistics.geometric_mean(slower) - 1:.1%}", f"{max(slower) - 1:.1%}"
        body.append((f"{'dX' if backward else 'y'}, M = {m}", taken, *losses, *others))
    over = (f"{name}, time over the chosen" for name in (DEQUANTIZE, SKINNY, WGMMA))
    return ("product", "chosen", "slower than the fastest measured", "at most", *over), body


def host(rows: list[Row]) -> Table:
    """What the host spends on a layer's call for one row, a line for each kind of call: the weight changes nothing."""
    kinds = {"linear4bit": "inference", "linear4bit_training": "an input that needs a gradient"}
    found = [row for row in rows if row["op"] in kinds and (row["method"], row["status"]) == ("host", "ok")]
    providers = list(dict.fromkeys(row["provider"] for row in found if not row["provider"].endswith(AGAIN)))
    body = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in found):
        cells = [f"{kinds[op]}, {dtype}"]
        for provider in providers:
            those = (row for row in found if (row["op"], row["dtype"], row["provider"]) == (op, dtype, provider))
            times = [row["median_us"] for row in those]
            cells.append(f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})")
        body.append(cells)
    return ("host's part of a call, M = 1; µs, over the weights (least to most)", *providers), body


def models(rows: list[Row]) -> Table:
    """A line for each operation, M and dtype, a column for each stack: its time, and the most that the GPU holds."""
    names = {"load": "loading", "train_step": "training step, {} tokens", "generate": "generating"}
    found = [row for row in rows if row["op"] in names and not row["provider"].endswith(AGAIN)]
    stacks = sorted(dict.fromkeys(row["provider"] for row in found), key=lambda stack: stack != "qlora")
    body: dict[tuple[object, ...], dict[str, str]] = {}
    for row in found:
        cell = "-"
        if row["status"] == "ok":
            cell = f"{row['median_us'] / 1e3:,.1f}"
            cell += "" if row["peak_mib"] is None else f" ({row['peak_mib'] / 1024:.1f})"
        body.setdefault((names[row["op"]].format(row["m"]), row["dtype"]), {})[row["provider"]] = cell
    head = f"{found[0]['model']}; ms (GPU peak, GiB)"
    return (head, *stacks), [
        (f"{name}, {dtype}", *(cells.get(stack, "") for stack in stacks)) for (name, dtype), cells in body.items()
    ]


def learning(rows: list[Row]) -> Table:
    """Each kind of weights' loss on the prompts to test on, before training and after."""
    curves = curves_of(rows)
    plain = curves[PLAIN]
    body = []
    for kind, curve in curves.items():
        cells = [kind]
        for step in (0, -1):
            cells.append(f"{curve.by_seed()[:, step].mean():.4f}")
            mean, low, high = curve.above(plain, step)
            cells.append("" if kind == PLAIN else f"{mean:+.2%} ({low:+.2%} to {high:+.2%})")
        body.append(cells)
    name = rows[0]["model"]
    return (
        f"LoRA on {name}, {len(plain.losses)} seeds",
        "loss before",
        "above 16 bits",
        f"after {plain.steps[-1]} steps",
        "above 16 bits",
    ), body


def _only(rows: Iterable[Row], shape: tuple[int, int], op: str, method: str, provider: str) -> Row:
    return next(
        row
        for row in rows
        if (row["rows"], row["columns"]) == shape
        and (row["op"], row["method"], row["provider"], row["status"]) == (op, method, provider, "ok")
    )
