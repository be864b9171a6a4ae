"""The real bitsandbytes beside ours, in one process."""

from __future__ import annotations

import pytest

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the rival, part of the [dev] extra")
