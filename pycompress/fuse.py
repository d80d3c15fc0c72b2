"""Which activations can move into the epilogue of the linear before them, and what has to change for it.

Folding act(linear(x)) changes what `linear` returns, so it is done only where nothing can tell: on every path
through the forward around them (see tracing.py) each value of the linear is read once, by that activation,
and the activation reads nothing else. The activation's place is then taken by an identity.
nn.TransformerEncoderLayer and nn.TransformerDecoderLayer, whose activation is often a plain function, are
known by their source. The second part of a LowRankLinear, a layer behind a ChannelScale, and a batch norm that goes
into the convolution before it (fuse_norm.py) count as the layer that their caller sees.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pycompress.nn import ChannelScale, LowRankLinear
from pycompress.selection import HOOKS, Layer, ModuleMap, relative_name
from pycompress.tracing import Method, Shadow, Traces, last_attribute, methods_of

# Classes of transformers.activations, by name because transformers may be absent. The four tanh forms are one
# function, written differently. QuickGELU is another function (x * sigmoid(1.702 x)) and stays out.
_TRANSFORMERS_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}


class Edit(NamedTuple):
    """`target[key] = value`: one step of a conversion, on a module's _modules or __dict__."""

    target: dict[str, Any]
    key: str
    value: Any


@dataclass(frozen=True)
class Fusion:
    activation: str  # as Int8Linear names it
    edit: Edit  # puts the identity in the activation's place


@dataclass(frozen=True)
class NormFusion:
    norm: nn.BatchNorm2d
    name: str  # relative to the module whose forward calls it
    edit: Edit


@dataclass
class FusionPlan:
    fusions: dict[nn.Module, Fusion] = field(default_factory=dict)  # by linear or convolution
    notes: dict[nn.Module, str] = field(default_factory=dict)  # by layer: why what follows it was not folded
    norms: dict[nn.Module, NormFusion] = field(default_factory=dict)  # by convolution
    norm_notes: dict[nn.Module, str] = field(default_factory=dict)  # by convolution: why its norm was not folded


def identity(x: Tensor) -> Tensor:
    """Stands for a folded activation function; at module level, so that the layer still pickles."""
    return x


def activation_name(activation: object) -> str | None:
    """The kernel's name of an activation module or function that is numerically the same, else None."""
    if isinstance(activation, functools.partial):
        tanh = activation.func is F.gelu and not activation.args and activation.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if tanh else None
    if not isinstance(activation, nn.Module):
        # F.gelu is a builtin, F.relu a python function: both hash; a user's callable object may not.
        functions = (types.FunctionType, types.BuiltinFunctionType)
        return _FUNCTIONS.get(activation) if isinstance(activation, functions) else None
    kind = type(activation)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if kind.__module__ == "transformers.activations":
        return _TRANSFORMERS_ACTIVATIONS.get(kind.__name__)
    return None


def plan_fusions(
    modules: ModuleMap, layers: Iterable[Layer], shadow: Shadow, plan: FusionPlan | None = None
) -> FusionPlan:
    """For each layer to be swapped the activation to fold into it, or a note why not. Changes nothing in the model.

    plan: one that says already which batch norms go into their convolutions; it is completed.
    """
    plan = plan or FusionPlan()
    groups = by_owner(modules, layers, plan)
    activations: dict[nn.Module, list[nn.Module]] = {}
    for module in modules.names:
        if activation_name(module) and (owner := modules.owner(module)) is not None:
            activations.setdefault(owner, []).append(module)
    for owner, group in groups.items():
        if is_transformer_layer(owner):
            _plan_transformer_layer(modules, owner, group, shadow, plan)
        elif owner in activations:
            _plan_owner(modules, owner, group, activations[owner], shadow, plan)
        else:
            _note_functions(modules, owner, group, shadow, plan)
    return plan


def by_owner(modules: ModuleMap, layers: Iterable[Layer], plan: FusionPlan) -> dict[nn.Module, list[Layer]]:
    """The layers by the module whose forward calls them; without those that several hold."""
    groups: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        owner = modules.owner(_called(modules, layer.module, plan))
        if owner is not None:
            groups.setdefault(owner, []).append(layer)
    return groups


def _called(modules: ModuleMap, linear: nn.Module, plan: FusionPlan) -> nn.Module:
    """What a forward calls to get the layer's output: the layer, or what it is the last part of."""
    if (fold := plan.norms.get(linear)) is not None:
        return fold.norm
    slots = modules.slots.get(linear, [])
    if len(slots) != 1:
        return linear
    parent, key = slots[0]
    low_rank = type(parent) is LowRankLinear and key == "up"
    scaled = type(parent) is nn.Sequential and len(parent) == 2 and key == "1" and type(parent[0]) is ChannelScale
    if not (low_rank or scaled) or _why_not_module(modules, parent):
        return linear
    return _called(modules, parent, plan)


