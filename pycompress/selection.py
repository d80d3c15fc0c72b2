"""Which layers of a model a swap touches, and why the others are left alone.

quantize_, calibrate, prune_ and sparsify_ share this one selection, so that what was calibrated is what is swapped.
Swapped are modules whose type is exactly nn.Linear or Hugging Face's Conv1D and which nothing else depends on: a
layer with hooks, a parametrization, a tied weight or a reader of its raw weight would be silently broken by a swap.
An operation may take more types, and layers pruned by torch.nn.utils.prune or a parametrization.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycompress.layer_kinds import (
    ATTENTION,
    HOOKS,
    LINEAR,
    OURS,
    LayerKind,
    Slot,
    is_hook_pruned,
    kept_reason,
)
from pycompress.tracing import Shadow, last_attribute, methods_of

__all__ = [
    "FLOATS",
    "HOOKS",
    "OURS",
    "FilterFn",
    "Layer",
    "ModuleMap",
    "Slot",
    "check_patterns",
    "check_root",
    "closest",
    "covers",
    "is_hook_pruned",
    "memory_key",
    "own_reason",
    "relative_name",
    "select",
    "tensor_owners",
    "tied_reason",
    "weight_read_reason",
]

FilterFn = Callable[[str, nn.Module], bool]

_FACTORIES = {  # what makes a single layer, where the model is itself one
    "quantize_": "pycompress.nn.Int8Linear.from_float(model)",
    "prepare_qat_": "pycompress.nn.FakeQuantLinear.from_float(model)",
    "prune_": "pycompress.nn.MaskedLinear.from_linear(model)",
    "sparsify_": "pycompress.nn.SparseLinear.from_dense(model)",
    "factorize_": "pycompress.nn.LowRankLinear.from_linear(model, rank)",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer:
    """One layer of the model: `reason` is empty when it is to be swapped, else why it is left."""

    name: str
    names: tuple[str, ...]
    module: nn.Module
    slots: tuple[Slot, ...]
    reason: str
    kind: LayerKind = LINEAR


class ModuleMap:
    """Every module of a model with all its qualified names and all the places that hold it.

    aliases: for a module that is also in a plain attribute or list, where a swap would not reach, that
        attribute.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, list[str]] = {}
        self.slots: dict[nn.Module, list[Slot]] = {}
        for name, module in _walk(model, "", ()):
            self.names.setdefault(module, []).append(name)
        for parent in self.names:
            for key, child in parent._modules.items():
                if child is not None:
                    self.slots.setdefault(child, []).append((parent, key))
        self.aliases: dict[nn.Module, str] = {}
        for holder, names in self.names.items():
            for key, value in holder.__dict__.items():
                if key != "_modules":
                    alias = f"{names[0]}.{key}".lstrip(".")
                    self.aliases.update((module, alias) for module in _modules_in(value))

    def owner(self, module: nn.Module) -> nn.Module | None:
        """The module whose forward calls `module`: its parent, or the one above a ModuleList or ModuleDict.

        None for the model itself and for a module that is registered in more than one place.
        """
        while len(slots := self.slots.get(module, [])) == 1:
            module = slots[0][0]
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                return module
        return None

    def ancestors(self, module: nn.Module) -> list[nn.Module]:
        """Every module above `module`, nearest first."""
        found: dict[nn.Module, None] = {}
        queue = [module]
        for current in queue:
            above = [parent for parent, _ in self.slots.get(current, []) if parent not in found]
            found.update(dict.fromkeys(above))
            queue.extend(above)
        return list(found)

    def paths(self, above: nn.Module, module: nn.Module) -> list[str]:
        """Every name of `module` seen from `above`."""
        prefixes = [f"{name}." if name else "" for name in self.names[above]]
        return list({n[len(p) :]: None for p in prefixes for n in self.names[module] if n.startswith(p)})


def _walk(module: nn.Module, name: str, path: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for key, child in module._modules.items():
        if child is not None and child is not module and child not in path:  # a cycle ends here
            yield from _walk(child, f"{name}.{key}" if name else key, (*path, module))


def _modules_in(value: object, depth: int = 3) -> Iterator[nn.Module]:
    """The modules in a plain attribute: itself, or inside lists, tuples and dicts up to `depth` deep."""
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)


