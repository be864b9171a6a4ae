"""`qlora plan`: peak memory and step time of a fine-tuning run before anything is loaded, and what to choose.

Room: the command; the arithmetic is in shapes.py, memory.py and roofline.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qkernels.errors import UserError

from .arguments import LoraArguments, ModelArguments, PlanArguments, check_numbers
from .config import Parser, parse
from .gpus import Gpu, find_gpu
from .memory import ASSUMPTIONS, PARTS, Run, plan
from .optimize import can_optimize
from .precision import choose_precision
from .roofline import ASSUMPTIONS as TIME_ASSUMPTIONS
from .roofline import step_time
from .shapes import Shapes, meta_model, shapes_of
from .units import GIB

# The allocator's fragmentation, and what a prediction may be off by.
HEADROOM = 0.95
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def fits(shapes: Shapes, run: Run, available_bytes: float) -> bool:
    """Whether a run stays within the memory, with room for what the plan does not count."""
    return plan(shapes, run).total <= available_bytes * HEADROOM


def most_kept_blocks(shapes: Shapes, run: Run, available_bytes: float) -> int | None:
    """How many blocks can keep everything within the memory; None if the run does not fit without any."""
    possible = range(shapes.layers + 1)
    return max(
        (kept for kept in possible if fits(shapes, replace(run, kept_blocks=kept), available_bytes)), default=None
    )


def best_run(shapes: Shapes, run: Run, gpu: Gpu) -> Run | None:
    """The batch size and number of blocks that keep everything with the most tokens a second; None if nothing fits.

    Where the GPU's speeds are not known, the largest batch that fits.
    """
    candidates = []
    for batch_size in BATCH_SIZES:
        candidate = replace(run, batch_size=batch_size)
        kept = most_kept_blocks(shapes, candidate, gpu.memory_gib * GIB)
        if kept is not None:
            candidate = replace(candidate, kept_blocks=kept)
            time = step_time(shapes, candidate, gpu)
            candidates.append((candidate.tokens / time.total if time else candidate.tokens, candidate))
    return max(candidates, key=lambda pair: pair[0])[1] if candidates else None


def report(shapes: Shapes, runs: Sequence[Run], gpu: Gpu) -> list[str]:
    """A table as text: a line for each part of the memory and of the time, a column for each run.

    Args:
        shapes: of the model.
        runs: which differ by their batch size.
        gpu: to compare with.
    """
    plans = [plan(shapes, run) for run in runs]
    times = [step_time(shapes, run, gpu) for run in runs]

    def line(label: str, cells: Sequence[str]) -> str:
        return f"{label:<40}" + "".join(f"{cell:>10}" for cell in cells)

    lines = [line("GiB at batch size", [str(run.batch_size) for run in runs])]
    for part, label in PARTS.items():
        lines.append(line(label, [f"{getattr(p, part) / GIB:.2f}" for p in plans]))
    lines.append(line("total", [f"{p.total / GIB:.2f}" for p in plans]))
    verdicts = ["fits" if p.total <= gpu.memory_gib * GIB else "too big" for p in plans]
    lines.append(line(f"in {gpu.memory_gib:.2f} GiB", verdicts))
    if all(times):
        for label, part in (
            ("seconds a step: products", "products"),
            ("  decoding weights", "decode"),
            ("  output layer and loss", "head"),
            ("  attention", "attention"),
            ("  the rest of the blocks", "rest"),
            ("  host", "host"),
            ("a step", "total"),
        ):
            lines.append(line(label, [f"{getattr(time, part):.3f}" for time in times]))
        speeds = [f"{run.tokens / time.total:,.0f}" for run, time in zip(runs, times, strict=True) if time]
        lines.append(line("tokens a second", speeds))
    return lines


def proposal(shapes: Shapes, run: Run, gpu: Gpu) -> str:
    """One sentence: what to choose on this GPU."""
    best = best_run(shapes, run, gpu)
    if best is None:
        shorter = run
        while shorter.length > 1 and not fits(shapes, shorter, gpu.memory_gib * GIB):
            shorter = replace(shorter, batch_size=1, length=shorter.length // 2)
        if not fits(shapes, shorter, gpu.memory_gib * GIB):
            return "It does not fit, whatever the batch and the length: take a GPU with more memory."
        return f"It does not fit at this length: try --max_length {shorter.length}."
    time = step_time(shapes, best, gpu)
    speed = f", about {best.tokens / time.total:,.0f} tokens a second" if time else ""
    return (
        f"Proposed: --per_device_train_batch_size {best.batch_size} --kept_blocks {best.kept_blocks} "
        f"({plan(shapes, best).total / GIB:.2f} GiB{speed})."
    )


def main(argv: Sequence[str]) -> None:
    """`qlora plan`.

    Raises:
        UserError: wrong flags, an unknown model, GPU or target module.
    """
    parser = Parser((ModelArguments, LoraArguments, PlanArguments), prog="qlora plan")
    model_arguments, lora, wanted = parse(parser, argv, check_numbers)
    gpu = find_gpu(wanted.gpu, wanted.memory_gib)
    policy = choose_precision(capability=gpu.capability)
    model = meta_model(model_arguments.model_name_or_path, model_arguments.model_revision)
    shapes = shapes_of(model, lora)
    run = Run(
        batch_size=1,
        length=wanted.max_length,
        dtype=policy.dtype,
        recompute=wanted.recompute,
        kept_blocks=wanted.kept_blocks,
        offload=wanted.offload,
        graphs=can_optimize(model),
        double_quantization=model_arguments.use_bnb_nested_quant,
        quantize_embeddings=model_arguments.quantize_embeddings,
        capability=gpu.capability,
    )
    if wanted.kept_blocks > shapes.layers:
        raise UserError(
            "--kept_blocks", expected=f"at most {shapes.layers}", got=wanted.kept_blocks, remedy="Lower it."
        )
    runs = [replace(run, batch_size=batch_size) for batch_size in wanted.batch_size]
    print(f"{model_arguments.model_name_or_path}: {shapes.parameters / 1e9:.2f} billion parameters")
    share = shapes.trainable / (shapes.parameters + shapes.trainable)
    print(f"adapter: {shapes.trainable:,} parameters to train ({share:.4%} of all)")
    print(f"GPU: {gpu.name}, {gpu.memory_gib:.2f} GiB; precision: {policy.reason}")
    print(f"texts of {wanted.max_length} tokens\n")
    print("\n".join(report(shapes, runs, gpu)))
    print(f"\n{proposal(shapes, run, gpu)}")
    assumptions = ASSUMPTIONS + (TIME_ASSUMPTIONS if gpu.bandwidth_gbps else ())
    print("\nAn estimate. It assumes:\n" + "\n".join(f"- {text}" for text in assumptions))
