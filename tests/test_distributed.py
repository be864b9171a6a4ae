"""Two processes, on the CPU over gloo or on two GPUs over NCCL: trained as in one, sharded, saved and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import save_tiny
from two_processes import FSDP_RUNS, STEPS, adapted, batch, optimizer_of

from qlora.sharding import shards_integers

ROOT = Path(__file__).resolve().parent.parent
KINDS = list(FSDP_RUNS)
fsdp = pytest.mark.skipif(not shards_integers(), reason="this torch's FSDP2 takes no integer parameters")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("two") / "llama")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    return request.param


@pytest.fixture(scope="module")
def alone(checkpoint, device) -> list[float]:
    """The losses of one process that takes both texts."""
    model, losses = adapted(str(checkpoint)).to(device), []
    optimizer = optimizer_of(model)
    ids = batch().to(device)
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def both(checkpoint, device, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command += [str(Path(__file__).with_name("two_processes.py")), str(folder), str(checkpoint), device]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[:12000]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert all(ranks[0][kind]["losses"] == ranks[1][kind]["losses"] for kind in ranks[0])
    return ranks[0] | {"folder": folder}


def test_ddp_trains_as_one_process_does(both, alone):
    assert both["ddp"]["kind"] == "DistributedDataParallel"
    assert both["ddp"]["losses"] == pytest.approx(alone, rel=1e-5)


@fsdp
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_trains_as_one_process_does(both, alone, kind):
    tolerance = 0.02 if kind == "fsdp bfloat16" else 1e-5
    assert both[kind]["losses"] == pytest.approx(alone, rel=tolerance)
    assert both[kind]["losses"][-1] < both[kind]["losses"][0]


@fsdp
@pytest.mark.parametrize("kind", KINDS)
def test_the_codes_are_sharded(both, kind):
    assert both[kind]["sharded"]
    assert both[kind]["codes"] / 2 <= both[kind]["local"] < both[kind]["codes"] * 0.51


@fsdp
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_run_goes_on_with_the_same_losses(both, kind):
    assert both[kind]["resumed"] == both[kind]["losses"][STEPS // 2 :]


@fsdp
def test_the_adapter_that_was_trained_loads_in_one_process(both, checkpoint):
    model = adapted(str(checkpoint))
    adapters = torch.load(both["folder"] / "fsdp" / "adapters.pt")
    found = model.load_state_dict(adapters, strict=False)
    assert not found.unexpected_keys
    loss = model(input_ids=batch(), labels=batch()).loss
    assert loss < both["fsdp"]["losses"][-1]  # one step more than the last loss
