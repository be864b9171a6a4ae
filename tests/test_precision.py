"""The precision policy: the dtype for each kind of GPU, its reason, and wrong devices."""

from __future__ import annotations

import pytest
import torch

from qkernels import UserError
from qlora.precision import choose_precision, resolve_device


@pytest.mark.parametrize(
    ("capability", "dtype", "flags", "reason"),
    [
        ((9, 0), torch.bfloat16, (False, True), "bfloat16, because"),
        ((8, 0), torch.bfloat16, (False, True), "compute capability 8.0"),
        ((7, 5), torch.float16, (True, False), "bfloat16 only by emulation"),
        ((7, 0), torch.float16, (True, False), "float16 with loss scaling"),
        ((6, 1), torch.float32, (False, False), "no tensor cores"),
    ],
)
def test_policy_by_capability(capability, dtype, flags, reason):
    policy = choose_precision(capability=capability)
    assert policy.dtype == dtype
    assert (policy.fp16, policy.bf16) == flags
    assert reason in policy.reason


def test_float32_on_the_cpu():
    policy = choose_precision("cpu")
    assert policy.dtype == torch.float32
    assert "the model runs on the CPU" in policy.reason


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_other_devices_are_refused(device):
    with pytest.raises(UserError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
        resolve_device(device)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees no CUDA GPU here"):
        resolve_device("cuda")


def test_cuda_gets_its_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device(0) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="a CUDA index below 2"):
        resolve_device("cuda:2")
