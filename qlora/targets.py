"""Which linear layers of a model get an adapter, by peft's rules for `target_modules`, and what to say if none fits.

Room: names only; torch only.  `lora.apply_lora`, the peft integration and the command line share it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from qkernels.errors import UserError

ALL_LINEAR = "all-linear"


def likely_target_modules(model: nn.Module) -> list[str]:
    """Last parts of the names of the model's linear layers, the most frequent first.

    The output head is left out, as peft's "all-linear" does, and so are layers that already carry an adapter.
    """
    counts = Counter(name.rsplit(".", 1)[-1] for name in _linear_layers(model))
    return [name for name, _ in counts.most_common()]


def resolve_target_modules(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Full names of the linear layers that `targets` means, in the model's order.

    Args:
        model: any model.
        targets: peft's `target_modules`: a list of names, each of which means every module called so or ending in
            "." and it; or a string: "all-linear", or a regular expression that full names match as a whole.

    Raises:
        UserError: a target that names nothing, or something that is not a linear layer without an adapter.  The
            message lists the likely targets.
    """
    if targets == ALL_LINEAR:
        return list(_linear_layers(model)) or _refuse(model, targets, "no linear layer in the model")
    modules = dict(model.named_modules())
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            return _refuse(model, targets, f"not a regular expression: {error}")
        matches = {targets: [name for name in modules if pattern.fullmatch(name)]}
    else:
        matches = {
            target: [name for name in modules if name == target or name.endswith(f".{target}")] for target in targets
        }
    if not matches:
        return _refuse(model, [], "an empty list")
    chosen = set()
    for target, names in matches.items():
        if not names:
            remedy_hint = f" (write [{target!r}] for a name)" if isinstance(targets, str) else ""
            return _refuse(model, targets, f"{target!r}, which names nothing{remedy_hint}")
        for name in names:
            if hasattr(modules[name], "base_layer"):
                return _refuse(model, targets, f"{target!r}, which has an adapter already ({name})")
            if not isinstance(modules[name], nn.Linear):
                kind = type(modules[name]).__name__
                return _refuse(model, targets, f"{target!r}, which is a {kind} and not a linear layer ({name})")
        chosen.update(names)
    return [name for name in modules if name in chosen]


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not _in_adapter(name)
    }


def _in_adapter(name: str) -> bool:
    return any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))


def _refuse(model: nn.Module, targets: str | Iterable[str], got: str) -> list[str]:
    likely = likely_target_modules(model)
    raise UserError(
        "target_modules",
        expected=f"names of linear layers of {type(model).__name__}",
        got=got,
        remedy=f"Likely ones: {', '.join(likely)}." if likely else "The model has no linear layer to adapt.",
    )
