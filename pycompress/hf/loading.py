"""Loading a compressed checkpoint into a model that transformers built on the meta device.

Before its weights are read each compressed layer is replaced by a ``Holder``: a module with exactly the tensors that
the file has for the layer, by their names, dtypes and shapes. transformers fills it as any other module; then the layer
is made of the tensors. Float weights are never there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.convert import apply_edits
from pycompress.fuse import Edit
from pycompress.hf.prefixes import fitted
from pycompress.model_file_state import Slot
from pycompress.structure import Plan, StructureError, plan
from pycompress.structure_kind import Kind
from pycompress.structure_kinds import kind_of

_OP = "from_pretrained"
_REMEDY = "save the model again, or pass the checkpoint that belongs to this config.json"


class Holder(nn.Module):
    """The tensors of a layer while they are loaded; computes nothing."""

    def __init__(self, made: nn.Module, likes: Mapping[str, Tensor]) -> None:
        super().__init__()
        for key, like in likes.items():
            if key in made._parameters:
                self.register_parameter(key, nn.Parameter(like, requires_grad=like.is_floating_point()))
            else:
                self.register_buffer(key, like)
        # The _init_weights of a model reads these of its layers, whether or not there is anything to initialise.
        for key in {"weight", "bias"} - set(likes):
            self.__dict__[key] = _initialized(torch.empty(0)) if key == "weight" else None


def _initialized(tensor: Tensor) -> Tensor:
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # as transformers marks what it has loaded
    return tensor


def _is_loaded(tensor: Tensor) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


@dataclass
class _Layer:
    name: str
    kind: Kind
    made: nn.Module
    holder: Holder
    options: dict[str, Any]
    edits: list[Edit]


@dataclass
class Loading:
    """The layers between ``begin``, before the weights are read, and ``finish``."""

    layers: list[_Layer]
    is_checked: bool = False

    @classmethod
    def begin(cls, model: nn.Module, structure: Mapping[str, Any], lengths: Mapping[str, int]) -> Loading:
        """Replace the layers of `model` by holders, all or none.

        Raises:
            StructureError: a structure that does not fit the model, by the layer's name.
        """
        structure, lengths = fitted(model, structure, lengths)
        planned = plan(model, structure, op=_OP)
        layers = [_held(name, made, planned, lengths) for name, made in planned.made.items() if _tensors_of(made)]
        holders = {layer.made: layer for layer in layers}
        edits = []
        for edit in planned.edits:
            layer = holders.get(edit.value) if isinstance(edit.value, nn.Module) else None
            if layer is None:
                edits.append(edit)
            else:
                layer.edits.append(edit)
                edits.append(edit._replace(value=layer.holder))
        apply_edits(edits)
        names = {layer.name for layer in layers}
        _untie(model, names)
        _cast_no_more(model, names)
        _expect_transient(model)
        return cls(layers)

    def check(self, missing: Iterable[str]) -> None:
        """Raises StructureError where one of the `missing` tensors is of a compressed layer."""
        own = {layer.name for layer in self.layers}
        for name in missing:
            if _owner(name) in own:
                raise StructureError(f"{_OP}: {name} is not in the checkpoint; {_REMEDY}")
        self.is_checked = True

    def finish(self) -> None:
        """Make the layers of what was loaded.

        Raises:
            StructureError: a tensor that is missing or of another dtype or shape, by its name.
        """
        if not self.is_checked:
            tensors = [(layer, key) for layer in self.layers for key in layer.kind.tensors(layer.made)]  # type: ignore[misc]
            self.check(f"{layer.name}.{key}" for layer, key in tensors if not _is_loaded(getattr(layer.holder, key)))
        while self.layers:  # a layer at a time: what it packs is then there plain only once
            _finish(self.layers.pop(0))


def _tensors_of(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.tensors is not None


def _held(name: str, made: nn.Module, planned: Plan, lengths: Mapping[str, int]) -> _Layer:
    kind = kind_of(made)
    assert kind is not None
    assert kind.tensors is not None
    likes = kind.tensors(made)
    for key in kind.unknown_length & set(likes):
        most = int(made.in_features) * int(made.out_features)  # type: ignore[arg-type]
        length = lengths.get(f"{name}.{key}")
        if length is None or length > most:
            raise StructureError(
                f"{_OP}: config.json gives {name}.{key} {length} values; expected at most {most}; {_REMEDY}"
            )
        likes[key] = likes[key].new_empty(length)
    return _Layer(name, kind, made, Holder(made, likes), planned.options[name], [])


def _finish(layer: _Layer) -> None:
    values: dict[str, Tensor] = {}
    likes = layer.kind.tensors(layer.made)  # type: ignore[misc]
    holder, made = layer.holder, layer.made
    for key, like in likes.items():
        value = getattr(holder, key).detach()
        slot = Slot(made, key, like, layer.kind, value.device, key in made._parameters, True)
        if why_not := slot.why_not(value.dtype, tuple(value.shape)):
            raise StructureError(f"{_OP}: {layer.name}.{key} {why_not}; {_REMEDY}")
        values[key] = value
    holder._parameters.clear()
    holder._buffers.clear()
    layer.kind.fill(made, values, layer.options)  # type: ignore[misc]
    values.clear()
    for parameter in made.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    made.train(holder.training)
    apply_edits(layer.edits)


def _untie(model: nn.Module, replaced: set[str]) -> None:
    """A layer that was compressed by itself shares no weight any more, whatever the class ties."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied:
        own = {key: other for key, other in tied.items() if not {_owner(key), _owner(other)} & replaced}
        model.all_tied_weights_keys = own  # type: ignore[assignment]


def _cast_no_more(model: nn.Module, replaced: set[str]) -> None:
    """transformers 5.0 makes float32 of integers, too, where a model keeps a layer in float32, as T5's wo."""
    casts = getattr(model, "dtype_plan", None)
    if isinstance(casts, dict):
        for pattern in [each for each in casts if any(re.search(each, name) for name in replaced)]:
            del casts[pattern]


def _expect_transient(model: nn.Module) -> None:
    """pycompress.save_pretrained keeps buffers that are no part of a state_dict; transformers makes its own anew."""
    prefix = getattr(model, "base_model_prefix", "")
    names = {f"{name}.{key}" for name, module in model.named_modules() for key in module._non_persistent_buffers_set}
    patterns = {rf"(^|\.){re.escape(name.removeprefix(f'{prefix}.').lstrip('.'))}$" for name in names}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    model._keys_to_ignore_on_load_unexpected = _Patterns([*ignored, *patterns])  # type: ignore[assignment]


class _Patterns(list[str]):
    """A list in some versions of transformers, a set in others."""

    def __or__(self, other: Iterable[str]) -> set[str]:
        return {*self, *other}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
