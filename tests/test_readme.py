"""The README's tables and the figures are those of the records in the repository."""

from __future__ import annotations

import json
import re
import shutil

import pytest

pytest.importorskip("bitsandbytes", reason="the rival, part of the [bench] extra")

from PIL import Image

from benchmarks import error_page, figures, plotting, readme
from benchmarks.aims import NAMES, aims_of, short_of
from benchmarks.report import write_csv


def test_the_tables_are_current(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_a_table_of_another_time_is_seen(monkeypatch, tmp_path, capsys):
    """Whichever page it is on."""
    for page in readme.PAGES:
        changed = tmp_path / page.name
        changed.write_text("<!-- table: host -->\nof another time\n<!-- end of table -->", encoding="utf-8")
        monkeypatch.setattr(readme, "PAGES", (changed,))
        assert readme.main(["--check"]) == 1
        assert page.name in capsys.readouterr().err
        assert readme.main([]) == 0
        assert readme.main(["--check"]) == 0


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/optimize.md", "docs/error.md"])
def test_every_record_that_a_page_names_is_there(page):
    text = (readme.ROOT / page).read_text(encoding="utf-8")
    for pattern in re.findall(r"`([\w-]+-\*\.(?:md|csv|jsonl))`", text):
        assert list(readme.RESULTS.glob(pattern)), f"{page} names {pattern}"


def test_every_table_has_its_place():
    text = "".join(page.read_text(encoding="utf-8") for page in readme.PAGES)
    assert sorted(found["name"] for found in readme.MARKS.finditer(text)) == sorted(readme.TABLES)


def test_a_changed_record_changes_the_table(tmp_path):
    for path in readme.RESULTS.glob("dequantize-quantize-*.csv"):
        shutil.copy(path, tmp_path)
    mark = "<!-- table: kernels -->\n<!-- end of table -->"
    before = readme.current(mark, tmp_path)
    assert before.count("\n| ") > 3
    assert "python -m benchmarks.run" in before
    ours = re.search(r"\| ([\d.]+) \|", before)[1]
    for path in tmp_path.iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        changed = [re.sub(r",ok,,[\d.]+", ",ok,,1234.5", line) for line in lines]
        path.write_text("\n".join(changed) + "\n", encoding="utf-8")
    after = readme.current(mark, tmp_path)
    assert "1234.5" in after
    assert f"| {ours} |" not in after


def test_a_table_without_a_record_is_empty(tmp_path):
    mark = "<!-- table: errors -->\nold\n<!-- end of table -->"
    assert readme.current(mark, tmp_path) == "<!-- table: errors -->\n<!-- end of table -->"


def test_a_mark_that_names_no_table_is_an_error(tmp_path):
    with pytest.raises(KeyError):
        readme.current("<!-- table: nothing -->\n<!-- end of table -->", tmp_path)


def test_every_figure_is_of_the_newest_record():
    for name, drawn in figures.DRAWN.items():
        path = figures.FIGURES / name
        record = figures.newest(figures.RESULTS, drawn.pattern)
        if record is None or not any(drawn.needs(row) for row in record[1]):
            assert not path.exists(), f"{name} has no record"
            continue
        with Image.open(path) as picture:
            assert picture.text[plotting.SOURCE_KEY] == plotting.source_of(*record), "run `make figures`"
    assert {path.name for path in figures.FIGURES.iterdir()} <= {*figures.DRAWN, *figures.DEFINED}
    assert all(
        (figures.FIGURES / name).stat().st_size < 200_000 for name in figures.DRAWN if (figures.FIGURES / name).exists()
    )


def test_the_error_page_is_current(tmp_path):
    committed = figures.RESULTS / "error.md"
    made = error_page.make(figures.RESULTS, tmp_path)
    assert [path.name for path in made] == ["error.html", "error.md"]
    without_pictures = re.sub(r"!\[[^\n]*\n\n", "", committed.read_text(encoding="utf-8"))
    assert (tmp_path / "error.md").read_text(encoding="utf-8") == without_pictures, "run `make figures`"


def test_the_training_table_names_every_stack(tmp_path):
    rows = [
        {"stack": stack, "name": "4x512", "status": "ok", "precision": "bf16", "tokens_per_s": speed}
        | {"gpu_peak_allocated_gib": 6.0, "commit": "c" * 40, "gpu": "GPU", "date": "2026-01-01"}
        for stack, speed in (("qlora", 5000.0), ("other", 4000.0))
    ]
    (tmp_path / "bloom-7b1-gpu.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    text = readme.current("<!-- table: training -->\n<!-- end of table -->", tmp_path)
    assert "| 4 x 512 | 5,000 (6.0) | 4,000 (6.0) |" in text


def test_what_is_around_training_has_a_blank_where_nothing_was_generated(tmp_path):
    base = {"status": "ok", "precision": "bf16", "load_gpu_peak_allocated_gib": 4.0, "gpu_peak_allocated_gib": 6.0}
    base |= {"commit": "c" * 40, "gpu": "GPU", "date": "2026-01-01"}
    rows = [
        base | {"stack": "other", "name": "4x512", "load_seconds": 8.0, "tokens_per_s": 1.0},
        base | {"stack": "qlora", "name": "4x512", "load_seconds": 7.0, "tokens_per_s": 1.0},
        base | {"stack": "qlora", "name": "generate", "load_seconds": 7.0, "new_tokens_per_s": 100.0},
    ]
    (tmp_path / "bloom-7b1-gpu.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    text = readme.current("<!-- table: around -->\n<!-- end of table -->", tmp_path)
    assert "| bf16 (GPU peak, GiB) | qlora | other |" in text
    assert "| loading, s | 7.0 (4.0) | 8.0 (4.0) |" in text
    assert "| generating, tokens/s | 100 (6.0) |  |" in text


@pytest.fixture(scope="module")
def records():
    """What the aims are held against."""
    found = [readme._newest(readme.RESULTS, pattern) for pattern in readme.TABLES["aims"][0][:6]]
    return [rows for _, rows in found]


@pytest.mark.parametrize(
    ("record", "changed", "keys", "what"),
    [
        (0, {"provider": "qkernels"}, ["median_us"], r"product|gradient|layer with|host"),
        (1, {"stack": "qlora"}, ["tokens_per_s", "new_tokens_per_s"], r"Bloom-7B1.*(tokens/s|over)|generating"),
        (1, {"stack": "qlora"}, ["gpu_peak_allocated_gib"], r"Bloom-7B1.*GPU peak"),
        (2, {"stack": "qlora"}, ["tokens_per_s"], r"Llama"),
        (3, {}, ["memory_error"], r"plan"),
        (4, {}, ["largest_loss_difference"], r"losses step by step"),
    ],
)
def test_an_aim_is_reached_or_not_as_its_record_says(records, record, changed, keys, what):
    """One record a thousand times better, and a thousand times worse: these aims and no others follow it."""
    before = {aim.what: aim.reached for aim in aims_of(*records)}
    mine = {aim for aim in before if re.search(what, aim)}
    assert mine
    more_is_better = keys[0].endswith("tokens_per_s")
    for factor in (1e-3, 1e3):
        rows = [
            row
            | {key: row[key] * factor for key in keys if changed.items() <= row.items() and row.get(key) is not None}
            for row in records[record]
        ]
        others = [*records[:record], rows, *records[record + 1 :]]
        after = {aim.what: aim.reached for aim in aims_of(*others)}
        assert after == before | dict.fromkeys(mine, (factor > 1) == more_is_better)
        *missed, counted = short_of(*others)[1]
        assert [line[0] for line in missed] == [aim for aim, reached in after.items() if not reached]
        assert counted[0] == f"{sum(after.values())} of {len(after)} aims"


@pytest.mark.parametrize("slow", ["1x128", "4x512", "8x512", None])
def test_the_aim_of_fp16_is_held_against_the_slowest_case(records, slow):
    """Of our stack: bitsandbytes' own speed in fp16 does not count."""
    bf16 = {row["name"]: row for row in records[1] if row["stack"] == "qlora" and row["precision"] == "bf16"}
    rows = []
    for row in records[1]:
        speed = row.get("tokens_per_s")
        if row["precision"] == "fp16" and speed is not None:
            ours = (0.9 if row["name"] == slow else 1.1) * bf16[row["name"]]["tokens_per_s"]
            row = {**row, "tokens_per_s": ours if row["stack"] == "qlora" else 0.1 * speed}
        rows.append(row)
    (found,) = (aim for aim in aims_of(records[0], rows, *records[2:]) if "fp16 to that in bf16" in aim.what)
    assert found.reached == (slow is None)
    if slow is not None:
        assert found.cells()[2] == f"0.90x ({slow.replace('x', ' x ')})"


@pytest.mark.parametrize(("factor", "reached"), [(0.1, False), (10, True)])
def test_the_aim_of_ragged_weights_waits_for_their_record(records, factor, reached):
    base = {"op": "matmul", "rows": 8, "columns": 80, "dtype": "float16", "method": "graph", "status": "ok"}
    ragged = [
        base | {"op": op, "m": m, "provider": provider, "median_us": us}
        for op in ("matmul", "matmul_dx")
        for m in (1, 4, 16)
        for provider, us in (("qkernels", 1.0), ("bitsandbytes", factor if (op, m) == ("matmul", 4) else 2.0))
    ]
    before, after = list(aims_of(*records)), list(aims_of(*records, ragged))
    found = {aim.what: (aim.reached, aim.where) for aim in after if aim.what not in {one.what for one in before}}
    y, dx = (f"{name} with rows that are not whole blocks, M = 1 to 16, over bitsandbytes" for name in NAMES.values())
    assert found == {y: (reached, " (M = 1)" if reached else " (M = 4)"), dx: (True, " (M = 1)")}


@pytest.mark.parametrize("factor", [0.5, 2])
def test_the_aim_of_learning_is_held_against_the_best_kind(records, factor):
    *others, learning = records
    rows = [
        row
        if row["weights"] == "16 bits"
        else {**row, "losses": " ".join(str(float(loss) * factor) for loss in row["losses"].split())}
        for row in learning
    ]
    *_, last = aims_of(*others, rows)
    assert last.reached == (factor < 1)


def test_a_table_names_the_command_of_its_record(tmp_path):
    row = {"hidden": "all", "provider": "qkernels", "seconds": 1.0, "times_bitsandbytes": 1.5}
    row |= {"commit": "c" * 40, "gpu": "GPU", "date": "2026-01-01"}
    mark = "<!-- table: exercise -->\n<!-- end of table -->"
    write_csv(tmp_path / "nf4-exercise-a", [row])
    assert "`python -m benchmarks.nf4_exercise` at" in readme.current(mark, tmp_path)
    write_csv(tmp_path / "nf4-exercise-b", [{**row, "command": "python -m benchmarks.nf4_exercise --trials 7"}])
    text = readme.current(mark, tmp_path, "../records")
    assert "`python -m benchmarks.nf4_exercise --trials 7` at commit ccccccccc on GPU, 2026-01-01." in text
    assert "[nf4-exercise-b.csv](../records/nf4-exercise-b.csv)" in text


def test_the_tables_of_whole_models_and_of_the_hosts_part(tmp_path):
    base = {
        "commit": "c" * 40,
        "gpu": "GPU",
        "date": "2026-01-01",
        "model": "small",
        "dtype": "float16",
        "reason": None,
    }
    models = [
        base | {"op": op, "m": m, "provider": name, "status": status, "median_us": us, "peak_mib": 2048.0}
        for op, m, name, status, us in (
            ("copy", None, "torch", "ok", 1.0),
            ("train_step", 128, "bitsandbytes", "ok", 2000.0),
            ("train_step", 128, "qlora", "ok", 1000.0),
            ("train_step", 128, "qlora, again", "ok", 1001.0),
            ("generate", 1, "bitsandbytes", "not run", None),
        )
    ]
    models[-1]["reason"] = "no loss scale"
    models.append(models[1] | {"dtype": "bfloat16", "median_us": 3000.0})
    write_csv(tmp_path / "load-train_step-gpu", models)
    text = readme.current("<!-- table: models -->\n<!-- end of table -->", tmp_path)
    assert "| small; ms (GPU peak, GiB) | qlora | bitsandbytes |" in text
    assert "| training step, 128 tokens, float16 | 1.0 (2.0) | 2.0 (2.0) |" in text
    assert "| generating, float16 |  | - |" in text
    assert "| training step, 128 tokens, bfloat16 |  | 3.0 (2.0) |" in text
    assert text.count("Not run: bitsandbytes, float16, generate: no loss scale.") == 1
    host = [
        base
        | {"op": "linear4bit", "rows": 8, "columns": 4, "m": 1, "method": method, "status": "ok", "provider": name}
        | {"median_us": us}
        for method, name, us in (
            *(("host", "qkernels", us) for us in (9.0, 9.5, 14.0)),
            *(("host", "torch", 11.0), ("graph", "qkernels", 5.0)),
        )
    ]
    write_csv(tmp_path / "linear4bit-gpu", host)
    text = readme.current("<!-- table: host -->\n<!-- end of table -->", tmp_path)
    assert "| inference, float16 | 9.5 (9.0 to 14.0) | 11.0 (11.0 to 11.0) |" in text


def test_the_table_of_ragged_weights_has_a_record_of_its_own(tmp_path):
    base = {"commit": "c" * 40, "gpu": "GPU", "date": "2026-01-01", "model": "small", "dtype": "float16"}
    rows = [
        base
        | {"op": op, "rows": 8, "columns": 80, "blocksize": blocksize, "m": m, "provider": provider}
        | {
            "method": method,
            "median_us": us,
            "status": "ok" if us else "not run",
            "reason": None if us else "it cannot",
        }
        for op, blocksize, m, provider, method, us in (
            ("copy", 64, None, "torch", "graph", 1.0),
            *(("matmul", 64, 1, name, "graph", us) for name, us in (("qkernels", 2.0), ("torch", 3.0))),
            ("matmul", 64, 1, "bitsandbytes", None, None),
            ("matmul", 64, 1, "qkernels", "flushed", 7.0),
            *(
                ("matmul_dx", 32, m, name, "graph", m * us)
                for m in (1, 4)
                for name, us in (("bitsandbytes", 5.0), ("qkernels", 2.0), ("torch", 3.0))
            ),
        )
    ]
    write_csv(tmp_path / "ragged-matmul-matmul_dx-gpu", rows)
    text = readme.current("<!-- table: ragged -->\n<!-- end of table -->", tmp_path)
    assert "| float16; µs (over bitsandbytes, over 16-bit cuBLAS) | M = 1 | M = 4 |" in text
    assert "| y, 8 x 80 | 2.0 (-, 1.50x) |" in text
    assert "| dX, 8 x 80, blocks of 32 | 2.0 (2.50x, 1.50x) | 8.0 (2.50x, 1.50x) |" in text
    assert "Not run: bitsandbytes, float16, matmul: it cannot." in text
    for name in set(readme.TABLES) - {"ragged", "aims"}:  # none of another's weights
        assert not [path for pattern in readme.TABLES[name][0] for path in tmp_path.glob(pattern)]
    assert not [path for drawn in figures.DRAWN.values() for path in tmp_path.glob(drawn.pattern)]
