"""Reading a compressed-tensors checkpoint into pycompress layers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.checkpoint import transformers_model
from pycompress.compressed_tensors.config import CompressedTensorsError, Config, Scheme
from pycompress.compressed_tensors.folder import CONFIG_FILE, GENERATION_FILE, Tensors, open_tensors, read_json
from pycompress.compressed_tensors.formats import BITMASK_KEYS, decode, decode_bitmask
from pycompress.compressed_tensors.hugging_face import compute_transient_, model_tensors
from pycompress.convert import apply_edits
from pycompress.model_file_state import Slot, fill, slots_of
from pycompress.ops.sparse_linear_weight import SPARSE_DTYPES, expand, sparse_mask
from pycompress.selection import ModuleMap
from pycompress.structure import StructureError, describe, plan
from pycompress.structure_kind import type_name
from pycompress.structure_linear import linear_shape
from pycompress.tensor_file import Pending, TensorFileError

_OP = "import_compressed_tensors"
_DTYPE_NAMES = {dtype: name for name, dtype in SPARSE_DTYPES.items()}


def import_compressed_tensors(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, masked: bool = False
) -> nn.Module:
    """Give `model` the layers and the tensors of a compressed-tensors checkpoint, and return it.

    model: a fresh float one, or on the meta device, which spares the memory for weights that are replaced; in place and
        all or nothing. None: a Hugging Face model, built from config.json by the class that it names.
    masked: layers of sparse-bitmask become MaskedLinear, to be trained on; SparseLinear, to be run, by default.

    W8A8 by token becomes Int8Linear of the mode dynamic, by tensor static, W8A16 weight_only; W4A16 becomes Int4Linear.
    Weights and scales have the file's values to the bit: scales in bfloat16 or float16 become float32, which is exact.
    Other tensors come as they are.

    Raises:
        OSError, CompressedTensorsError: a folder that is incomplete, damaged or holds what pycompress has no layer for
            (fp8, other bit widths, asymmetric int8 weights, ...), or of another model: the message names the layer or
            tensor. The model is then what it was.
        TypeError: `model` is no module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model is a {type(model).__name__}; expected a torch.nn.Module")
    path = Path(folder)
    note = "" if model is None else ". The model is unchanged"
    # What is read is on the CPU, also where the caller is building a model on the meta device.
    with torch.device("cpu"), _told(path, note), ExitStack() as files:
        settings = read_json(path / CONFIG_FILE)
        if not isinstance(settings.get("quantization_config"), dict):
            raise CompressedTensorsError(f"{CONFIG_FILE} has no quantization_config; a float model is loaded as ever")
        config = Config(settings["quantization_config"])
        tensors = open_tensors(path, files)
        model = _built(settings, tensors, path) if model is None else model
        tensors, originals = model_tensors(model, tensors)
        layers, new = _layers(model, config, tensors, originals, masked)
        own = describe(model)
        rebuilt = plan(model, {**own, "layers": layers, "aliases": _aliases(model, layers), "attributes": {}}, op=_OP)
        slots = slots_of(rebuilt)
        sources = _sources(slots, new, _tied(model))
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        try:
            edits = fill(rebuilt, slots, sources, lambda name, keep: new[name].make(), frozen)
        except RuntimeError as error:  # what load_state_dict says of a layer
            raise CompressedTensorsError(str(error)) from error
    apply_edits(edits)
    return model


@contextmanager
def _told(path: Path, note: str) -> Iterator[None]:
    """Whatever is wrong is said with the folder's name."""
    try:
        yield
    except (TensorFileError, StructureError) as error:
        text = str(error).removeprefix(f"{_OP}: ")
        where = "" if str(path) in text else f"{path}: "
        raise CompressedTensorsError(f"{_OP}: {where}{text}{note}") from error


# ---- layers ---------------------------------------------------------------------------------------------------------


