"""The compiled module, and what it says of this machine.

Torch is imported first: the kernels share the OpenMP library that torch has loaded, so that the process has one
thread pool, sized by ``torch.set_num_threads``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch  # loads libgomp.so.1 before _C does
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack

from pycompress import _C

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available_isas() -> list[str]:
    """Instruction-set levels that the CPU and this build support, best first; the last is ``"scalar"``."""
    return list(_C.available_isas())


def selected_isa() -> str:
    """The level in force: ``PYCOMPRESS_ISA`` where set (``ValueError`` if unknown or missing here), else the best."""
    return str(_C.selected_isa())


def cpu_features() -> list[str]:
    """Features of the CPU that matter to the kernels, e.g. ``["avx2", "fma", "avx512f", "avx512vnni"]``."""
    return list(_C.cpu_features())


def has_values(tensor: Tensor) -> bool:
    """Whether there is memory behind the tensor: it is not on the meta device, and no fake one of a tracer."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, for results that a training step makes anew each time; dtype: of DTYPE_CODES.

    Fresh memory of some size comes as pages that the system clears when they are first written, which takes as
    long as the loss that fills them. From 8 MB on it is memory of an earlier such tensor, where there is one:
    up to two blocks are kept, and the system may have their pages back when it runs short (MADV_FREE).
    """
    if math.prod(shape) * dtype.itemsize < _C.POOL_SMALLEST:
        return torch.empty(shape, dtype=dtype)
    return from_dlpack(_C.pooled_empty(list(shape), DTYPE_CODES[dtype]))
