"""The report and the figure of a run."""

from __future__ import annotations

import pytest

from qkernels import UserError
from qlora.compare import side_by_side
from qlora.report import RunResult, report_text, save_loss_plot, save_report


@pytest.fixture
def result() -> RunResult:
    history = [{"step": 0, "eval_loss": 4.0}]
    history += [{"step": step, "loss": 4 - step / 10, "num_tokens": 100.0 * step} for step in range(1, 21)]
    history += [{"step": 20, "eval_loss": 2.5}, {"step": 20, "train_loss": 3.0}]
    return RunResult(
        model="someone/model",
        dataset="bundled",
        device="CPU",
        precision="float32, because",
        sizes={"quantized": 2**20, "quantized_16bit": 4 * 2**20, "kept": 2**21},
        trainable=5,
        parameters=1000,
        batch_size=4,
        seconds=10.0,
        peak_memory_gib=1.5,
        history=history,
        eval_loss=(4.0, 2.5),
        samples=[("Act | now", "", "I will\n\nact.")],
    )


def test_the_report_has_every_figure(result):
    text = report_text(result)
    for line in (
        "# Fine-tuning model",
        "| held-out texts | 4.000 | 2.500 |",
        "| training, mean of 2 log entries at the start and the end | 3.850 | 2.050 |",
        "| linear layers in 16 bits | 4.0 MiB |",
        "| the same in 4 bits, with scales | 1.0 MiB |",
        "| peak of the run | 1.50 GiB (process) |",
        "| trainable parameters | 5 of 1,000 (0.5000%) |",
        "| steps | 20 |",
        "| tokens a second | 200 |",
        "### Act | now",
        "> (nothing)",
        "> I will\n>\n> act.",
    ):
        assert line in text


def test_nothing_held_out_and_no_samples(result):
    result.eval_loss, result.samples = None, []
    text = report_text(result)
    assert "held-out" not in text
    assert "before and after" not in text


def test_losses_are_told_apart(result):
    assert result.eval_losses() == ([0, 20], [4.0, 2.5])
    assert result.train_losses()[0] == list(range(1, 21))


def test_the_figure_is_a_picture(result, tmp_path):
    save_loss_plot(result, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_place_that_cannot_be_written(result, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="folder"):
        save_report(result, tmp_path / "file" / "report.md")


def test_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "43")
    text = side_by_side("one two three four five six", "eins\n\nzwei", ("base", "tuned"))
    assert text.splitlines() == [
        "base                 | tuned",
        "----                 | -----",
        "one two three four   | eins",
        "five six             |",
        "                     | zwei",
    ]
