"""Which tensors of a model a file keeps, by which names, and where they go in a model that is loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress.fuse import Edit
from pycompress.selection import ModuleMap, memory_key
from pycompress.structure import Plan
from pycompress.structure_kind import Kind, fill_packed
from pycompress.structure_kinds import kind_of
from pycompress.tensor_file import Pending, Scratch, dtype_name

_WORKERS = min(4, os.cpu_count() or 1)  # that read and pack; each holds a plain layer meanwhile

# ---- from a model ---------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What of a model goes into a file; names as in a state_dict, each piece of memory under its first one."""

    tensors: dict[str, Pending] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    transient: list[str] = field(default_factory=list)
    bitmaps: dict[str, int] = field(default_factory=dict)  # the columns of the pruned weight whose bitmap it is


def collect(model: nn.Module, op: str = "save_model") -> Found:
    """Raises TypeError or ValueError, with its name, for what a file cannot keep."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; expected a torch.nn.Module")
    found = Found()
    owners: dict[tuple[object, ...], str] = {}
    for module, (name, *_) in ModuleMap(model).names.items():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise TypeError(
                f"{op}: {name!r} ({type(module).__name__}) has extra state of its own (get_extra_state), which "
                "need not be tensors; keep it in buffers, or save it yourself"
            )
        prefix, kind = f"{name}." if name else "", kind_of(module)
        for key, item in _pending_of(module, kind, prefix, op).items():
            full, own = prefix + key, module._parameters.get(key, module._buffers.get(key))
            is_parameter = key in module._parameters
            if is_parameter and own is not None and not own.requires_grad:
                found.frozen.append(full)
            if key in module._non_persistent_buffers_set and kind is None:
                found.transient.append(full)
            if own is not None and own.numel():
                place = (is_parameter, *memory_key(own), own.dtype, own.shape, own.stride())
                if owners.setdefault(place, full) != full:
                    found.tied[full] = owners[place]
                    continue
            found.tensors[full] = item
            if kind is not None and key == kind.bitmap:
                found.bitmaps[full] = int(module.in_features)  # type: ignore[arg-type]
    return found


def _pending_of(module: nn.Module, kind: Kind | None, prefix: str, op: str) -> dict[str, Pending]:
    """The module's own tensors by their keys, to be made when they are written."""
    own = {key: t for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    for key, tensor in own.items():
        _check_savable(tensor, prefix + key, op)
    if kind is None or kind.tensors is None:
        return {key: Pending.of(tensor) for key, tensor in own.items()}
    make, found = kind.tensors, {}
    for key, tensor in make(module).items():
        if key in own and own[key].data_ptr() == tensor.data_ptr():
            found[key] = Pending.of(tensor)
        else:  # a copy, unpacked or masked: made again when it is wanted, so that there is one at a time
            found[key] = Pending(tensor.dtype, tuple(tensor.shape), lambda key=key: make(module)[key])  # type: ignore[misc]
    return found


def _check_savable(tensor: Tensor, name: str, op: str) -> None:
    why = ""
    if nn.parameter.is_lazy(tensor):
        why = "is not initialised yet; run the model once"
    elif tensor.is_meta:
        why = "is on the meta device; load its values first"
    elif tensor.layout is not torch.strided or tensor.is_quantized:
        why = f"is {tensor.layout}, {tensor.dtype}; make it a dense tensor"
    if why:
        raise ValueError(f"{op}: {name} {why}")
    try:
        dtype_name(tensor.dtype)
    except TypeError as error:
        raise TypeError(f"{op}: {name} is {error}") from error


# ---- into a model ---------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """Where a tensor goes. like: what dtype and shape to expect; kind: of the new layer it belongs to, if any."""

    module: nn.Module
    key: str
    like: Tensor
    kind: Kind | None
    device: torch.device
    is_parameter: bool
    is_needed: bool

    def why_not(self, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
        """Why a tensor of this dtype and shape cannot go here; empty where it can."""
        like = self.like
        # A model may be saved in bfloat16 and built in float32; scales of a layer are what the layer says they are.
        floats = dtype.is_floating_point and like.dtype.is_floating_point and (self.is_parameter or self.kind is None)
        expected = f"{like.dtype} {tuple(like.shape)}"
        if self.kind is not None and self.key in self.kind.unknown_length:
            most = int(self.module.in_features) * int(self.module.out_features)  # type: ignore[arg-type]
            expected = f"{like.dtype} with at most {most} values"
            fits = len(shape) == 1 and shape[0] <= most
        else:
            fits = tuple(like.shape) == shape
        fits = fits and (floats or dtype == like.dtype)
        return "" if fits else f"is {dtype} {shape} in the file, expected {expected}"


def slots_of(rebuilt: Plan, device: torch.device | None = None) -> dict[str, Slot]:
    """The tensors of the model to be, by name. device: where they go; by default where those they replace are."""
    default = device or _device_of(rebuilt.model, torch.device("cpu"))
    slots: dict[str, Slot] = {}
    made = set(rebuilt.made.values())
    for name, module in rebuilt.modules():
        prefix = f"{name}." if name else ""
        kind = kind_of(module) if module in made else None
        if kind is not None and kind.tensors is not None:
            place = device or _device_of(rebuilt.replaced[name], default)
            for key, like in kind.tensors(module).items():
                slots[prefix + key] = Slot(module, key, like, kind, place, key in module._parameters, True)
            continue
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                place = device or (default if tensor.is_meta else tensor.device)
                needed = tensor.is_meta or key not in module._non_persistent_buffers_set
                slots[prefix + key] = Slot(module, key, tensor, None, place, key in module._parameters, needed)
    return slots


def _device_of(module: nn.Module, default: torch.device) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), default)


