"""Who reads what a layer returns, seen while the model runs on real batches.

An operation on tensors is seen wherever it happens, also in code that cannot be traced: `watching` notes for each
watched layer which linear layers take its output as their input, unchanged but for operations that carry a positive
factor a channel through (a view, a copy, ReLU, a product with another tensor), and what else reads it. What did not
happen on these batches was not seen: `other_paths` asks the traces of the forward around the layer for other readers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pycompress.selection import ModuleMap, relative_name
from pycompress.tracing import Shadow

_aten = torch.ops.aten
# act(c * x) = c * act(x) for every c > 0, value by value; so does a copy.
_CARRIES = (_aten.relu.default, _aten.relu_.default, _aten.clone.default, _aten._to_copy.default)
_PRODUCTS = (_aten.mul.Tensor, _aten.mul_.Tensor)


@dataclass
class Flow:
    """What became of a watched layer's output, over all its calls."""

    readers: dict[nn.Module, None] = field(default_factory=dict)  # linear layers whose input it is
    others: dict[str, None] = field(default_factory=dict)  # what else reads it, in words


@dataclass
class Flows:
    of: dict[nn.Module, Flow]
    # By linear layer: where its input came from in each call; None is anything that is not watched.
    sources: dict[nn.Module, set[nn.Module | None]] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    """Follows the outputs of the watched layers through one forward, by the memory that they lie in."""

    def __init__(self, modules: ModuleMap, flows: Flows) -> None:
        super().__init__()
        self.names = modules.names
        self.flows = flows
        self.running: list[nn.Module] = []
        self.inside = 0  # a linear layer: what it does with its input is its own affair
        # Storage address -> (layer, channels, a tensor in that memory, so that it is not used again meanwhile).
        self.origins: dict[int, tuple[nn.Module, int, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside or not self.origins:
            return result
        tracked = [t for t in tensors_in((args, kwargs)) if _address(t) in self.origins]
        if tracked:
            self._follow(func, tracked, result)
        return result

    def _follow(self, func: Any, tracked: list[Tensor], result: Any) -> None:
        carries = func in _CARRIES or func in _PRODUCTS
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        made = [_address(tensor) in self.origins for tensor in tensors_in(result)]
        if made and all(made) and not (carries or writes):
            return  # a view: nothing is read
        passed = tracked[-1] if carries else None
        for tensor in tracked:
            source, channels, _ = self.origins[_address(tensor)]
            if tensor is passed and _aligned(tensor, channels) and _aligned(result, channels):
                self.origins[_address(result)] = (source, channels, result)
            else:
                self.flows.of[source].others.setdefault(self._describe(func))

    def _describe(self, func: Any) -> str:
        where = self.names[self.running[-1]][0] if self.running else ""
        return f"{func.overloadpacket.__name__.strip('_')} in {where or 'the model'}"

    def returned(self, source: nn.Module, output: Any, channels: int) -> None:
        if isinstance(output, Tensor) and _aligned(output, channels) and _address(output):
            self.origins[_address(output)] = (source, channels, output)
        else:
            self.flows.of[source].others.setdefault("something: its output is no plain tensor of its channels")

    def reads(self, layer: nn.Module, x: Tensor) -> None:
        source, channels, _ = self.origins.get(_address(x), (None, 0, None))
        self.flows.sources.setdefault(layer, set()).add(source)
        if source is None:
            return
        if _aligned(x, channels):
            self.flows.of[source].readers.setdefault(layer)
        else:
            self.flows.of[source].others.setdefault(f"{self.names[layer][0]}, with its channels in another place")

    def given_out(self, output: Any, by: str) -> None:
        for tensor in tensors_in(output):
            if _address(tensor) in self.origins:
                source = self.origins[_address(tensor)][0]
                self.flows.of[source].others.setdefault(f"the caller of {by or 'the model'}: it is returned")


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor, or one of a subclass without storage
        return 0


def _aligned(tensor: Any, channels: int) -> bool:
    """Whether the last dimension is the channels': in memory, channel j lies at a multiple of `channels`, plus j."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.shape[-1] != channels:
        return False
    jumps = [tensor.storage_offset(), *tensor.stride()[:-1]]
    return (channels == 1 or tensor.stride(-1) == 1) and all(jump % channels == 0 for jump in jumps)


def tensors_in(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from tensors_in(vars(value), depth - 1)


@contextmanager
def watching(
    modules: ModuleMap, watched: Mapping[nn.Module, int], layers: Iterable[nn.Module]
) -> Iterator[tuple[Flows, Callable[[Callable[[], Any]], Any]]]:
    """Yields the flows, filled as the model runs, and a function that makes one forward under watch.

    watched: layers with the number of channels of what they return. layers: every linear layer.
    """
    flows = Flows({module: Flow() for module in watched})
    watch = _Watch(modules, flows)
    linears = set(layers)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.running.append(module)
        if module in linears:
            if not watch.inside:
                watch.reads(module, next(tensors_in((args, kwargs))))
            watch.inside += 1

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watch.running.pop()
        watch.inside -= module in linears
        if module in watched and not watch.inside:
            watch.returned(module, output, watched[module])
        elif not isinstance(output, Tensor):
            # As in last_hidden_state of a model inside a model: who asks that one by itself would get another value.
            watch.given_out(output, modules.names[module][0])

    def forward(call: Callable[[], Any]) -> Any:
        watch.running.clear()
        watch.origins.clear()
        watch.inside = 0
        with watch:
            output = call()
        watch.given_out(output, "")
        watch.origins.clear()
        return output

    handles = []
    try:
        for module in modules.names:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield flows, forward
    finally:
        for handle in handles:
            handle.remove()


# --- the paths that were not run ---

# What does not look at the values, or carries a factor a channel through.
_HARMLESS_FUNCTIONS = (getattr, operator.getitem, operator.mul, F.relu, torch.relu, F.dropout, torch.mul)
_HARMLESS_METHODS = frozenset(
    ("size", "dim", "view", "reshape", "flatten", "contiguous", "to", "relu", "type_as", "unsqueeze", "squeeze")
)


def other_paths(modules: ModuleMap, source: nn.Module, shadow: Shadow) -> str:
    """A reader of the layer's output on some path of the forward around it, in words; empty if there is none."""
    owner = modules.owner(source)
    if owner is None:
        return ""
    traces = shadow.explore(modules.names[owner][0])
    for call in traces.calls(relative_name(modules, owner, source)):
        for user in call.users:
            harmless = user.op in ("call_module", "output")
            harmless |= user.op == "call_function" and user.target in _HARMLESS_FUNCTIONS
            harmless |= user.op == "call_method" and user.target in _HARMLESS_METHODS
            if not harmless:
                return f"{getattr(user.target, '__name__', user.target)} in {type(owner).__name__}.forward"
    return ""
