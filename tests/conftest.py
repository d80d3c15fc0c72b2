"""Fixtures that every test file shares."""

from __future__ import annotations

import pytest
import torch

from pycompress import _native


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this CPU has, forced in turn."""
    monkeypatch.setenv("PYCOMPRESS_ISA", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
