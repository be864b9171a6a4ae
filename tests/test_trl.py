"""What users of TRL and transformers' Trainer do, on a 4-bit model: nothing of it needs this project's own commands."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import VOCABULARY, save_tiny
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from qlora import NF4Config, optimize_model

CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }} </s>{% endgeneration %} "
    "{% else %}w1 {{ message.content }} w2 {% endif %}{% endfor %}"
)


def words(start: int, count: int = 6) -> str:
    return " ".join(f"w{(start + step) % 90 + 3}" for step in range(count))


def texts(count: int = 8) -> Dataset:
    return Dataset.from_list([{"text": words(7 * number, 5 + number % 4)} for number in range(count)])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="w0")
    fast.chat_template = CHAT
    return fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("trl") / "llama")


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), dtype=torch.float32)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def arguments(folder: Path, kind=SFTConfig, **changes):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "max_length": 24,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return kind(output_dir=str(folder), **(settings | changes))


def sft(model, tokenizer, settings, data=None, **options) -> SFTTrainer:
    data = texts() if data is None else data
    return SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=lora(), **options)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_packing_puts_texts_side_by_side_and_they_do_not_see_each_other(model, tokenizer, tmp_path):
    trainer = sft(optimize_model(model), tokenizer, arguments(tmp_path, packing=True, per_device_train_batch_size=1))
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1  # several texts in the row
    with torch.no_grad():
        packed = trainer.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        head = trainer.model(input_ids=batch["input_ids"][:, : starts[1]]).logits
        tail = trainer.model(input_ids=batch["input_ids"][:, starts[-1] :]).logits
    torch.testing.assert_close(packed[:, : starts[1]], head, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, starts[-1] :], tail, rtol=1e-4, atol=1e-5)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_only_completions_count(model, tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": words(number), "completion": " " + words(50, 3)} for number in range(8)])
    trainer = sft(model, tokenizer, arguments(tmp_path, completion_only_loss=True), data)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    kept = labels[0][labels[0] != -100]
    assert tokenizer.decode(kept) == f"{words(50, 3)} </s>"
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_chat_templates_and_the_assistants_words_alone(model, tokenizer, tmp_path):
    talk = [{"role": "user", "content": words(3)}, {"role": "assistant", "content": words(60, 4)}]
    data = Dataset.from_list([{"messages": talk * 2}] * 8)
    trainer = sft(model, tokenizer, arguments(tmp_path, assistant_only_loss=True, max_length=48), data)
    batch = next(iter(trainer.get_train_dataloader()))
    said = batch["labels"][0] != -100
    assert tokenizer.decode(batch["input_ids"][0][said]) == f"{words(60, 4)} </s> {words(60, 4)} </s>"
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_evaluation_early_stopping_and_the_best_model(model, tokenizer, tmp_path):
    """A learning rate that ruins the adapter: the first evaluation is the best one, and its adapter comes back."""
    settings = arguments(
        tmp_path,
        max_steps=20,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = sft(model, tokenizer, settings, eval_dataset=texts(4), callbacks=[stop])
    trainer.train()
    measured = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.global_step < 20
    assert trainer.state.best_metric == min(measured)
    assert measured[-1] > min(measured)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(measured), rel=1e-5)


def test_a_batch_that_does_not_fit_is_made_smaller(model, tokenizer, tmp_path, monkeypatch):
    settings = arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=3)
    trainer = sft(model, tokenizer, settings)
    sizes, stock = [], SFTTrainer.compute_loss

    def with_little_memory(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", with_little_memory)
    trainer.train()
    assert sizes[0] == 3
    assert sizes[-1] == 2
    assert trainer.state.global_step == 3


def test_a_resumed_run_has_the_same_losses(folder, tokenizer, tmp_path):
    def trainer():
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), dtype=torch.float32)
        return sft(model, tokenizer, arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3))

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert len(losses(resumed)) == 6
    ours, theirs = (dict(each.model.named_parameters()) for each in (resumed, whole))
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items() if "lora_" in name)


def test_trackers_get_what_they_get_elsewhere(model, tokenizer, tmp_path):
    pytest.importorskip("tensorboardX", reason="a tracker, part of the [dev] extra")
    settings = arguments(tmp_path, report_to="tensorboard")
    sft(model, tokenizer, settings).train()
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("events.out.tfevents*"))
    assert all(word in written for word in (b"train/loss", b"train/learning_rate", b"train/grad_norm"))


def test_preferences_are_learned(model, tokenizer, tmp_path):
    """DPO: the reference is the 4-bit base without its adapter, so the first loss is that of a coin."""
    answers = {"chosen": " " + words(50, 3), "rejected": " " + words(20, 3)}
    rows = [{"prompt": words(number), **answers} for number in range(8)]
    settings = arguments(tmp_path, DPOConfig, max_steps=6, beta=0.5)
    trainer = DPOTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora()
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses(trainer)[-1] < 0.5
