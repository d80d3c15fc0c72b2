"""The compiled module, and what it says of this machine.

Torch is imported first: the kernels share the OpenMP library that torch has loaded, so that the process has one
thread pool, sized by ``torch.set_num_threads``.
"""

from __future__ import annotations

import torch  # noqa: F401  (loads libgomp.so.1 before _C does)

from pycompress import _C


def available_isas() -> list[str]:
    """Instruction-set levels that the CPU and this build support, best first; the last is ``"scalar"``."""
    return list(_C.available_isas())


def selected_isa() -> str:
    """The level in force: ``PYCOMPRESS_ISA`` where set (``ValueError`` if unknown or missing here), else the best."""
    return str(_C.selected_isa())


def cpu_features() -> list[str]:
    """Features of the CPU that matter to the kernels, e.g. ``["avx2", "fma", "avx512f", "avx512vnni"]``."""
    return list(_C.cpu_features())
