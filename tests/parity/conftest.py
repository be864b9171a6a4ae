"""The real bitsandbytes beside ours, in one process."""

from __future__ import annotations

import pytest

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")


@pytest.fixture(autouse=True, scope="session")
def _on_its_own_kernels() -> None:
    from qkernels.bitsandbytes_backend import reason_not_to, registered

    assert reason_not_to() == "QKERNELS_BITSANDBYTES=0"
    assert not registered