def select(
    modules: ModuleMap,
    shadow: Shadow,
    *,
    op: str,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    takes: tuple[type[nn.Module], ...] = (),
    pruned: bool = False,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    keeps_weight: bool = True,
    kinds: tuple[LayerKind, ...] = (LINEAR,),
) -> list[Layer]:
    """The layers of these kinds in the model's own order, each with the reason that keeps it, or none.

    takes: types that may go besides nn.Linear and Conv1D. pruned: so may layers pruned by torch.nn.utils.prune, and
        those whose weight is parametrized. dtypes: of the parameters that may go. keeps_weight: as weight_read_reason.
    skip: a qualified name, which also covers everything below it, or a glob pattern ('*.attention.*').
    filter_fn: filter_fn(qualified name, module) -> True where the layer may be swapped.
    Raises ValueError for a pattern that matches no module, and where the model is itself the layer.
    """
    check_root(modules.model, op, kinds)
    patterns = check_patterns(modules, skip, op)
    owners_of = tensor_owners(modules)
    layers = []
    for module, slots in ((module, modules.slots.get(module, [])) for module in modules.names):
        kind = next((kind for kind in kinds if kind.includes(module)), None)
        if kind is None or (ATTENTION in kinds and kind is LINEAR and _is_part(slots)):
            continue
        names = modules.names[module]
        reason = _skip_reason([*names, *_parts(names, kind)], patterns)
        if not reason:
            reason = own_reason(module, modules, owners_of, kind, takes=takes, pruned=pruned, dtypes=dtypes)
        if not reason:
            reason = weight_read_reason(module, modules, shadow, keeps_weight)
        if not reason and filter_fn is not None and not filter_fn(names[0], module):
            reason = "filter_fn said no"
        layers.append(Layer(names[0], tuple(names), module, tuple(slots), reason, kind))
    return layers


def own_reason(
    module: nn.Module,
    modules: ModuleMap,
    owners: Owners,
    kind: LayerKind,
    *,
    takes: tuple[type[nn.Module], ...] = (),
    pruned: bool = False,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> str:
    """Why the layer has to stay, as far as the model's code need not be looked at; empty if it may go."""
    reason = kept_reason(module, modules.slots[module], kind, takes, pruned) or _tensors_reason(module, dtypes)
    if not reason:
        reason = tied_reason(module, owners)
    if not reason and module in modules.aliases:
        reason = f"is also held in {modules.aliases[module]}, a plain attribute that a swap would miss"
    return reason


def _is_part(slots: list[Slot]) -> bool:
    """Whether only attention holds the layer: then it goes or stays with that."""
    return bool(slots) and all(ATTENTION.includes(parent) for parent, _ in slots)


def _parts(names: list[str], kind: LayerKind) -> list[str]:
    """What may be named instead of the layer, to keep it: the part of attention that is a module."""
    return [f"{name}.out_proj" for name in names] if kind is ATTENTION else []


def check_root(model: nn.Module, op: str, kinds: tuple[LayerKind, ...] = (LINEAR,)) -> None:
    """Raises where `model` cannot be changed in place: not a module, a scripted one, or itself a layer."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{op}: the model is a ScriptModule, whose layers are fixed; convert before scripting")
    if isinstance(model, OURS) or any(kind.includes(model) for kind in (LINEAR, *kinds)):
        factory = f"use {_FACTORIES[op]}, or pass" if op in _FACTORIES and LINEAR.includes(model) else "pass"
        raise ValueError(
            f"{op}: the model is itself a {type(model).__name__}, and a swap in place needs a parent; "
            f"{factory} nn.Sequential(model)"
        )


def check_patterns(modules: ModuleMap, given: str | Iterable[str], op: str, argument: str = "skip") -> list[str]:
    """The names and patterns given as `argument`. Raises TypeError, and ValueError for one that matches no module."""
    if not isinstance(given, Iterable):
        raise TypeError(f"{op}: {argument}={given!r}; expected a qualified name or glob pattern, or several of them")
    patterns = [given] if isinstance(given, str) else list(given)
    every = [name for names in modules.names.values() for name in names if name]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{op}: {argument} holds {pattern!r}; expected qualified names or glob patterns (str)")
        if not any(covers(pattern, name) for name in every):
            close = closest(pattern, every)
            hint = f"; the closest names are {', '.join(map(repr, close))}" if close else ""
            raise ValueError(f"{op}: {argument}={pattern!r} matches no module of the model{hint}")
    return patterns


def closest(pattern: str, names: list[str]) -> list[str]:
    """At most three names like `pattern`: those that end in it first, then those spelt like it."""
    tails = [name for name in names if name.endswith("." + pattern)]
    spelt = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    spelt += [last[tail] for tail in difflib.get_close_matches(pattern.rpartition(".")[2], last, n=3)]
    return list(dict.fromkeys(tails + spelt))[:3]


def covers(pattern: str, name: str) -> bool:
    """Whether the pattern matches `name` or a module above it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), 0, -1))


