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


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Built-in figures for the cost model: a test calibrates nothing, and the user's cache stays as it is."""
    monkeypatch.setenv("PYCOMPRESS_COST_MODEL", "builtin")
    monkeypatch.setenv("PYCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
