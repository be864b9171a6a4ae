"""`qlora.trainer.Trainer` beside TRL's: the same numbers, and when the host does what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import TARGETS, VOCABULARY, save_tiny
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch._C import _is_multithreading_enabled as is_multithreading_enabled
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qlora import NF4Config, optimize_model
from qlora.arguments import TrainingArguments
from qlora.later import read, read_later
from qlora.trainer import Trainer, _Ahead

TEXTS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("bloom", tmp_path_factory.mktemp("trainer") / "bloom")


def trained(kind: type[SFTTrainer], checkpoint, output, events: list[str] | None = None, **changes) -> SFTTrainer:
    """A trainer that has run; what it did is appended to `events`."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=NF4Config(), dtype=torch.float32)
    words = Tokenizer(tokenizer_models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2}, unk_token="<unk>"))
    settings = {"per_device_train_batch_size": 2, "learning_rate": 0.02, "save_strategy": "no", "report_to": "none"}
    resume = changes.pop("resume_from_checkpoint", None)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (5 + n,), generator=generator).tolist() for n in range(TEXTS)]
    trainer = kind(
        optimize_model(model),
        TrainingArguments(str(output), use_cpu=True, disable_tqdm=True, **(settings | changes)),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[:3]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>"),
        peft_config=LoraConfig(r=4, target_modules=TARGETS["bloom"], task_type="CAUSAL_LM"),
    )
    if events is not None:
        collate = trainer.data_collator
        trainer.data_collator = lambda examples: events.append("batch") or collate(examples)
        trainer.add_callback(Events(events))
    collator = trainer.data_collator
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.data_collator is collator
    return trainer


class Events(TrainerCallback):
    def __init__(self, events: list[str]) -> None:
        self.events = events

    def on_step_begin(self, *args, **kwargs):
        self.events.append("begin")

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.events.append("gradients")

    def on_step_end(self, *args, **kwargs):
        self.events.append("end")


def history(trainer: SFTTrainer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))}
        for row in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 2, "gradient_accumulation_steps": 3},  # the last step of an epoch has one batch only
        {"max_steps": 6},
        {"max_steps": 5, "dataloader_drop_last": True, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2},
    ],
    ids=str,
)
def test_what_is_logged_and_learned_is_what_trl_does(folder, tmp_path, changes):
    ours, theirs = (trained(kind, folder, tmp_path, **changes) for kind in (Trainer, SFTTrainer))
    assert history(ours) == history(theirs)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_resumed_run_is_trls(folder, tmp_path):
    changes = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole = trained(Trainer, folder, tmp_path / "ours", **changes)
    checkpoint = str(tmp_path / "ours" / "checkpoint-3")
    for kind in (Trainer, SFTTrainer):
        resumed = trained(kind, folder, tmp_path / kind.__name__, resume_from_checkpoint=checkpoint, **changes)
        assert [row["loss"] for row in history(resumed)[:-1]] == [row["loss"] for row in history(whole)[:-1]]


@pytest.mark.parametrize(("steps", "made_in_step"), [(4, [1, 1, 0, 0]), (2, [1, 0])])
def test_the_next_batch_is_made_while_the_gpu_computes(folder, tmp_path, steps, made_in_step):
    """Behind the backward pass and before anything asks the GPU for a result; no more of them than TRL makes."""
    events: list[str] = []
    trained(Trainer, folder, tmp_path, events, max_steps=steps)
    during = [event for count in made_in_step for event in ["begin", *["batch"] * count, "gradients", "end"]]
    # The loader is a batch ahead too: the first two are there before the first step.
    assert events == ["batch", "batch", *during]
    stock: list[str] = []
    trained(SFTTrainer, folder, tmp_path, stock, max_steps=steps)
    assert sorted(stock) == sorted(events)


