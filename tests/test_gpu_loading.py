"""What stays unloaded until a GPU tensor comes: Triton, the CUDA module, the driver. And why a backend cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pycompress import gpu

MAPS = Path("/proc/self/maps")

# Every operation, by its module and by its function, in a fresh interpreter.
EVERYTHING = """
import torch
from torch import nn
import pycompress
from pycompress import ops
from pycompress.nn import DistillationLoss, Int8Linear, SparseLinear

x = torch.randn(5, 64)
model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval()
with torch.no_grad():
    for mode in ("dynamic", "weight_only"):
        assert Int8Linear.from_float(model[0], mode=mode)(x).shape == (5, 96)
    pycompress.prune_(model, 0.8, pattern="4x4")
    pycompress.sparsify_(model, format="index")
    assert isinstance(model[0], SparseLinear)
    assert model(x).shape == (5, 32)
student = torch.randn(4, 100, requires_grad=True)
DistillationLoss()(student, torch.randn(4, 100), torch.randint(100, (4,))).backward()
assert student.grad is not None
weight = torch.randint(-127, 128, (96, 64), dtype=torch.int8)
for backend in ("native", "reference"):
    assert ops.int8_linear(x, weight, torch.ones(96), backend=backend).shape == (5, 96)
"""

# Paths are searched as ever, but Triton is not found.
WITHOUT_TRITON = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest))
"""


def run_python(code: str, folder: Path, **environment: str) -> None:
    """In a fresh interpreter, away from the repository, and without Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    env["PYCOMPRESS_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_call_on_the_cpu_loads_nothing_of_a_gpu(tmp_path: Path) -> None:
    run_python(
        f"""
import sys
import torch
def libraries():
    maps = open("{MAPS}").read() if {MAPS.is_file()} else ""
    return {{line.split()[-1] for line in maps.splitlines() if "/libcuda.so" in line or "/_cuda." in line}}
before = libraries()  # of torch's own
{EVERYTHING}
named = ("triton", "pycompress._cuda", "pycompress.kernels")
loaded = [m for m in sys.modules if m in named or m.startswith(("triton.", "pycompress.kernels."))]
assert not loaded, loaded
assert libraries() == before, libraries()
assert not torch.cuda.is_initialized()
""",
        tmp_path,
    )


def test_info_without_a_gpu_loads_neither_triton_nor_the_driver(tmp_path: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch was built with CUDA: info asks it for GPUs")
    run_python(
        f"""
import sys
from pycompress import info
assert info.collect()["gpu"]["devices"] == []
assert "triton" not in sys.modules
assert not {MAPS.is_file()} or "/libcuda.so" not in open("{MAPS}").read()
""",
        tmp_path,
    )


def test_everything_works_without_triton(tmp_path: Path) -> None:
    run_python(
        f"""{WITHOUT_TRITON}
{EVERYTHING}
from pycompress import info
found = info.collect()
assert found["gpu"]["triton"] is None
assert found["backends"]["int8_matmul"]["native"].startswith("usable")
""",
        tmp_path,
    )


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_triton_by_name_without_triton_says_so(tmp_path: Path, interpreted: str) -> None:
    wanted = "Triton is not installed; pip install triton" if interpreted == "1" else " on cpu, the Triton"
    run_python(
        f"""{WITHOUT_TRITON}
import torch
from pycompress import ops
from pycompress.nn import DistillationLoss
x, weight = torch.ones(2, 8), torch.ones(4, 8)
bitmap, values = ops.sparse_from_dense(weight, weight > 0)
for run in (
    lambda: ops.int8_linear(x, weight.to(torch.int8), torch.ones(4), backend="triton"),
    lambda: ops.sparse_linear(x, bitmap, values, backend="triton"),
    lambda: DistillationLoss(backend="triton", alpha=0.0)(x, x),
):
    try:
        run()
    except ValueError as error:
        assert "backend='triton' cannot run this" in str(error), error
        assert {wanted!r} in str(error), error
    else:
        raise AssertionError("it ran")
