"""Numbers that a training step leaves on the GPU until they are logged.

Room: a number that is read later; torch only.  TRL reads entropy, accuracy and the count of tokens between the forward
and the backward pass: the host waits for the one before it launches the other, and then the GPU waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, where


class Later(Tensor):
    """A tensor of one number that stays one where TRL would read it; of whatever else is done to it, it is a tensor."""

    def item(self) -> Later:  # type: ignore[override]
        return self

    def __gt__(self, other: Any) -> bool:  # type: ignore[override]
        """Asked of what is divided by, and true: the quotient looks itself."""
        return True

    def __truediv__(self, other: Any) -> Any:
        """0 where there is nothing to divide by, as TRL has it."""
        if not isinstance(other, Later):
            return super().__truediv__(other)
        count = other.as_subclass(Tensor)
        return where(count > 0, self.as_subclass(Tensor) / count, 0.0).as_subclass(Later)


@contextmanager
def read_later(accelerator: Any) -> Iterator[None]:
    """Within it what this process would gather from all is `Later`; for a process that is the only one."""
    accelerator.gather_for_metrics = lambda number: number.as_subclass(Later)
    try:
        yield
    finally:
        del accelerator.gather_for_metrics


def read(values: list[Any]) -> list[Any]:
    """The numbers, of which some may be `Later`."""
    return [value.as_subclass(Tensor).item() if isinstance(value, Later) else value for value in values]
