"""The command itself: usage, exit codes, one line for an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_runs import refused

import qkernels
import qlora
import qlora_command
from qkernels import UserError
from qlora import cli
from qlora.arguments import DEFAULT_MODEL, LoraArguments
from qlora.memory import Run, plan
from qlora.shapes import meta_model, shapes_of
from qlora.units import GIB
from qlora.usage import COMMANDS, VERSION

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage_lists_the_commands(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: qlora {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_refuses_an_unknown_flag(command, capsys):
    assert "unknown setting 'nonsense'" in refused(capsys, command, "--nonsense", "1")


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"demo"}))
def test_every_command_takes_the_short_name_of_the_model(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "--model " in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--version"]])
def test_the_door_answers_without_importing_what_takes_seconds(words):
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(sorted({'torch', 'qlora', 'qkernels'} & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv[1:] = {words}\n"
        "import qlora_command; qlora_command.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith(f"qlora {VERSION}" if words == ["--version"] else "usage: qlora COMMAND")


def test_the_door_hands_everything_else_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qlora", "trian"])
    assert qlora_command.main() == 2
    assert "'trian'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["qlora", "plan", "--help"])
    with pytest.raises(SystemExit):
        qlora_command.main()
    assert "usage: qlora plan" in capsys.readouterr().out


def test_one_version():
    assert f'VERSION = "{VERSION}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert qlora.__version__ == qkernels.__version__ == VERSION


def test_an_unknown_command(capsys):
    message = refused(capsys, "trian")
    assert "'trian'" in message
    assert "train" in message


def test_training_the_default_model_without_a_gpu_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refused(capsys, "train")
    need = plan(shapes_of(meta_model(DEFAULT_MODEL), LoraArguments()), Run(1, 512, torch.float16)).total / GIB
    assert 5 < need < 7
    assert f"an NVIDIA GPU with {need:.1f} GiB" in message
    assert "qlora demo" in message
    assert "--model_name_or_path" in message


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(command, capsys):
    words = [command, "--model_name_or_path", "./nothing", "--prompt", "a", " "]
    assert "prompt holds an empty text" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("argument", "flag"),
    [("name_or_path", "--model_name_or_path"), ("quant_type", "--bnb_4bit_quant_type"), ("file", "file")],
)
def test_an_argument_of_the_library_is_named_as_its_flag(capsys, monkeypatch, argument, flag):
    def main(argv):
        raise UserError(argument, expected="a", got="b", remedy="Do c.")

    monkeypatch.setattr("qlora.plan.main", main)
    assert refused(capsys, "plan") == f"qlora plan: {flag}: expected a, got b. Do c."


def test_an_error_of_several_lines_becomes_one(capsys, monkeypatch):
    def main(argv):
        raise UserError("thing", expected="a", got="b\nc", remedy="Do d.")

    monkeypatch.setattr("qlora.plan.main", main)
    assert refused(capsys, "plan") == "qlora plan: thing: expected a, got b c. Do d."


def test_ctrl_c(capsys, monkeypatch):
    def main(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora.plan.main", main)
    assert cli.main(["plan"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("error", [None, BrokenPipeError()])
def test_a_reader_that_has_gone_is_no_error_but_another_broken_pipe_is(error, monkeypatch):
    reader, writer = os.pipe()
    if error is None:
        os.close(reader)  # `head` has seen enough

    def command(words):
        print("a line")
        if error is not None:
            raise error

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=command))
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        if error is None:
            assert cli.main(["plan"]) == 141
        else:
            with pytest.raises(BrokenPipeError):
                cli.main(["plan"])
    monkeypatch.undo()
    if error is not None:
        os.close(reader)


def test_a_defect_is_not_dressed_up_as_wrong_input(monkeypatch):
    def main(argv):
        raise ZeroDivisionError

    monkeypatch.setattr("qlora.plan.main", main)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])


def test_python_m_qlora_is_the_same():
    done = subprocess.run([sys.executable, "-m", "qlora", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("qlora: command:")
    assert done.stdout == ""
