"""Whether a call may go past torch's dispatcher, straight to a kernel: plain eager mode."""

from __future__ import annotations

import torch
from torch import Tensor


def nothing_watches() -> bool:
    """Whether a call would be seen by nothing but the kernel: no mode, tracer, transform or profiler.

    ``torch.compiler.is_compiling()`` is the caller's to ask, so that the compiler can fold it; :data:`CAN_ASK` too.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch.autograd.profiler._is_profiler_enabled
    )


# What a torch must have for the question to be answered; without it every call takes the operator.
_ASKED = (
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C, "_is_torch_function_mode_enabled"),
    (torch._C, "_get_tracing_state"),
    (torch._C._functorch, "peek_interpreter_stack"),
    (torch.autograd.forward_ad, "_current_level"),
    (torch.autograd.profiler, "_is_profiler_enabled"),
)
CAN_ASK = all(hasattr(owner, name) for owner, name in _ASKED)

_AUTOCAST_CPU = torch._C.DispatchKey.AutocastCPU
_CAN_ASK_OF_AUTOCAST = CAN_ASK and hasattr(torch._C, "_dispatch_tls_is_dispatch_key_excluded")


def is_plain_eager(x: Tensor) -> bool:
    """Whether nothing would see a linear layer's call on x but the kernel: as above, and no gradient nor autocast.

    ``torch.compiler.is_compiling()`` is the caller's to ask, so that the compiler can fold it. False on a torch that
    lacks one of the (private) questions asked.
    """
    return (
        _CAN_ASK_OF_AUTOCAST
        and type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOCAST_CPU)  # excluded where autocast is off
        and nothing_watches()
    )
