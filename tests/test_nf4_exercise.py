"""`python -m benchmarks.nf4_exercise` at its trial size, and its gate."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")

import qkernels
from benchmarks import nf4_exercise
from benchmarks.operations import GateError


def test_a_trial_leaves_a_row_for_each_provider_and_size(tmp_path, capsys):
    assert nf4_exercise.main(["--smoke", "--trials", "2", "--out", str(tmp_path / "new")]) == 0
    (path,) = (tmp_path / "new").glob("nf4-exercise-*.csv")
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    sizes = [(str(size.hidden), str(size.dtype)[6:]) for size in nf4_exercise.TRIAL_SIZES]
    expected = [(*size, name) for size in [*sizes, ("all", "all")] for name in nf4_exercise.PROVIDERS]
    assert [(row["hidden"], row["dtype"], row["provider"]) for row in rows] == expected
    assert all(row["torch"] == torch.__version__ and row["commit"] and row["trials"] == "2" for row in rows)
    for row in rows:
        assert 0 < float(row["seconds_min"]) <= float(row["seconds"]) <= float(row["seconds_max"])
        yardstick = next(r for r in rows if (r["hidden"], r["provider"]) == (row["hidden"], nf4_exercise.YARDSTICK))
        assert float(row["times_bitsandbytes"]) == pytest.approx(float(yardstick["seconds"]) / float(row["seconds"]))
    assert "written:" in capsys.readouterr().out


def one_weight_off(matrix):
    weight = qkernels.dequantize_4bit(matrix.packed, matrix.ours)
    weight.view(-1)[17] += 1
    return weight


def minus_zero(matrix):
    weight = qkernels.dequantize_4bit(matrix.packed, matrix.ours)
    return torch.where(weight == 0, -0.0, weight)


def float32(matrix):
    return qkernels.dequantize_4bit(matrix.packed, matrix.ours).float()


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (one_weight_off, "wrong: 1 of 8192 decoded weights differ"),
        (minus_zero, r"wrong: \d+ of 8192 decoded weights differ"),
        (float32, r"wrong decodes to torch.float32 \(128, 64\), bitsandbytes to torch.float16 \(128, 64\)"),
    ],
)
def test_a_wrong_provider_is_refused(decode, message, monkeypatch, tmp_path):
    monkeypatch.setitem(nf4_exercise.PROVIDERS, "wrong", decode)
    with pytest.raises(GateError, match=message):
        nf4_exercise.main(["--smoke", "--trials", "1", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_layer_that_computes_something_else_is_refused():
    mlp = nf4_exercise.Mlp(nf4_exercise.TRIAL_SIZES[0], "cpu")
    x = torch.randn(2, 3, 64, dtype=torch.float16)
    decode = nf4_exercise.PROVIDERS["qkernels"]
    nf4_exercise.gate("qkernels", decode, mlp, x)
    mlp.gate.layer = mlp.up.layer
    with pytest.raises(GateError, match="qkernels: the MLP differs"):
        nf4_exercise.gate("qkernels", decode, mlp, x)


def test_without_a_gpu_only_a_trial_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nf4_exercise.main(["--out", str(tmp_path)]) == 2
    assert "--smoke" in capsys.readouterr().err
