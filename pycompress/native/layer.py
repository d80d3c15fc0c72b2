"""What the layers have in common: a plan of the compiled module, called with arrays."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from pycompress.codes import RowLayout
from pycompress.native import runtime
from pycompress.native.arrays import Array, address, float_code, rows_of


class Run(Protocol):
    """What a plan of ``_C`` does: x, M, K, dtype, y, threads."""

    def __call__(self, x: int, m: int, k: int, dtype: int, y: int, threads: int, /) -> None: ...


class RunStrided(Protocol):
    """The same for x of any strides."""

    def __call__(self, x: int, layout: RowLayout, dtype: int, y: int, threads: int, /) -> None: ...


class Layer:
    """A linear layer of K inputs and N outputs, ready to be called; it is not changed afterwards.

    The arrays that it was made of were copied. Calls from several threads at once are safe.
    """

    _op: str
    in_features: int
    out_features: int
    activation: str
    threads: int | None

    def __call__(self, x: Array) -> Array:
        """``(..., K)`` float32, float16 or bfloat16, any strides -> ``(..., N)``, contiguous, of the same dtype.

        Raises:
            TypeError, ValueError: another K, or a dtype that the kernels do not take.
        """
        n, k = self.out_features, self.in_features
        threads = runtime.get_num_threads() if self.threads is None else self.threads
        # The common case, past the checks that have nothing to find.
        if type(x) is np.ndarray and x.ndim and x.shape[-1] == k and x.flags.carray:
            code = float_code(x.dtype)
            if code is not None:
                leading = x.shape[:-1]
                y = np.empty((*leading, n), x.dtype)
                m = leading[0] if len(leading) == 1 else math.prod(leading)
                self._runs(m)[0](address(x), m, k, code, address(y), threads)
                return y
        x, layout, code = rows_of(self._op, x, k)
        y = np.empty((*x.shape[:-1], n), x.dtype)
        self._runs(layout[0])[1](address(x), layout, code, address(y), threads)
        return y

    def _runs(self, m: int) -> tuple[Run, RunStrided]:
        """What computes m tokens."""
        raise NotImplementedError

    def memory_bytes(self) -> int:
        """Bytes of memory that the layer holds."""
        raise NotImplementedError

    def _set_threads(self, threads: int | None) -> None:
        self.threads = None if threads is None else runtime.checked_threads(self._op, threads)

    @property
    def kernel(self) -> str:
        """Name of the native kernel that runs."""
        raise NotImplementedError

    def __repr__(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{type(self).__name__}({sizes}, {self._details()}, kernel={self.kernel})"

    def _details(self) -> str:
        return f"activation={self.activation}"
