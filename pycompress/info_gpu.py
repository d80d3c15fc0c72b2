"""The GPU side of `pycompress info`: what was built, what is installed, which GPUs there are, what can run on them.

Only what is there is asked: without a torch built for CUDA nobody touches the driver, and Triton is not imported.
"""

import importlib.metadata
import importlib.util
from typing import Any

import torch

from pycompress import gpu

BACKENDS = ("cuda", "triton")


def collect() -> dict[str, Any]:
    """JSON-ready: the CUDA module, Triton's version (None: not installed), torch's CUDA, and every GPU that it sees."""
    return {
        "module": _module(),
        "triton": _version("triton"),
        "torch_cuda": torch.version.cuda,
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
    }


def _module() -> dict[str, Any]:
    """built: whether this pycompress has one; where it does not load, `error` says why."""
    try:
        module = gpu.cuda_module()
    except RuntimeError as error:
        return {"built": importlib.util.find_spec("pycompress._cuda") is not None, "error": str(error)}
    major, rest = divmod(module.CUDA_VERSION, 1000)
    return {
        "built": True,
        "cuda": f"{major}.{rest // 10}",
        "targets": _targets(module.ARCHITECTURES),
        "device_type": module.DEVICE_TYPE,
    }


def _targets(architectures: str) -> list[str]:
    """What CMake calls 80-real,120 -> sm_80, sm_120, PTX of compute_120."""
    found = []
    for name in architectures.split(",") if architectures else []:
        number, _, kind = name.partition("-")
        found += [f"sm_{number}"] if kind != "virtual" else []
        found += [f"PTX of compute_{number}"] if kind != "real" else []
    return found


def _version(distribution: str) -> str | None:
    """Without importing it; None where it is not installed."""
    if importlib.util.find_spec(distribution) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a copy on the path that pip does not know
        return "of unknown version"


def _device(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_gb": round(found.total_memory / 1e9, 1),
        "multiprocessors": found.multi_processor_count,
    }


def device_for(backend: str) -> tuple[str, str | None]:
    """(device, why not): where a backend can be tried here, and why it cannot be, if so."""
    if backend not in BACKENDS:
        return "cpu", None
    missing = {"cuda": gpu.cuda_missing, "triton": gpu.triton_missing}[backend]
    if missing(torch.empty(0)) is None:  # interpreted, or emulated by a test
        return "cpu", None
    if not torch.cuda.is_available():
        return "cpu", "no GPU" if torch.version.cuda else f"torch {torch.__version__} is a build without CUDA"
    return "cuda", missing(torch.empty(0, device="cuda"))


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """`collect()`'s answer as rows of the table for the terminal."""
    module = found["module"]
    if "error" in module:
        built = f"{'built, but ' if module['built'] else ''}{module['error']}"
    else:
        built = f"built with CUDA {module['cuda']} for {', '.join(module['targets'])}"
        built += " (emulated on the CPU)" if module["device_type"] == "cpu" else ""
    rows = [("CUDA module", built), ("Triton", found["triton"] or "not installed")]
    if not found["devices"]:
        why = "none that torch sees" if found["torch_cuda"] else "not asked for: torch is a build without CUDA"
        rows.append(("GPU", why))
    rows += [
        (
            f"GPU {index}",
            f"{device['name']}, compute capability {device['capability']}, {device['memory_gb']} GB, "
            f"{device['multiprocessors']} multiprocessors",
        )
        for index, device in enumerate(found["devices"])
    ]
    return rows
