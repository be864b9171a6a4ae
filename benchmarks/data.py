"""What the stacks train on: the tutorial's prompts, and synthetic batches of one length.

The tokens are the same for every stack, made once.  Bloom's own tokenizer lies on a hub, so a byte-level BPE, which
Bloom's is too, is trained on the prompts; its ids fill the low end of the vocabulary, while the loss and its memory
are over the whole of it.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qkernels.errors import UserError

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3, as in Bloom's vocabulary
TOKENIZER_VOCABULARY = 8192
TEXT_COLUMN = "prompt"
WHERE = "Pass the file of fka/awesome-chatgpt-prompts; for a trial qlora/assets/prompts.csv will do."


def read_prompts(path: Path | None) -> list[str]:
    """Every row's `prompt`.

    Args:
        path: a CSV; None: nobody named one.

    Raises:
        UserError: no such file, or no such column.
    """
    if path is None or not path.is_file():
        raise UserError(
            "--data",
            expected=f"a CSV file with a column {TEXT_COLUMN!r}",
            got="none" if path is None else f"{path}, which is not there",
            remedy=WHERE,
        )
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if TEXT_COLUMN not in (rows.fieldnames or []):
            raise UserError(
                "--data",
                expected=f"a column {TEXT_COLUMN!r}",
                got=f"the columns {rows.fieldnames} in {path}",
                remedy=WHERE,
            )
        return [row[TEXT_COLUMN] for row in rows]


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens, with Bloom's four special tokens first."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts,
        vocab_size=min(vocab, TOKENIZER_VOCABULARY),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    unk, bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad
    )


def prompt_dataset(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Dataset:
    """One column, `input_ids`: each text's tokens and the end-of-text token."""
    ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    return Dataset.from_dict({"input_ids": ids})


def synthetic_dataset(rows: int, length: int, vocab: int, seed: int = 0) -> Dataset:
    """`rows` sequences of `length` ids each, uniform over the vocabulary without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL_TOKENS), vocab, (rows, length), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()})
