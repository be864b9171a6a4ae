"""`python -m benchmarks.run` at its trial size, and its gate."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")

import bitsandbytes

import qkernels
import qlora
from benchmarks import compare, models, operations, products, report, run
from benchmarks.processes import Outcome
from benchmarks.report import read_csv
from benchmarks.weights import LISTS, Size, stored_bytes
from qkernels import dispatch


def test_a_trial_leaves_a_row_for_each_provider(tmp_path, capsys):
    assert run.main(["--op", "dequantize", "--op", "quantize", "--smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("dequantize-quantize-*.csv")
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    cases = {(row["op"], row["provider"]) for row in rows}
    assert {("copy", "torch"), ("dequantize", "bitsandbytes"), ("quantize", "qkernels")} <= cases
    assert all(row["torch"] == torch.__version__ and row["commit"] for row in rows)
    said = "python -m benchmarks.run --op dequantize --op quantize --smoke --out benchmarks/results"
    assert {row["command"] for row in rows} == {said}
    # Bytes of 64x128 float16 weights: themselves, half a byte each of codes, and the scales.
    expected = int(8192 * (2 + 1 / 2 + 1 / 64 + 4 / 16384))
    assert {int(row["bytes"]) for row in rows if row["op"] == "quantize"} == {expected}
    for row in rows:
        if row["status"] == "ok":
            assert float(row["gbps"]) == pytest.approx(int(row["bytes"]) / float(row["median_us"]) / 1e3)
    assert "written:" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = qkernels.dequantize_4bit

    def wrong(packed, state, out=None):
        result = right(packed, state, out=out)
        result.view(-1)[17] += 1
        return result

    monkeypatch.setattr(qkernels, "dequantize_4bit", wrong)
    with pytest.raises(operations.GateError, match="1 of 8192 decoded weights differ"):
        operations.dequantize(torch.randn(64, 128))


def test_products_are_tried_too(tmp_path):
    ops = ["matmul", "matmul_dx", "lora", "linear4bit", "linear4bit_training"]
    flags = [flag for op in ops for flag in ("--op", op)]
    assert run.main([*flags, "--m", "3", "--dtype", "float32", "--smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("matmul-matmul_dx-lora-linear4bit-*.csv")
    rows = [row for row in csv.DictReader(path.open(encoding="utf-8")) if row["op"] not in ("copy", "peak")]
    assert {row["op"] for row in rows if row["provider"] == "qkernels"} == set(ops)
    assert {row["m"] for row in rows} == {"3"}
    # 64x128 float32 weights in 4 bits, 3 rows of 64 + 128 activations.
    expected = int(8192 * (1 / 2 + 1 / 64 + 4 / 16384)) + 3 * (64 + 128) * 4
    assert {int(row["bytes"]) for row in rows if row["op"] == "matmul"} == {expected}
    assert {int(row["flops"]) for row in rows if row["op"] == "matmul_dx"} == {2 * 3 * 8192}
    for row in rows:
        assert float(row["tflops"]) == pytest.approx(int(row["flops"]) / float(row["median_us"]) / 1e6)
    assert {row["implementation"] for row in rows if row["op"] == "matmul"} == {"", dispatch.REFERENCE}


def test_shares_are_of_the_copy_and_of_the_matrix_peak_of_the_same_run(tmp_path):
    assert run.main(["--op", "matmul", "--m", "3", "--smoke", "--out", str(tmp_path)]) == 0
    rows = list(csv.DictReader(next(tmp_path.glob("*.csv")).open(encoding="utf-8")))
    best = {op: next(row for row in rows if row["op"] == op) for op in ("copy", "peak")}
    assert int(best["peak"]["flops"]) == 2 * int(best["peak"]["m"]) ** 3
    for row in rows[1:]:
        assert float(row["percent_of_peak"]) == pytest.approx(
            100 * float(row["tflops"]) / float(best["peak"]["tflops"])
        )
        assert float(row["percent_of_copy"]) == pytest.approx(100 * float(row["gbps"]) / float(best["copy"]["gbps"]))


def test_whole_models_alone_are_in_both_dtypes(monkeypatch):
    asked = []
    monkeypatch.setattr(run, "measure_to_csv", lambda options, *_: asked.append(options.dtype) or 0)
    for flags in (["load", "--op", "train_step"], ["load", "--op", "matmul"], ["load", "--dtype", "float32"]):
        assert run.main(["--out", "there", "--op", *flags]) == 0
    assert asked == [["float16", "bfloat16"], ["float16"], ["float32"]]


def test_whole_models_are_tried_too(tmp_path, capsys):
    """The stack beside bitsandbytes; the other two are tried in test_benchmarks.py."""
    stacks = ["trl+peft+bitsandbytes", "qlora"]
    ops = [flag for op in models.MODEL_OPS for flag in ("--op", op)]
    flags = ["--dtype", "float32", "--m", "16", "--m", "32", "--stacks", *stacks, "--smoke", "--out", str(tmp_path)]
    assert run.main([*ops, *flags]) == 0
    rows = [row for row in read_csv(next(tmp_path.glob("*.csv"))) if row["op"] in models.MODEL_OPS]
    cases = {(row["op"], row["m"]) for row in rows}
    assert cases == {("load", None), ("train_step", 16), ("train_step", 32), ("generate", 1)}
    assert {row["provider"] for row in rows} == {*stacks, "qlora, again"}
    assert all((row["status"], row["model"], row["method"]) == ("ok", "bloom-2x64x512", "wall") for row in rows)
    for row in rows:
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["percent_of_peak"] is None or row["tflops"] == pytest.approx(row["flops"] / row["median_us"] / 1e6)
        assert (row["percent_of_copy"] is None) == (row["op"] == "load")
    # Two blocks of 64 features: 12 * 64^2 weights each; the tied embedding; norms and biases.
    quantized, head = 2 * 12 * 64 * 64, 512 * 64
    trainable = 2 * 16 * (64 + 3 * 64)
    attention = 3 * 2 * 16 * 16 * 64 * 2
    step = next(row for row in rows if row["m"] == 16)
    assert step["flops"] == 16 * (4 * quantized + 6 * trainable + 4 * head) + attention
    assert step["bytes"] == 2 * (int(stored_bytes(quantized)) + 4 * head) + 32 * trainable
    cached = sum(range(33, 36))  # 32 tokens given, 4 to be found: three are looked at one by one
    expected = 4 * (int(stored_bytes(quantized)) + 4 * head) + 2 * 4 * cached * 64 * 2
    assert next(row for row in rows if row["op"] == "generate")["bytes"] == expected
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("noise, "))
    assert all(f"{op} (wall) " in line for op in models.MODEL_OPS), line
    assert len(compare.ratios(rows)) == len(cases)


def test_a_stack_that_the_gate_stops_has_no_time():
    asked = models.Asked(["load", "generate"], {})
    failed = Outcome([{"phase": "load", "times_s": [1.0], "sm_mhz": None}], "GateError: other bits", "gate", "")
    for op, m in asked.measured:
        row = models._row(op, m, failed, models.Work(1, 1))
        assert (row["status"], row["median_us"], row["reason"]) == ("not run", None, "in gate: GateError: other bits")
        assert row.keys() >= report.UNMEASURED.keys()


@pytest.mark.parametrize("tokens", [1, 700])
def test_a_batch_that_there_is_not_is_told(tokens, capsys):
    with pytest.raises(SystemExit):
        run.main(["--op", "train_step", "--m", str(tokens), "--smoke", "--out", "x"])
    assert f"or a multiple of 512, got --m {tokens}" in capsys.readouterr().err


def test_a_step_of_many_tokens_has_sequences_of_512():
    assert [models.batch_of(m) for m in (2, 128, 512, 2048)] == [(1, 2), (1, 128), (1, 512), (4, 512)]


def test_blockwise_8_bit_is_tried_and_a_wrong_one_is_not_timed(monkeypatch, tmp_path):
    flags = ["--op", "quantize_blockwise", "--op", "dequantize_blockwise", "--smoke", "--out", str(tmp_path)]
    assert run.main(flags) == 0
    rows = list(csv.DictReader(next(tmp_path.glob("*.csv")).open(encoding="utf-8")))
    # 64x128 float16 weights, a byte each of codes, a float32 scale for 256.
    assert {int(row["bytes"]) for row in rows if row["op"] != "copy"} == {int(8192 * (2 + 1 + 4 / 256))}
    right = qkernels.dequantize_blockwise
    monkeypatch.setattr(qkernels, "dequantize_blockwise", lambda index, state: right(index, state) * 2)
    with pytest.raises(operations.GateError, match="decoded 8-bit codes differ"):
        operations.dequantize_blockwise(torch.randn(64, 128))


def test_other_shapes_may_be_given(monkeypatch):
    parse = run._parser().parse_args
    given = ["--op", "matmul", "--out", "x", "--shape", "4096x4096", "--shape", "8x64"]
    for blocksize in (64, 32):
        assert run.sizes_of(parse([*given, "--blocksize", str(blocksize)])) == {
            Size((4096, 4096), blocksize): "bloom-7b1",
            Size((8, 64), blocksize): "given",
        }
    assert Size((32000, 4096)) in run.sizes_of(parse(["--op", "quantize"]))
    ragged = run.sizes_of(parse(["--op", "matmul", "--shapes", "ragged"]))
    assert all(size.shape[1] % 64 or size.blocksize < 64 for size in ragged)
    assert ragged[Size((1152, 4304))] == "siglip-so400m"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--op", "matmul", "--op", "lora", "--shapes", "ragged"], "other blocks than of 64 are for"),
        (["--op", "quantize", "--blocksize", "32"], "other blocks than of 64 are for"),
        (["--op", "matmul", "--all-rivals", "--blocksize", "128"], "other blocks than of 64 are for"),
        (["--op", "matmul", "--shapes", "ragged", "--blocksize", "32"], "has blocks of its own"),
        (["--op", "matmul", "--shapes", "ragged", "--shape", "8x64"], "not allowed with"),
    ],
)
def test_blocks_that_do_not_go_together_are_told(flags, said, capsys):
    with pytest.raises(SystemExit):
        run.main([*flags, "--smoke", "--out", "x"])
    assert said in capsys.readouterr().err


def test_ragged_weights_are_in_a_record_of_their_own(tmp_path, capsys):
    """bitsandbytes' CPU path reads other scales where rows are not whole blocks: it is listed with this reason."""
    flags = ["--op", "matmul", "--op", "matmul_dx", "--shapes", "ragged", "--smoke", "--out", str(tmp_path)]
    assert run.main(flags) == 0
    (path,) = tmp_path.glob("ragged-matmul-matmul_dx-*.csv")
    rows = [row for row in read_csv(path) if row["op"] in ("matmul", "matmul_dx")]
    assert {(row["rows"], row["columns"], row["blocksize"]) for row in rows} == {(64, 80, 64), (64, 128, 32)}
    sizes = {row["bytes"] for row in rows if (row["op"], row["blocksize"], row["m"]) == ("matmul", 32, 16)}
    assert sizes == {int(8192 * (1 / 2 + 1 / 32 + 4 / 8192)) + 16 * (64 + 128) * 2}
    refused = {(row["op"], row["columns"], row["reason"]) for row in rows if row["status"] != "ok"}
    assert all(columns == 80 and "from what its weight gives" in reason for _, columns, reason in refused), refused
    assert refused or torch.cuda.is_available()
    cases = {case[:2] for case in compare.ratios(read_csv(path))}
    assert {("matmul", "64x80"), ("matmul_dx", "64x128/32")} <= cases
    assert "64x128/32 float16 M=16" in capsys.readouterr().out


