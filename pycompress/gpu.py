"""Where the GPU kernels of a tensor are, or why there are none: the CUDA module and Triton.

Both are loaded when a call first asks for them: on a machine without a GPU neither is imported and the CUDA driver is
not touched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

OLDEST = (8, 0)  # compute capability: mma.sync on bytes with k = 32, cp.async
_cuda: ModuleType | str | None = None  # the module, or why there is none; None: nobody has asked yet


def _load() -> ModuleType | str:
    global _cuda
    if _cuda is None:
        try:
            _cuda = importlib.import_module("pycompress._cuda")
        except ModuleNotFoundError as error:
            if error.name != "pycompress._cuda":
                raise
            _cuda = (
                "this pycompress was built without CUDA; reinstall it from source where nvcc is found, with "
                "PYCOMPRESS_CUDA=ON"
            )
        except ImportError as error:  # it is there and does not load
            _cuda = f"the CUDA module of pycompress cannot be loaded: {error}"
    return _cuda


def cuda_module() -> ModuleType:
    """``pycompress._cuda``.

    Raises:
        RuntimeError: it was not built, or cannot be loaded.
    """
    module = _load()
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def cuda_missing(tensor: Tensor, name: str = "x") -> str | None:
    """Why the CUDA kernels cannot take a tensor of this name, or None."""
    emulated = isinstance(_cuda, ModuleType) and _cuda.DEVICE_TYPE == "cpu"
    if tensor.device.type != ("cpu" if emulated else "cuda"):
        return f"{name} is on {tensor.device}, the CUDA kernels run on NVIDIA GPUs"
    module = _load()
    if isinstance(module, str):
        return module
    if emulated:
        return None
    index = tensor.device.index
    return _device_missing(index) or _module_missing(index, module.ARCHITECTURES, module.CUDA_VERSION)


def interpreting() -> bool:
    """Whether Triton kernels are run by its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing(tensor: Tensor, name: str = "x") -> str | None:
    """Why the Triton kernels cannot take a tensor of this name, or None."""
    if tensor.device.type == "cpu" and not interpreting():
        return (
            f"{name} is on cpu, the Triton kernels run on NVIDIA GPUs (or, slowly, on the CPU with TRITON_INTERPRET=1)"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        return f"{name} is on {tensor.device}, the Triton kernels run on NVIDIA GPUs"
    if not _triton_installed():
        return "Triton is not installed; pip install triton"
    return None if tensor.device.type == "cpu" else _device_missing(tensor.device.index)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _device_missing(index: int) -> str | None:
    if torch.version.cuda is None:  # ROCm calls its devices cuda too
        return "this torch was built for AMD GPUs, the kernels run on NVIDIA GPUs"
    found = torch.cuda.get_device_capability(index)
    if found < OLDEST:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {found[0]}.{found[1]}, the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]} or newer; backend='reference' runs there"
        )
    return None


@functools.cache
def _module_missing(index: int, architectures: str, cuda: int) -> str | None:
    """Why the CUDA module, built for these architectures with this CUDA (13000), does not run on a device that is new
    enough, or None."""
    found, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
    if not any(_runs(architecture, *found) for architecture in architectures.split(",")):
        return (
            f"the CUDA module was built for {architectures}, {name} has compute capability {found[0]}.{found[1]}; "
            f"build it with CMAKE_CUDA_ARCHITECTURES={10 * found[0] + found[1]} (make wheel CUDA_TARGETS=...)"
        )
    # The runtime that is part of the module asks for a driver of its own CUDA's major version; torch's may be older.
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    driver = cuda if ask is None else ask()
    if driver // 1000 < cuda // 1000:
        return (
            f"the driver of {name} knows CUDA {driver // 1000}.{driver % 1000 // 10}, the CUDA module was built with "
            f"{cuda // 1000}.{cuda % 1000 // 10}; update the driver, or build with a CUDA that it knows"
        )
    return None


def _runs(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture, as CMake writes it, runs on a compute capability.

    80-real: machine code, for 8.0 and up to 8.9; 90a-real: for 9.0 alone; 120-virtual: PTX, for all from 12.0 on;
    120: both.
    """
    number, _, kind = architecture.partition("-")
    digits = number.rstrip("af")
    if not digits.isdigit():  # "native", "all": whatever CMake made of it
        return True
    built = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return built == (major, minor)
    same = built[0] == major and built[1] <= minor
    if number.endswith("f"):
        return same
    return (kind != "virtual" and same) or (kind != "real" and built <= (major, minor))


def capability(tensor: Tensor) -> int:
    """Of the tensor's GPU, as in sm_90: 90; 80 for the CPU, where kernels are emulated or interpreted."""
    if tensor.device.type != "cuda":
        return 10 * OLDEST[0]
    major, minor = _capability(tensor.device.index)
    return 10 * major + minor


_capability = functools.cache(torch.cuda.get_device_capability)


def place(tensor: Tensor) -> tuple[int, int]:
    """Where the CUDA kernels of a call run: the index of the tensor's device and the handle of its current stream."""
    if tensor.device.type != "cuda":
        return 0, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