@pytest.mark.parametrize(
    ("device", "non_blocking", "count"), [("cpu", False, 1), ("cuda", True, 1), ("cuda", False, 0)]
)
def test_no_copy_is_waited_for(monkeypatch, device, non_blocking, count):
    """Made behind the backward pass, a batch whose copy is waited for would be waited for that much longer."""
    monkeypatch.setattr(SFTTrainer, "training_step", lambda self, *args: torch.ones(()))
    trainer = Trainer.__new__(Trainer)
    trainer.accelerator = SimpleNamespace(device=torch.device(device), non_blocking=non_blocking)
    trainer.state = SimpleNamespace(global_step=0, max_steps=9)
    trainer._batches = _Ahead(iter(range(3)))
    trainer.training_step()
    assert len(trainer._batches._fetched) == count


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"non_blocking": True}),
        ({"dataloader_pin_memory": False}, None),
        ({"use_cpu": True}, None),
        ({"accelerator_config": {"even_batches": False}}, {"even_batches": False}),
    ],
    ids=str,
)
def test_batches_are_copied_without_waiting_from_pinned_memory(monkeypatch, tmp_path, changes, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("qlora.arguments.precision_of", lambda training: SimpleNamespace(fp16=False, bf16=False))
    monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: None)  # would ask the GPU
    assert TrainingArguments(str(tmp_path), **changes).accelerator_config == expected


def test_nothing_is_read_between_forward_and_backward_pass(folder, tmp_path, monkeypatch):
    """To read a number is to wait for the GPU, which then has nothing to do."""
    reads: list[bool] = []
    compute_loss = SFTTrainer.compute_loss

    def watched(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", lambda number: reads.append(self.model.training) or 0.0)
            patch.setattr(torch.Tensor, "__bool__", lambda number: reads.append(self.model.training) or True)
            return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", watched)
    trainer = trained(Trainer, folder, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    assert len(history(trainer)) == 5
    assert reads  # in evaluation as ever
    assert not any(reads)


class Waits(TorchDispatchMode):
    """What the host could not go on from before the GPU has come there: sizes or numbers that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put") and any(one is not None and one.dtype == torch.bool for one in args[1])
        if by_mask or name in ("nonzero", "masked_select", "masked_scatter_backward", "_local_scalar_dense"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "waits"), [(Trainer, False), (SFTTrainer, True)])
def test_the_host_never_waits_within_a_step(folder, tmp_path, monkeypatch, kind, waits):
    """TRL picks labels by a mask on a GPU, whose number the host has to know."""
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)  # as there
    training_step = SFTTrainer.training_step
    found: list[str] = []

    def watched(self, *args, **kwargs):
        with Waits() as mode:
            loss = training_step(self, *args, **kwargs)
        found.extend(mode.found)
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", watched)
    trained(kind, folder, tmp_path, max_steps=2)
    assert bool(found) is waits


def test_the_backward_pass_is_in_the_thread_of_the_step(folder, tmp_path, monkeypatch):
    """On a GPU autograd would wake another one for it."""
    backward = torch.Tensor.backward
    found = []
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: found.append(is_multithreading_enabled()) or backward(loss)
    )
    trained(Trainer, folder, tmp_path, max_steps=1)
    assert found == [False]
    assert is_multithreading_enabled()


@pytest.mark.parametrize("changes", [{"max_steps": 3}, {"max_steps": 2, "gradient_accumulation_steps": 2}], ids=str)
def test_labels_picked_by_their_places_are_those_of_the_mask(folder, tmp_path, monkeypatch, changes):
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    ours, theirs = (trained(kind, folder, tmp_path, **changes) for kind in (Trainer, SFTTrainer))
    assert history(ours) == history(theirs)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_batch_without_a_label_that_counts():
    """Its entropy is 0 as in TRL, and not a quotient of nothing."""
    with read_later(accelerator := SimpleNamespace()):
        count, entropy, total = map(accelerator.gather_for_metrics, map(torch.tensor, (0, 0.5, 7)))
        assert count > 0
        assert read([(entropy / count).item(), (entropy / total).item(), 0 + total // 2, total + total, 3.0]) == [
            0.0,
            pytest.approx(0.5 / 7),
            3,
            14,
            3.0,
        ]
    assert not vars(accelerator)


def test_items_are_fetched_once_and_in_order():
    ahead = _Ahead(iter("abc"))
    ahead.fetch()
    assert next(ahead) == "a"
    ahead.fetch()
    ahead.fetch()
    ahead.fetch()  # there is none left
    assert list(ahead) == ["b", "c"]


def test_parameters_are_counted_once(monkeypatch):
    """An estimate of operations for a batch is transformers', without its walk over the modules at each step."""
    calls = []
    monkeypatch.setattr(
        SFTTrainer, "floating_point_ops", lambda self, inputs: calls.append(1) or 60 * inputs["input_ids"].numel()
    )
    trainer = Trainer.__new__(Trainer)
    found = [trainer.floating_point_ops({"input_ids": torch.ones(2, length)}) for length in (5, 9)]
    assert found == [600, 1080]
    assert calls == [1]
