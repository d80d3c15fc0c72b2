"""What pycompress finds on this machine: the data behind `pycompress info`, and behind every result file."""

import dataclasses
import functools
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.table import Table

from pycompress import _native, info_gpu, nn, ops
from pycompress.version import __version__

# What this version computes; a benchmark each, of the same name.
OPERATIONS = ("int8_matmul", "int4_matmul", "int8_conv2d", "distill_loss", "sparse_linear")
# What the kernels could use, as /proc/cpuinfo spells it (x86 "flags", Arm "Features").
_FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_OPENMP = re.compile(r"(?:^|/)(lib(?:gomp|iomp5|omp)[^/]*\.(?:so[.\d]*|dylib))$")


def collect(*, peaks: bool = False) -> dict[str, Any]:
    """Returns a JSON-ready description of the machine and of what pycompress will run on it.

    peaks: also measure the ceilings: int8 GOP/s, fp32 and bf16 GFLOP/s, read GB/s (about a second).
    A wrong PYCOMPRESS_ISA is reported under isa.error, not raised: finding such things is what this is for.
    """
    found = {
        "versions": _versions(),
        "cpu": _cpu(),
        "isa": _isa(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cores_usable": _cores_usable(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "openmp": _openmp(),
        "gpu": info_gpu.collect(),
        "backends": _backends(),
    }
    if peaks:
        from pycompress.peaks import measure

        found["peaks"] = dataclasses.asdict(measure())
    return found


def _versions() -> dict[str, str]:
    return {
        "pycompress": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    """The CPU's model as Linux names it; elsewhere the name that Python knows."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The fields of /proc/cpuinfo, those of its last processor; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return dict(re.findall(r"^([^\t:\n]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))


def _cpu() -> dict[str, Any]:
    """Reads /proc/cpuinfo; elsewhere there is no feature list."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "logical_cores": os.cpu_count(),
        "features": [f for f in _FEATURES if f in flags],
    }


def _cores_usable() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _isa() -> dict[str, Any]:
    forced = os.environ.get("PYCOMPRESS_ISA") or None
    found: dict[str, Any] = {"available": _native.available_isas(), "forced": forced}
    try:
        return {**found, "selected": _native.selected_isa()}
    except (ValueError, RuntimeError) as error:
        return {**found, "selected": None, "error": str(error)}


def _openmp() -> dict[str, Any]:
    """Lists the OpenMP libraries of this process; two of them are two thread pools fighting for the cores."""
    path = Path("/proc/self/maps")
    if not path.is_file():
        return {"libraries": [], "shared_with_torch": None}
    files = {line.split(maxsplit=5)[5] for line in path.read_text().splitlines() if line.count("/")}
    libraries = sorted(f for f in files if _OPENMP.search(f))
    return {"libraries": libraries, "shared_with_torch": len(libraries) == 1}


def _backends() -> dict[str, dict[str, str]]:
    """Runs every backend of every operation once, on next to nothing, and tells the kernel or the error."""
    names = {
        "int8_matmul": ops.BACKENDS,
        "int4_matmul": ops.INT4_BACKENDS,
        "int8_conv2d": ops.CONV_BACKENDS,
        "distill_loss": ops.DISTILL_BACKENDS,
        "sparse_linear": ops.SPARSE_BACKENDS,
    }
    return {
        operation: {backend: _try(operation, backend) for backend in names[operation] if backend != "auto"}
        for operation in OPERATIONS
    }


def _try(operation: str, backend: str) -> str:
    device, why_not = info_gpu.device_for(backend)
    if why_not is not None:
        return f"not usable: {why_not}"
    try:
        found, expected, kernels = _TRIALS[operation](backend, device)
    except (ValueError, RuntimeError, ImportError) as error:
        return f"not usable: {error}"
    if abs(found - expected) >= 1e-3:
        return f"broken: gives {found:g} where {expected:g} is right"
    if backend == "native":
        return f"usable: {kernels}"
    if backend == "reference":
        return "usable: plain torch"
    return "usable" if device == "cuda" else "usable: on the CPU, for tests"


Trial = tuple[float, float, str]  # the result, what it should be, the names of the native kernels


def _try_int8_matmul(backend: str, device: str) -> Trial:
    weight, one = torch.ones(1, 1, dtype=torch.int8, device=device), torch.ones(1, device=device)
    y = ops.int8_linear(one, weight, one, backend=backend)
    return y.item(), 1, ops.kernel_name(ops.pack_weight(weight)) if backend == "native" else ""


def _try_int4_matmul(backend: str, device: str) -> Trial:
    weight, scale, _ = ops.quantize_weight_int4(torch.ones(1, 1, device=device), "nf4")
    y = ops.int4_linear(torch.ones(1, device=device), weight, scale, format="nf4", backend=backend)
    if backend != "native":
        return y.item(), 1, ""
    return y.item(), 1, ops.int4_kernel_name(ops.pack_weight_int4(weight, scale, in_features=1, format="nf4"))


def _try_int8_conv2d(backend: str, device: str) -> Trial:
    weight, one = torch.ones(1, 1, 1, 1, dtype=torch.int8, device=device), torch.ones(1, device=device)
    y = ops.int8_conv2d(torch.ones(1, 1, 1, 1, device=device), weight, one, backend=backend)
    return y.item(), 1, ops.conv_kernel_name(ops.pack_conv_weight(weight)) if backend == "native" else ""


def _try_distill_loss(backend: str, device: str) -> Trial:
    logits, label = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    loss = nn.DistillationLoss(backend=backend)(logits, logits, label)
    expected = math.log(2) / 2  # half of the cross-entropy, and a teacher that agrees
    return loss.item(), expected, ops.distill_kernel_name() if backend == "native" else ""


def _try_sparse_linear(backend: str, device: str) -> Trial:
    weight, one = torch.ones(1, 1, device=device), torch.ones(1, device=device)
    bitmap, values = ops.sparse_from_dense(weight, weight != 0)
    y = ops.sparse_linear(one, bitmap, values, backend=backend)
    return y.item(), 1, ", ".join(ops.sparse_kernel_names(torch.float32)) if backend == "native" else ""


_TRIALS = {
    "int8_matmul": _try_int8_matmul,
    "int4_matmul": _try_int4_matmul,
    "int8_conv2d": _try_int8_conv2d,
    "distill_loss": _try_distill_loss,
    "sparse_linear": _try_sparse_linear,
}


def table(found: dict[str, Any]) -> Table:
    """Returns `collect()`'s answer as a table for the terminal."""
    grid = Table(show_header=False, box=None, pad_edge=False)
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    versions, cpu, isa, threads, openmp = (found[k] for k in ("versions", "cpu", "isa", "threads", "openmp"))
    grid.add_row("pycompress", versions["pycompress"])
    grid.add_row("python", f"{versions['python']} on {versions['platform']}")
    grid.add_row("torch, numpy", f"{versions['torch']}, {versions['numpy']}")
    grid.add_row("CPU", f"{cpu['name']}, {cpu['logical_cores']} logical cores, {cpu['architecture']}")
    grid.add_row("CPU features", " ".join(cpu["features"]) or "not listed by this platform")
    why = f"PYCOMPRESS_ISA={isa['forced']}" if isa["forced"] else "the best; PYCOMPRESS_ISA forces another"
    grid.add_row("instruction set", f"{isa['selected'] or 'none'} ({why})")
    grid.add_row("available", ", ".join(isa["available"]))
    grid.add_row("threads", f"{threads['torch']} of {threads['cores_usable']} usable cores")
    shared = {True: "one library, shared with torch", False: "not shared with torch", None: "not known here"}
    grid.add_row("OpenMP", "\n".join([shared[openmp["shared_with_torch"]], *openmp["libraries"]]))
    for title, text in info_gpu.lines(found["gpu"]):
        grid.add_row(title, text)
    for operation, backends in found["backends"].items():
        for backend, state in backends.items():
            grid.add_row(f"{operation}, {backend}", state)
    if "peaks" in found:
        grid.add_row("peaks", _peaks_line(found["peaks"]))
    return grid


def _peaks_line(peaks: dict[str, Any]) -> str:
    units = {"int8_gops": "int8 GOP/s", "fp32_gflops": "fp32 GFLOP/s", "bf16_gflops": "bf16 GFLOP/s"}
    units["exp_g"] = "Gexp/s"
    units["read_gbps"] = "GB/s read"
    rates = [f"{peaks[name]:.0f} {unit}" for name, unit in units.items() if peaks[name] is not None]
    return f"{', '.join(rates)} on {peaks['threads']} threads"
