"""Whether a text has ended is looked at one token late, while the GPU computes the next one.

Room: the only file that reaches into transformers' loop of `generate`.  The loop waits for each token before it
prepares the next, and the GPU for the loop.  For Apple's GPUs transformers has a check that comes one token late and
takes back the token that was too many (`DeferredStopCheck`); here NVIDIA's have it too, where the caller cannot tell.
It makes a call of 64 tokens a tenth shorter (docs/log.md, "one row between the products").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, logits_process, utils


def can_defer(
    *,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: Any,
    streamer: Any = None,
    synced_gpus: bool = False,
    **others: Any,
) -> bool:
    """Whether a step more than the text has leaves no trace.

    The arguments are the loop's.  A streamer waits for each token itself, several processes for each other, and an
    assistant's cache goes on to be used; criteria and processors of the caller's may count how often they are asked.
    """
    config = generation_config
    return (
        config.cache_implementation == "static"  # else the host is the slower one, and a step more costs most
        and not config.return_dict_in_generate
        and not config.is_assistant
        and streamer is None
        and not synced_gpus
        and all(type(one) in (MaxLengthCriteria, EosTokenCriteria) for one in stopping_criteria)
        and all(type(one).__module__ == logits_process.__name__ for one in logits_processor)
    )


def deferred(run: Callable[[list[Any]], Tensor], input_ids: Tensor, processors: Sequence[Any]) -> Tensor:
    """The loop with the late check.

    Args:
        run: the loop, called with the processors.
        input_ids: [rows, length], the prompts.
        processors: of the logits.

    Returns:
        What `run` does.  Random numbers go on where the text's last token left them.
    """
    generator = torch.cuda.default_generators[input_ids.device.index] if input_ids.is_cuda else torch.default_generator
    noted = _Noted(generator)
    with _late_check():
        tokens = run([*processors, noted])
    if noted.steps > tokens.shape[1] - input_ids.shape[1]:
        generator.set_state(noted.state)
    return tokens


class _Noted(LogitsProcessor):
    """Notes where random numbers stand before a token is drawn."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.state, self.steps = self._generator.get_state(), self.steps + 1
        return scores


@contextlib.contextmanager
def _late_check() -> Iterator[None]:
    check = utils.DeferredStopCheck
    stock = check.__dict__["is_supported"]
    check.is_supported = staticmethod(lambda *args, **kwargs: True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        check.is_supported = stock  # type: ignore[method-assign]
