"""What the benchmarks say of a call's memory."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gauges import peak_mib

pytestmark = pytest.mark.gpu


def test_the_peak_of_a_call_is_what_it_allocates():
    x = torch.zeros(1 << 20, device="cuda")
    assert peak_mib(lambda: x + 1, x.device) == 4
    assert peak_mib(lambda: x + 1 + 1, x.device) == 8
