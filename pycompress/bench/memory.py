"""Peak extra memory of one call: what the process holds at most during it, less what it held before.

It is resident memory as the kernel of Linux counts it, so it is the same for every library, and holds what an
allocator's own statistics would leave out: buffers of C++ code, of BLAS, of thread pools.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of VmHWM, see proc_pid_clear_refs(5)


def can_measure() -> bool:
    return _CLEAR_REFS.exists()


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Calls `run` once. Memory that earlier calls left with the allocator is returned to the system first.

    What `run` returns is alive until the end, so it counts.

    Raises:
        RuntimeError: not on Linux.
    """
    if not can_measure():
        raise RuntimeError("peak_extra_bytes: no /proc/self/clear_refs; expected Linux")
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _status_bytes("VmRSS")
    kept = run()
    peak = _status_bytes("VmHWM")
    del kept
    return max(0, peak - before)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"peak_extra_bytes: no {field} in {_STATUS}")


def in_subprocess(function: str, **arguments: object) -> Any:
    """Calls function, "package.module:name", in a fresh interpreter; arguments and result travel as JSON.

    Raises:
        RuntimeError: with the last line that the function's traceback has, where it raised.
    """
    code = "import sys; from pycompress.bench.memory import _answer; _answer(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-c", code, function, json.dumps(arguments), str(answer)]
        # Python puts the working directory in front of its path, where a source tree would hide the package.
        done = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"{function}: {lines[-1]}")
        return json.loads(answer.read_text())


def _answer(function: str, arguments: str, answer: str) -> None:
    module, name = function.split(":")
    Path(answer).write_text(json.dumps(getattr(import_module(module), name)(**json.loads(arguments))))
