"""The regression check on ratios, rivals that may be missing, and the throughput's figure and table."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the rival, part of the [bench] extra")

import qkernels
from benchmarks import compare, int4, operations, plotting, readme, rivals, run, throughput_figures
from benchmarks.report import read_csv, write_csv
from benchmarks.weights import FORMAT


def rows_of(ours: float, theirs: float, again: float = 1.0, gpu: str = "GPU") -> list[dict]:
    """A record of one product, of the copy and of quantize, which has no rival in a graph."""
    base = {"rows": 64, "columns": 128, "dtype": "float16", "method": "graph", "status": "ok", "reason": None}
    base |= {
        "model": "bloom-7b1",
        "gpu": gpu,
        "commit": "c" * 40,
        "dirty": False,
        "date": "2026-01-01",
        "processor": "CPU",
    }
    times = [
        ("copy", None, "torch", 10.0, 0),
        *(("matmul", m, "qkernels", ours * m, m) for m in (1, 16)),
        *(("matmul", m, "bitsandbytes", theirs * m, m) for m in (1, 16)),
        *(("matmul", m, "torch", theirs * m, m) for m in (1, 16)),
        *(("matmul", m, "qkernels, again", ours * again * m, m) for m in (1, 16)),
        ("quantize", None, "qkernels", 20.0, 0),
    ]
    return [
        base
        | {"op": op, "m": m, "provider": provider, "median_us": us, "p20_us": 0.9 * us, "p80_us": 1.2 * us}
        | {"bytes": 10000, "flops": 20000 * flops, "gbps": 10000 / us / 1e3}
        for op, m, provider, us, flops in times
    ]


def test_only_what_became_slower_beside_its_rival_is_told():
    before = rows_of(ours=10, theirs=20)
    lines, fine = compare.compare(before, rows_of(ours=30, theirs=60))
    assert fine  # a slower machine
    assert lines[-1] == "3 the same"
    lines, fine = compare.compare(before, rows_of(ours=11, theirs=20))
    assert not fine
    (line,) = (line for line in lines if line.startswith("matmul 64x128 float16 M=16, graph: SLOWER; times ours, "))
    assert "bitsandbytes 2.00 -> 1.82 (-9.1%), torch 2.00 -> 1.82 (-9.1%), a copy" in line
    assert lines[-1] == "2 SLOWER, 1 the same"
    lines, fine = compare.compare(before, rows_of(ours=8, theirs=20))
    assert fine
    assert lines[-1] == "2 faster, 1 the same"


@pytest.mark.parametrize("provider", ["bitsandbytes", "torch", "copy"])
def test_a_rival_that_became_faster_alone_proves_nothing(provider):
    """One of the others, too, may be slow in the record's run and fast in this one."""
    before, after = rows_of(10, 20), rows_of(10, 20)
    for row in after:
        if provider == (row["op"] if row["op"] == "copy" else row["provider"]):
            row["median_us"] *= 0.7
    lines, fine = compare.compare(before, after)
    assert fine == (provider != "copy")  # quantize is held against nothing else
    assert sum("SLOWER" in line for line in lines[:-1]) == (0 if fine else 1)


def test_a_noisy_run_proves_less():
    lines, fine = compare.compare(rows_of(10, 20), rows_of(11, 20, again=1.06))
    assert fine
    noise = ["noise of the record, graph: 1.0%", "noise of this run, graph: 6.0%"]
    assert lines[-3:] == [*noise, "3 the same"]


@pytest.mark.parametrize(
    ("ours", "verdict"), [(10.35, "the same"), (10.5, "SLOWER"), (9.7, "the same"), (9.5, "faster")]
)
def test_what_processes_differ_by_is_no_change(ours, verdict):
    lines, fine = compare.compare(rows_of(10, 20), rows_of(ours, 20))
    assert fine == (verdict != "SLOWER")
    assert lines[-1] in (f"2 {verdict}, 1 the same", "3 the same")
    assert sum(verdict in line for line in lines[:-1]) >= 2
    assert "noise between processes, at least: 2.0%; twice the largest noise is no change" in lines


