"""The record of errors beside bitsandbytes and torch: its command at a trial's size, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")

import qkernels
from benchmarks import accuracy
from benchmarks.compare import RESULTS
from benchmarks.products import exact_weight
from benchmarks.report import read_csv
from benchmarks.weights import FORMAT, Size


def _ours(**changed):
    point = {"op": "matmul", "rows": 4096, "columns": 4096, "dtype": "float16", "m": 8, "scales": accuracy.ALIKE}
    ratios = {f"{kind}_to_{other}": 1.0 for kind in ("max", "rms") for other in ("bitsandbytes", "torch")}
    return {**point, "provider": "qkernels", "elements": 1 << 17, "wrong_overflows": 0, **ratios, **changed}


def test_a_trial_compares_every_point_and_passes(tmp_path, capsys):
    assert accuracy.main(["--smoke", "--out", str(tmp_path)]) == 0
    assert "20 points, no error too large" in capsys.readouterr().out
    (path,) = tmp_path.glob("accuracy-*.csv")
    rows = read_csv(path)
    assert len(rows) == 60
    assert {row["scales"] for row in rows if row["dtype"] == "bfloat16"} == {accuracy.ALIKE, accuracy.APART}
    edge = [row for row in rows if row["scales"] == accuracy.EDGE and row["m"] == 16]
    assert all(row["overflows"] > 0 and row["wrong_overflows"] == 0 for row in edge)
    assert accuracy.problems(rows) == []


def test_ragged_weights_are_compared_with_who_computes_the_same(tmp_path, capsys):
    assert accuracy.main(["--smoke", "--shapes", "ragged", "--dtype", "float16", "--out", str(tmp_path)]) == 0
    assert "24 points, no error too large" in capsys.readouterr().out
    (path,) = tmp_path.glob("ragged-accuracy-*.csv")
    ours = [row for row in read_csv(path) if row["provider"] == accuracy.OURS]
    assert {row["columns"] for row in ours if row["rms_to_bitsandbytes"] is None} == {80}
    assert {(row["columns"], row["blocksize"]) for row in ours if row["rms_to_bitsandbytes"]} == {(128, 32)}
    assert all(row["rms_to_torch"] for row in ours)


def test_a_product_with_a_larger_error_turns_it_red(tmp_path, monkeypatch, capsys):
    right = qkernels.matmul_4bit
    monkeypatch.setattr(qkernels, "matmul_4bit", lambda *arguments: right(*arguments) * 1.001)
    assert accuracy.main(["--smoke", "--dtype", "float16", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "matmul 64x128 float16 M=16 scales alike: rms error" in said
    assert "matmul_dx 64x128 float16 M=16 scales alike: rms error" not in said
    assert len(list(tmp_path.glob("accuracy-*.csv"))) == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rms_to_bitsandbytes": 1.02}, "rms error 1.020 times bitsandbytes'"),
        ({"max_to_bitsandbytes": 1.4}, "max error 1.400 times bitsandbytes'"),
        ({"rms_to_torch": 2.01}, "rms error 2.010 times torch's own"),
        ({"max_to_torch": 2.01}, "max error 2.010 times torch's own"),
        ({"max_to_torch": math.nan}, "max error nan times torch's own"),
        ({"wrong_overflows": 1}, "1 results overflow wrongly"),
    ],
)
def test_what_is_refused(changed, said):
    good = [_ours() for _ in range(100)]
    assert accuracy.problems(good) == []
    (line,) = accuracy.problems([*good, _ours(**changed)])
    assert line == f"matmul 4096x4096 float16 M=8 scales alike: {said}"


def test_what_chance_explains_at_a_point_it_does_not_explain_at_all():
    (line,) = accuracy.problems([_ours(max_to_bitsandbytes=1.02) for _ in range(100)])
    assert line == "matmul float16: max error 1.020 times bitsandbytes', geometric mean of all points"


def test_overflows_are_told_from_errors():
    truth = torch.tensor([1.0, 65504.0, 65519.0, 70000.0, -70000.0], dtype=torch.float64)
    right = truth.half().double()
    row = accuracy._error(right, truth, torch.float16)
    assert (row["wrong_overflows"], row["overflows"], row["max_error"]) == (0, 2, 0)
    for wrong in ([math.inf, 65504, 65504, math.inf, -math.inf], [1, 65504, 65504, 65504, -math.inf]):
        assert accuracy._error(torch.tensor(wrong).double(), truth, torch.float16)["wrong_overflows"] == 1
    assert accuracy._error(truth, truth, torch.bfloat16)["wrong_overflows"] == 0


@pytest.mark.parametrize("size", [Size((8, 256)), Size((8, 256), 32), Size((64, 80))])
def test_neighbouring_blocks_are_a_thousandfold_apart(size):
    weight = accuracy._weight(size, accuracy.APART, "cpu", torch.float32)
    absmax = weight.view(-1, size.blocksize).abs().amax(dim=1)
    ratio = (absmax[1::2] / absmax[::2]).log2()
    assert ratio.mean().item() == pytest.approx(10, abs=0.3)


def test_the_exact_weight_is_code_times_scale():
    packed, state = qkernels.quantize_4bit(torch.randn(16, 128), **FORMAT)
    exact = exact_weight(packed, state)
    assert exact.dtype == torch.float64
    assert torch.equal(exact.float(), qkernels.dequantize_4bit(packed, state))


def test_the_committed_records_keep_the_promise():
    records = list(RESULTS.glob("accuracy-*.csv"))
    assert records
    assert [problem for path in records for problem in accuracy.problems(read_csv(path))] == []
