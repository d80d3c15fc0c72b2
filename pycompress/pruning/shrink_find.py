"""Pairs of linear layers between which a unit can go: `second(f(first(x)))` where f works on each value alone.

A pair is taken only where every path through the forward (see tracing.py) leads each value of `first` through f into
`second`, and nothing else reads it on the way. The two may lie in one module, as in nn.Sequential or an MLP, or each
in a module of its own, as in Hugging Face's BertIntermediate and BertOutput. nn.TransformerEncoderLayer and
nn.TransformerDecoderLayer are known by their source.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pycompress.fuse import called_from_above, is_transformer_layer
from pycompress.nn.masked_linear import MaskedLinear
from pycompress.selection import HOOKS, ModuleMap
from pycompress.tracing import Shadow, Traces, methods_of

_DROPOUTS = (nn.Dropout, nn.Identity)  # nothing in eval
_ELEMENTWISE_MODULES = frozenset(
    (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
        *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softplus),
        *(nn.Softsign, nn.LogSigmoid, nn.Threshold),
    )
)
_ELEMENTWISE_FUNCTIONS = frozenset(
    (
        *(F.relu, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish),
        *(F.sigmoid, torch.sigmoid, F.tanh, torch.tanh, F.hardtanh, F.hardsigmoid, F.hardswish, F.softplus),
        *(F.softsign, F.logsigmoid),
    )
)
_ELEMENTWISE_METHODS = frozenset(("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"))
_DROPOUT_FUNCTIONS = frozenset((F.dropout, torch.dropout))


@dataclass(frozen=True)
class Step:
    """One elementwise function between two layers. Equal steps compute the same."""

    call: Callable[[Tensor], Tensor]
    key: tuple[object, ...]
    module: nn.Module | None = None  # where it is one

    @classmethod
    def of_module(cls, module: nn.Module) -> Step:
        return cls(module, (module,), module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def in_float64(self, values: Tensor) -> Tensor:
        """The step on float64 values; a module's own parameters are converted on a copy."""
        call = self.call if self.module is None else copy.deepcopy(self.module).double().eval()
        return call(values)


@dataclass(frozen=True, eq=False)
class Pair:
    """`second(steps(first(x)))`; `name` is that of `first`. The steps are those of eval, where dropout is none."""

    kind: ClassVar[str] = "units"
    reason: ClassVar[str] = ""  # found only where nothing forbids it

    name: str
    first: nn.Linear
    second: nn.Linear
    steps: tuple[Step, ...]

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        return self.first, self.second

    @property
    def size(self) -> int:
        return self.first.out_features


Chain = tuple[nn.Linear, tuple[Step, ...]]  # a layer, and what follows (or precedes) it


def is_shrinkable_type(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) in (nn.Linear, MaskedLinear)


def is_elementwise(activation: object) -> bool:
    """Whether it maps each value alone, whatever the tensor's shape; of those known."""
    if isinstance(activation, nn.PReLU):
        return type(activation) is nn.PReLU and activation.num_parameters == 1
    if isinstance(activation, nn.Module):
        kind = type(activation)
        known = kind in _ELEMENTWISE_MODULES or kind.__module__ == "transformers.activations"
        return known and "forward" not in activation.__dict__ and not has_hooks(activation)
    function = getattr(activation, "func", activation)  # functools.partial(F.gelu, approximate="tanh")
    try:
        return function in _ELEMENTWISE_FUNCTIONS
    except TypeError:  # not hashable
        return False


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind, None) for kind in HOOKS)


def find_pairs(modules: ModuleMap, shadow: Shadow) -> list[Pair]:
    """Every pair of the model, in its order. Runs nothing of the model but its forwards, on meta tensors."""
    return _Finder(modules, shadow).pairs()


