"""What of a model is not as its class builds it: described as JSON, and put into a fresh model of the same class.

    {"class": "BertModel",
     "layers": {"encoder.0.fc": {"kind": "Int8Linear", "in_features": 384, ...}, ...},   replaced modules, parents first
     "aliases": {"encoder.0.fc": ["encoder.1.fc"]},                   further names of one and the same module
     "attributes": {"encoder": {"use_nested_tensor": false}, ...},    plain attributes that conversions set
     "training": true, "training_differs": ["encoder.0"]}             where a module's flag is not its parent's

Values of tensors are no part of it; ``model_file.py`` keeps both in one file. The kinds of layers stand in
``structure_kinds.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pycompress.convert import apply_edits, carry_marks
from pycompress.fuse import Edit
from pycompress.selection import ModuleMap, closest
from pycompress.structure_attributes import ReadAttributes, attributes_of, checked_attribute
from pycompress.structure_kind import type_name
from pycompress.structure_kinds import OURS_BY_NAME, kind_of

__all__ = ["StructureError", "describe", "rebuild_"]


class StructureError(ValueError):
    """A description that does not fit the model, or is none."""


def describe(model: nn.Module) -> dict[str, Any]:
    """What of `model` is not as its class builds it, as JSON takes it; see the head of this file.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"describe: model is a {type(model).__name__}; expected a torch.nn.Module")
    layers: dict[str, Any] = {}
    aliases: dict[str, list[str]] = {}
    attributes: dict[str, ReadAttributes] = {}
    for module, (name, *others) in ModuleMap(model).names.items():
        kind = kind_of(module)
        if kind is not None:
            layers[name] = {"kind": kind.name, **kind.describe(module)}
            if others:
                aliases[name] = others
        if found := attributes_of(module):
            attributes[name] = found
    return {
        "class": type_name(model),
        "layers": layers,
        "aliases": aliases,
        "attributes": attributes,
        "training": model.training,
        "training_differs": _training_differs(model),
    }


