"""The short way from a module to the native kernel, for plain eager mode.

The dispatcher, with autograd and autocast registered, takes about 12 us from Python and the checks 1.5 us more, where
a 1 x 384 x 384 product takes 1.4 us. A plan holds a layer's arguments, checked once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import DTYPE_CODES
from pycompress.ops.int8_matmul import check, native_plan
from pycompress.ops.int8_matmul_reference import Call
from pycompress.ops.int8_matmul_weight import ALIGNMENT


class EagerPlan:
    """A layer's tensors, checked once.

    :meth:`run` computes what the operator computes, or answers None where it is not sure; the operator then runs, or
    says what is wrong. Ask
    :func:`pycompress.ops.eager.is_plain_eager` and :meth:`is_for` first.
    """

    __slots__ = ("_addresses", "_held", "_k", "_n", "_native", "_tensors")

    def __init__(self, call: Call) -> None:
        check(call)
        self._tensors = (call.weight, call.weight_scale, call.bias, call.input_scale, call.input_zero_point)
        # Held, so that no other tensor can come to lie at these addresses while the plan compares them.
        self._held = tuple(t.detach() for t in self._tensors if t is not None)
        self._addresses = tuple(t.data_ptr() for t in self._held)
        self._n, self._k = _C.int8_packed_shape(call.weight.data_ptr(), call.weight.numel())
        self._native = native_plan(call, call.weight)

    @classmethod
    def make(
        cls, x: Tensor, buffers: Mapping[str, Tensor | None], bias: Tensor | None, mode: str, activation: str
    ) -> EagerPlan | None:
        """A plan for calls like this one, or None where they are not for the native kernel."""
        weight, scale = buffers["_weight"], buffers["weight_scale"]
        if weight is None or scale is None or not (x.is_cpu and weight.is_cpu):
            return None
        if x.layout is not torch.strided or weight.dtype != torch.uint8 or weight.data_ptr() % ALIGNMENT != 0:
            return None
        statics = buffers["input_scale"], buffers["input_zero_point"]
        if x.dim() == 0 or _C.int8_packed_shape(weight.data_ptr(), weight.numel()) != (scale.numel(), x.shape[-1]):
            return None
        return cls(Call(x, weight, scale, bias, mode, *statics, activation))

    def is_for(self, buffers: Mapping[str, Tensor | None], bias: Tensor | None) -> bool:
        """Whether these are the plan's tensors still, in the memory that they had then (``.data`` may move them)."""
        weight, scale, own_bias, input_scale, zero_point = self._tensors
        if (
            buffers["_weight"] is not weight
            or buffers["weight_scale"] is not scale
            or bias is not own_bias
            or buffers["input_scale"] is not input_scale
            or buffers["input_zero_point"] is not zero_point
        ):
            return False
        if input_scale is None and own_bias is not None:  # the common case, spelled out: a quarter of the time
            return (weight.data_ptr(), scale.data_ptr(), own_bias.data_ptr()) == self._addresses
        return tuple(t.data_ptr() for t in self._tensors if t is not None) == self._addresses

    def run(self, x: Tensor) -> Tensor | None:
        """y, or None where this call is the operator's: a bias wants its gradient, or x is not contiguous, dense,
        on the CPU, (..., K) and of a known dtype.
        """
        bias = self._tensors[2]
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        dtype, shape = x.dtype, x.shape
        code = DTYPE_CODES.get(dtype)
        if code is None or not x.is_cpu or not shape or shape[-1] != self._k or x.layout is not torch.strided:
            return None
        if not x.is_contiguous() or x.is_neg():
            return None
        if len(shape) == 2:
            m = shape[0]
            y = torch.empty(m, self._n, dtype=dtype)
        else:
            m = shape[:-1].numel()
            y = torch.empty((*shape[:-1], self._n), dtype=dtype)
        self._native.run(x.data_ptr(), m, self._k, code, y.data_ptr(), torch.get_num_threads())
        return y