class _Finder:
    def __init__(self, modules: ModuleMap, shadow: Shadow) -> None:
        self._modules, self._shadow = modules, shadow
        self._heads: dict[nn.Module, Chain | None] = {}
        self._tails: dict[nn.Module, Chain | None] = {}

    def pairs(self) -> list[Pair]:
        owners: dict[nn.Module, None] = {}
        for module in self._modules.names:
            if is_shrinkable_type(module):
                above = self._modules.owner(module)
                for _ in range(2):  # the owner itself, and one that holds the pair in two modules
                    if above is not None:
                        owners.setdefault(above)
                        above = self._modules.owner(above)
        return [pair for owner in self._modules.names if owner in owners for pair in self._pairs_of(owner)]

    def _pairs_of(self, owner: nn.Module) -> list[Pair]:
        name = self._modules.names[owner][0]
        if is_transformer_layer(owner):
            found = self._pair_of_transformer_layer(owner)
        else:
            found = self._traced_pairs(name, owner)
        return [
            pair
            for pair in found
            if not called_from_above(self._modules, owner, (pair.first, pair.second), self._shadow)
        ]

    def _traced_pairs(self, name: str, owner: nn.Module) -> list[Pair]:
        children = self._children(owner)
        tails = {path: tail for path, child in children.items() if (tail := self._tail(child)) is not None}
        heads = {path: head for path, child in children.items() if (head := self._head(child)) is not None}
        if not any(a != b for a in tails for b in heads):
            return []
        traces = self._shadow.explore(name)
        if traces.failure:
            return []
        pairs = []
        for path, (first, before) in tails.items():
            after = _successor(traces, owner, path, heads.keys())
            if after is not None:
                second, steps = heads[after[0]][0], (*before, *after[1], *heads[after[0]][1])
                fits = first.out_features == second.in_features  # else no input gets this far
                if fits and not _used_apart(owner, path, after[0]):
                    pairs.append(Pair(self._modules.names[first][0], first, second, steps))
        return pairs

    def _pair_of_transformer_layer(self, owner: Any) -> list[Pair]:
        first, second, activation = owner.linear1, owner.linear2, owner.activation
        if not (is_shrinkable_type(first) and is_shrinkable_type(second) and is_elementwise(activation)):
            return []
        if _used_apart(owner, "linear1", "linear2"):
            return []
        is_module = isinstance(activation, nn.Module)
        step = Step.of_module(activation) if is_module else Step(activation, (activation,))
        return [Pair(self._modules.names[first][0], first, second, (step,))]

    def _children(self, owner: nn.Module) -> dict[str, nn.Module]:
        """What the owner's forward calls, by its path there; members of a ModuleList or ModuleDict included."""
        found: dict[str, nn.Module] = {}
        for key, child in owner._modules.items():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                found.update({f"{key}.{path}": module for path, module in self._children(child).items()})
            elif child is not None and self._modules.owner(child) is not None:
                found[key] = child
        return found

    def _tail(self, child: nn.Module) -> Chain | None:
        """The layer whose values, through elementwise steps alone, are what the child returns."""
        if child not in self._tails:
            self._tails[child] = self._end(child, _tail_of_graph)
        return self._tails[child]

    def _head(self, child: nn.Module) -> Chain | None:
        """The layer that alone reads the child's first argument."""
        if child not in self._heads:
            self._heads[child] = self._end(child, _head_of_graph)
        return self._heads[child]

    def _end(self, child: nn.Module, of_graph: Callable[[fx.Graph, nn.Module], Chain | None]) -> Chain | None:
        if is_shrinkable_type(child):
            return child, ()
        own = [m for m in self._children(child).values() if is_shrinkable_type(m)]
        if not own or has_hooks(child) or len(self._modules.slots.get(child, [])) != 1:
            return None
        traces = self._shadow.explore(self._modules.names[child][0])
        if traces.failure or not traces.graphs:
            return None
        first, *rest = [of_graph(graph, child) for graph in traces.graphs]
        if first is not None and _used_apart(child, *self._modules.paths(child, first[0])):
            return None
        read = any(node.users for node in traces.nodes("get_attr") if str(node.target).endswith((".weight", ".bias")))
        return first if not read and all(end == first for end in rest) else None