def test_a_noisy_load_hides_no_slower_step():
    """Of a whole model each operation has a noise of its own."""
    base = {"model": "small", "rows": None, "columns": None, "dtype": "float16", "method": "wall", "status": "ok"}

    def model(step: float) -> list[dict]:
        times = {("load", "qlora"): 10.0, ("load", "qlora, again"): 14.0, ("load", "bitsandbytes"): 20.0}
        times |= {("step", "qlora"): step, ("step", "qlora, again"): step, ("step", "bitsandbytes"): 20.0}
        return [base | {"op": op, "m": None, "provider": name, "median_us": us} for (op, name), us in times.items()]

    assert compare.noise(model(10)) == {"load (wall)": pytest.approx(0.4), "step (wall)": 0.01}
    lines, fine = compare.compare(model(10), model(11))
    assert not fine
    assert "step small float16, wall: SLOWER; times ours, bitsandbytes 2.00 -> 1.82 (-9.1%)" in lines
    assert lines[-1] == "1 the same, 1 SLOWER"


def test_quantize_is_held_against_the_copy():
    assert compare.ratios(rows_of(10, 20))["quantize", "64x128", "float16", None, "graph"] == {compare.COPY: 0.5}


def test_without_noise_nothing_is_judged():
    rows = [row for row in rows_of(10, 20) if not row["provider"].endswith(compare.AGAIN)]
    lines, fine = compare.compare(rows, rows)
    assert fine
    assert all("not compared" in line for line in lines[:-1])
    assert lines[-1] == "nothing compared"


def test_the_command(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(compare, "RESULTS", results)
    slow = write_csv(tmp_path / "slow", rows_of(11, 20))
    assert compare.main([str(slow)]) == 2
    write_csv(results / "other-gpu", rows_of(10, 20, gpu="another"))
    assert compare.main([str(slow)]) == 2
    write_csv(results / "matmul", rows_of(10, 20))
    assert compare.main([str(slow)]) == 1
    assert "slow.csv against matmul.csv" in capsys.readouterr().out
    equal = write_csv(tmp_path / "equal", rows_of(10, 20))
    assert compare.main([str(equal)]) == 0
    assert compare.main([str(slow), str(equal)]) == 1


def test_the_record_with_most_cases_in_common_is_taken(tmp_path):
    rows = rows_of(10, 20)
    write_csv(tmp_path / "newer", [row | {"date": "2026-02-02"} for row in rows if row["m"] == 1])
    older = write_csv(tmp_path / "older", rows)
    assert compare.record_for(rows, tmp_path) == older
    newest = write_csv(tmp_path / "newest", [row | {"date": "2026-02-02"} for row in rows])
    assert compare.record_for(rows, tmp_path) == newest


def test_a_run_times_the_same_code_twice_and_lists_who_is_missing(tmp_path, capsys):
    flags = ["--op", "matmul", "--m", "3", "--dtype", "float32", "--smoke", "--all-rivals", "--out", str(tmp_path)]
    assert run.main(flags) == 0
    (path,) = tmp_path.glob("rivals-matmul-*.csv")
    rows = read_csv(path)
    listed = {row["provider"] for row in rows}
    assert listed >= {"qkernels", "qkernels, again", rivals.COMPILED, rivals.TORCHAO, *int4.KERNELS}
    compiled = next(row for row in rows if row["provider"] == rivals.COMPILED)
    assert (compiled["status"], compiled["median_us"]) == ("not run", None)
    assert "C++ compiler" in compiled["reason"]
    assert "noise, the same code timed twice: wall" in capsys.readouterr().out


def test_plain_torch_decodes_as_the_library_does():
    weight = 0.02 * torch.randn(64, 640)  # 640 scales: two and a half blocks of them
    x = torch.randn(3, 640)
    packed, state = qkernels.quantize_4bit(weight, **FORMAT)
    parts = (packed.view(-1), state.code, *rivals._scales(state), weight.shape, weight.dtype)
    y = rivals.decode_and_multiply(x, *parts)
    torch.testing.assert_close(y, x @ qkernels.dequantize_4bit(packed, state).t())


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch):
    weight = torch.randn(64, 128)
    decoded = qkernels.dequantize_4bit(*qkernels.quantize_4bit(weight, **FORMAT))
    measured = operations.dequantize(weight)
    for rival, message in (
        (rivals.Rival(lambda w: lambda: 1.05 * decoded, decoded), "it differs by 5.0% from what its weight gives"),
        (rivals.Rival(lambda w: lambda: 1.05 * decoded, 1.05 * decoded), "its weight is off by"),
    ):
        monkeypatch.setattr(rivals, "_torchao", lambda w, use, rival=rival: rival)
        found = rivals.with_rivals("dequantize", measured, weight)
        assert message in found.missing[rivals.TORCHAO]
        assert rivals.TORCHAO not in found.providers


