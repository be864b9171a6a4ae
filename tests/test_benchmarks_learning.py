"""The learning curves, on a tiny model: every kind of weights, what is chosen on what, and the intervals."""

from __future__ import annotations

import math
from collections import deque
from operator import getitem

import numpy as np
import pytest
import torch
from train_runs import save_model

from benchmarks import learning, learning_curves, learning_runs
from benchmarks.learning_runs import BOTH, CALIBRATED, EMBEDDINGS, PLAIN, QERA, RIVAL, ZERO
from benchmarks.report import read_csv


@pytest.fixture
def measured(prompts_csv, tmp_path, monkeypatch):
    """Runs the command with some flags; returns the record's rows."""
    folder = save_model("llama", tmp_path / "model", hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    monkeypatch.setattr(learning, "prepare_model", lambda: folder)
    sizes = {"train": "0:5", "choose": "6:7", "steps": 2, "every": 1, "rank": 4, "learning-rate": 0.01}
    settings = {**sizes, "device": "cpu", "data": prompts_csv, "commit": "abc"}

    def run(name: str, *flags: str):
        common = [f"--{key}={value}" for key, value in settings.items()]
        flags = ("--seeds", "0", "1", *flags)
        assert learning.main([*common, f"--out={tmp_path / name}", f"--figure={tmp_path / name}.png", *flags]) == 0
        (record,) = (tmp_path / name).glob("learning-curves-cpu-*.csv")
        return read_csv(record)

    return run


def test_every_kind_of_weights_learns(measured, tmp_path, capsys):
    rows = measured("all", "--weights", *learning_runs.WEIGHTS[1:])
    curves = learning_curves.curves_of(rows)
    assert list(curves) == list(learning_runs.WEIGHTS)
    before = {}
    for kind, curve in curves.items():
        assert curve.steps == [0, 1, 2]
        assert curve.losses.shape == (2, 3, 2)  # rows 5 and 7 of 8 are left to test on
        ends = curve.by_seed()
        assert (ends[:, 2] < ends[:, 0]).all()
        assert ends[0, 0] == ends[1, 0]
        assert kind != PLAIN or ends[0, 2] != ends[1, 2]
        before[kind] = ends[0, 0]
    distances = {kind: abs(loss - before[PLAIN]) for kind, loss in before.items()}
    assert min(distances[kind] for kind in (ZERO, QERA, CALIBRATED, BOTH, EMBEDDINGS)) > 0
    # The same mathematics: bitsandbytes' weights and ours are the same, and so are the adapters and the batches.
    assert curves[RIVAL].by_seed() == pytest.approx(curves[ZERO].by_seed(), abs=1e-4)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert f"{PLAIN:30} {before[PLAIN]:.4f} (+0.00%, +0.00% to +0.00%)" in capsys.readouterr().out


def test_decoding_once_changes_no_loss(measured):
    kinds = ["--weights", BOTH, EMBEDDINGS]
    for each, once in zip(measured("each", *kinds), measured("once", *kinds, "--decode-once"), strict=True):
        assert once["loss"] == pytest.approx(each["loss"], abs=1e-5)
        assert (each["decode_once"], once["decode_once"]) == (False, True)


def test_processes_change_nothing(measured):
    flags = ("--seeds", "0", "1", "2", "--weights", QERA)
    alone, together = measured("alone", *flags), measured("together", *flags, "--processes", "3")
    found = [
        {(row["weights"], row["seed"], row["step"], row["part"]): row["losses"] for row in rows}
        for rows in (alone, together)
    ]
    assert found[0] == found[1]


def test_of_several_learning_rates_one_is_chosen_for_the_rest(measured):
    rows = measured("rates", "--seeds", "0", "1", "2", "--weights", ZERO, "--learning-rate", "0.01", "1e-4")
    runs = {(row["weights"], row["learning_rate"], row["seed"]) for row in rows}
    (rate,) = {row["chosen_rate"] for row in rows}
    assert runs == {*((PLAIN, each, seed) for each in (0.01, 1e-4) for seed in (0, 1)), (PLAIN, rate, 2)} | {
        (ZERO, rate, seed) for seed in (0, 1, 2)
    }


def test_one_learning_rate_needs_no_choice(measured, monkeypatch):
    """All that needs no preparation is there to be run from the start, whatever ends first."""
    began = []

    def backwards(todo, texts, _):
        began.extend(todo)
        for function, case in reversed(began):
            yield (function, case), function(case, texts)

    monkeypatch.setattr(learning, "_finished", backwards)
    rows = measured("one", "--weights", ZERO)
    assert len(began) == 4
    assert {row["chosen_rate"] for row in rows} == {0.01}


def test_a_run_that_fails_leaves_the_others():
    todo, found = deque([(getitem, []), (getitem, [5]), (getitem, [6])]), []
    with pytest.raises(IndexError):
        found += (result for _, result in learning._finished(todo, 0, processes=2))
    assert sorted(found) == [5, 6]


def test_the_learning_rate_is_chosen_by_other_prompts_than_it_is_tested_by():
    def row(rate, part, step, loss, seed=0, weights=PLAIN):
        return {"learning_rate": rate, "part": part, "step": step, "loss": loss, "seed": seed, "weights": weights}

    rows = [row(0.1, "choose", 2, 1.0), row(0.1, "test", 2, 9.0), row(0.1, "choose", 1, 9.0)]
    rows += [row(0.2, "choose", 2, 2.0), row(0.2, "test", 2, 0.5), row(0.2, "choose", 1, 0.5)]
    # Of the rate that was chosen there are more seeds and more kinds of weights, which choose nothing.
    rows += [row(0.1, "choose", 2, 9.0, seed=1), row(0.2, "choose", 2, 0.1, weights=ZERO)]
    assert learning.best_rate(rows, [0]) == 0.1


def test_no_prompt_is_in_two_parts(prompts_csv, tmp_path):
    folder = save_model("llama", tmp_path / "model")
    texts = learning_runs.read_texts(prompts_csv, str(folder), range(3), range(4, 6))
    assert [len(part) for part in (texts.train, texts.choose, texts.test)] == [3, 2, 3]
    everything = learning_runs.read_texts(prompts_csv, str(folder), range(8), range(0)).train
    assert texts.train + texts.test[:1] + texts.choose + texts.test[1:] == everything


def test_losses_are_the_models_own(tmp_path):
    """Of each text alone, without padding, whatever the batch that it was measured in."""
    model = learning_runs.load(PLAIN, save_model("llama", tmp_path / "model"), "cpu")
    texts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
    with torch.no_grad():
        expected = [
            (len(text) - 1) * model(torch.tensor([text]), labels=torch.tensor([text])).loss.item() for text in texts
        ]
    assert learning_runs.losses_of(model, texts, 1, "cpu") == pytest.approx(expected, rel=1e-5)


def test_the_interval_is_paired():
    """A curve that is 1% above another on every prompt is so however prompts are drawn, though these differ much."""
    random = np.random.default_rng(1)
    sums, tokens = random.uniform(1, 100, size=30), np.full(30, 10)

    def curve(factors):
        common = {"step": 0, "tokens": " ".join(map(str, tokens))}
        losses = [" ".join(map(str, sums * factor)) for factor in factors]
        return learning_curves.Curve([{**common, "seed": seed, "losses": text} for seed, text in enumerate(losses)])

    plain = curve([1.0, 1.0])
    assert curve([1.01, 1.01]).above(plain, 0) == pytest.approx((0.01, 0.01, 0.01))
    mean, low, high = curve([1.0, 1.02]).above(plain, 0)
    assert math.isclose(mean, 0.01)
    assert (low, high) == pytest.approx((0.0, 0.02))