def test_a_rival_that_refuses_a_weight_is_listed_with_its_reason(monkeypatch):
    def refuses(*arguments, **options):
        raise ValueError("invalid blocksize\nand more")

    monkeypatch.setattr(products.bnb, "quantize_4bit", refuses)
    measured = products.matmul(torch.randn(64, 128), 3, blocksize=32)
    assert measured.missing == {"bitsandbytes": "ValueError: invalid blocksize"}
    assert measured.providers.keys() == {"qkernels", "qkernels, dequantize + cuBLAS", "torch"}
    monkeypatch.setattr(qkernels, "matmul_4bit", lambda x, packed, state: x.new_ones(3, 64))
    with pytest.raises(operations.GateError, match="error of y"):  # ours is held against torch's product alone
        products.matmul(torch.randn(64, 128), 3, blocksize=32)


def test_a_rotation_does_not_fit_into_the_cache():
    for sizes in LISTS.values():
        for shape, blocksize in (size for those in sizes.values() for size in those):
            count = run.rotation_of(Size(shape, blocksize), "cuda")
            assert count * stored_bytes(shape[0] * shape[1], blocksize) > 64e6
            assert count == 8 or shape[0] * shape[1] < 4096 * 4096


def test_a_command_is_told_without_places_of_the_machine():
    parser = run._parser()
    parser.add_argument("--data")
    given = ["--op", "matmul", "--out=/tmp/x", "--commit", "abc+", "--data", "/home/me/texts.csv", "--m", "3"]
    assert parser.parse_args(given).command == (
        "python -m benchmarks.run --op matmul --out benchmarks/results --data texts.csv --m 3"
    )


