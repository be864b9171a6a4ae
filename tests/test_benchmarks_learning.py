"""The learning curves, on a tiny model: every kind of weights, and decoding once changes no loss."""

from __future__ import annotations

import pytest
from runs import save_model

from benchmarks import learning
from benchmarks.report import read_csv


@pytest.fixture
def measured(prompts_csv, tmp_path, monkeypatch):
    """Runs the command with some flags; returns the record's rows."""
    folder = save_model("llama", tmp_path / "model", hidden_size=64, tie_word_embeddings=True)
    monkeypatch.setattr(learning, "prepare_model", lambda: folder)
    sizes = {"texts": 4, "held-out": 2, "steps": 2, "every": 1, "rank": 4, "threads": 1}
    settings = {**sizes, "device": "cpu", "data": prompts_csv, "commit": "abc"}

    def run(name: str, *flags: str):
        common = [f"--{key}={value}" for key, value in settings.items()]
        assert learning.main([*common, f"--out={tmp_path / name}", f"--figure={tmp_path / name}.png", *flags]) == 0
        (record,) = (tmp_path / name).glob("learning-cpu-*.csv")
        return read_csv(record)

    return run


def test_every_kind_of_weights_learns(measured, tmp_path, capsys):
    rows = measured("all")
    curves = learning.held_out(rows)
    assert list(curves) == list(learning.COLORS)
    for steps, losses in curves.values():
        assert steps == [0, 1, 2]
        assert losses[2] < losses[0]
    before = {weights: losses[0] for weights, (_, losses) in curves.items()}
    plain = before[learning.PLAIN]
    assert len(set(before.values())) == len(before)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert f"{learning.PLAIN:22} {plain:.4f} (+0.00%)" in capsys.readouterr().out


def test_decoding_once_changes_no_loss(measured):
    kinds = ["--weights", learning.QERA, learning.EMBEDDINGS]
    for each, once in zip(measured("each", *kinds), measured("once", *kinds, "--decode-once"), strict=True):
        assert once["loss"] == pytest.approx(each["loss"], abs=1e-5)
        assert (each["decode_once"], once["decode_once"]) == (False, True)
