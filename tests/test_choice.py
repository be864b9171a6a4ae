"""What the dispatch chooses is held against a record of `benchmarks.tune`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")

from benchmarks import candidates, choice, choice_figure, proposal, readme_tables, tune
from benchmarks.report import read_csv, write_csv
from benchmarks.weights import LISTS, SHAPES
from qkernels.dispatch import DEQUANTIZE, SKINNY, WGMMA, Choice, Product
from qkernels.tuning import skinny, skinny_dx, wgmma


def _rows(times, m=8, op="matmul", capability=9.0):
    """A record of one point: (implementation, configuration, round) -> microseconds."""
    point = {"op": op, "rows": 8192, "columns": 4096, "dtype": "float16", "m": m, "capability": capability}
    return [
        {**point, "implementation": name, "configuration": configuration, "round": number, "median_us": us}
        for (name, configuration, number), us in times.items()
    ]


TIMES = {
    (DEQUANTIZE, None, 1): 20.0,
    (SKINNY, "tiles=1", 1): 5.0,
    (SKINNY, "tiles=2", 1): 4.0,
    (SKINNY, "tiles=1", 2): 5.0,
    (SKINNY, "tiles=2", 2): 4.9,
}


def test_a_point_of_a_record_has_its_blocks():
    (row, *_) = _rows(TIMES)
    assert choice.product_of(row).blocksize == 64  # of a record that is older than this column
    assert choice.product_of({**row, "blocksize": 32}).blocksize == 32


@pytest.mark.parametrize("backward", [False, True])
def test_what_cannot_be_chosen_for_a_weight_is_no_candidate(backward):
    """And what is chosen is one."""
    sizes = [size for named in LISTS.values() for those in named.values() for size in those]
    for shape, blocksize in dict.fromkeys(sizes):
        weight = [
            Product(m, *shape, torch.float16, (9, 0), blocksize, backward) for m in (1, 2, 4, 8, 16, 32, 64, 256, 4096)
        ]
        able = {DEQUANTIZE, *(candidates.chosen(one).implementation for one in weight)}
        for one in weight:
            found = candidates.candidates(one)
            assert candidates.chosen(one) in found
            assert {candidate.implementation for candidate in found} <= able


def test_what_is_as_fast_as_the_fastest_passes():
    rows = _rows(TIMES)
    assert choice.too_slow(rows, lambda product: (SKINNY, "tiles=2")) == []
    # The second time counts: tiles=2 was fastest by chance, and is 2% faster.
    (loss,) = choice.losses(rows, lambda product: (SKINNY, "tiles=1"))
    assert (loss.chosen_us, loss.best_us) == (5.0, 4.9)
    assert choice.too_slow(rows, lambda product: (SKINNY, "tiles=1")) == []


def test_a_short_look_shows_nothing_faster_than_the_second_did():
    rows = _rows({(SKINNY, "tiles=1", 1): 4.0, (SKINNY, "tiles=2", 1): 4.5, (SKINNY, "tiles=1", 2): 5.0})
    (measured,) = choice.times(rows).values()
    assert measured == {(SKINNY, "tiles=1"): 5.0, (SKINNY, "tiles=2"): 5.0}


@pytest.mark.parametrize("kind", choice.RECORDS)
def test_the_newest_record_shows_no_implementation_that_is_faster_than_the_chosen_one(kind):
    """Where what is chosen now was measured; which configuration is the fastest, `benchmarks.choice` judges."""
    record = choice.newest(choice.RESULTS, kind)
    if record is None:
        pytest.skip("no record of benchmarks.tune")
    known = [loss for loss in choice.losses(read_csv(record)) if loss.chosen_us is not None]
    slower = [loss for loss in known if loss.beside_others > choice.TOLERANCE]
    assert slower == [], "\n".join(map(choice.text, slower))


def test_a_bad_rule_is_seen():
    rows = _rows(TIMES)
    (loss,) = choice.too_slow(rows, lambda product: (DEQUANTIZE, ""))
    assert loss.product == Product(8, 8192, 4096, torch.float16, (9, 0))
    assert loss.share == pytest.approx(20 / 4.9 - 1)
    assert loss.beside_others == loss.share
    assert "is 308.2% slower than fused skinny tiles=2, 4.9 us" in choice.text(loss)
    (loss,) = choice.too_slow(rows, lambda product: (SKINNY, "tiles=3"))
    assert "is chosen and was not measured" in choice.text(loss)


@pytest.fixture
def record(tmp_path):
    """A record in which the dispatch's choices are the fastest."""
    rows = []
    for op, m in (("matmul", 8), ("matmul", 64), ("matmul_dx", 64), ("matmul", 4096)):
        product = Product(m, 8192, 4096, torch.float16, (9, 0), backward=op == "matmul_dx")
        taken = candidates.chosen(product)
        times = {(one.implementation, one.configuration, 1): 10.0 for one in candidates.candidates(product)}
        name = taken.implementation, taken.configuration
        rows += [row | {"chosen": choice.name_of(row) == name} for row in _rows(times | {(*name, 1): 9.0}, m, op)]
    common = {"date": "2026-11-25", "commit": "c" * 40, "dirty": False, "gpu": "GPU"}
    return write_csv(tmp_path / "tune-test", [row | common for row in rows])


