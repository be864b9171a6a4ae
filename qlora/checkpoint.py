"""Safe files: whole or not there at all.

Room: everything the command line leaves on disk goes through here.  A file or folder is written beside its final place
and renamed when it is complete, so an interrupted run, a full disk or an error in the middle leaves neither a
half-written checkpoint nor a damaged older one.  A disk that cannot be written becomes a `UserError`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from qkernels.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "The disk is full: free space, or choose a folder on another disk.",
    errno.EDQUOT: "The disk quota is used up: free space, or choose a folder on another disk.",
    errno.EFBIG: "The file is larger than this disk or process may write: choose a folder on another disk.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.EACCES: "You may not write there: change the permissions, or choose another folder.",
    errno.EPERM: "You may not write there: change the permissions, or choose another folder.",
    errno.ENOTDIR: "A part of the path is a file, not a folder: choose another folder.",
    errno.ENAMETOOLONG: "The path is too long: choose a shorter one.",
}


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failed write inside the `with` block into one `UserError` that names `path`.

    Covers Python's own `OSError`, safetensors' errors and those of `torch.save`.  Errors that say nothing about the
    disk (a missing input file, a wrong value) pass through unchanged.

    Raises:
        UserError: the disk is full, over quota or read-only, or the place may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        remedy = _write_failure(error)
        if remedy is None:
            raise
        raise _unwritable(Path(path), str(error), remedy) from error


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Write a folder whole: yields an empty folder beside `path`, renamed to `path` when the block succeeds.

    If the block raises (Ctrl-C included), the temporary folder and any parents made for it are removed and what
    stood at `path` before is untouched.

    Args:
        path: the final folder; missing parents are made.
        replace: an existing folder with something in it is replaced; otherwise it is an error.

    Raises:
        UserError: `path` exists and may not be replaced, or the disk cannot be written (see `writing`).
    """
    final = Path(path)
    with writing(final), _parents_of(final):
        if not replace or not final.is_dir():
            refuse_existing(final)
        partial = _sibling(final, "partial")
        partial.mkdir()
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _flush_to_disk(file)
            _move_into_place(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole: yields a path beside `path`, renamed over `path` when the block succeeds.

    The suffix is kept, so writers that choose a format by it (`savefig`) work.  If the block raises, the temporary
    file is removed and an older file at `path` is untouched.

    Raises:
        UserError: `path` is a folder, or the disk cannot be written (see `writing`).
    """
    final = Path(path)
    with writing(final), _parents_of(final):
        if final.is_dir():
            raise UserError(str(final), expected="a file to write", got="a folder", remedy="Choose another file name.")
        partial = _sibling(final, "partial").with_suffix(final.suffix)
        try:
            yield partial
            _flush_to_disk(partial)
            os.replace(partial, final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_writable(path: str | os.PathLike[str], *, need_bytes: int = 0) -> None:
    """Check, before hours of work, that `path` (a file or folder, existing or not) can be written.

    Tries by creating a nameless file in the nearest folder that exists; leaves nothing behind.

    Args:
        path: where something will be written.
        need_bytes: free space it will take, in bytes.

    Raises:
        UserError: the nearest existing parent is no folder or may not be written, or too little space is free.
    """
    target = Path(path)
    try:
        place = _nearest_existing_folder(target)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _unwritable(target, str(error), _write_failure(error) or "Choose another folder.") from error
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < need_bytes:
        raise UserError(
            str(target),
            expected=f"a disk with {need_bytes / 1e9:.2f} GB free",
            got=f"{free_bytes / 1e9:.2f} GB",
            remedy=_REMEDIES[errno.ENOSPC],
        )


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Check, before hours of work, that a new folder can be made at `path`.

    Raises:
        UserError: a file is there, or a folder with something in it.
    """
    final = Path(path)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(
            str(final),
            expected="a folder that does not exist yet",
            got="a folder with files in it" if final.is_dir() else "a file",
            remedy="Choose another folder, or remove this one first.",
        )


def is_local(name: str | os.PathLike[str]) -> bool:
    """Whether a model's or adapter's name means a folder of this machine (existing or not) and not a hub's id."""
    text = os.fspath(name)
    return Path(text).exists() or text.startswith((".", "~", os.sep)) or text.count("/") > 1 or "\\" in text


def _nearest_existing_folder(target: Path) -> Path:
    place = target.parent if target.is_file() else target
    while not place.exists() and place.parent != place:
        place = place.parent
    return place


def _write_failure(error: BaseException) -> str | None:
    """The remedy for a failed write, or None for an error of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError):  # Rust's io::Error keeps the number in its text only
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    if type(error) is RuntimeError and re.search("PytorchStreamWriter|inline_container", str(error)):
        # torch.save's C++ writer keeps no errno; on a path that could be opened it fails for want of space.
        number = errno.ENOSPC
    return _REMEDIES.get(number) if number is not None else None


def _unwritable(path: Path, reason: str, remedy: str) -> UserError:
    return UserError(str(path), expected="a place that can be written", got=reason, remedy=remedy)


@contextmanager
def _parents_of(final: Path) -> Iterator[None]:
    """Make missing parents; unmake them if the block raises and left them empty."""
    missing = []
    parent = final.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        if missing:
            final.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # one that was never made, or that someone else has put a file into
            for folder in missing:
                folder.rmdir()
        raise


def _sibling(final: Path, kind: str) -> Path:
    """A free name beside `final`, on the same file system, so that the rename is atomic."""
    return final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.{kind}"


def _move_into_place(partial: Path, final: Path) -> None:
    if not final.is_dir() or not any(final.iterdir()):
        os.replace(partial, final)
        return
    older = _sibling(final, "old")
    os.rename(final, older)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(older, final)
        raise
    shutil.rmtree(older)


def _flush_to_disk(file: Path) -> None:
    """Without it a power cut could keep the rename and lose the data; network file systems report a full disk here."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