""",
        tmp_path,
        TRITON_INTERPRET=interpreted,
    )


def test_importing_the_cuda_module_does_not_touch_the_driver(tmp_path: Path) -> None:
    if importlib.util.find_spec("pycompress._cuda") is None:
        pytest.skip("this pycompress was built without CUDA")
    found = importlib.util.find_spec("pycompress._cuda")
    assert found is not None
    content = Path(str(found.origin)).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so", b"libpython"):  # a name that the loader would look for
        assert library not in content
    run_python(
        f"""
import torch
maps = lambda: {{line.split()[-1] for line in open("{MAPS}") if "/libcuda" in line}}
before = maps()
from pycompress import gpu
assert gpu.cuda_module().DEVICE_TYPE == "cuda"
assert maps() == before, maps()
""",
        tmp_path,
    )


# ---- why a backend cannot take a tensor ----


def tensor(device: str) -> torch.Tensor:
    """Something that says it is on this device, which is all that is asked of it."""
    return SimpleNamespace(device=torch.device(device))  # type: ignore[return-value]


@pytest.fixture
def an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "T4")
    forget()


def cuda_module(architectures: str) -> ModuleType:
    """A CUDA module as far as it tells of itself."""
    module = ModuleType("pycompress._cuda")
    module.__dict__.update(DEVICE_TYPE="cuda", ARCHITECTURES=architectures, CUDA_VERSION=13000)
    return module


def forget() -> None:
    gpu._device_missing.cache_clear()
    gpu._module_missing.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    forget()


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch, an_old_gpu: None) -> None:
    monkeypatch.setattr(gpu, "_cuda", cuda_module("80"))
    monkeypatch.setattr(gpu, "_triton_installed", lambda: True)
    for missing in (gpu.cuda_missing, gpu.triton_missing):
        assert missing(tensor("cuda:0")) == (
            "T4 has compute capability 7.5, the kernels need 8.0 or newer; backend='reference' runs there"
        )


def test_a_gpu_of_another_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_triton_installed", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "AMD GPUs" in str(gpu.triton_missing(tensor("cuda:0")))
    assert "NVIDIA GPUs" in str(gpu.triton_missing(tensor("xpu:0")))
    assert "NVIDIA GPUs" in str(gpu.cuda_missing(tensor("xpu:0")))


def test_gpu_tensors_with_a_build_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_cuda", None)
    monkeypatch.setattr(
        gpu.importlib, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name, name=name))
    )
    reason = str(gpu.cuda_missing(tensor("cuda:0")))
    assert "built without CUDA" in reason
    assert "PYCOMPRESS_CUDA=ON" in reason
    with pytest.raises(RuntimeError, match="built without CUDA"):
        gpu.cuda_module()


def test_a_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_cuda", None)
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("GLIBC_2.99")))
    assert "cannot be loaded: GLIBC_2.99" in str(gpu.cuda_missing(tensor("cuda:0")))


# What cmake/cuda.cmake builds by default, and what runs on which GPU.
@pytest.mark.parametrize(
    ("built", "runs", "lacks"),
    [
        ("80-real,86-real,89-real,90a-real,100-real,120", [(8, 0), (8, 7), (9, 0), (10, 3), (12, 1)], [(11, 0)]),
        ("80", [(8, 0), (8, 9), (9, 0), (12, 0)], []),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("86-virtual", [(8, 6), (9, 0)], [(8, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("native", [(8, 0)], []),
    ],
)
def test_a_module_that_was_built_for_other_gpus(
    monkeypatch: pytest.MonkeyPatch, built: str, runs: list[tuple[int, int]], lacks: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(gpu, "_cuda", cuda_module(built))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    for capability in (*runs, *lacks):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        forget()
        reason = gpu.cuda_missing(tensor("cuda:0"))
        if capability in runs:
            assert reason is None, (capability, reason)
        else:
            assert f"built for {built}, GPU has compute capability {capability[0]}.{capability[1]}" in str(reason)


@pytest.mark.parametrize(("driver", "reason"), [(12080, "knows CUDA 12.8"), (13000, None), (13010, None)])
def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch, driver: int, reason: str | None) -> None:
    monkeypatch.setattr(gpu, "_cuda", cuda_module("80"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    found = gpu.cuda_missing(tensor("cuda:0"))
    assert found is None if reason is None else reason in str(found)