def test_the_command_turns_red_with_a_planted_rule(record, monkeypatch, capsys):
    assert choice.main([str(record)]) == 0
    said = capsys.readouterr().out
    assert "4 points: what is chosen is 0.0% slower than the fastest measured (geometric mean), 0.0% at most" in said
    assert "than the other implementations 0.0% at most" in said
    monkeypatch.setattr(candidates, "choose", lambda product: Choice(DEQUANTIZE, "planted"))
    assert choice.main([str(record)]) == 1
    said = capsys.readouterr().out
    assert "matmul 8192x4096 float16 M=8: dequantize + cuBLAS, 10.0 us is 11.1% slower than fused skinny" in said


def test_ragged_weights_have_a_record_that_counts_too(record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice, "RESULTS", tmp_path / "none")
    assert choice.main([]) == 2
    monkeypatch.setattr(choice, "RESULTS", tmp_path)
    record.rename(tmp_path / "tune-a.csv")
    assert choice.main([]) == 0
    rows = [row | {"blocksize": 32, "date": "2026-11-25"} for row in _rows(TIMES)]
    write_csv(tmp_path / "ragged-tune-a", rows)
    assert choice.main([]) == 1
    assert "matmul 8192x4096/32 float16 M=8" in capsys.readouterr().out


def test_every_point_is_told_with_its_alternatives(record, capsys):
    assert choice.main([str(record), "--points"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("matmul")]
    assert len(lines) == 4
    assert lines[0].startswith("matmul 8192x4096 float16 M=8")
    assert "9.0 us; dequantize + cuBLAS 10.0; fused skinny 9.0; fused wgmma 10.0" in lines[0]


def test_the_table_and_the_figure_of_the_choices(record):
    rows = read_csv(record)
    slow = next(row for row in rows if row["implementation"] == WGMMA and row["m"] == 8)
    slow["median_us"] = 6.0
    _, body = readme_tables.choice(rows)
    assert [line[0] for line in body] == ["y, M = 8", "y, M = 64", "y, M = 4096", "dX, M = 64"]
    assert body[0] == ("y, M = 8", SKINNY, "50.0%", "50.0%", "1.11", "1.00", "0.67")
    assert body[2] == ("y, M = 4096", DEQUANTIZE, "0.0%", "0.0%", "1.00", "-", "1.11")
    above, _, below, _ = choice_figure.figure_of(rows).axes
    assert sorted(below.lines[0].get_ydata()) == pytest.approx([0, 0, 50])
    (wgmma,) = [line for line in above.lines if line.get_label() == WGMMA]
    assert list(wgmma.get_ydata()) == pytest.approx([6 / 9, 1, 10 / 9])


def test_a_point_is_read_back_as_it_was_asked(record):
    products = {choice.product_of(row) for row in read_csv(record)}
    assert {(p.M, p.backward, p.capability) for p in products} == {
        (8, False, (9, 0)),
        (64, False, (9, 0)),
        (64, True, (9, 0)),
        (4096, False, (9, 0)),
    }


@pytest.mark.parametrize(
    ("backward", "m"), [(False, 1), (False, 32), (False, 33), (True, 1), (True, 512), (False, 1024)]
)
def test_what_is_chosen_is_a_candidate(backward, m):
    for shape in SHAPES["bloom-7b1"]:
        product = Product(m, *shape, torch.bfloat16, (9, 0), backward=backward)
        found = candidates.candidates(product)
        assert candidates.chosen(product) in found
        assert len({(one.implementation, one.configuration) for one in found}) == len(found)
        assert {one.implementation for one in found} >= {DEQUANTIZE, WGMMA}


def test_what_was_measured_at_a_weight_is_for_that_weight_and_gpu_alone():
    """Each entry is a candidate; other GPUs and a weight next to it have the rule's."""
    for table, config_of, listed in (
        (skinny._MEASURED, skinny.skinny_config, skinny.skinny_candidates),
        (skinny_dx._MEASURED, skinny_dx.skinny_dx_config, skinny_dx.skinny_dx_candidates),
    ):
        for N, K, M in table:
            assert config_of(M, N, K, 90) in listed(M, N, K, 90)
            assert config_of(M, N, K, 90) != config_of(M, N + 16, K, 90)
            for sm in (75, 80, 100):
                assert config_of(M, N, K, sm) in listed(M, N, K, sm)
    for N, K, M, backward in wgmma._MEASURED:
        found = wgmma.wgmma_candidates(M, N, K, backward)
        assert wgmma.wgmma_config(M, N, K, backward) in found[1:]
    for capability in ((8, 0), (9, 0)):
        assert candidates.choose(Product(17, 4096, 11008, torch.float16, capability)).implementation == SKINNY
    assert candidates.choose(Product(17, 4096, 11008, torch.float16, (9, 0), backward=True)).implementation == SKINNY


def test_a_trial_leaves_a_record_that_can_be_checked(tmp_path):
    assert tune.main(["--smoke", "--dtype", "float16", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("tune-*.csv")
    assert choice.newest(tmp_path, "tune-*.csv") == path
    assert choice.main([str(path)]) == 0
    rows = read_csv(path)
    assert {(row["op"], row["m"], row["round"]) for row in rows} == {
        (op, m, number) for op in ("matmul", "matmul_dx") for m in (1, 16) for number in (1, 2)
    }
    assert {(row["round"], row["times_fastest"]) for row in rows} == {(1, None), (2, 1.0)}


def test_what_may_be_the_fastest_is_looked_at_again():
    taken, near, far, best = (candidates.Candidate(SKINNY, config) for config in range(4))
    other, another = candidates.Candidate(DEQUANTIZE, 4), candidates.Candidate(DEQUANTIZE, 5)
    first = {taken: 20.0, near: 10.5, far: 11.0, best: 10.0, other: 30.0, another: 31.0}
    assert set(tune._finalists(first, taken)) == {taken, best, near, other}


def test_a_candidate_that_computes_something_else_is_not_timed(monkeypatch):
    right = tune.call_of
    monkeypatch.setattr(tune, "call_of", lambda *arguments: lambda: right(*arguments)() * 1.01)
    with pytest.raises(tune.GateError, match="error of dequantize"):
        list(tune._rows(tune._parser().parse_args(["--smoke", "--out", "/nowhere"]), "cpu"))


def test_after_the_given_seconds_no_point_is_begun(tmp_path, capsys):
    assert tune.main(["--smoke", "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert "the rest is not measured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_faster_configuration_is_proposed(record, monkeypatch, capsys):
    assert proposal.main([str(record)]) == 0
    said = capsys.readouterr().out
    assert "matmul 8192x4096 float16: fused skinny 8, fused wgmma 64, dequantize + cuBLAS 4096" in said
    assert said.count("  nothing") == 2
    rows = read_csv(record)
    slow = next(row for row in rows if row["implementation"] == SKINNY and row["median_us"] == 10.0)
    slow["median_us"] = 4.5
    (line,) = [line for line in proposal.lines(rows) if "by 100.0% than" in line]
    assert line.startswith(f"  (8192, 4096, 8): {slow['configuration']} by")


def test_points_without_a_configuration_in_common_get_no_proposal():
    """Rows 1 and 4 of x have one entry of the table."""
    rows = _rows({(SKINNY, "tiles=1", 1): 5.0}, m=1) + _rows({(SKINNY, "tiles=2", 1): 4.0}, m=4)
    found = proposal.lines(rows, lambda product: (SKINNY, "tiles=1" if product.M == 1 else "tiles=2"))
    assert [line for line in found if "for all of M = [1, 4]" in line]