def _layers(
    model: nn.Module, config: Config, tensors: Tensors, originals: Mapping[str, str], masked: bool
) -> tuple[dict[str, Any], Tensors]:
    """The description of every layer that is replaced, and all tensors by their names in the model to be.

    originals: a layer's name in the checkpoint, where it is not the model's.
    """
    left = dict(tensors)
    by_module = _by_module(left)
    layers: dict[str, Any] = {}
    new: Tensors = {}
    for module, names in ModuleMap(model).names.items():
        name = next((each for each in names if each in by_module), names[0])
        raw = by_module.get(name, {})
        scheme = config.scheme_of({name, originals.get(name, name)}, module) if isinstance(module, nn.Linear) else None
        try:
            if scheme is None and "bitmask" not in raw:
                continue
            made = _layer(module, scheme, raw, masked)
        except CompressedTensorsError as error:
            raise CompressedTensorsError(f"layer {name!r}: {error}") from error
        prefix = f"{name}." if name else ""
        for key in raw:
            del left[prefix + key]
        options, state = made
        if options:
            layers[names[0]] = options
            prefix = f"{names[0]}." if names[0] else ""
        new.update((prefix + key, _named(item, name)) for key, item in state.items())
    return layers, {**left, **new}


def _named(item: Pending, layer: str) -> Pending:
    """The same, its errors with the layer's name."""

    def make() -> Tensor:
        try:
            return item.make()
        except CompressedTensorsError as error:
            raise CompressedTensorsError(f"layer {layer!r}: {error}") from error

    return Pending(item.dtype, item.shape, make)


def _by_module(tensors: Tensors) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for name, item in tensors.items():
        above, _, key = name.rpartition(".")
        found.setdefault(above, {})[key] = item
    return found


def _layer(module: nn.Module, scheme: Scheme | None, raw: Tensors, masked: bool) -> tuple[dict[str, Any], Tensors]:
    """The description of the layer, empty where the module stays, and its state."""
    if "bitmask" in raw:
        return _pruned(module, scheme, raw, masked)
    assert scheme is not None
    if not raw:
        raise CompressedTensorsError("there are no tensors of it in the file; the checkpoint is of another model")
    shape = linear_shape(module)
    assert shape is not None
    state = decode(raw, scheme, *shape)
    options: dict[str, Any] = {**_linear(shape, state), "activation": "none", "backend": "auto"}
    if scheme.bits == 4:
        group = shape[1] if scheme.group_size is None else scheme.group_size
        kind = {"kind": "Int4Linear", "format": "int4", "group_size": max(group, 1), "symmetric": scheme.symmetric}
        return {**options, **kind}, state
    mode = {"float": "weight_only", "token": "dynamic", "tensor": "static"}[scheme.activations]
    return {**options, "kind": "Int8Linear", "mode": mode}, state


