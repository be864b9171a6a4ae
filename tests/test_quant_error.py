"""The error report: its theory against other ways of integrating, and wrong quantizers that it must not let pass."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch
from scipy import integrate, stats

pytest.importorskip("bitsandbytes", reason="the rival, part of the [bench] extra")

import qkernels
from benchmarks import error_page, figures, quant_error
from benchmarks.error import (
    check,
    formats,
    model,
    outputs,
    records,
    sections,
    sources,
    statistics,
    tables,
    theory,
    weights,
)
from qkernels import format as definition
from qlora.loading import load_pretrained_4bit
from tests.models import tiny_model


def test_the_derived_tables_are_the_librarys():
    for name in ("nf4", "fp4"):
        ours = qkernels.get_4bit_type(name, device="cpu").unique().double().numpy()
        np.testing.assert_allclose(tables.TABLES[name], ours, atol=2e-7)
    np.testing.assert_allclose(tables.dynamic_map(), qkernels.create_dynamic_map().double().numpy(), atol=1e-7)


@pytest.mark.parametrize(("distribution", "of"), [("normal", stats.norm()), ("student-t", stats.t(5))])
@pytest.mark.parametrize("blocksize", [32, 4096])
def test_the_expected_error_by_another_integration(distribution, of, blocksize):
    """By Simpson's rule in x instead of u, over absmax itself instead of its probability."""
    table = tables.TABLES["nf4"]

    def given(m: float) -> float:
        x = m * np.linspace(-1, 1, 20001)
        nearest = m * table[np.abs(table - x[:, None] / m).argmin(axis=1)]
        inside = integrate.simpson((x - nearest) ** 2 * of.pdf(x), x=x)
        return inside / (1 - 2 * of.sf(m)) * (blocksize - 1) / blocksize

    def density(m: float) -> float:
        return blocksize * (1 - 2 * of.sf(m)) ** (blocksize - 1) * 2 * of.pdf(m)

    grid = of.isf(np.geomspace(0.4, 1e-9, 201) / 2)
    weight = np.array([density(m) for m in grid])
    error = integrate.simpson(weight * [given(m) for m in grid], x=grid) / integrate.simpson(weight, x=grid)
    assert theory.expected(distribution, "nf4", blocksize, False).mse == pytest.approx(error, rel=3e-3)


def test_the_bounds():
    # Max, "Quantizing for minimum distortion" (1960), table I: sixteen levels for the normal distribution.
    assert theory.unblocked_lloyd_max("normal") == pytest.approx(0.009497, rel=1e-3)
    # The same by the normal distribution's own moments instead of fine bins, to more digits than Max had.
    codes = stats.norm.ppf((np.arange(16) + 0.5) / 16)
    for _ in range(5000):
        edges = np.concatenate([[-np.inf], tables.midpoints(codes), [np.inf]])
        codes = -np.diff(stats.norm.pdf(edges)) / np.diff(stats.norm.cdf(edges))
    exact = 1 - (np.diff(stats.norm.pdf(edges)) ** 2 / np.diff(stats.norm.cdf(edges))).sum()
    assert theory.unblocked_lloyd_max("normal") == pytest.approx(exact, rel=1e-5)
    # Evenly spaced cells are the best for the uniform distribution on [-1, 1]: (2 / 16)^2 / 12.
    assert theory.unblocked_lloyd_max("uniform") == pytest.approx((2 / 16) ** 2 / 12, rel=1e-3)
    for blocksize in (32, 64, 4096):
        best = theory.best_table_mse("normal", blocksize)
        assert all(best < theory.expected("normal", name, blocksize, False).mse for name in ("nf4", "fp4", "int4"))


def test_other_weights_agree_with_the_theory_too():
    cases = weights.Cases(tuple(formats.FORMATS), (64, 256))
    for distribution, seed in (("normal", 7), ("student-t", 8), ("outliers", 9), ("uniform", 10)):
        rows = list(weights.synthetic_rows(distribution, 1 << 19, cases, "cpu", total=4 * 24, seed=seed))
        assert not list(weights.problems(rows))
        assert {row["provider"] for row in rows} == {"qkernels", "bitsandbytes", "torch"}
        # Without double quantization bitsandbytes decodes to the same bits.
        assert {row["values_differ"] for row in rows if row["provider"] == "bitsandbytes" and not row["nested"]} == {0}


