"""Writing a compressed model as a compressed-tensors checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pycompress.checkpoint import transformers_model
from pycompress.checkpoint.shards import size_of
from pycompress.compressed_tensors import config as ct
from pycompress.compressed_tensors.config import Scheme
from pycompress.compressed_tensors.folder import CONFIG_FILE, GENERATION_FILE, write_folder
from pycompress.compressed_tensors.formats import SHIFT, encode_bitmask, encode_int4, encode_int8
from pycompress.compressed_tensors.hugging_face import checkpoint_tensors
from pycompress.model_file_state import collect
from pycompress.nn import Int4Linear, Int8Linear, MaskedLinear, SparseLinear
from pycompress.nn.masked_linear import zeroed
from pycompress.ops.sparse_linear_weight import expand, sparse_from_dense
from pycompress.report import megabytes
from pycompress.selection import ModuleMap
from pycompress.structure_kind import type_name
from pycompress.structure_kinds import kind_of
from pycompress.structure_linear import linear_shape
from pycompress.tensor_file import Pending
from pycompress.text_table import TextTable

_OP = "export_compressed_tensors"
_SPARSE = ("bitmask", "dense")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExportReport(TextTable):
    """What was written. `print(report)` shows a table.

    layers: of each compressed layer its name, how it is kept, its (outputs, inputs), bytes of the file. total: bytes
    of all tensors, floats included.
    """

    layers: tuple[tuple[str, str, tuple[int, int], int], ...]
    total: int

    header: ClassVar[tuple[str, ...]] = ("layer", "kept as", "shape", "bytes")
    right: ClassVar[frozenset[str]] = frozenset(("bytes",))

    def rows(self) -> list[tuple[str, ...]]:
        return [(name, how, "x".join(map(str, shape)), str(size)) for name, how, shape, size in self.layers]

    def summary(self) -> str:
        own = sum(size for *_, size in self.layers)
        rest = megabytes(self.total - own)
        return f"{len(self.layers)} compressed layers in {megabytes(own)} MB, the rest in {rest} MB"


def export_compressed_tensors(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    sparse: str = "bitmask",
    scale_dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
) -> ExportReport:
    """Write `model` to `folder` as compressed-tensors: model.safetensors, and config.json with quantization_config.

    ===========================  ==================================================================================
    Int8Linear dynamic           int-quantized, W8A8: weight by channel, activations by token
    Int8Linear static            int-quantized, W8A8: activations by tensor, with a zero point where it is not 128
    Int8Linear weight_only       pack-quantized, W8A16 by channel
    Int4Linear int4              pack-quantized, W4A16 by group, or by channel where a group is a whole row
    SparseLinear, MaskedLinear   sparse-bitmask; int8 values as W8A8 dynamic beneath it
    ===========================  ==================================================================================

    Weights and scales are the layer's own bits. Other layers are kept as they are. A Hugging Face model's config.json
    is its own, so that transformers and vLLM can load the folder; any other's holds nothing else.

    sparse: "bitmask", or "dense" with the zeros in place: compressed-tensors reads no bitmasks after version 0.14, nor
        do transformers 5 and vLLM.
    scale_dtype: of the scales in the file; a 16-bit one only where every scale is exact in it, as those of a checkpoint
        that came with such.
    max_shard_size: of a file, in bytes or as "5GB"; a larger tensor has a file of its own.

    Raises:
        TypeError, ValueError: a layer that the format cannot hold (a fused activation, NF4, what smooth_ made, ...), by
            its name and with the remedy. Nothing was written.
        OSError: as the system says.
    """
    if sparse not in _SPARSE:
        raise ValueError(f"{_OP}: unknown sparse={sparse!r}; expected one of {', '.join(_SPARSE)}")
    if scale_dtype not in _SCALE_DTYPES:
        expected = ", ".join(map(str, _SCALE_DTYPES))
        raise ValueError(f"{_OP}: scale_dtype={scale_dtype}; expected one of {expected}")
    most = size_of(max_shard_size, _OP)
    export = _collected(model, sparse, scale_dtype)
    tensors = checkpoint_tensors(model, export.tensors)
    export.floats += _float_weights(model, tensors)
    write_folder(Path(folder), tensors, _texts(model, export), most, _OP)
    return ExportReport(tuple(export.rows), sum(item.nbytes for item in tensors.values()))


@dataclass
class _Export:
    tensors: dict[str, Pending]
    schemes: dict[str, Scheme] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)
    bitmasks: list[str] = field(default_factory=list)
    rows: list[tuple[str, str, tuple[int, int], int]] = field(default_factory=list)
    kept: int = 0  # weights of bitmask layers that are not 0, and all of them
    weights: int = 0


def _collected(model: nn.Module, sparse: str, scale_dtype: torch.dtype) -> _Export:
    found = collect(model, _OP)
    transient = set(found.transient)
    export = _Export({name: item for name, item in found.tensors.items() if name not in transient})
    for module, names in ModuleMap(model).names.items():
        if reason := _why_not(module):
            raise ValueError(f"{_OP}: layer {names[0]!r} {reason}")
        if not isinstance(module, (Int8Linear, Int4Linear, SparseLinear, MaskedLinear)):
            if isinstance(module, nn.Linear):
                export.floats += names
            continue
        if not names[0]:
            raise ValueError(f"{_OP}: the model itself is one layer; export nn.Sequential(model)")
        _replace(export, module, names, sparse, scale_dtype)
    return export


def _float_weights(model: nn.Module, tensors: Mapping[str, Pending]) -> list[str]:
    """Float matrices that other engines may take for linear layers: routers, and the experts of a mixture."""
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    matrices = {name for name, item in tensors.items() if len(item.shape) == 2 and item.dtype.is_floating_point}
    return sorted({name.removesuffix(".weight") for name in matrices if name.endswith(".weight")} - tables)


def _replace(export: _Export, module: nn.Module, names: list[str], sparse: str, scale_dtype: torch.dtype) -> None:
    """Puts the library's tensors of a layer in the place of its own."""
    prefix = f"{names[0]}."
    for key in [key for key in export.tensors if key.startswith(prefix)]:
        del export.tensors[key]
    state = _state(module)
    scheme = _scheme(module)
    if isinstance(module, Int4Linear):
        assert scheme is not None
        new = encode_int4(state, module.in_features, scheme, scale_dtype)
    elif isinstance(module, Int8Linear):
        assert scheme is not None
        new = encode_int8(state, scheme, scale_dtype)
    else:
        assert isinstance(module, (SparseLinear, MaskedLinear))
        new = _encode_sparse(module, state, export, names, sparse)
        if scheme is not None:
            new |= encode_int8({**state, "weight": _dense(module)}, scheme, scale_dtype)
            if "bitmask" in new:
                del new["weight"]
    if "bias" in state:
        new["bias"] = state["bias"]
    export.tensors.update((prefix + key, _named(item, names[0])) for key, item in new.items())
    if scheme is None:
        export.floats += names
    else:
        export.schemes.update(dict.fromkeys(names, scheme))
    shape = linear_shape(module)
    assert shape is not None
    export.rows.append((names[0], _how(scheme, new), shape, sum(item.nbytes for item in new.values())))


