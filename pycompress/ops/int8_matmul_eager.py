"""The short way from a module to the native kernel, for plain eager mode.

The dispatcher, with autograd and autocast registered, takes about 12 us from Python and the checks 1.5 us more, where
a 1 x 384 x 384 product takes 1.4 us. A plan holds a layer's arguments, checked once.
"""

from __future__ import annotations

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
    says what is wrong. Ask :func:`is_plain_eager` and :meth:`is_for` first.
    """

    __slots__ = ("_input_scale", "_input_zero_point", "_k", "_n", "_native", "_pointers", "_scale", "_weight", "bias")

    def __init__(self, call: Call) -> None:
        check(call)
        self._weight, self._scale, self.bias = call.weight, call.weight_scale, call.bias
        self._input_scale, self._input_zero_point = call.input_scale, call.input_zero_point
        self._pointers = self._addresses()
        self._n, self._k = call.weight_scale.shape[0], call.x.shape[-1]
        self._native = native_plan(call, call.weight)

    @classmethod
    def make(
        cls,
        x: Tensor,
        weight: Tensor | None,
        weight_scale: Tensor | None,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        mode: str,
        activation: str,
        backend: str,
    ) -> EagerPlan | None:
        """A plan for calls with tensors like x, or None where they are not for the native kernel."""
        if weight is None or weight_scale is None or weight.dtype != torch.uint8 or backend == "reference":
            return None
        if not (x.is_cpu and weight.is_cpu) or weight.data_ptr() % ALIGNMENT != 0:
            return None
        return cls(Call(x, weight, weight_scale, bias, mode, input_scale, input_zero_point, activation))

    def _addresses(self) -> tuple[int, int]:
        return self._scale.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()

    def is_for(self, weight: object, scale: object, bias: object, input_scale: object, zero_point: object) -> bool:
        """Whether these very tensors are the plan's, with the memory that they had then."""
        return (
            weight is self._weight
            and scale is self._scale
            and bias is self.bias
            and input_scale is self._input_scale
            and zero_point is self._input_zero_point
            and self._addresses() == self._pointers  # else replaced through .data
        )

    def run(self, x: Tensor) -> Tensor | None:
        if self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled():
            return None
        dtype, shape, k, n = x.dtype, x.shape, self._k, self._n
        code = DTYPE_CODES.get(dtype)
        if code is None or not x.is_cpu or not shape or shape[-1] != k or not x.is_contiguous():
            return None
        if len(shape) == 2:
            m = shape[0]
            y = torch.empty(m, n, dtype=dtype)
        else:
            m = shape[:-1].numel()
            y = torch.empty((*shape[:-1], n), dtype=dtype)
        self._native.run(x.data_ptr(), m, k, code, y.data_ptr(), torch.get_num_threads())
        return y
