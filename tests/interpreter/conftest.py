"""This folder runs with TRITON_INTERPRET=1 only: `make test-interpreter`."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        skip = pytest.mark.skip(reason="set TRITON_INTERPRET=1 (make test-interpreter)")
        for item in items:
            if "interpreter" in item.path.parts:
                item.add_marker(skip)