def _plan_owner(
    modules: ModuleMap,
    owner: nn.Module,
    group: list[Layer],
    activations: list[nn.Module],
    shadow: Shadow,
    plan: FusionPlan,
) -> None:
    """Plan the activations of one forward: the children of `owner` that `activations` and `group` name."""
    traces = shadow.explore(modules.names[owner][0])
    linears = {relative_name(modules, owner, _called(modules, layer.module, plan)): layer for layer in group}
    if not traces.graphs:
        why_not = f"activations not folded in: {type(owner).__name__} cannot be traced: {traces.failure}"
        plan.notes.update((layer.module, why_not) for layer in group)
        return
    for module in activations:
        activation = relative_name(modules, owner, module)
        sources = {source(node) for node in traces.calls(activation)}
        feeding = [name for name in linears if name in sources]
        if not feeding:
            continue
        before = {name: _called(modules, linears[name].module, plan) for name in feeding}
        why_not = why_apart(modules, owner, shadow, before, module)
        parent, key = modules.slots[module][0]
        edit = Edit(parent._modules, key, nn.Identity().train(module.training))
        for name in feeding:
            if why_not:
                plan.notes[linears[name].module] = f"{activation} not folded in: {why_not}"
            else:
                plan.fusions[linears[name].module] = Fusion(activation_name(module) or "none", edit)
    for name, layer in linears.items():
        if layer.module not in plan.fusions and layer.module not in plan.notes:
            _note_function(traces.calls(name), layer, plan)


def why_apart(
    modules: ModuleMap, owner: nn.Module, shadow: Shadow, before: dict[str, nn.Module], after: nn.Module
) -> str:
    """Why `after` cannot go into the layers that feed it, all children of `owner`; empty if it can.

    before: what `owner` calls to get the output of each, by relative name.
    """
    traces, name = shadow.explore(modules.names[owner][0]), relative_name(modules, owner, after)
    return (
        _why_not(traces, list(before), name)
        or _why_not_module(modules, after)
        or next((reason for layer in before if (reason := _other_method(owner, layer, name))), "")
        or called_from_above(modules, owner, (after, *before.values()), shadow)
    )


def source(node: fx.Node) -> str:
    """The name of the child whose output the node reads first; empty if it is not a child's."""
    first = node.args[0] if node.args else None
    return str(first.target) if isinstance(first, fx.Node) and first.op == "call_module" else ""


def _why_not(traces: Traces, linears: list[str], activation: str) -> str:
    """Why they must stay apart, judged from every call of each on every path; empty if they need not.

    linears: all the layers that feed the activation; several may share one, as in relu(fc2(relu(fc1(x)))).
    """
    if traces.failure:
        return f"{type(traces.root).__name__}.forward cannot be traced: {traces.failure}"
    if any(traces.passes_on(name) for name in (*linears, activation)):
        return "one of them is passed on as a value"
    linear_calls = {node for name in linears for node in traces.calls(name)}
    activation_calls = set(traces.calls(activation))
    for node in linear_calls:
        others = [user for user in node.users if user not in activation_calls]
        if others:
            return f"the value between is also read by {_describe(others[0])}"
        if len(node.users) != 1:
            return f"the value between is read {len(node.users)} times"
    for node in activation_calls:
        if node.kwargs or len(node.args) != 1 or node.args[0] not in linear_calls:
            return "the activation is also called on another value"
    return ""


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the caller (it is returned)"
    return str(getattr(node.target, "__name__", node.target))


def _why_not_module(modules: ModuleMap, activation: nn.Module) -> str:
    if "forward" in activation.__dict__:
        return "its forward was replaced on the instance"
    if any(getattr(activation, kind, None) for kind in HOOKS):
        return "it has hooks"
    if activation in modules.aliases:
        return f"it is also held in the plain attribute {modules.aliases[activation]}"
    return ""


def _other_method(owner: nn.Module, linear: str, activation: str) -> str:
    """A method beside forward that may use one of the two alone, as `encode` of an auto-encoder does.

    A method is trusted where it names both by attributes of their own and forward calls it.
    """
    methods = methods_of(owner)
    by_forward = frozenset[str]().union(*(m.names for m in methods if m.name == "forward"))
    indexed = last_attribute(linear) == last_attribute(activation)
    indexed = indexed or any(path.rpartition(".")[2].isdigit() for path in (linear, activation))
    for method in methods:
        if method.name != "forward":
            reached = [method.may_reach(path) for path in (linear, activation)]
            if any(reached) and indexed:
                return f"{method.label} may use one of them without the other"
            if any(reached) and not all(reached):
                return f"{method.label} uses one of them without the other"
            if all(reached) and method.name not in by_forward:
                return f"{method.label} uses them too"
    return ""


