"""What the modules' short way to the kernel is tested with: who may watch a call, counted plans, callers in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class FunctionRecorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


# What the call is made under, and how x is made; each must take the operator.
NOT_FAST: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[Tensor], Tensor]]] = {
    "x wants a gradient": (nullcontext, lambda x: x.clone().requires_grad_()),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda x: x),
    "dispatch mode": (Recorder, lambda x: x),
    "function mode": (FunctionRecorder, lambda x: x),
    "profiler": (torch.profiler.profile, lambda x: x),
    "old profiler": (torch.autograd.profiler.profile, lambda x: x),
    "subclass": (nullcontext, lambda x: x.as_subclass(Subclass)),
    "parameter": (nullcontext, lambda x: nn.Parameter(x, requires_grad=False)),
    "not contiguous": (nullcontext, transposed),
    "negative bit": (nullcontext, lambda x: torch._neg_view(-x)),
}


def assert_watched(
    name: str, case: str, module: nn.Module, through_op: Callable[[Any, Tensor], Tensor], taken: list[bool]
) -> None:
    """In this case of NOT_FAST the call goes through the operator of this name. taken: as `count_plans` gives it."""
    context, change = NOT_FAST[case]
    x = torch.randn(5, module.in_features)
    expected = module(x)
    assert taken == [True]
    with context() as watcher:
        y = module(change(x))
    assert True not in taken[1:]
    if case == "autocast":
        assert y.dtype == torch.bfloat16
        expected = through_op(module, x.bfloat16())
    torch.testing.assert_close(torch.Tensor(y.detach()) if case != "autocast" else y, expected, rtol=0, atol=0)
    if isinstance(watcher, (Recorder, FunctionRecorder)):
        assert any(f"pycompress.{name}" in str(func) for func in watcher.seen)
    if case == "profiler":
        assert f"pycompress::{name}" in {event.key for event in watcher.key_averages()}
    if case == "subclass":
        assert isinstance(y, Subclass)


def count_plans(monkeypatch: pytest.MonkeyPatch, plan: type) -> list[bool]:
    """One entry a call that asks a plan of this class, from now on: whether it gave the result."""
    taken: list[bool] = []
    run = plan.run  # type: ignore[attr-defined]

    def counted(self: Any, *args: Any) -> Tensor | None:
        y: Tensor | None = run(self, *args)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(plan, "run", counted)
    return taken


def wrong_callers(
    module: nn.Module, inputs: list[Tensor], calls: int, same: Callable[[Tensor, Tensor], bool] = torch.equal
) -> list[int]:
    """A thread an input, each with a team of two, while one more replaces the state with an equal one.

    Returns whose results were ever not the same as alone.
    """
    expected = [module(x) for x in inputs]
    state, wrong, stop = module.state_dict(), [], threading.Event()

    def call(i: int) -> None:
        torch.set_num_threads(2)
        for _ in range(calls):
            if not same(module(inputs[i]), expected[i]):
                wrong.append(i)

    def reload() -> None:
        while not stop.is_set():
            module.load_state_dict(state)

    before = torch.get_num_threads()
    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    loader = threading.Thread(target=reload)
    for thread in (*callers, loader):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    loader.join()
    torch.set_num_threads(before)
    return wrong
