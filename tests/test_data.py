"""Texts from files, and what a file that is wrong gets."""

from __future__ import annotations

import json

import pytest

from qkernels import UserError
from qlora.arguments import BUNDLED, DataArguments
from qlora.data import bundled_prompts, load_texts


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(name, column="prompt", **options):
    texts, held_out = load_texts(DataArguments(dataset_name=str(name), **options), column)
    return texts["text"][:], None if held_out is None else held_out["text"][:]


def wrong(name, column="prompt", **options) -> str:
    with pytest.raises(UserError) as caught:
        load(name, column, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def table(write):
    return write("texts.csv", 'act,prompt,number\nA,"one, two",1\nB,"three\nfour",2\nC,,3\nD,fünf,4\n')


def test_csv(table):
    assert load(table) == (["one, two", "three\nfour", "fünf"], None)


def test_jsonl(write):
    path = write("texts.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "b")))
    assert load(path)[0] == ["a", "b"]


def test_a_text_file_has_a_text_a_line_and_no_column(write):
    assert load(write("texts.txt", "one\n\ntwo\n"), column="whatever")[0] == ["one", "two"]


def test_the_bundled_prompts():
    texts, _ = load(BUNDLED, max_samples=None)
    assert len(texts) == len(set(texts)) == 60
    assert all(text.startswith("I want you to act as ") for text in texts)
    assert all(60 <= len(text.split()) <= 120 for text in texts)
    assert bundled_prompts().is_file()


def test_the_first_rows_train_and_the_next_are_held_out(write):
    path = write("texts.txt", "".join(f"{number}\n" for number in range(6)))
    assert load(path, max_samples=3, eval_samples=2) == (["0", "1", "2"], ["3", "4"])
    assert load(path, max_samples=None, eval_samples=2) == (["0", "1", "2", "3"], ["4", "5"])
    assert load(path, max_samples=9) == (list("012345"), None)


def test_a_tilde_is_the_home_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("texts.txt", "one\n")
    assert load("~/texts.txt")[0] == ["one"]


def test_a_missing_column_lists_the_columns(table):
    message = wrong(table, column="prompts")
    assert "act, prompt, number" in message
    assert "--dataset_text_field prompt" in message


def test_a_column_of_numbers(table):
    assert "a int: 1" in wrong(table, column="number")


@pytest.mark.parametrize("text", ["", "\n", "act,prompt\n", "act,prompt\nA,\n"])
def test_no_text(write, text):
    assert "at least one text" in wrong(write("texts.csv", text))


def test_too_few_rows_to_hold_any_out(table):
    assert "--eval_samples" in wrong(table, max_samples=3, eval_samples=1)
    assert "--eval_samples" in wrong(table, max_samples=None, eval_samples=3)


def test_a_damaged_file(write):
    assert "texts.jsonl" in wrong(write("texts.jsonl", '{"prompt": "a"\n{{{\n'))


def test_a_file_that_is_not_there_or_not_data(tmp_path, write):
    assert "no such file" in wrong(tmp_path / "texts.csv")
    assert "no such file" in wrong("./nothing/here")
    assert "'.parquet'. Convert it to .csv or .jsonl." in wrong(write("texts.parquet", "x"))
    assert "a folder" in wrong(tmp_path)


def test_a_hub_that_cannot_be_reached():
    assert "--dataset_name bundled" in wrong("nobody/nothing")