def test_a_rival_that_fails_is_listed_with_its_reason(monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(rivals, "_torchao", fails)
    weight = torch.randn(64, 128)
    measured = rivals.with_rivals("dequantize", operations.dequantize(weight), weight)
    assert measured.missing[rivals.TORCHAO] == "RuntimeError: no kernel image"
    assert rivals.TORCHAO not in measured.providers


def test_int4_rounds_to_the_nearest_of_sixteen_values():
    weight = torch.randn(8, 192)
    quantized = int4.quantize(weight)
    assert quantized.codes.max() == 15
    assert quantized.codes.min() == 0
    off = (int4.decode(quantized) - weight).abs().view(8, 3, 64).amax(-1)
    assert (off <= 0.5001 * quantized.scales).all()


def test_a_rival_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    assert "not installed" in rivals._torchao(torch.randn(64, 128), rivals._decode)


def test_the_share_of_the_roofline():
    rows = rows_of(ours=10, theirs=20)
    one, many = (row for row in rows if row["provider"] == "qkernels" and row["op"] == "matmul")
    # The copy moves 10,000 bytes in 10 us; torch's product does 20,000 FLOPs in 20 us.
    assert throughput_figures.roofline_us(one | {"flops": 1}, rows) == pytest.approx(10)
    assert throughput_figures.roofline_us(one, rows) == pytest.approx(20)
    assert throughput_figures.roofline_us(many, rows) == pytest.approx(320)
    picture = plotting.picture(lambda: throughput_figures.against_rows("matmul", "float16", rows), "test")
    assert picture.startswith(b"\x89PNG")


def test_the_readmes_table_of_rivals_has_a_dash_for_who_cannot_run(tmp_path):
    rows = rows_of(10, 20)
    missing = {"provider": "gemlite", "method": None, "status": "not run", "median_us": None}
    rows.append(next(row for row in rows if row["op"] == "matmul" and row["m"] == 16) | missing)
    write_csv(tmp_path / "rivals-gpu", rows)
    text = readme.current("<!-- table: rivals -->\n<!-- end of table -->", tmp_path)
    assert "| 64 x 128, float16; µs | qkernels | bitsandbytes | torch | gemlite |" in text
    assert "| product, M = 16 | 160.0 | 320.0 | 320.0 | - |" in text
    assert text.startswith("<!-- table: rivals -->\n\nBeside further rivals")


def test_the_readmes_table_of_products(tmp_path):
    write_csv(tmp_path / "matmul-gpu", rows_of(10, 20))
    text = readme.current("<!-- table: matmul -->\n<!-- end of table -->", tmp_path)
    assert "| 16 | 160.0 | 320.0 | 320.0 | 2.00x |" in text
