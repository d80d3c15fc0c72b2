"""`pycompress info` on GPUs: what was built, what is installed, which GPUs there are, why a backend is not usable."""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from pycompress import cli, gpu, info, info_gpu, ops

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def built(device_type: str = "cuda") -> ModuleType:
    module = ModuleType("pycompress._cuda")
    vars(module).update(DEVICE_TYPE=device_type, ARCHITECTURES="80-real,90a-real,120,121-virtual", CUDA_VERSION=12080)
    return module


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees one; nothing can be put on it."""
    properties = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 10**9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_module_that_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_cuda", built())
    found = info_gpu.collect()["module"]
    targets = ["sm_80", "sm_90a", "sm_120", "PTX of compute_120", "PTX of compute_121"]
    assert found == {"built": True, "cuda": "12.8", "targets": targets, "device_type": "cuda"}
    rows = dict(info_gpu.lines(info_gpu.collect()))
    assert rows["CUDA module"].startswith("built with CUDA 12.8 for sm_80, sm_90a, ")


def test_a_module_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_cuda", "this pycompress was built without CUDA; reinstall it")
    monkeypatch.setattr(info_gpu.importlib.util, "find_spec", lambda name: None)
    found = info_gpu.collect()
    assert found["module"] == {"built": False, "error": "this pycompress was built without CUDA; reinstall it"}
    assert found["triton"] is None
    rows = dict(info_gpu.lines(found))
    assert rows["CUDA module"] == "this pycompress was built without CUDA; reinstall it"
    assert rows["Triton"] == "not installed"


def test_a_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_cuda", "the CUDA module of pycompress cannot be loaded: no such symbol")
    monkeypatch.setattr(info_gpu.importlib.util, "find_spec", lambda name: object())
    rows = dict(info_gpu.lines(info_gpu.collect()))
    assert rows["CUDA module"].startswith("built, but the CUDA module of pycompress cannot be loaded: no such symbol")


def test_gpus_are_listed(a_gpu: None) -> None:
    found = info_gpu.collect()
    assert found["devices"] == [{"name": "H100", "capability": "9.0", "memory_gb": 80.0, "multiprocessors": 132}]
    rows = dict(info_gpu.lines(found))
    assert rows["GPU 0"] == "H100, compute capability 9.0, 80.0 GB, 132 multiprocessors"


@without_gpu
@pytest.mark.parametrize(("cuda", "why"), [(None, "is a build without CUDA"), ("13.0", "no GPU")])
def test_backends_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, no_interpreter: None, cuda: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for backend in info_gpu.BACKENDS:
        device, reason = info_gpu.device_for(backend)
        assert device == "cpu"
        assert why in str(reason)
    assert info_gpu.device_for("native") == ("cpu", None)


def test_backends_on_a_gpu(monkeypatch: pytest.MonkeyPatch, no_interpreter: None, a_gpu: None) -> None:
    monkeypatch.setattr(info_gpu.torch, "empty", lambda *size, device="cpu": SimpleNamespace(device=device))
    monkeypatch.setattr(gpu, "cuda_missing", lambda x: "wrong device" if x.device == "cpu" else None)
    monkeypatch.setattr(gpu, "triton_missing", lambda x: "wrong device" if x.device == "cpu" else "too old")
    assert info_gpu.device_for("cuda") == ("cuda", None)
    assert info_gpu.device_for("triton") == ("cuda", "too old")


def test_every_backend_of_every_operation_is_told() -> None:
    found = info.collect()["backends"]
    known = ops.BACKENDS, ops.INT4_BACKENDS, ops.CONV_BACKENDS, ops.DISTILL_BACKENDS, ops.SPARSE_BACKENDS
    for operation, names in zip(info.OPERATIONS, known, strict=True):
        assert tuple(found[operation]) == names[1:]
        for backend, state in found[operation].items():
            assert state.startswith("usable" if backend in ("native", "reference") else ("usable", "not usable")), state


def test_a_backend_that_is_wrong_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(backend: str, device: str) -> info.Trial:
        raise RuntimeError("out of order")

    monkeypatch.setitem(info._TRIALS, "int8_matmul", lambda backend, device: (2.0, 1.0, ""))
    monkeypatch.setitem(info._TRIALS, "distill_loss", fails)
    found = info.collect()["backends"]
    assert found["int8_matmul"]["native"] == "broken: gives 2 where 1 is right"
    assert found["distill_loss"]["native"] == "not usable: out of order"


def test_json_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = json.loads(CliRunner().invoke(cli.app, ["info", "--json"]).output)
    assert found["gpu"].keys() == {"module", "triton", "torch_cuda", "devices"}
    shown = CliRunner().invoke(cli.app, ["info"]).output
    for word in ("CUDA module", "Triton", "GPU"):
        assert word in shown
