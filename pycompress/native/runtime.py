"""The compiled module in a process that may have no torch: its OpenMP library, threads and instruction sets."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["available_isas", "checked_threads", "core", "get_num_threads", "selected_isa", "set_num_threads"]


def _load_openmp() -> None:
    """Torch's OpenMP library, where torch is installed; torch itself is not imported.

    The system links a process with one libgomp.so.1: the first that is loaded. Were it another one, an older one could
    lack what torch wants of it. As it is torch's own, a later ``import torch`` finds it, and shares its threads.
    """
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):  # a finder that forbids torch, or a stand-in for it
        return
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        library = Path(place, "lib", "libgomp.so.1")
        if library.is_file():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


if "torch" not in sys.modules:
    _load_openmp()
try:
    from pycompress import _C as core
except ImportError as error:
    if "libgomp" not in str(error):
        raise
    raise ImportError(
        f"pycompress.native: {error}; the kernels need GCC's OpenMP library libgomp.so.1, which torch brings along: "
        "install it (Debian, Ubuntu: apt install libgomp1; Fedora: dnf install libgomp; Alpine: apk add libgomp)"
    ) from error


def available_isas() -> list[str]:
    """Instruction-set levels that the CPU and this build support, best first; the last is ``"scalar"``."""
    return list(core.available_isas())


def selected_isa() -> str:
    """The level in force: ``PYCOMPRESS_ISA`` where set (``ValueError`` if unknown or missing here), else the best."""
    return str(core.selected_isa())


def _default_threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    affinity = getattr(os, "sched_getaffinity", None)
    return max(len(affinity(0)) if affinity is not None else os.cpu_count() or 1, 1)


_threads = _default_threads()


def get_num_threads() -> int:
    """How many threads a call may use at most; a small one uses fewer. At first ``OMP_NUM_THREADS``, or every CPU that
    this process may run on. Torch's own number, where torch is loaded too, is another one.
    """
    return _threads


def set_num_threads(threads: int) -> None:
    """For calls from now on, of layers that were not given a number of their own.

    Raises:
        ValueError, TypeError: not a whole number from 1 to 4096.
    """
    global _threads
    _threads = checked_threads("set_num_threads", threads)


def checked_threads(op: str, threads: int) -> int:
    """threads itself; raises as set_num_threads."""
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"{op}: threads={threads!r}, expected a whole number")
    if not 1 <= threads <= 4096:
        raise ValueError(f"{op}: threads={threads}, expected 1 to 4096")
    return threads