@pytest.fixture
def wrong_code(monkeypatch):
    """Change entries of the NF4 code that is decoded with; the thresholds stay."""

    def change(index: int, by: float) -> None:
        code = definition._TABLES["nf4", torch.device("cpu")].clone()
        code[index] += by
        pairs = torch.cartesian_prod(code, code)
        monkeypatch.setitem(definition._TABLES, ("nf4", torch.device("cpu")), code)
        monkeypatch.setitem(definition._TABLES, ("nf4 bytes", torch.device("cpu")), pairs)

    return change


def test_a_wrong_code_is_refused(wrong_code):
    weights.calibrate(["nf4"], "cpu")
    wrong_code(11, 0.02)
    with pytest.raises(check.DisagreementError) as refusal:
        weights.calibrate(["nf4"], "cpu")
    for problem in (
        "nf4 64 nested=False by qkernels: mse 0.00",
        "nf4 64 nested=True by qkernels: mse 0.00",
        "nf4 64 nested=False by qkernels: a weight is 0.02 further off than by the nearest code",
    ):
        assert problem in str(refusal.value)
    assert "bitsandbytes" not in str(refusal.value)


@pytest.mark.parametrize("index", range(16))
def test_every_slightly_wrong_code_is_refused(index, wrong_code):
    wrong_code(index, 1e-4)
    row = next(iter(weights.synthetic_rows("normal", 1 << 18, weights.Cases(("nf4",), (64,)), "cpu", total=1)))
    assert "further off than by the nearest code" in " ".join(weights.problems([row]))


def test_a_wrong_threshold_is_refused(monkeypatch):
    from qkernels import reference

    moved = list(definition.NF4_THRESHOLDS)
    moved[7] += 0.03
    monkeypatch.setattr(reference, "NF4_THRESHOLDS", tuple(moved))
    with pytest.raises(check.DisagreementError, match="standard errors"):
        weights.calibrate(["nf4"], "cpu")


