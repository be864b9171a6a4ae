"""A tiny model with a tokenizer, tiny data, and the command line called as a user calls it."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from models import TARGETS, VOCABULARY, save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora.cli import main
from qlora.data import bundled_prompts

_SPECIAL = ["<unk>", "<eos>", "<pad>"]


def save_model(name: str, folder: Path, **changes) -> Path:
    """A checkpoint with a tokenizer that knows the most frequent words of the bundled prompts."""
    words = Counter(word for prompt in prompts() for word in prompt.split())
    known = [*_SPECIAL, *(word for word, _ in words.most_common(VOCABULARY - len(_SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # <unk> is no special token of it: generated text shows it.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return save_tiny(name, folder, **changes)


def prompts() -> list[str]:
    with bundled_prompts().open(encoding="utf-8", newline="") as file:
        return [row["prompt"] for row in csv.DictReader(file)]


def train_flags(model: Path, output: Path, name: str = "llama") -> list[str]:
    """`qlora train` on 16 bundled prompts: 4 steps an epoch, 2 epochs, a checkpoint after each."""
    settings = {
        "model_name_or_path": model,
        "output_dir": output,
        "dataset_name": "bundled",
        "max_samples": 16,
        "eval_samples": 4,
        "max_length": 24,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "sample_tokens": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    flags = ["train", "--lora_target_modules", *TARGETS[name]]
    return flags + [f"--{key}={value}" for key, value in settings.items()]


def refused(capsys, *words: str) -> str:
    """The message with which a command is refused: one line on stderr, exit code 2."""
    capsys.readouterr()
    assert main(list(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qlora")]
    assert len(lines) == 1
    return lines[0]
