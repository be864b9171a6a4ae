"""TRL's trainer without what makes the GPU wait for the host.

Room: a subclass of `SFTTrainer` that computes the same; the steps are transformers'.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.autograd.grad_mode import set_multithreading_enabled
from trl import SFTTrainer

from . import places
from .later import read, read_later


class Trainer(SFTTrainer):
    """TRL's trainer without its model card, whose place `report.md` takes, and with the host's work out of the way.

    The next batch is made while the GPU computes, metrics are read when they are logged, and the parameters are counted
    once.
    """

    _flops_per_token: int | None = None
    _batches: _Ahead | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate for a batch, which is so many a token.

        transformers counts the parameters for it at each step, which takes longer than some blocks' forward passes.
        """
        tokens = inputs["input_ids"].numel()
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops(inputs) // tokens
        return self._flops_per_token * tokens

    def get_train_dataloader(self) -> Any:
        """As transformers', whose batches also tell where their labels are."""
        collator = self.data_collator
        if self.accelerator.num_processes == 1 and self.args.n_gpu <= 1:
            self.data_collator = places.PlacingCollator(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As transformers', from the batches that are there already."""
        if self._batches is None or self._batches.source is not epoch_iterator:
            self._batches = _Ahead(epoch_iterator)
        return super().get_batch_samples(self._batches, num_batches, device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As TRL's; then the next batch is made, for which the GPU would wait between the steps."""
        # The backward pass in this thread: to wake another one takes a part of a millisecond, in which the GPU waits.
        with set_multithreading_enabled(False):
            loss = super().training_step(*args, **kwargs)
        # A copy to the GPU that is waited for would wait for the backward pass too.
        is_free = self.accelerator.device.type == "cpu" or self.accelerator.non_blocking
        if self._batches is not None and is_free and self.state.global_step + 1 < self.state.max_steps:
            self._batches.fetch()
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; in training the metrics stay on the GPU, and nothing has to be asked of it."""
        known = inputs.pop(places.NAME, None)
        if known is not None:
            inputs["labels"] = places.placed(inputs["labels"], known)
        is_alone = model.training and self.accelerator.num_processes == 1
        with read_later(self.accelerator) if is_alone else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's, of the metrics read now."""
        for metrics in self._metrics.values():
            metrics.update({name: read(values) for name, values in metrics.items()})
        super().log(*args, **kwargs)


class _Ahead(Iterator[Any]):
    """An iterator that takes the next item of another one when it is told to, before it is asked for it.

    Attributes:
        source: the other one.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self._fetched: deque[Any] = deque()

    def fetch(self) -> None:
        """Take one item; at the end nothing."""
        for item in self.source:
            self._fetched.append(item)
            return

    def __next__(self) -> Any:
        return self._fetched.popleft() if self._fetched else next(self.source)
