"""Run one job in a process of its own, watched: its host memory is sampled, and it is ended at its time limit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import ROOT
from .jobs import Job

SAMPLE_EVERY_S = 0.005
LOG_LINES = 25


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
    """Run `job` in a fresh Python process and wait for it.

    Host memory is RssAnon of `/proc/PID/status` (what the process itself allocated: neither the mapped checkpoint's
    pages nor shared libraries), read from outside every 5 ms, so that a long call in the process hides nothing.

    Args:
        job: its `record` is written here, and its output to `log.txt` in its `folder`.
        limit_s: seconds until the process is ended.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True)
    job.save(folder / "job.json")
    command = [sys.executable, "-m", "benchmarks.worker", str(folder / "job.json")]
    log = folder / "log.txt"
    samples: list[tuple[float, int]] = []
    deadline = time.monotonic() + limit_s
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=_worker_environment(), stdout=output, stderr=output)
        try:
            while process.poll() is None and time.monotonic() < deadline:
                samples.append((time.monotonic(), _anonymous_bytes(process.pid)))
                time.sleep(SAMPLE_EVERY_S)
            in_time = process.poll() is not None
        finally:
            process.kill()
            process.wait()
    printed = log.read_text(encoding="utf-8")
    failure = None
    if not in_time:
        failure = f"ended at its time limit of {limit_s:.0f} s"
    elif process.returncode != 0:
        failure = _reason(printed, process.returncode)
    phases, unfinished = _phases(Path(job.record), samples)
    failed_in = None if failure is None else unfinished or "start"
    return Outcome(phases, failure, failed_in, "\n".join(printed.splitlines()[-LOG_LINES:]))


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