def rebuild_(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Give a fresh `model` of the described class the described structure, in place and all or nothing.

    model: with float layers, or on the meta device; built as the described one was before it was compressed. New
        layers are on the meta device: load_model builds and fills them in one go.

    Raises:
        StructureError: naming the layer that does not fit and what to do; the model is then what it was.
    """
    apply_edits(plan(model, description, op="rebuild_").edits)


@dataclass
class Plan:
    """What a rebuild changes. `made`: the new modules by first name, on the meta device, not yet in the model."""

    model: nn.Module
    made: dict[str, nn.Module] = field(default_factory=dict)
    replaced: dict[str, nn.Module] = field(default_factory=dict)  # what stood there, by the same names
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module of the model to be, once, by its first name."""
        overlay = {(id(edit.target), edit.key): edit.value for edit in self.edits}
        seen: set[nn.Module] = set()
        stack = [("", self.model)]
        while stack:
            name, module = stack.pop()
            if module in seen:
                continue
            seen.add(module)
            yield name, module
            children = []
            for key, child in module._modules.items():
                new = overlay.get((id(module._modules), key), child)
                if new is not None:
                    children.append((f"{name}.{key}" if name else key, new))
            stack += reversed(children)


def plan(model: nn.Module, description: Mapping[str, Any], *, op: str) -> Plan:
    """Checks all of `description` against `model`, makes the new layers, and changes nothing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; expected a torch.nn.Module")
    parts = _checked(description, op)
    result = Plan(model)
    overlay: dict[str, nn.Module] = {}
    for name, entry in parts.layers.items():
        every = [name, *parts.aliases.get(name, ())]
        old = _find(model, overlay, name, op)
        new = _made(name, entry, old, op)
        if new is None:
            continue
        if not name:
            raise StructureError(
                f"{op}: the model itself is to become a {type_name(new)}, and a swap in place needs a parent; save and "
                "load it as nn.Sequential(model)"
            )
        if kind_of(new) is not None and kind_of(new).tensors is not None:  # type: ignore[union-attr]
            carry_marks(old, new)
        for each in every:
            if any(each.startswith(f"{other}.") for other in every):
                raise StructureError(f"{op}: layer {name!r} would hold itself as {each!r}; the file is damaged")
            above, _, key = each.rpartition(".")
            parent = _find(model, overlay, above, op)
            if key not in parent._modules:
                raise _missing(model, each, op)
            result.edits.append(Edit(parent._modules, key, new))
            overlay[each] = new
        result.made[name], result.replaced[name] = new, old
        result.options[name] = {key: value for key, value in entry.items() if key != "kind"}
    for name, module in _left_over(model, overlay, set(parts.layers)):
        raise StructureError(
            f"{op}: layer {name!r} is a {type_name(module)} in the model and none in the description; pass a fresh "
            f"float model of the class {parts.cls}"
        )
    for name, values in parts.attributes.items():
        result.edits += _attribute_edits(_find(model, overlay, name, op), values, name, op)
    result.edits += _training_edits(result, parts)
    return result


# ---- checks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    cls: str
    layers: dict[str, dict[str, Any]]
    aliases: dict[str, list[str]]
    attributes: dict[str, dict[str, Any]]
    training: bool
    training_differs: list[str]


_TYPES = {
    "class": str, "layers": dict, "aliases": dict, "attributes": dict, "training": bool, "training_differs": list,
}  # fmt: skip


def _checked(description: object, op: str) -> _Parts:
    """The description, its form checked: a file may say anything."""
    if not isinstance(description, Mapping):
        raise StructureError(f"{op}: the description is a {type(description).__name__}; expected what describe() gives")
    for key, kind in _TYPES.items():
        if not isinstance(description.get(key), kind):
            raise StructureError(
                f"{op}: the description's {key!r} is a {type(description.get(key)).__name__}, expected a "
                f"{kind.__name__}; it is damaged, or not from describe()"
            )
    if unknown := sorted(set(description) - set(_TYPES), key=str):
        raise StructureError(
            f"{op}: the description has {unknown[0]!r}, which this version of pycompress does not know"
        )
    for key, inner in (("layers", dict), ("aliases", list), ("attributes", dict)):
        for name, value in description[key].items():
            if not isinstance(name, str) or not isinstance(value, inner):
                raise StructureError(
                    f"{op}: the description's {key}[{name!r}] is not a {inner.__name__}; it is damaged"
                )
    lists = (description["training_differs"], *description["aliases"].values())
    if any(not isinstance(name, str) for names in lists for name in names):
        raise StructureError(f"{op}: the description names a module by something that is no text; it is damaged")
    if stray := sorted(set(description["aliases"]) - set(description["layers"])):
        raise StructureError(f"{op}: the description has aliases of {stray[0]!r} but no such layer; it is damaged")
    return _Parts(*(description[key] for key in _TYPES))


def _made(name: str, entry: dict[str, Any], old: nn.Module, op: str) -> nn.Module | None:
    """The new layer of this entry on the meta device; None where `old` is already what it says."""
    kind = OURS_BY_NAME.get(entry.get("kind", "")) if isinstance(entry.get("kind"), str) else None
    if kind is None:
        raise StructureError(
            f"{op}: layer {name!r} is of the kind {entry.get('kind')!r}, which this version of pycompress does not "
            f"know ({', '.join(OURS_BY_NAME)}); update pycompress"
        )
    options = {key: value for key, value in entry.items() if key != "kind"}
    try:
        kind.check(options)
        if why_not := kind.why_not(options, old):
            raise StructureError(why_not)
        return kind.make(options, old)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise StructureError(f"{op}: layer {name!r} ({kind.name}): {error}") from error


def _find(model: nn.Module, overlay: Mapping[str, nn.Module], name: str, op: str) -> nn.Module:
    """The module of this name, new ones included."""
    module, path = model, ""
    for key in name.split(".") if name else ():
        path = f"{path}.{key}" if path else key
        child = overlay.get(path) or module._modules.get(key)
        if child is None:
            raise _missing(model, name, op)
        module = child
    return module


def _missing(model: nn.Module, name: str, op: str) -> StructureError:
    close = closest(name, [each for each, _ in model.named_modules() if each])
    hint = f" (closest: {', '.join(map(repr, close))})" if close else ""
    return StructureError(
        f"{op}: the model has no layer {name!r}{hint}; pass a model of the same class, built with the same sizes"
    )


def _left_over(
    model: nn.Module, overlay: Mapping[str, nn.Module], described: set[str]
) -> Iterator[tuple[str, nn.Module]]:
    """Compressed layers of the model that the description does not have."""
    for name, module in model.named_modules():
        kind = kind_of(module)
        inside = any(name == at or name.startswith(at + ".") for at in overlay)
        if kind is not None and kind.is_ours and name not in described and not inside:
            yield name, module


# ---- attributes and flags -------------------------------------------------------------------------------------------


def _attribute_edits(module: nn.Module, values: Mapping[str, Any], name: str, op: str) -> list[Edit]:
    edits = []
    for key, value in values.items():
        try:
            edits += checked_attribute(module, key, value)
        except ValueError as error:
            raise StructureError(f"{op}: module {name!r}: {error}") from error
    return edits


def _training_differs(model: nn.Module) -> list[str]:
    """The names of the modules whose training flag is not that of the first module that holds them."""
    flags = {"": model.training}
    differs = []
    for name, module in model.named_modules():
        flags[name] = module.training
        if name and module.training != flags[name.rpartition(".")[0]]:
            differs.append(name)
    return differs


def _training_edits(result: Plan, parts: _Parts) -> list[Edit]:
    differs = set(parts.training_differs)
    flags: dict[str, bool] = {}
    edits = []
    for name, module in result.modules():
        above = flags[name.rpartition(".")[0]] if name else parts.training
        flags[name] = above != (name in differs)
        edits.append(Edit(module.__dict__, "training", flags[name]))
    return edits