def called_from_above(modules: ModuleMap, owner: nn.Module, pair: tuple[nn.Module, ...], shadow: Shadow) -> str:
    """A module above that may use one of the pair itself, as feature extractors loop over an nn.Sequential."""
    for above in modules.ancestors(owner):
        kind, name, methods = type(above).__name__, modules.names[above][0], methods_of(above)
        paths = sorted({path for module in pair for path in modules.paths(above, module)})
        for path in paths:
            reaching = [method for method in methods if method.may_reach(path)]
            for method in reaching:
                if method.name != "forward" and not _is_traced(method, methods, paths):
                    return f"{method.label} may use one of them by itself"
            traces = shadow.explore(name) if reaching else shadow.glance(name)
            if reaching and traces.failure:
                return f"{kind}.forward may use one of them by itself; it cannot be traced: {traces.failure}"
            parts = path.split(".")
            ways = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
            if traces.calls(path) or any(traces.passes_on(way) for way in ways):
                return f"{kind}.forward uses one of them by itself"
    return ""


def _is_traced(method: Method, methods: list[Method], paths: list[str]) -> bool:
    """Whether it is a part of forward, as torchvision's _forward_impl, and names all of them as attributes."""
    named = all((attribute := last_attribute(path)) and attribute in method.names for path in paths)
    return named and any(method.name in other.names for other in methods if other.name == "forward")


def _note_functions(modules: ModuleMap, owner: nn.Module, group: list[Layer], shadow: Shadow, plan: FusionPlan) -> None:
    glance = shadow.glance(modules.names[owner][0])
    for layer in group:
        _note_function(glance.calls(relative_name(modules, owner, _called(modules, layer.module, plan))), layer, plan)


def _note_function(calls: list[fx.Node], layer: Layer, plan: FusionPlan) -> None:
    """An activation that forward calls as a function cannot be taken out; say what would help."""
    for user in (user for node in calls for user in node.users):
        name = None
        if user.op == "call_function":
            name = activation_name(user.target)
        elif user.op == "call_method":
            name = _METHODS.get(str(user.target))
        if name is not None:
            function = _describe(user)
            plan.notes[layer.module] = f"{function} not folded in: forward calls a function, not a module"
            return


# --- nn.TransformerEncoderLayer and nn.TransformerDecoderLayer ---


def is_transformer_layer(owner: nn.Module) -> bool:
    """Whether forward and the feed-forward block are torch's own: linear1 and activation meet only there."""
    for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        if isinstance(owner, kind):
            mine = type(owner)
            return mine.forward is kind.forward and mine._ff_block is kind._ff_block and not _patched(owner)
    return False


def _patched(owner: nn.Module) -> bool:
    return "_ff_block" in owner.__dict__ or "forward" in owner.__dict__


def _plan_transformer_layer(
    modules: ModuleMap, owner: nn.Module, group: list[Layer], shadow: Shadow, plan: FusionPlan
) -> None:
    layer = next((layer for layer in group if _called(modules, layer.module, plan) is owner.linear1), None)
    if layer is None:
        return
    activation = owner.activation
    name = activation_name(activation)
    if name is None:
        return
    linear1 = _called(modules, layer.module, plan)
    pair = (linear1, activation) if isinstance(activation, nn.Module) else (linear1,)
    why_not = _other_method(owner, "linear1", "activation") or called_from_above(modules, owner, pair, shadow)
    if why_not:
        plan.notes[layer.module] = f"activation not folded in: {why_not}"
    elif isinstance(activation, nn.Module):
        if len(modules.slots[activation]) > 1:
            plan.notes[layer.module] = "activation not folded in: it is registered in more than one place"
        elif why_not := _why_not_module(modules, activation):
            plan.notes[layer.module] = f"activation not folded in: {why_not}"
        else:
            stand_in = nn.Identity().train(activation.training)
            plan.fusions[layer.module] = Fusion(name, Edit(owner._modules, "activation", stand_in))
    else:
        plan.fusions[layer.module] = Fusion(name, Edit(owner.__dict__, "activation", identity))


def fast_path_edits(modules: ModuleMap, swapped: set[nn.Module]) -> list[Edit]:
    """Keep torch from reading the raw weights of swapped layers.

    In eval without gradients nn.TransformerEncoderLayer hands linear1.weight and linear2.weight to one fused
    kernel unless activation_relu_or_gelu is 0, and nn.TransformerEncoder converts a padded batch to nested
    tensors for it unless use_nested_tensor is False. Both are plain attributes: deepcopy and pickle keep
    them.
    """
    edits = []
    for module in modules.names:
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            if swapped.isdisjoint(module.modules()):
                continue
            if isinstance(module, nn.TransformerEncoderLayer):
                edits.append(Edit(module.__dict__, "activation_relu_or_gelu", 0))
            else:
                edits.append(Edit(module.__dict__, "use_nested_tensor", False))
    return edits