def _successor(
    traces: Traces, owner: nn.Module, path: str, heads: Iterable[str]
) -> tuple[str, tuple[Step, ...]] | None:
    """The one child that reads the values of the child `path`, and the steps between; None where they differ."""
    heads = set(heads)
    ends: set[tuple[str, tuple[Step, ...]]] = set()
    used: set[fx.Node] = set()
    calls = traces.calls(path)
    if not calls or traces.passes_on(path) or _reads_weight(traces, path):
        return None
    for node in calls:
        steps: list[Step] = []
        current = node
        while True:
            user = _only_user(current)
            if user is None:
                return None
            if user.op == "call_module" and user.target in heads:
                break
            step = _step(user, owner)
            if step is None:
                return None
            steps += step
            current = user
        ends.add((str(user.target), tuple(steps)))
        used.add(user)
    if len(ends) != 1:
        return None
    (end, between) = ends.pop()
    only_from_here = set(traces.calls(end)) == used and not traces.passes_on(end) and not _reads_weight(traces, end)
    return (end, between) if only_from_here and end != path else None


def _used_apart(owner: nn.Module, *paths: str) -> bool:
    """Whether a method beside forward may use one of the modules at `paths` by itself, as `encode` may.

    A method that names them all is trusted to do with them what forward does, unless it gets at them by an index.
    """
    indexed = any(path.rpartition(".")[2].isdigit() for path in paths)
    for method in methods_of(owner):
        reached = [method.may_reach(path) for path in paths]
        if method.name != "forward" and any(reached) and (len(paths) == 1 or indexed or not all(reached)):
            return True
    return False


def _reads_weight(traces: Traces, path: str) -> bool:
    """Whether the forward computes with the layer's weight itself; to look at its dtype does no harm."""
    return any(node.users and str(node.target).startswith(f"{path}.") for node in traces.nodes("get_attr"))


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads the value, once, as its first argument."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    reads: list[fx.Node] = []
    fx.node.map_arg((user.args, user.kwargs), lambda n: reads.append(n) if n is node else None)
    return user if len(reads) == 1 and user.args and user.args[0] is node else None


def _step(node: fx.Node, owner: nn.Module) -> list[Step] | None:
    """The elementwise function that the node computes of its first argument: none for dropout; None if another."""
    if any(isinstance(argument, fx.Node) for argument in (*node.args[1:], *node.kwargs.values())):
        return None
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        if type(module) in _DROPOUTS and not has_hooks(module):
            return []
        return [Step.of_module(module)] if is_elementwise(module) else None
    rest, options = node.args[1:], dict(node.kwargs)
    key = (node.op, node.target, repr(rest), repr(options))
    if node.op == "call_function":
        function = node.target
        if function in _DROPOUT_FUNCTIONS:
            return []
        if is_elementwise(function) and callable(function):
            return [Step(lambda values: function(values, *rest, **options), key)]
    if node.op == "call_method" and node.target in _ELEMENTWISE_METHODS:
        method = str(node.target)
        return [Step(lambda values: getattr(values, method)(*rest, **options), key)]
    return None


def _tail_of_graph(graph: fx.Graph, child: nn.Module) -> Chain | None:
    output = next((node for node in graph.nodes if node.op == "output"), None)
    node = output.args[0] if output is not None else None
    steps: list[Step] = []
    while isinstance(node, fx.Node) and len(node.users) == 1 and node.args:
        if node.op == "call_module":
            module = child.get_submodule(str(node.target))
            if is_shrinkable_type(module):
                once = sum(other.target == node.target for other in graph.nodes) == 1
                return (module, tuple(steps)) if once else None
        step = _step(node, child)
        if step is None:
            return None
        steps = [*step, *steps]
        node = node.args[0]
    return None


def _head_of_graph(graph: fx.Graph, child: nn.Module) -> Chain | None:
    node = next((node for node in graph.nodes if node.op == "placeholder"), None)
    steps: list[Step] = []
    while node is not None and (user := _only_user(node)) is not None:
        if user.op == "call_module":
            module = child.get_submodule(str(user.target))
            if is_shrinkable_type(module):
                once = sum(other.target == user.target for other in graph.nodes) == 1
                return (module, tuple(steps)) if once else None
        step = _step(user, child)
        if step is None:
            return None
        steps += step
        node = user
    return None
