"""A structure for the class that is loaded, where another class of the same family was saved.

transformers loads the checkpoint of a BertForMaskedLM into a BertModel and the other way round: the base model is there
an attribute of the one with a head, here the model itself. The names of the layers follow those of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_NAMED = ("layers", "aliases", "attributes")
Renaming = Callable[[str], str | None]  # None for what the model has not


def fitted(
    model: nn.Module, structure: Mapping[str, Any], lengths: Mapping[str, int]
) -> tuple[Mapping[str, Any], Mapping[str, int]]:
    """`structure` and `lengths` with the names that the layers have in `model`; those it has not are left out."""
    if structure.get("class") == type(model).__name__ or not _is_sound(structure):
        return structure, lengths  # a damaged structure is told by what reads it
    there = {name for name, _ in model.named_modules(remove_duplicate=False)}
    rename = _renaming(model, structure["layers"], there)
    replaced: list[str] = []
    for name in map(rename, sorted(structure["layers"])):
        if name is not None and (name in there or any(name.startswith(f"{above}.") for above in replaced)):
            replaced.append(name)  # or what a replaced one is made of
    there.update(replaced)

    def kept(names: Mapping[str, Any]) -> dict[str, Any]:
        renamed = {rename(name): value for name, value in names.items()}
        return {name: value for name, value in renamed.items() if name is not None and name in there}

    new = {**structure, **{key: kept(structure[key]) for key in _NAMED}, "training_differs": []}
    for name, others in new["aliases"].items():
        new["aliases"][name] = [other for other in map(rename, others) if other in there]
    return new, {other: length for name, length in lengths.items() if (other := rename(name)) is not None}


def _is_sound(structure: Mapping[str, Any]) -> bool:
    if not all(isinstance(structure.get(key), dict) for key in _NAMED):
        return False
    aliases = structure["aliases"].values()
    return all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in aliases)


def _renaming(model: nn.Module, layers: Mapping[str, Any], there: set[str]) -> Renaming:
    """By which most of the `layers` of the saved class are found in `model`."""
    prefix = getattr(model, "base_model_prefix", "")
    ways: list[Renaming] = [lambda name: name]
    if prefix:
        ways += [
            lambda name: f"{prefix}.{name}" if name else prefix,
            lambda name: name.removeprefix(prefix).removeprefix(".") if f"{name}.".startswith(f"{prefix}.") else None,
        ]
    return max(ways, key=lambda rename: sum(rename(name) in there for name in layers))
