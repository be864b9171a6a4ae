"""The full-size benchmark, at a tiny size on the CPU: every stack, the gate, what failures leave behind."""

from __future__ import annotations

import json
import select
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments
from trl import SFTConfig

from benchmarks import bloom7b1, checkpoint, data, gate, processes, report
from benchmarks.environment import LIBRARIES, environment
from benchmarks.jobs import Case, Job
from benchmarks.providers import PROVIDERS, training_arguments
from qkernels.errors import UserError
from qlora import train as qlora_train

BLOOM_7B1_PARAMETERS = 7_069_016_064
TINY = checkpoint.ModelSize(layers=2, hidden=64, heads=4, vocab=512)
TINY_FLAGS = ["--layers", "2", "--hidden", "64", "--heads", "4", "--vocab", "512", "--device", "cpu"]
TEXTS = [f"I want you to act as number {number} of a row of speakers, and to say only that." for number in range(9)]


@pytest.fixture(scope="module")
def prompts_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.csv"
    file.write_text("act,prompt\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def results(prompts_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of every stack; the path of its results without suffix."""
    pytest.importorskip("bitsandbytes")
    out = tmp_path_factory.mktemp("results")
    flags = [
        "--prompts",
        "4",
        "--lengths",
        "2x16",
        "--steps",
        "1",
        "--warmup",
        "1",
        "--new-tokens",
        "2",
        "--commit",
        "abc+",
    ]
    assert bloom7b1.main([*TINY_FLAGS, *flags, "--data", str(prompts_csv), "--out", str(out)]) == 0
    (file,) = out.glob("*.jsonl")
    return file.with_suffix("")


@pytest.mark.parametrize("settings", [TrainingArguments, SFTConfig, qlora_train.TrainingArguments])
def test_every_stack_has_the_trainers_own_optimizer(settings, tmp_path):
    """An unfused one waits for the GPU in each step under a loss scale, which no user of a default sees."""
    given = settings(output_dir=str(tmp_path), **training_arguments("fp32", "cpu"))
    assert given.optim == TrainingArguments(output_dir=str(tmp_path)).optim == "adamw_torch_fused"


@pytest.fixture
def rows(results: Path) -> list[report.Row]:
    return [json.loads(line) for line in results.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.build_checkpoint(folder, TINY, device="cpu")
    data.train_tokenizer(TEXTS, TINY.vocab).save_pretrained(folder)
    return folder


@pytest.fixture
def job(tiny_checkpoint: Path, tmp_path: Path) -> Job:
    (tmp_path / "prompts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    return Job(
        provider=next(iter(PROVIDERS)),
        precision="fp32",
        device="cpu",
        checkpoint=str(tiny_checkpoint),
        prompts=str(tmp_path / "prompts.json"),
        record=str(tmp_path / "run" / "record.jsonl"),
        yardstick=str(tmp_path / "yardstick.safetensors"),
        folder=str(tmp_path / "run"),
        cases=(Case("2x16", 2, 16, steps=1, warmup_steps=0),),
    )


def test_every_stack_does_every_case(rows: list[report.Row]) -> None:
    assert [(row["stack"], row["name"], row["status"]) for row in rows] == [
        (stack, name, "ok") for stack in PROVIDERS for name in ("recipe", "2x16", "generate")
    ]


def test_every_row_says_what_was_measured_and_on_what(rows: list[report.Row]) -> None:
    for row in rows:
        assert (row["commit"], row["dirty"]) == ("abc", True)
        assert row["date"].endswith("+00:00")
        assert row["torch"] == torch.__version__
        assert set(LIBRARIES) <= set(row)
        assert (row["layers"], row["hidden"], row["heads"], row["vocab"]) == (2, 64, 4, 512)
        if row["name"] == report.GENERATE:
            assert row["new_tokens_per_s"] == pytest.approx(2 / row["generate_s"])
            assert row["token_regret"] <= gate.REGRET_TOLERANCE["fp32"]
        else:
            assert row["tokens_per_s"] > 0
            assert row["step_ms"] > 0
        assert row["load_seconds"] > 0
        assert row["host_peak_gib"] > 0.05
        assert row["trainable_parameters"] == 2 * 16 * (64 + 3 * 64)


def test_the_stacks_train_alike(rows: list[report.Row]) -> None:
    """The same tokens, one batch of them five times, and a loss that goes down alike but for the adapters' draw."""
    recipes = [row for row in rows if row["name"] == "recipe"]
    assert {(row["steps"], row["tokens"]) for row in recipes} == {(5, recipes[0]["tokens"])}
    assert all(len(row["losses"]) == 5 for row in recipes)
    for row in recipes:
        assert row["final_loss"] < row["first_loss"]
        assert row["final_loss"] == pytest.approx(recipes[0]["final_loss"], abs=0.05)


def test_the_gate_compared_every_stack_with_the_first(rows: list[report.Row]) -> None:
    first, *others = (name for name, provider in PROVIDERS.items() if provider.is_quantized)
    expected = {name: "passed" if provider.is_quantized else "not quantized" for name, provider in PROVIDERS.items()}
    for row in rows:
        assert row["gate"] == (expected | {first: "is the yardstick"})[row["stack"]]
    assert others
    assert all(row["packed_bytes_differ"] == 0 for row in rows if row["stack"] in others)


def test_the_stacks_generate_the_same_tokens(rows: list[report.Row]) -> None:
    alike = [row["tokens_alike_at_first"] for row in rows if row.get("tokens_alike_at_first") is not None]
    assert alike == [2] * (sum(provider.is_quantized for provider in PROVIDERS.values()) - 1)


def test_the_page_shows_the_rows(results: Path, rows: list[report.Row]) -> None:
    page = results.with_suffix(".md").read_text(encoding="utf-8")
    assert page == report.markdown(rows, results.with_suffix(".jsonl").name)
    for stack in PROVIDERS:
        assert page.count(f"| {stack} | fp32 |") == 4  # loading, recipe, fixed length, generating


def test_the_stack_to_hold_the_others_against_runs_first() -> None:
    options = bloom7b1._parser().parse_args(["--stacks", "qlora", "trl+peft+bitsandbytes", "--out", "x"])
    assert options.stacks == ["trl+peft+bitsandbytes", "qlora"]


def test_the_full_size_is_bloom_7b1s() -> None:
    config = checkpoint.bloom_config(checkpoint.ModelSize())
    shards = list(checkpoint._shards(config))
    assert sum(shape.numel() for shard in shards for shape in shard.values()) == BLOOM_7B1_PARAMETERS
    assert "h.29.self_attention.query_key_value.weight" in shards[-1]
    assert shards[0]["word_embeddings.weight"] == (250_880, 4096)
    assert len(shards) == 7


def test_llama_beside_bitsandbytes(prompts_csv: Path, tmp_path: Path) -> None:
    """Another model is a flag; two stacks of the four, as the rest is shared with Bloom's run above."""
    pytest.importorskip("bitsandbytes")
    flags = ["--model", "llama-2-7b", "--stacks", "trl+peft+bitsandbytes", "qlora", "--epochs", "0"]
    sizes = ["--lengths", "2x16", "--steps", "1", "--warmup", "0", "--new-tokens", "0"]
    paths = ["--data", str(prompts_csv), "--out", str(tmp_path)]
    assert bloom7b1.main([*TINY_FLAGS, *flags, *sizes, *paths]) == 0
    (file,) = tmp_path.glob("llama-2x64x512-*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["stack"], row["status"]) for row in rows] == [(flags[3], "ok"), (flags[4], "ok")]
    assert rows[1]["gate"] == "passed"
    for row in rows:
        assert row["trainable_parameters"] == 2 * 16 * (4 * (64 + 64) + 3 * (64 + 192))


def test_llama_has_its_published_size() -> None:
    shards = list(checkpoint._shards(checkpoint.config_of(checkpoint.MODELS["llama-2-7b"])))
    assert sum(shape.numel() for shard in shards for shape in shard.values()) == 6_738_415_616
    assert shards[0].keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert "model.layers.31.mlp.down_proj.weight" in shards[-1]


def test_the_checkpoint_is_built_once_and_again_for_another_size(tmp_path: Path) -> None:
    size_bytes = checkpoint.build_checkpoint(tmp_path, TINY, device="cpu")
    (file, _) = sorted(tmp_path.glob("*.safetensors"))
    before = file.stat().st_mtime_ns
    assert checkpoint.build_checkpoint(tmp_path, TINY, device="cpu") == size_bytes
    assert file.stat().st_mtime_ns == before
    assert checkpoint.build_checkpoint(tmp_path, replace(TINY, vocab=1024), device="cpu") > size_bytes
    assert load_file(file)["word_embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_the_tokenizer_comes_back_from_the_checkpoint(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    ids = data.prompt_dataset(tokenizer, TEXTS)[0]["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == 3
    assert tokenizer.decode(ids[:-1]) == TEXTS[0]


class Parrot(torch.nn.Module):
    """Its next token is the one before, plus one; the end of text it would like best of all."""

    config = SimpleNamespace(eos_token_id=2)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.nn.functional.one_hot(input_ids + 1, 16).float()
        logits[..., 2] = 9
        return SimpleNamespace(logits=logits)


def test_the_gate_stops_tokens_that_are_not_the_best() -> None:
    tokens = torch.arange(3, 11)[None]
    assert gate.must_be_greedy(Parrot(), tokens, 3, "bf16") == 0
    tokens[0, 2] = 7  # of the prompt, which nobody chose; but the next token would be another
    with pytest.raises(gate.GateError, match="a generated token's logit is 1 below the best one's"):
        gate.must_be_greedy(Parrot(), tokens, 3, "bf16")
    assert gate.must_be_greedy(Parrot(), tokens, 4, "bf16") == 0


@pytest.fixture
def sample() -> gate.Sample:
    return gate.Sample(
        {"a": torch.arange(8, dtype=torch.uint8)}, {"a": torch.arange(2, dtype=torch.uint8)}, torch.ones(5)
    )


def test_the_gate_lets_an_equal_stack_through_after_a_round_trip(sample: gate.Sample, tmp_path: Path) -> None:
    sample.save(tmp_path / "sample.safetensors")
    differences = gate.compare(sample, gate.Sample.load(tmp_path / "sample.safetensors"), "fp32")
    assert differences["packed_bytes_differ"] == differences["scale_codes_differ"] == 0
    assert differences["packed_bytes_compared"] == 8
    assert differences["token_loss_rms_difference"] == 0


def test_the_gate_stops_other_nibbles(sample: gate.Sample) -> None:
    other = replace(sample, packed={"a": sample.packed["a"] + 1})
    with pytest.raises(gate.GateError, match="8 bytes of the sampled packed weights"):
        gate.compare(other, sample, "fp32")


@pytest.mark.parametrize("loss", [1.1, float("nan")])
def test_the_gate_stops_another_loss(sample: gate.Sample, loss: float) -> None:
    other = replace(sample, token_loss=torch.tensor([1.0, 1.0, loss, 1.0, 1.0]))
    with pytest.raises(gate.GateError, match="token losses differ"):
        gate.compare(other, sample, "fp32")


def test_a_stack_that_the_gate_stops_is_not_timed_but_listed_with_its_reason(job: Job) -> None:
    name = "transformer.h.0.self_attention.query_key_value"
    other = gate.Sample({name: torch.zeros(3 * 64 * 64 // 2, dtype=torch.uint8)}, {}, torch.ones(1))
    other.save(Path(job.yardstick))
    outcome = processes.run_job(job, limit_s=120)
    assert outcome.failed_in == "gate"
    assert [phase["phase"] for phase in outcome.phases] == ["load"]
    (row,) = report.rows_of(job, outcome, {"model": "m", "gpu": None, "processor": "p", "checkpoint_bytes": 1})
    assert (row["name"], row["status"]) == ("gate", "failed")
    assert "bytes of the sampled packed weights differ" in row["reason"]
    assert row["reason"] in outcome.log_tail
    assert row["reason"] in report.markdown([row], "x.jsonl")
    assert "tokens_per_s" not in row


def test_a_stack_is_ended_at_its_time_limit(job: Job) -> None:
    outcome = processes.run_job(replace(job, cases=(Case("long", 2, None, 10**6, 0),)), limit_s=5)
    assert (outcome.failure, outcome.failed_in) == ("ended at its time limit of 5 s", "case")
    assert [phase["phase"] for phase in outcome.phases] == ["load", "gate"]


def test_a_stack_that_has_no_time_left_does_not_begin(job: Job) -> None:
    outcome = processes.run_job(job, limit_s=0)
    assert (outcome.phases, outcome.failure, outcome.failed_in) == ([], "ended at its time limit of 0 s", "start")


def test_every_process_has_imported_before_the_first_begins(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one, which is still importing, would disturb the first one's times; and none begins unasked."""
    jobs = [replace(job, folder=str(tmp_path / name), record=str(tmp_path / name / "r")) for name in ("a", "b")]
    ready: list[int] = []
    begin = processes._Started.begin

    def noting_begin(self: processes._Started) -> None:
        pipes = [started._ready for started in workers._started.values()]
        ready.append(sum(not pipe.closed and bool(select.select([pipe], [], [], 0)[0]) for pipe in pipes))
        begin(self)

    monkeypatch.setattr(processes._Started, "begin", noting_begin)
    with processes.Workers(jobs) as workers:
        first, second = workers._started.values()
        assert not workers.run(jobs[0], limit_s=120).failure
        assert ready[0] == 2
        assert first.has_ended
        assert not second.has_ended
        assert not Path(jobs[1].record).exists()
    assert second.has_ended


def test_what_was_finished_before_a_failure_is_kept(job: Job) -> None:
    two = replace(job, cases=(Case("first", 1, 8, 2, 1), Case("second", 1, 8, 2, 1)))
    phases = [{"phase": "load", "seconds": 2.0}, {"phase": "case", "name": "first", "tokens_per_s": 3.0}]
    outcome = processes.Outcome(phases, "torch.OutOfMemoryError: no room", "case", "")
    done, failed = report.rows_of(two, outcome, {"checkpoint_bytes": 4_000_000_000})
    assert (done["name"], done["status"], done["load_gbps"]) == ("first", "ok", 2.0)
    assert (failed["name"], failed["reason"]) == ("second", "torch.OutOfMemoryError: no room")


def test_the_reason_is_the_tracebacks_last_error() -> None:
    log = "ValueError: first\nDuring handling\ntorch.OutOfMemoryError: CUDA out of memory.\n  0%|   | 0/2\n"
    assert processes._reason(log, 1) == "torch.OutOfMemoryError: CUDA out of memory."
    assert processes._reason("", -9) == "killed by signal 9"


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    stem = report.file_stem(tmp_path, "bloom-7b1", "NVIDIA H100 80GB HBM3", "2026-01-02T03:04:05+00:00")
    assert stem.name == "bloom-7b1-nvidia-h100-80gb-hbm3-2026-01-02"
    stem.with_suffix(".jsonl").touch()
    again = report.file_stem(tmp_path, "bloom-7b1", "NVIDIA H100 80GB HBM3", "2026-01-02T03:04:05+00:00")
    assert again.name == "bloom-7b1-nvidia-h100-80gb-hbm3-2026-01-02-2"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "which is not there"), ("act,text\n1,2\n", "the columns ['act', 'text']")]
)
def test_wrong_data_is_one_line_and_exit_code_2(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.csv"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert bloom7b1.main([*TINY_FLAGS, "--data", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        data.read_prompts(file)


def test_data_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bloom7b1.main([*TINY_FLAGS, "--out", str(tmp_path)]) == 2
    assert "got none. Pass the file of fka/awesome-chatgpt-prompts" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--out", "--checkpoint"])
def test_a_place_that_cannot_be_written_is_one_line_and_exit_code_2(
    flag: str, prompts_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    flags = ["--data", str(prompts_csv), "--out", str(tmp_path / "out"), flag, str(tmp_path / "file" / "folder")]
    assert bloom7b1.main([*TINY_FLAGS, *flags]) == 2
    printed = capsys.readouterr()
    assert "a place that can be written" in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""  # it stopped before building and measuring


def test_the_commit_comes_from_git_where_there_is_one() -> None:
    found = environment("cpu")
    assert found["commit"] is None or len(str(found["commit"])) == 40
    assert environment("cpu", commit="abc")["dirty"] is False