def fill(
    rebuilt: Plan,
    slots: Mapping[str, Slot],
    sources: Mapping[str, str],
    read: Callable[[str, bool | Scratch], Tensor],
    frozen: set[str],
) -> list[Edit]:
    """Fills the new layers, which are not yet in the model, and returns what has to change in it.

    sources: by slot the name in the file; read: gives the tensor of that name, to be kept, or in a Scratch if it can,
    in any thread.
    """
    _fill_layers(rebuilt, slots, sources, read)
    edits = list(rebuilt.edits)
    shared: dict[tuple[str, bool], Tensor] = {}  # by name in the file: a tied weight is one parameter again
    for name, slot in slots.items():
        source = sources.get(name)
        own: dict[str, Any] = slot.module._parameters if slot.is_parameter else slot.module._buffers
        if source is None:  # a buffer that only the model has
            if slot.like.device != slot.device:
                edits.append(Edit(own, slot.key, slot.like.to(slot.device)))
            continue
        if slot.kind is not None and own.get(slot.key) is None:
            continue  # packed by its layer
        new = shared.get((source, slot.is_parameter))
        if new is None:
            new = own[slot.key] if slot.kind is not None else read(source, True).to(slot.device)
            new = nn.Parameter(new, False) if slot.is_parameter and slot.kind is None else new
            shared[source, slot.is_parameter] = new
        if slot.is_parameter and new.is_floating_point():
            new.requires_grad_(source not in frozen)
        if slot.kind is None:
            edits.append(Edit(own, slot.key, new))
        else:
            own[slot.key] = new
    return [*edits, *_flat_weights(rebuilt, edits)]


def _fill_layers(
    rebuilt: Plan,
    slots: Mapping[str, Slot],
    sources: Mapping[str, str],
    read: Callable[[str, bool | Scratch], Tensor],
) -> None:
    by_layer: dict[nn.Module, dict[str, str]] = {}
    for name, slot in slots.items():
        if slot.kind is not None:
            by_layer.setdefault(slot.module, {})[slot.key] = name

    local = threading.local()

    def fill_one(name: str) -> None:
        # A layer at a time: what it packs is then there plain only once.
        scratch: Scratch = local.__dict__.setdefault("scratch", Scratch())
        scratch.reset()
        module = rebuilt.made[name]
        kept, values = {*module._parameters, *module._buffers}, {}
        for key, full in by_layer[module].items():
            values[key] = read(sources[full], key in kept or scratch).to(slots[full].device)
        kind_of(module).fill(module, values, rebuilt.options[name])  # type: ignore[union-attr, misc]
        for key, buffer in module._buffers.items():
            if buffer is not None and scratch.holds(buffer):
                module._buffers[key] = buffer.clone()

    own: list[str] = []
    packed: list[str] = []
    for name, module in rebuilt.made.items():
        kind = kind_of(module)
        if kind is not None and kind.fill is not None and module in by_layer:
            (packed if kind.fill is fill_packed else own).append(name)
    for name in own:
        fill_one(name)
    # Reading, summing and packing are all done without the interpreter's lock.
    with ThreadPoolExecutor(_WORKERS) as pool:
        work = [pool.submit(fill_one, name) for name in packed]
        try:
            for each in work:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _flat_weights(rebuilt: Plan, edits: list[Edit]) -> Iterator[Edit]:
    """nn.LSTM and its like keep a list of their parameters beside them."""
    new = {(id(edit.target), edit.key): edit.value for edit in edits}
    for _, module in rebuilt.modules():
        if isinstance(module, nn.RNNBase):
            weights = [new.get((id(module._parameters), key)) for key in module._flat_weights_names]
            yield Edit(module.__dict__, "_flat_weights", weights)
