"""Fixtures that every test file shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pycompress import _native, cost_calibration, cost_model, info
from pycompress import gpu as gpu_backends
from pycompress.cost_core import Fit
from pycompress.demo import distill_digits
from tests.cost_fakes import model_of
from tests.gpu import Gpu, emulated_cuda

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any is imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts its background jobs so, and nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this CPU has, forced in turn."""
    monkeypatch.setenv("PYCOMPRESS_ISA", request.param)
    return str(request.param)


@pytest.fixture(params=["cuda", "triton"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Each GPU backend in turn: on the GPU where there is one, else emulated or interpreted on the CPU."""
    backend = str(request.param)
    if torch.cuda.is_available():
        found = Gpu(backend, "cuda")
    else:
        found = Gpu(backend, "cpu")
        if backend == "cuda":
            monkeypatch.setattr(gpu_backends, "_cuda", emulated_cuda())
    missing = {"cuda": gpu_backends.cuda_missing, "triton": gpu_backends.triton_missing}[backend]
    reason = missing(torch.empty(0, device=found.device))
    if reason is not None:
        pytest.skip(reason)
    return found


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Built-in figures for the cost model: a test calibrates nothing, and the user's cache stays as it is."""
    monkeypatch.setenv("PYCOMPRESS_COST_MODEL", "builtin")
    monkeypatch.setenv("PYCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other longer than they compute."""
    with distill_digits.one_thread():
        yield


@pytest.fixture
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking every backend takes longer than a small run of compress()."""
    monkeypatch.setattr(info, "collect", dict)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the final model of tests/workflow_runs.py without any interruption."""
    from tests import workflow_runs

    with pytest.MonkeyPatch.context() as patch, distill_digits.one_thread():
        patch.setenv("PYCOMPRESS_COST_MODEL", "builtin")
        patch.setattr(info, "collect", dict)
        folder = tmp_path_factory.mktemp("whole")
        workflow_runs.run(folder / "run")
        return workflow_runs.digest(folder / "run" / "model.safetensors")


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No override, an empty cache of its own, and nothing remembered in the process."""
    monkeypatch.delenv("PYCOMPRESS_COST_MODEL")
    monkeypatch.setenv("PYCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cost_model, "_models", {})
    monkeypatch.setattr(cost_model, "_gave_up", set())
    monkeypatch.setattr(cost_model, "settle_ties", lambda *args, **kwargs: None)  # its tests call it by itself
    return tmp_path / "cache"


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calibrations answer at once; the list holds the dtypes that were measured."""
    measured: list[str] = []

    def measure_fits(dtype: str, *, progress: object = None) -> dict[tuple[str, str], Fit]:
        measured.append(dtype)
        return dict(model_of(dtype).fits)

    monkeypatch.setattr(cost_calibration, "measure_fits", measure_fits)
    return measured
