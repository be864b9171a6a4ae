"""Files are whole or not there, and a disk that cannot be written is one clear message."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qkernels.errors import UserError
from qlora import checkpoint
from qlora.checkpoint import atomic_file, atomic_folder, check_writable, writing


class Stop(Exception):
    """An error of the writing code itself."""


def everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- atomic_folder


def test_folder_appears_only_when_complete(tmp_path):
    final = tmp_path / "runs" / "first"
    with atomic_folder(final) as partial:
        (partial / "a.txt").write_text("a")
        assert not final.exists()
        assert partial.parent == final.parent
    assert everything_under(tmp_path) == ["runs", "runs/first", "runs/first/a.txt"]


def test_failed_folder_leaves_nothing_behind(tmp_path):
    def write():
        with atomic_folder(tmp_path / "deep" / "er" / "run") as partial:
            (partial / "half.txt").write_text("half")
            raise Stop

    with pytest.raises(Stop):
        write()
    assert everything_under(tmp_path) == []


def test_interrupt_leaves_nothing_behind(tmp_path):
    def write():
        with atomic_folder(tmp_path / "run") as partial:
            (partial / "half.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert everything_under(tmp_path) == []


def test_parents_with_other_files_stay(tmp_path):
    def write():
        with atomic_folder(tmp_path / "runs" / "one"):
            (tmp_path / "runs" / "someone-elses.txt").write_text("keep")
            raise Stop

    with pytest.raises(Stop):
        write()
    assert everything_under(tmp_path) == ["runs", "runs/someone-elses.txt"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    with atomic_folder(tmp_path / "run") as partial:
        (partial / "a").write_text("a")
    assert everything_under(tmp_path) == ["run", "run/a"]


def test_full_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with (
        pytest.raises(
            UserError, match=r"run: expected a folder that does not exist yet, got a folder with files in it"
        ),
        atomic_folder(tmp_path / "run"),
    ):
        pytest.fail("the body must not run")
    assert everything_under(tmp_path) == ["run", "run/old"]


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="got a file"), atomic_folder(tmp_path / "run", replace=True):
        pytest.fail("the body must not run")


def test_replace_swaps_whole_folders(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with atomic_folder(tmp_path / "run", replace=True) as partial:
        (partial / "new").write_text("new")
    assert everything_under(tmp_path) == ["run", "run/new"]


def test_failed_replace_keeps_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    real_rename = os.rename

    def rename(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", rename)

    def write():
        with atomic_folder(tmp_path / "run", replace=True) as partial:
            (partial / "new").write_text("new")

    with pytest.raises(UserError, match="The disk is full"):
        write()
    assert everything_under(tmp_path) == ["run", "run/old"]


# --- atomic_file


def test_file_is_replaced_whole(tmp_path):
    target = tmp_path / "loss.png"
    target.write_text("old")
    with atomic_file(target) as partial:
        assert partial.suffix == ".png"
        partial.write_text("new")
        assert target.read_text() == "old"
    assert everything_under(tmp_path) == ["loss.png"]
    assert target.read_text() == "new"


def test_failed_file_keeps_the_old_one(tmp_path):
    target = tmp_path / "sub" / "metrics"

    def write(text, error):
        with atomic_file(target) as partial:
            partial.write_text(text)
            raise error

    with pytest.raises(Stop):
        write("half", Stop)
    assert everything_under(tmp_path) == []
    target.parent.mkdir()
    target.write_text("old")
    with pytest.raises(Stop):
        write("half", Stop)
    assert everything_under(tmp_path) == ["sub", "sub/metrics"]
    assert target.read_text() == "old"


def test_folder_where_a_file_should_go(tmp_path):
    with pytest.raises(UserError, match="expected a file to write, got a folder"), atomic_file(tmp_path):
        pytest.fail("the body must not run")


# --- a disk that cannot be written

WRITERS = {
    "python": "open(path, 'wb').write(bytes(100_000))",
    "safetensors": "import torch, safetensors.torch; safetensors.torch.save_file({'w': torch.zeros(30_000)}, path)",
    "torch": "import torch; torch.save({'w': torch.zeros(30_000)}, path)",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit(tmp_path, writer):
    """A real failing write (a limit on the file size), since the errors of three writers differ."""
    script = textwrap.dedent(f"""
        import resource, signal, sys
        from qkernels.errors import UserError
        from qlora.checkpoint import atomic_folder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with atomic_folder(sys.argv[1]) as partial:
                path = str(partial / "file.bin")
                {WRITERS[writer]}
        except UserError as error:
            print(error)
            sys.exit(2)
    """)
    run = subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path / "runs" / "run")], capture_output=True, text=True
    )
    assert run.returncode == 2, run.stderr
    assert "run: expected a place that can be written, got" in run.stdout
    assert "choose a folder on another disk" in run.stdout
    assert everything_under(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux' /dev/full")
def test_full_disk():
    def write():
        with writing("/dev/full"), open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(UserError, match="The disk is full: free space, or choose a folder on another disk"):
        write()


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "run"):
        (tmp_path / "missing-input.txt").read_text()
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path):
        raise RuntimeError("shapes do not match")


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="A part of the path is a file"), atomic_folder(tmp_path / "file" / "run"):
        pytest.fail("the body must not run")
    with pytest.raises(UserError, match="A part of the path is a file"), atomic_file(tmp_path / "file" / "x.txt"):
        pytest.fail("the body must not run")


# --- check_writable


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "runs" / "new")
    check_writable(tmp_path)
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path / "file")
    assert everything_under(tmp_path) == ["file"]


def test_check_writable_refuses(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="A part of the path is a file"):
        check_writable(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="The path is too long"):
        check_writable(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match=r"expected a disk with 1000000000.00 GB free, got \d+\.\d\d GB"):
        check_writable(tmp_path / "run", need_bytes=10**18)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "You may not write there"), (errno.EROFS, "The file system is read-only")]
)
def test_check_writable_names_the_reason(tmp_path, monkeypatch, number, remedy):
    """Denied by hand: whoever runs the tests as root may write anywhere."""

    def refuse(dir):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=remedy):
        check_writable(tmp_path / "run")
