"""A pruned weight in all the forms that a layer holds, and the short way from a module to the native kernels.

The short way is for plain eager mode; see ``int8_matmul_eager.py`` for why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pycompress._native import DTYPE_CODES
from pycompress.ops.int8_matmul import native_plan as int8_native_plan
from pycompress.ops.sparse_linear import check, native_plan
from pycompress.ops.sparse_linear_reference import DENSE, INDEX, Call, dense_linear

# x, M, K, dtype, y, threads: addresses, sizes and codes.
_Run = Callable[[int, int, int, int, int, int], None]


class Forms:
    """A weight as it was at one moment, with what was derived from it; replaced as a whole, never changed.

    choices: by number of threads, see ``sparse_linear``. backends: who reads the forms, best first: native, or those of
    a GPU. Without either: no forms and no choices.
    """

    __slots__ = (
        "_addresses", "_held", "_versions", "backends", "bitmap", "choices", "dense", "index", "native", "row_start",
        "scale", "values",
    )  # fmt: skip

    def __init__(
        self,
        state: tuple[Tensor, Tensor, Tensor | None],
        row_start: Tensor | None = None,
        index: Tensor | None = None,
        dense: Tensor | None = None,
        choices: Mapping[int, tuple[int, ...]] | None = None,
        backends: tuple[str, ...] = (),
    ) -> None:
        self.bitmap, self.values, self.scale = state
        self.backends, self.native = backends, backends == ("native",)
        self.row_start, self.index, self.dense, self.choices = row_start, index, dense, dict(choices or {})
        # Held, so that no other tensor can come to lie at these addresses while they are compared.
        self._held = self.bitmap.detach(), self.values.detach()
        self._addresses = self.bitmap.data_ptr(), self.values.data_ptr()
        # Changes in place count too; inference tensors do not count theirs.
        counted = not (self.bitmap.is_inference() or self.values.is_inference())
        self._versions = self.bitmap._version + self.values._version if counted else None

    def are_of(self, buffers: Mapping[str, Tensor | None]) -> bool:
        """Whether these are a module's tensors still, in the memory that they had then and with the same contents."""
        bitmap, values = self.bitmap, self.values
        places = self._addresses
        return (
            buffers["weight_values"] is values
            and buffers["weight_bitmap"] is bitmap
            and buffers["weight_scale"] is self.scale
            and bitmap.data_ptr() == places[0]
            and values.data_ptr() == places[1]
            and (self._versions is None or self._versions == bitmap._version + values._version)
        )


class EagerPlan:
    """The arguments of a layer's calls, checked once.

    :meth:`run` computes what the operator computes, or answers None where it is not sure; the operator then runs, or
    says what is wrong. Ask :func:`pycompress.ops.eager.is_plain_eager`, :meth:`Forms.are_of` and :meth:`is_for` first.
    """

    __slots__ = (
        "_activation", "_bias", "_dense", "_held", "_k", "_n", "_places", "_runs", "_scale", "forms",
        "threads",
    )  # fmt: skip

    def __init__(self, x: Tensor, forms: Forms, bias: Tensor | None, activation: str, threads: int) -> None:
        """forms: with a choice for so many threads, and every form that it names."""
        choice = forms.choices[threads]
        weight = forms.bitmap, forms.values, forms.scale
        call = Call(x, *weight, bias, forms.row_start, forms.index, forms.dense, choice, activation)
        check(call)
        self.forms, self.threads, self._activation, self._bias = forms, threads, activation, bias
        self._n, self._k = forms.bitmap.shape[0], x.shape[-1]
        self._held = None if forms.scale is None else forms.scale.detach(), None if bias is None else bias.detach()
        self._scale = forms.scale
        self._places = (
            0 if forms.scale is None else forms.scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        self._dense = None if forms.scale is not None else forms.dense
        assert forms.row_start is not None
        native = native_plan(call, forms.row_start, forms.index)
        runs: list[tuple[int, _Run | None]] = []
        for most, code in zip(choice[::2], choice[1::2], strict=True):
            run: _Run | None = native.run_index if code == INDEX else native.run_bitmap
            if code == DENSE:
                assert forms.dense is not None
                run = None if forms.scale is None else int8_native_plan(call.int8(forms.dense), forms.dense).run
            runs.append((most, run))
        self._runs = tuple(runs)

    def is_for(self, bias: Tensor | None, threads: int) -> bool:
        """Whether the bias is the plan's still, scale and bias are where they were, and there are as many threads."""
        if bias is not self._bias or threads != self.threads:
            return False
        scale, places = self._scale, self._places
        return (scale is None or scale.data_ptr() == places[0]) and (bias is None or bias.data_ptr() == places[1])

    def run(self, x: Tensor) -> Tensor | None:
        """y, or None where this call is the operator's: a bias wants its gradient, or x is not contiguous, dense,
        on the CPU, (..., K) and of a known dtype.
        """
        bias = self._bias
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        dtype, shape = x.dtype, x.shape
        code = DTYPE_CODES.get(dtype)
        if code is None or not x.is_cpu or not shape or shape[-1] != self._k or x.layout is not torch.strided:
            return None
        if not x.is_contiguous() or x.is_neg():
            return None
        flat = len(shape) == 2  # slices of a shape cost a quarter of a microsecond
        m = shape[0] if flat else shape[:-1].numel()
        run = self._runs[-1][1]
        for most, candidate in self._runs:
            if m <= most:
                run = candidate
                break
        if run is None:
            assert self._dense is not None
            return dense_linear(x, self._dense, bias, self._activation)
        y = torch.empty(m, self._n, dtype=dtype) if flat else torch.empty((*shape[:-1], self._n), dtype=dtype)
        run(x.data_ptr(), m, self._k, code, y.data_ptr(), self.threads)
        return y
