"""Run jobs in processes of their own, watched: host memory is sampled, and each is ended at its time limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT
from .jobs import Job

SAMPLE_EVERY_S = 0.005
LOG_LINES = 25
START_LIMIT_S = 300.0


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    phases: the finished phases' records in order, each with `host_peak_gib` (None where the kernel does not tell).
    failure: why the job ended early, or None.
    failed_in: the phase it was in then.
    log_tail: the last lines it printed.
    """

    phases: list[dict[str, Any]]
    failure: str | None
    failed_in: str | None
    log_tail: str


def run_job(job: Job, *, limit_s: float) -> Outcome:
    """Run `job` alone in a fresh Python process and wait for it; see `Workers.run`."""
    with Workers([job]) as workers:
        return workers.run(job, limit_s=limit_s)


class Workers:
    """A fresh Python process for each job.

    All start at once and import what they need, which takes longer than many a job, while there is nothing to time yet.
    Then each waits until it is told to begin; until then it touches no GPU.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = tuple(jobs)
        self._started: dict[str, _Started] = {}

    def __enter__(self) -> Workers:
        self._started = {job.folder: _Started(job) for job in self._jobs}
        return self

    def __exit__(self, *_: object) -> None:
        for started in self._started.values():
            started.end()

    def run(self, job: Job, *, limit_s: float) -> Outcome:
        """Let the job's process begin, and wait for it.

        Host memory is RssAnon of `/proc/PID/status` (what the process itself allocated: neither the mapped checkpoint's
        pages nor shared libraries), read from outside every 5 ms, so that a long call in the process hides nothing.

        Args:
            job: its `record` is written here, and its output to `log.txt` in its `folder`.
            limit_s: seconds until the process is ended; with none left it does not begin.
        """
        for started in self._started.values():
            started.wait_until_ready()
        process = self._started[job.folder]
        samples: list[tuple[float, int]] = []
        deadline = time.monotonic() + limit_s
        if limit_s > 0:
            process.begin()
        while not process.has_ended and time.monotonic() < deadline:
            samples.append((time.monotonic(), _anonymous_bytes(process.pid)))
            time.sleep(SAMPLE_EVERY_S)
        in_time = process.has_ended
        returncode = process.end()
        printed = process.log.read_text(encoding="utf-8")
        failure = None
        if not in_time:
            failure = f"ended at its time limit of {limit_s:.0f} s"
        elif returncode != 0:
            failure = _reason(printed, returncode)
        phases, unfinished = _phases(Path(job.record), samples)
        failed_in = None if failure is None else unfinished or "start"
        return Outcome(phases, failure, failed_in, "\n".join(printed.splitlines()[-LOG_LINES:]))


class _Started:
    """A job's process."""

    def __init__(self, job: Job) -> None:
        folder = Path(job.folder)
        folder.mkdir(parents=True)
        job.save(folder / "job.json")
        self.log = folder / "log.txt"
        our_end, its_end = os.pipe()
        self._ready = os.fdopen(our_end)
        command = [sys.executable, "-m", "benchmarks.worker", str(folder / "job.json"), str(its_end)]
        with self.log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_worker_environment(),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[its_end],
            )
        os.close(its_end)
        self.pid = self._process.pid

    def wait_until_ready(self) -> None:
        """It has imported, or has ended, or takes so long that its job's time limit may as well count."""
        if not self.has_ended:
            select.select([self._ready], [], [], START_LIMIT_S)

    def begin(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; why, its log says
            self._process.stdin.close()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> int:
        """Kill it if need be; returns its exit code."""
        self._process.kill()
        self.begin()  # closes its standard input
        self._ready.close()
        return self._process.wait()


def _phases(record: Path, samples: list[tuple[float, int]]) -> tuple[list[dict[str, Any]], str | None]:
    """The finished phases, and the name of the one that began but did not finish."""
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] if record.exists() else []
    phases = [line for line in lines if "phase" in line]
    for phase in phases:
        begin, end = phase.pop("begin_s"), phase.pop("end_s")
        phase.setdefault("seconds", end - begin)
        peak = max((size for moment, size in samples if begin <= moment <= end), default=0)
        phase["host_peak_gib"] = peak / 2**30 or None
    begun = [line["begin"] for line in lines if "begin" in line]
    return phases, begun[-1] if len(begun) > len(phases) else None


def _anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _worker_environment() -> dict[str, str]:
    """The checkpoint is local: a look at a hub would only cost time, or hang where there is no network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _reason(log: str, returncode: int) -> str:
    """The traceback's last error, or how the process ended."""
    errors = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*$", log, re.MULTILINE)
    if errors:
        return errors[-1]
    if returncode < 0:
        return f"killed by signal {-returncode}"
    return f"exit code {returncode}"