def test_a_wrong_code_leaves_no_record(wrong_code, tmp_path, capsys):
    wrong_code(3, 0.02)
    assert quant_error.main(["--smoke", "--level", "weights", "--model", "--out", str(tmp_path)]) == 1
    assert "nothing is published" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A folder with what a small run leaves."""
    folder = tmp_path_factory.mktemp("trial")
    flags = ["--smoke", "--level", "weights", "outputs", "--model", "--weights", "normal", "--out", str(folder)]
    assert quant_error.main(flags) == 0
    return folder


def test_a_run_leaves_records_and_a_page(trial):
    assert {path.suffix for path in trial.iterdir()} == {".csv", ".html", ".md"}
    for path in trial.glob("error-*.csv"):
        with path.open(encoding="utf-8") as file:
            assert all(None not in row and None not in row.values() for row in csv.DictReader(file))
        assert all(row["commit"] and row["torch"] == torch.__version__ for row in records.read(path))
    page = (trial / "error.html").read_text(encoding="utf-8")
    (record,) = trial.glob("error-weights-*.csv")
    first = records.read(record)[0]
    assert first["mse_low"] < first["mse"] < first["mse_high"]
    assert first["rounding_excess"] < 1e-6
    assert set(re.findall(r'href="#(\d+)"', page)) == set(re.findall(r'<h2 id="(\d+)"', page)) != set()
    numbers = (f"{first['mse']:.4g}", f"{first['mse_theory']:.4g}", f"{100 * first['relative_rms']:.3f}%")
    for text in (record.name, first["commit"], *numbers):
        assert text in page
        assert text in (trial / "error.md").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4  # codes, cosine, error against blocksize, outputs
    assert "http" not in page


def test_in_short_are_the_formats_that_both_levels_measured():
    weights_rows = [
        {"format": name, "blocksize": 64, "nested": True, "provider": "qkernels", "weights": kind, "tensor": tensor}
        | {"bits_per_weight": 4.127, "relative_rms": value, "relative_rms_theory": 0.09}
        for name in ("nf4", "int8")
        for kind, tensor, value in (("normal", None, 0.092), ("model", weights.POOLED, 0.094))
    ]
    interval = {f"{key}{end}": 1.5 for key in ("kl", "perplexity_ratio") for end in ("", "_low", "_high")}
    models = [weights_rows[0] | interval | {"model": "M"}]
    (section,) = sections.in_short(weights_rows, models)
    assert section.head[4] == "M's weights"
    kl, perplexity = "1.5000 (1.5000 to 1.5000)", "1.500 (1.500 to 1.500)"
    assert section.body == (("NF4", "4.13", "9.200%", "9.000%", "9.400%", kl, perplexity),)
    assert sections.in_short(weights_rows[:1], models) == []


def test_nothing_is_made_from_a_record_that_was_edited(trial, tmp_path, capsys):
    (path,) = trial.glob("error-weights-*.csv")
    text = path.read_text(encoding="utf-8")
    measured = str(records.read(path)[0]["mse"])
    assert measured in text
    (tmp_path / path.name).write_text(text.replace(measured, str(0.97 * float(measured))), encoding="utf-8")
    with pytest.raises(check.DisagreementError, match=r"mse 0\.00"):
        records.read(tmp_path / path.name)
    for made in (figures, error_page):
        assert made.main(["--results", str(tmp_path), "--out", str(tmp_path / "made")]) == 1
        assert "nothing is published" in capsys.readouterr().err
        assert not [one for one in (tmp_path / "made").glob("*") if one.name.startswith("error")]


def test_an_error_larger_than_rounding_allows_is_refused():
    row = next(iter(weights.synthetic_rows("normal", 1 << 18, weights.Cases(("nf4",), (64,)), "cpu", total=1)))
    assert not list(weights.problems([row]))
    assert "rounding allows" in next(weights.problems([row | {"max_error": 1.01 * row["max_error_allowed"]}]))


def test_the_interval_covers_the_truth():
    """Of 200 samples about 95 in 100 have the expected error within their interval."""
    expected, hits = theory.expected("normal", "int4", 64, False).mse, 0
    for seed in range(200):
        weight = check.draw("normal", 1 << 14, seed)
        decoded = formats.FORMATS["int4"].round_trip(weight, 64, False)
        found = statistics.estimates(statistics.Sums.of(weight, decoded, 64))["mse"]
        hits += found.low <= expected <= found.high
    assert 180 <= hits <= 199


def test_integers_with_a_short_last_block_and_zeros():
    weight = torch.randn(100)
    weight[:32] = 0
    for nested in (False, True):
        decoded = formats.FORMATS["int8"].round_trip(weight, 32, nested)
        assert decoded.shape == weight.shape
        assert torch.equal(decoded[:32], weight[:32])
        assert (decoded - weight).abs().max() < 0.05


def test_outputs_split_into_quantization_and_arithmetic():
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    rows = list(outputs.output_rows("normal", weight, torch.bfloat16, (1, 8), "cpu", total=4))
    assert not list(outputs.problems(rows))
    for row in rows:
        assert row["arithmetic"] == pytest.approx(row["arithmetic_expected"], rel=0.1)
    assert {row["quantization"] for row in rows if row["provider"] == "torch"} == {0}
    wrong = rows[0] | {"quantization": 1.3 * rows[0]["quantization"]}
    assert len(list(outputs.problems([wrong]))) == 2


def test_a_model_with_replaced_weights_is_the_loaded_4bit_model(tmp_path):
    float_model = tiny_model("llama").float()
    float_model.save_pretrained(tmp_path)
    texts = [torch.randint(0, 50, (1, length)) for length in (9, 17, 30)]
    case = model.Replacement("nf4", formats.FORMATS["nf4"], 64, True)
    rows = list(model.model_error_rows("tiny", float_model, texts, [case]))
    assert not list(model.problems(rows))
    assert [row["format"] for row in rows] == ["float32", "bfloat16", "nf4"]
    loaded = load_pretrained_4bit(str(tmp_path), dtype=torch.float32, device="cpu")
    divergence, count = 0.0, 0
    for ids in texts:
        truth, found = model._log_probabilities(float_model, ids), model._log_probabilities(loaded, ids)
        divergence += (truth.double().exp() * (truth.double() - found.double())).sum().item()
        count += len(truth)
    assert rows[-1]["kl"] == pytest.approx(divergence / count, rel=1e-3)
    assert "differs from itself" in next(model.problems([rows[-1] | {"format": "float32"}]))


def test_only_matrices_that_would_be_quantized():
    assert sources.is_quantized("model.layers.0.mlp.up_proj.weight", (8, 8))
    for name, shape in (("model.embed_tokens.weight", (8, 8)), ("lm_head.weight", (8, 8)), ("norm.weight", (8,))):
        assert not sources.is_quantized(name, shape)


def test_too_few_weights_for_an_interval(tmp_path, capsys):
    assert quant_error.main(["--count", "4096", "--out", str(tmp_path)]) == 2
    assert "--count" in capsys.readouterr().err
