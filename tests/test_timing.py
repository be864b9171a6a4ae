"""The benchmarks' clock: what the host spends on a launch is not in the GPU's time.  On a simulated GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gauges, timing


class Machine:
    """A host that launches and a GPU that works off what was launched, each at its own time, in microseconds."""

    def __init__(self) -> None:
        self.host_us = self.gpu_us = 0.0

    def launch(self, host_us: float, gpu_us: float) -> None:
        self.host_us += host_us
        self.gpu_us = max(self.gpu_us, self.host_us) + gpu_us

    def wait(self) -> None:
        self.host_us = max(self.host_us, self.gpu_us)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()

    class Buffer:
        def zero_(self):
            machine.launch(5, 85)

    class Event:
        def __init__(self, enable_timing):
            self.us = 0.0

        def record(self):
            machine.launch(1, 0)
            self.us = machine.gpu_us

        def elapsed_time(self, later):
            return (later.us - self.us) / 1e3

    monkeypatch.setattr(torch, "empty", lambda *sizes, **kind: Buffer())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.wait)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: machine.host_us / 1e6)
    return machine


@pytest.mark.parametrize("host_us", [2, 60, 900])
def test_a_slow_host_is_not_in_the_time(machine, host_us):
    assert timing.flushed({"call": lambda: machine.launch(host_us, 10)})["call"].median_us == pytest.approx(10)


def test_a_wait_within_the_call_is(machine):
    def call() -> None:
        machine.launch(5, 10)
        machine.wait()
        machine.launch(40, 10)

    assert timing.flushed({"call": call})["call"].median_us == pytest.approx(10 + 40 + 10, abs=5)


def test_what_else_the_host_does_meets_all_calls_alike(machine):
    """It does so from the middle of the measurement on, so that one call after the other would be told apart."""
    called = []

    def call(name: str) -> None:
        called.append(name)
        machine.launch(10 if len(called) < 152 else 30, 1)

    found = timing.host({name: lambda name=name: call(name) for name in ("ours", "theirs")}, repeats=2, rounds=75)
    for name in ("ours", "theirs"):
        assert (found[name].p20_us, found[name].p80_us) == pytest.approx((10, 30))


def test_a_clock_that_falls_meets_all_alike(machine):
    """After two of five turns all takes twice as long."""
    launched = []

    def call() -> None:
        launched.append(machine.gpu_us)
        machine.launch(1, 10 if len(launched) <= 106 else 20)

    ours, theirs = timing.flushed({"ours": call, "theirs": call}, seconds=0.02).values()
    assert len(launched) == 18 + 2 * 5 * 22
    assert ours == theirs


def test_a_fast_host_does_not_wait_for_the_gpu(machine):
    assert timing.host({"call": lambda: machine.launch(5, 100)})["call"].median_us == pytest.approx(5)


def test_there_is_no_peak_on_a_cpu():
    assert gauges.peak_mib(lambda: None, torch.device("cpu")) is None