def _encode_sparse(
    module: SparseLinear | MaskedLinear, state: Mapping[str, Pending], export: _Export, names: list[str], sparse: str
) -> dict[str, Pending]:
    if isinstance(module, MaskedLinear) and module.mask is None:
        return {"weight": state["weight"]}
    if sparse == "dense":
        return {"weight": _dense(module)}
    n, k = module.out_features, module.in_features
    if isinstance(module, SparseLinear):
        nnz, bitmap, values = module.nnz, state["weight_bitmap"], state["weight_values"]
    else:
        nnz = int(module.mask.sum())
        bitmap = Pending(torch.uint8, (n, -(-k // 8)), lambda: sparse_from_dense(module.weight, module.mask)[0])
        values = Pending(module.weight.dtype, (nnz,), lambda: sparse_from_dense(module.weight, module.mask)[1])
    export.bitmasks += names
    export.kept, export.weights = export.kept + nnz, export.weights + n * k
    return encode_bitmask(bitmap, values, k)


def _state(module: nn.Module) -> dict[str, Pending]:
    """The layer's state_dict, unpacked when it is written: one layer at a time."""
    return {
        key: Pending(tensor.dtype, tuple(tensor.shape), lambda key=key: module.state_dict()[key])  # type: ignore[misc]
        for key, tensor in module.state_dict().items()
    }


def _dense(module: nn.Module) -> Pending:
    """The weight with its zeros in place, in the values' dtype."""
    if isinstance(module, MaskedLinear):
        weight, mask = module.weight.detach(), module.mask
        return Pending(weight.dtype, tuple(weight.shape), lambda: zeroed(weight, mask))
    assert isinstance(module, SparseLinear)
    bitmap, values, k = module.weight_bitmap, module.weight_values, module.in_features
    return Pending(values.dtype, (module.out_features, k), lambda: expand(bitmap, values, k))


def _scheme(module: nn.Module) -> Scheme | None:
    """How the layer is kept; None for one with a float weight."""
    if isinstance(module, Int4Linear):
        group = None if module.group_size >= module.in_features else module.group_size
        return Scheme(4, group, module.symmetric)
    if isinstance(module, SparseLinear):
        return Scheme(8, activations="token", format=ct.INT) if module.dtype == "int8" else None
    if not isinstance(module, Int8Linear):
        return None
    if module.mode == "weight_only":
        return Scheme(8)
    if module.mode == "dynamic":
        return Scheme(8, activations="token", format=ct.INT)
    affine = module.input_zero_point is not None and int(module.input_zero_point) != SHIFT
    return Scheme(8, activations="tensor", affine=affine, format=ct.INT)


def _how(scheme: Scheme | None, tensors: Mapping[str, Pending]) -> str:
    """As people call it: W4A16 pack-quantized, group_size=128."""
    parts = []
    if scheme is not None:
        bits = "16" if scheme.activations == "float" else f"8 by {scheme.activations}"
        parts.append(f"W{scheme.bits}A{bits} {scheme.format}")
        if scheme.group_size is not None:
            parts.append(f"group_size={scheme.group_size}")
        if not scheme.symmetric or scheme.affine:
            parts.append("zero points")
    if "bitmask" in tensors:
        parts.append(ct.BITMASK)
    return ", ".join(parts) or "dense"


def _why_not(module: nn.Module) -> str:
    """Why the format cannot hold this layer; empty where it can, or where it is none of ours."""
    kind = kind_of(module)
    name = type_name(module)
    if kind is None or not (kind.is_ours or name in _REASONS):
        return ""
    if name in _REASONS or not isinstance(module, (Int8Linear, Int4Linear, SparseLinear, MaskedLinear)):
        return _REASONS.get(name, f"is a {name}, which compressed-tensors has no format for; {_LEAVE}")
    if getattr(module, "activation", "none") != "none":
        return (
            f"has {module.activation} fused into it, which compressed-tensors cannot say; quantise the float model "
            "with quantize_(..., fuse=False)"
        )
    if isinstance(getattr(module, "nf", None), int):  # what carry_marks takes along
        return f"took the place of transformers' Conv1D, which compressed-tensors does not know; {_LEAVE}"
    if isinstance(module, Int4Linear):
        if module.format != "int4":
            return f"is of the format {module.format}, which compressed-tensors has not; use mode='int4'"
        if module.in_features % module.group_size:
            return (
                f"has {module.in_features} inputs in groups of {module.group_size}, and compressed-tensors has no "
                "short last group; quantise it with a group_size that divides them, or -1"
            )
    return ""


_LEAVE = "leave it float with skip= or mode={name: 'float'}"
_REASONS = {
    "FakeQuantLinear": "is a FakeQuantLinear, to be trained; make it int8 with quantize_ first",
    "Sequential": "is scaled by smooth_, and compressed-tensors has no scale before a layer; keep smooth_ to layers "
    f"whose scales it can fold, or {_LEAVE}",
    "LowRankLinear": "is a LowRankLinear, which compressed-tensors has no format for; export it without factorize_",
}


def _named(item: Pending, layer: str) -> Pending:
    """The same, its errors with the layer's name."""

    def make() -> Tensor:
        try:
            return item.make()
        except ValueError as error:
            raise ValueError(f"{_OP}: layer {layer!r}: {error}. Nothing was written") from error

    return Pending(item.dtype, item.shape, make)


# ---- config.json ----------------------------------------------------------------------------------------------------


def _texts(model: nn.Module, export: _Export) -> dict[str, dict[str, Any]]:
    """The JSON files of the folder."""
    described = transformers_model.describe(model)
    config: dict[str, Any] = {}
    if described is not None:
        dtype = str(cast(Any, model).dtype).removeprefix("torch.")
        config = {**described["config"], "architectures": [described["class"]], "dtype": dtype}
    sparsity = 1 - export.kept / export.weights if export.weights else 0.0
    config["quantization_config"] = ct.to_json(export.schemes, export.floats, export.bitmasks, sparsity)
    generation = described["generation_config"] if described is not None else None
    return {CONFIG_FILE: config, **({GENERATION_FILE: generation} if generation else {})}