def _pruned(module: nn.Module, scheme: Scheme | None, raw: Tensors, masked: bool) -> tuple[dict[str, Any], Tensors]:
    """A weight of the format sparse-bitmask; int8 where a scheme of W8A8 dynamic lies on top of it."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() not in (1, 2):
        raise CompressedTensorsError(f"it has a bitmask, and the model a {type_name(module)} without such a weight")
    found = decode_bitmask(raw, tuple(weight.shape))
    bitmap, values = found["bitmap"], found["values"]
    rest = {key: item for key, item in raw.items() if key not in BITMASK_KEYS}
    k = weight.shape[-1]
    if type(module) is not nn.Linear or (scheme is not None and (masked or scheme.activations != "token")):
        dense = Pending(
            values.dtype, tuple(weight.shape), lambda: expand(bitmap.make(), values.make(), k).view(weight.shape)
        )
        state = {**rest, "weight": dense}
        return ({}, state) if scheme is None else _layer(module, scheme, state, masked)
    state = {"weight_bitmap": bitmap, "weight_values": values}
    if scheme is not None:
        placeholder = Pending(torch.int8, tuple(weight.shape), lambda: torch.empty(0))
        state |= decode({**rest, "weight": placeholder}, scheme, *weight.shape)
        del state["weight"]
    elif set(rest) - {"bias"}:
        raise CompressedTensorsError(f"there is a tensor {min(set(rest) - {'bias'})!r}, and no scheme for the layer")
    else:
        state |= rest
    options: dict[str, Any] = _linear(tuple(weight.shape), state)
    dtypes = {torch.int8} if scheme is not None else set(SPARSE_DTYPES.values()) - {torch.int8}
    if values.dtype not in dtypes:
        raise CompressedTensorsError(f"its compressed is {values.dtype}; expected {' or '.join(map(str, dtypes))}")
    if masked:
        return _masked(options, state, weight.shape)
    dtype = _DTYPE_NAMES[values.dtype]
    return {
        **options, "kind": "SparseLinear", "dtype": dtype, "format": "auto", "activation": "none", "backend": "auto"
    }, state  # fmt: skip


def _masked(options: dict[str, Any], state: Tensors, shape: torch.Size) -> tuple[dict[str, Any], Tensors]:
    bitmap, values = state.pop("weight_bitmap"), state.pop("weight_values")
    k = shape[1]
    state["weight"] = Pending(values.dtype, tuple(shape), lambda: expand(bitmap.make(), values.make(), k))
    state["mask"] = Pending(torch.bool, tuple(shape), lambda: sparse_mask(bitmap.make(), k))
    return {**options, "kind": "MaskedLinear", "gradient": "masked"}, state


def _linear(shape: tuple[int, ...], state: Tensors) -> dict[str, Any]:
    return {"in_features": shape[1], "out_features": shape[0], "bias": "bias" in state}


def _aliases(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Further names of the layers that are replaced."""
    every = ModuleMap(model).names.values()
    return {first: others for first, *others in every if first in layers and others}


# ---- the other tensors ----------------------------------------------------------------------------------------------


def _tied(model: nn.Module) -> dict[int, list[str]]:
    """The names under which the model has one and the same tensor."""
    found: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    ):  # fmt: skip
        found.setdefault(id(tensor), []).append(name)
    return found


def _sources(slots: Mapping[str, Slot], new: Tensors, tied: Mapping[int, list[str]]) -> dict[str, str]:
    """For each slot the name of its tensor; every dtype and shape fits. No large tensor was read yet."""
    shared = {name: names for names in tied.values() for name in names}
    sources: dict[str, str] = {}
    for name, slot in slots.items():
        source = next((each for each in (name, *shared.get(name, ())) if each in new), None)
        if source is not None:
            sources[name] = source
            item = new[source]
            if why_not := slot.why_not(item.dtype, item.shape):
                raise CompressedTensorsError(f"{name} {why_not}; build the model as the checkpoint's was built")
        elif slot.is_needed:
            raise CompressedTensorsError(
                f"there is no tensor for {name}, which the model has; it is of another model, or {name} is a buffer "
                "that no checkpoint holds, on the meta device: pass no model, or one whose buffers are real"
            )
    if extra := sorted(set(new) - set(sources.values()) - {each for name in sources for each in shared.get(name, ())}):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CompressedTensorsError(f"there is a tensor {extra[0]!r}{more} that the model has no place for")
    return sources


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def _built(settings: Mapping[str, Any], tensors: Tensors, folder: Path) -> nn.Module:
    """The model that config.json tells of, on the meta device."""
    classes = settings.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1:
        raise CompressedTensorsError(
            f"{CONFIG_FILE} names no model class of transformers; build the model and pass it: {_OP}(folder, model)"
        )
    generation = folder / GENERATION_FILE
    described = {
        "class": classes[0],
        "config": dict(settings),
        "generation_config": read_json(generation) if generation.exists() else None,
    }
    model = transformers_model.build(described, len(tensors), folder)
    compute_transient_(model, tensors)
    return model