def _skip_reason(names: list[str], patterns: list[str]) -> str:
    hits = (p for p in patterns if any(covers(p, name) for name in names))
    return next((f"skip={p!r}" for p in hits), "")


def _tensors_reason(module: nn.Module, dtypes: tuple[torch.dtype, ...]) -> str:
    inner = parametrize.is_parametrized(module) or module._modules
    own = module.named_parameters() if inner else module._parameters.items()
    return next((reason for key, tensor in own if (reason := _tensor_reason(tensor, key, dtypes))), "")


def _tensor_reason(tensor: Tensor | None, what: str, dtypes: tuple[torch.dtype, ...]) -> str:
    if tensor is None:
        return f"has no {what}" if what == "weight" else ""
    if nn.parameter.is_lazy(tensor):
        return f"its {what} is not initialised yet"
    if type(tensor) is not nn.Parameter:
        return f"its {what} is of type {type(tensor).__name__}"
    if tensor.is_meta:
        return f"its {what} is on the meta device; load the weights first"
    if tensor.layout is not torch.strided:
        return f"its {what} is {tensor.layout}"
    if tensor.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        return f"its {what} is {tensor.dtype}; expected {', '.join(names[:-1])} or {names[-1]}"
    return f"its {what} is empty" if tensor.numel() == 0 else ""


def memory_key(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that start at the same memory: a tied weight, or a second Parameter made over it."""
    if tensor.is_meta or nn.parameter.is_lazy(tensor) or tensor.layout is not torch.strided:
        return (id(tensor),)
    try:
        pointer = tensor.data_ptr()
    except RuntimeError:  # a tensor subclass without storage of its own
        pointer = 0
    return (tensor.device, pointer) if pointer else (id(tensor),)


Owners = dict[tuple[object, ...], list[tuple[nn.Module, str]]]


def tensor_owners(modules: ModuleMap) -> Owners:
    """For each piece of memory the (module, qualified name) pairs that hold it as a parameter or buffer."""
    owners: Owners = {}
    for module, names in modules.names.items():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{names[0]}.{key}" if names[0] else key
                owners.setdefault(memory_key(tensor), []).append((module, name))
    return owners


def tied_reason(module: nn.Module, owners: Owners) -> str:
    own = set(module.modules())  # a parametrization holds the weight in a module of its own
    for key, tensor in module.named_parameters():
        for other, name in owners[memory_key(tensor)]:
            if other not in own:
                return f"its {key} is tied to {name}"
    return ""


def weight_read_reason(module: nn.Module, modules: ModuleMap, shadow: Shadow, keeps_weight: bool = True) -> str:
    """Whether a module above reads the layer's weight itself, as torchvision's Swin attention does.

    Seen are reads in its forward, and in the code of any method those through the layer's attribute.
    keeps_weight: whether what takes the layer's place has a `weight`, float or int8, which code that knows of int8
        weights may go on reading.
    """
    keys = dict.fromkeys(("weight", "bias", *(key for key, _ in module.named_parameters())))
    for above in modules.ancestors(module):
        traces, methods = shadow.glance(modules.names[above][0]), methods_of(above)
        for path in modules.paths(above, module):
            for key in keys:
                if traces.reads(f"{path}.{key}"):
                    return f"{type(above).__name__}.forward reads its {key} directly"
            parts = {last_attribute(f"{path}.{key}".rpartition(".")[0]) for key in keys}
            for method in methods:
                read = method.tensors_of if keeps_weight else method.tensors_of | method.int8_tensors_of
                if not parts.isdisjoint(read):
                    return f"{method.label} reads its weight or bias directly"
    return ""


def relative_name(modules: ModuleMap, owner: nn.Module, module: nn.Module) -> str:
    """The name of `module` under `owner`, which holds it."""
    above, name = modules.names[owner][0], modules.names[module][0]
    for candidate in modules.names[module]:
        if not above or candidate.startswith(above + "."):
            name = candidate
            break
    return name[len(above) + 1 :] if above else name
