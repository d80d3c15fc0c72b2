"""The GPU backends as a test meets them: on a real device, or executed on the CPU.

Without a GPU the CUDA kernels run in the emulator of ``tests/cuda_emulator``, built here as the module ``_cuda`` from
the very sources of ``csrc/``, and the Triton kernels in Triton's interpreter (``TRITON_INTERPRET=1``, which
``conftest.py`` sets).
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "cuda-emulator"


@dataclass(frozen=True)
class Gpu:
    """A backend to name in a call, and the device its tensors live on."""

    backend: str
    device: str


def _tool(name: str) -> str:
    """One of the environment's tools, or the system's."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"the emulated CUDA module needs {name}; pip install {name}")
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}", pytrace=False)


@functools.cache
def emulated_cuda() -> ModuleType:
    """The module ``_cuda`` whose pointers are the CPU's, built where its sources have changed."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    _run(
        cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "--log-level=WARNING",
        "-DCMAKE_BUILD_TYPE=Release", "-DPYCOMPRESS_BUILD_PYTHON=OFF", "-DPYCOMPRESS_CUDA=OFF",
        "-DPYCOMPRESS_CUDA_EMULATOR=ON", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={_pybind11_dir()}",
    )  # fmt: skip
    _run(cmake, "--build", str(BUILD), "--target", "_cuda")
    file = next((BUILD / "python").glob("_cuda.*"))
    spec = importlib.util.spec_from_file_location("pycompress._cuda", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pybind11_dir() -> str:
    import pybind11

    return pybind11.get_cmake_dir()
