"""What a saved model's description says of it, and a model made of what a file or folder holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pycompress.convert import apply_edits
from pycompress.model_description import ModelFileError, to_json
from pycompress.model_file_reader import Contents
from pycompress.model_file_state import Found, Slot, fill, slots_of
from pycompress.structure import StructureError, describe, plan
from pycompress.structure_kind import type_name
from pycompress.version import __version__

_MOST_IDLE = 1 << 26  # bytes of transient buffers, as caches, that a fresh model may not have made yet


def description_of(
    model: nn.Module, found: Found, extra: Mapping[str, Any] | None, op: str = "save_model"
) -> dict[str, Any]:
    """All of it but the "sums". Raises TypeError where `extra` is no JSON."""
    header = {
        "structure": describe(model),
        "tensors": {},
        "tied": found.tied,
        "frozen": found.frozen,
        "transient": found.transient,
        "pycompress": __version__,
        "extra": dict(extra or {}),
    }
    try:
        to_json(header)  # complains before the work
    except (TypeError, ValueError) as error:
        raise TypeError(f"{op}: extra is no JSON ({error}); expected texts, numbers, lists and dicts") from error
    return header


def load_into(contents: Contents, model: nn.Module, op: str, device: torch.device | None = None) -> nn.Module:
    """Give `model` the structure and the tensors, and return it. device: for all of them, see slots_of.

    Raises:
        TensorFileError, StructureError: by the layer or tensor that is damaged or does not fit. The model is then what
            it was.
    """
    header = contents.header
    try:
        rebuilt = plan(model, header["structure"], op=op)
        slots = slots_of(rebuilt, device)
        sources = _sources(contents, slots)
    except (StructureError, ModelFileError) as error:
        saved = str(header["structure"].get("class"))
        if saved == type_name(model):
            raise
        raise ModelFileError(f"{error}. A {saved} was saved, and the model is a {type_name(model)}") from error
    try:
        with torch.device("cpu"):  # what is read, also where the caller is building a model on the meta device
            edits = fill(rebuilt, slots, sources, contents.read, set(header["frozen"]))
    except RuntimeError as error:  # what load_state_dict says of a layer
        raise ModelFileError(f"the file is damaged, or does not fit the model: {error}") from error
    apply_edits(edits)
    return model


def _sources(contents: Contents, slots: Mapping[str, Slot]) -> dict[str, str]:
    """For each slot the name of its tensor in the file; every dtype and shape fits. Nothing was read yet."""
    header, likes = contents.header, contents.likes()
    tied, cls = header["tied"], header["structure"]["class"]
    sources = {name: tied.get(name, name) for name in slots if name in tied or name in likes}
    remedy = f"build the model as the saved {cls} was built"
    lacking = [name for name, slot in slots.items() if slot.is_needed and sources.get(name) not in likes]
    if lacking:
        raise ModelFileError(f"there is no tensor for {_few(lacking)}, which the model has; {remedy}")
    extra = sorted((set(likes) | set(tied)) - set(slots) - set(header["transient"]))
    if extra:
        raise ModelFileError(f"there are tensors that the model has no place for: {_few(extra)}; {remedy}")
    sources = {name: source for name, source in sources.items() if source in likes}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in likes.items()}
    idle = sum(sizes[name] for name in set(likes).difference(sources.values()))
    if idle > sum(sizes.values()) - idle + _MOST_IDLE:  # a compact file decodes them with what lies beside them
        raise ModelFileError(f"{idle} bytes of its transient buffers have no place in the model; it is damaged")
    for name, source in sources.items():
        if why_not := slots[name].why_not(*likes[source]):
            raise ModelFileError(f"{name} {why_not}; {remedy}")
    return sources


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
