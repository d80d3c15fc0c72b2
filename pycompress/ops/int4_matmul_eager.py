"""The short way from a module to the native kernel, for plain eager mode; see ``int8_matmul_eager.py`` for why."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pycompress._native import DTYPE_CODES
from pycompress.ops.int4_matmul import check, native_plan
from pycompress.ops.int4_matmul_reference import Call
from pycompress.ops.int8_matmul_weight import ALIGNMENT


class EagerPlan:
    """A layer's tensors, checked once.

    :meth:`run` computes what the operator computes, or answers None where it is not sure; the operator then runs, or
    says what is wrong. Ask :func:`pycompress.ops.eager.is_plain_eager` and :meth:`is_for` first.
    """

    __slots__ = ("_addresses", "_bias", "_held", "_k", "_n", "_native", "_weight")

    def __init__(self, call: Call) -> None:
        """call: with a packed weight."""
        check(call)
        self._weight, self._bias = call.weight, call.bias
        # Held, so that no other tensor can come to lie at these addresses while the plan compares them.
        self._held = tuple(t.detach() for t in (call.weight, call.bias) if t is not None)
        self._addresses = tuple(t.data_ptr() for t in self._held)
        self._n, self._k = call.out_features, call.in_features
        self._native = native_plan(call.weight, call.bias, call.activation)

    @classmethod
    def make(cls, call: Call) -> EagerPlan | None:
        """A plan for calls like this one, or None where they are not for the native kernel."""
        x, weight = call.x, call.weight
        if not (x.is_cpu and weight.is_cpu and call.packed) or x.layout is not torch.strided:
            return None
        if weight.data_ptr() % ALIGNMENT != 0 or x.dim() == 0 or x.shape[-1] != call.in_features:
            return None
        return cls(call)

    def is_for(self, buffers: Mapping[str, Tensor | None], bias: Tensor | None) -> bool:
        """Whether these are the plan's tensors still, in the memory that they had then (``.data`` may move them)."""
        weight = self._weight
        if buffers["_weight"] is not weight or bias is not self._bias:
            return False
        if bias is None:
            return (weight.data_ptr(),) == self._addresses
        return (weight.data_ptr(), bias.data_ptr()) == self._addresses

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
        m = shape[:-1].numel()
        y = torch.empty((*shape[:-1], self._n), dtype=dtype)
        self._native.run(x.data_ptr(), m, self._k, code, y.data_ptr(), torch.get_num_threads())
        return y
