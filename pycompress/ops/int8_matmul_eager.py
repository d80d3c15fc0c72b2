"""The short way from a module to the native kernel, for plain eager mode.

The dispatcher, with autograd and autocast registered, takes about 12 us from Python and the checks 1.5 us more, where
a 1 x 384 x 384 product takes 1.4 us. A plan holds a layer's arguments, checked once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pycompress.ops.int8_matmul import DTYPE_CODES, check, native_plan
from pycompress.ops.int8_matmul_reference import Call
from pycompress.ops.int8_matmul_weight import ALIGNMENT

_AUTOCAST_CPU = torch._C.DispatchKey.AutocastCPU


def is_plain_eager(x: Tensor) -> bool:
    """Whether nothing would see a call on x but the kernel: no gradient, mode, tracer, transform or profiler.

    ``torch.compiler.is_compiling()`` is the caller's to ask, so that the compiler can fold it.
    """
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOCAST_CPU)  # excluded where autocast is off
        and torch._C._get_tracing_state() is None
        and not torch.autograd.profiler._is_profiler_enabled
    )


class EagerPlan:
    """A layer's tensors, checked once.

    :meth:`run` computes what the operator computes, or answers None where it is not sure; the operator then runs, or
    says what is wrong. Ask :func:`is_plain_eager` first.
    """

    __slots__ = (
        "_bias",
        "_bias_address",
        "_input_scale",
        "_input_zero_point",
        "_k",
        "_n",
        "_native",
        "_scale",
        "_scale_address",
        "_weight",
    )

    def __init__(self, call: Call) -> None:
        check(call)
        self._weight, self._scale, self._bias = call.weight, call.weight_scale, call.bias
        self._input_scale, self._input_zero_point = call.input_scale, call.input_zero_point
        self._scale_address = call.weight_scale.data_ptr()
        self._bias_address = 0 if call.bias is None else call.bias.data_ptr()
        self._n, self._k = call.weight_scale.shape[0], call.x.shape[-1]
        self._native = native_plan(call, call.weight)

    @classmethod
    def make(
        cls, x: Tensor, buffers: Mapping[str, Tensor | None], bias: Tensor | None, mode: str, activation: str
    ) -> EagerPlan | None:
        """A plan for calls like this one, or None where they are not for the native kernel."""
        weight, scale = buffers["_weight"], buffers["weight_scale"]
        if weight is None or scale is None or not (x.is_cpu and weight.is_cpu):
            return None
        if weight.dtype != torch.uint8 or weight.data_ptr() % ALIGNMENT != 0:
            return None
        statics = buffers["input_scale"], buffers["input_zero_point"]
        return cls(Call(x, weight, scale, bias, mode, *statics, activation))

    def run(self, x: Tensor, buffers: Mapping[str, Tensor | None], bias: Tensor | None) -> Tensor | None:
        """y, or None: the plan is not for these tensors (another object, or other memory through ``.data``), a
        gradient is wanted, or x is not contiguous, on the CPU, (..., K) and of a known dtype.
        """
        scale = self._scale
        if (
            buffers["_weight"] is not self._weight
            or buffers["weight_scale"] is not scale
            or buffers["input_scale"] is not self._input_scale
            or buffers["input_zero_point"] is not self._input_zero_point
            or bias is not self._bias
            or scale.data_ptr() != self._scale_address
        ):
            return None
        if bias is not None and (
            bias.data_ptr() != self._bias_address or (bias.requires_grad and torch.is_grad_enabled())
        ):
            return None
        dtype, shape = x.dtype, x.shape
        code = DTYPE_CODES.get(dtype)
        if code is None or not x.is_cpu or not shape or shape[-1] != self._k or not x.is_contiguous():
            return None
        if len(shape) == 2:
            m = shape[0]
            y = torch.empty(m, self._n, dtype=dtype)
        else:
            m = shape[:-1].numel()
            y = torch.empty((*shape[:-1], self._n), dtype=dtype)
        self._native.run(x.data_ptr(), m, self._k, code, y.data_ptr(), torch.get_num_threads())
        return y