def test_a_wrong_shape_is_told(capsys):
    with pytest.raises(SystemExit):
        run.main(["--op", "quantize", "--shape", "4096", "--out", "x"])
    assert "rows x columns, as 4096x4096, got '4096'" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--m", "0"), ("--m", "-3"), ("--layers", "x"), ("--shape", "0x64")])
def test_a_size_that_there_is_not_is_told(flag, value, capsys):
    with pytest.raises(SystemExit):
        run.main(["--op", "matmul", flag, value, "--smoke", "--out", "x"])
    assert f"got {value!r}" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run.main(["--op", "quantize", "--smoke", "--out", str(tmp_path / "file" / "folder")]) == 2
    printed = capsys.readouterr()
    assert "a place that can be written" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("flags", [["--gpu-record", "--smoke"], ["--gpu-record", "--out", "x"], []])
def test_a_record_goes_to_one_place(flags, capsys):
    with pytest.raises(SystemExit):
        run.main(["--op", "quantize", *flags])
    assert "--gpu-record" in capsys.readouterr().err


def test_a_record_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--op", "quantize", "--gpu-record"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("op", "name"), [("matmul", "matmul_4bit"), ("matmul_dx", "matmul_4bit_dx")])
def test_a_wrong_product_is_not_timed(op, name, monkeypatch):
    right = getattr(qkernels, name)
    monkeypatch.setattr(qkernels, name, lambda *arguments: right(*arguments) * 1.01)
    with pytest.raises(operations.GateError, match="error of"):
        products.PRODUCTS[op](torch.randn(64, 128), 3)


@pytest.mark.parametrize("kind", [qlora.Linear4bit, bitsandbytes.nn.Linear4bit])
def test_both_layers_decode_to_the_weight_s_dtype(kind):
    layer = products.packed_layer(kind, torch.randn(64, 128, dtype=torch.float16))
    assert layer.weight.quant_state.dtype == torch.float16
    assert layer.weight.quant_state.nested


def test_without_a_gpu_only_a_trial_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--op", "quantize", "--out", str(tmp_path)]) == 2
    assert "--smoke" in capsys.readouterr().err
