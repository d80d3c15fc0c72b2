"""Int8 embedding in torch: the specification that every kernel is tested against. Any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REDUCTIONS = ("sum", "mean", "max")


@dataclass(frozen=True)
class Lookup:
    """Checked arguments of ``int8_embedding``: a table int8 ``(V, D)``, scales float32 ``(V,)``, any indices."""

    weight: Tensor
    weight_scale: Tensor
    indices: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Bags:
    """Checked arguments of ``int8_embedding_bag``.

    indices, offsets: 1-D, contiguous and of one dtype; bag b is ``indices[offsets[b]:offsets[b + 1]]``, the last one
    goes to the end. Without offsets ``indices`` has ``bags`` equally large ones. padding: -1 where there is none.
    """

    weight: Tensor
    weight_scale: Tensor
    indices: Tensor
    offsets: Tensor | None
    bags: int
    mode: str
    dtype: torch.dtype
    weights: Tensor | None
    padding: int


def bag_of_each(offsets: Tensor | None, bags: int, indices: Tensor) -> Tensor:
    """The number of the bag of each index, int64 ``(count,)``."""
    at = torch.arange(indices.shape[0], device=indices.device)
    if offsets is None:
        return at // max(indices.shape[0] // max(bags, 1), 1)
    return torch.searchsorted(offsets.to(torch.int64), at, right=True) - 1  # of bags that start at one place the last


def check_values(call: Lookup | Bags) -> None:
    """Raises what the native kernel would: ``IndexError`` for an index, ``ValueError`` for an offset.

    On the CPU only: elsewhere it would wait for the device, where torch's own gathering checks indices.
    """
    indices, v = call.indices, call.weight.shape[0]
    if indices.device.type != "cpu":
        return
    if isinstance(call, Bags):
        _check_offsets(call.offsets, indices.shape[0])
    flat = indices.reshape(-1)
    bad = ((flat < 0) | (flat >= v)).nonzero()
    if bad.numel():
        at = int(bad[0])
        raise IndexError(
            f"int8_embedding: index {int(flat[at])} (at position {at}) is out of range for a table of V={v} rows, "
            "expected 0 to V-1"
        )


def _check_offsets(offsets: Tensor | None, count: int) -> None:
    if offsets is None or offsets.numel() == 0:
        return
    values, before = offsets.tolist(), 0
    if values[0] != 0:
        raise ValueError(f"int8_embedding_bag: offsets[0]={values[0]}, expected 0, where the first bag starts")
    for b, at in enumerate(values):
        if at < before:
            raise ValueError(
                f"int8_embedding_bag: offsets[{b}]={at} is less than the one before it, {before}; offsets must not fall"
            )
        if at > count:
            raise ValueError(f"int8_embedding_bag: offsets[{b}]={at} is beyond the {count} indices")
        before = at


def reference_int8_embedding(call: Lookup) -> Tensor:
    """The formula: one rounding of the exact product."""
    check_values(call)
    rows = call.weight[call.indices.long()].to(torch.float32)
    return (rows * call.weight_scale[call.indices.long()].unsqueeze(-1)).to(call.dtype)


def reference_int8_embedding_bag(call: Bags) -> Tensor:
    """The formula, with sums in float32."""
    check_values(call)
    if call.bags == 0:
        return call.weight.new_empty((0, call.weight.shape[1]), dtype=call.dtype)
    index = call.indices.long()
    bag = bag_of_each(call.offsets, call.bags, call.indices)
    if call.padding >= 0:
        kept = index != call.padding
        index, bag = index[kept], bag[kept]
    factor = call.weight_scale[index]
    if call.weights is not None:
        weights = call.weights if call.padding < 0 else call.weights[kept]
        factor = factor * weights.to(torch.float32)
    rows = call.weight[index].to(torch.float32) * factor[:, None]
    result = rows.new_zeros(call.bags, call.weight.shape[1])
    if call.mode == "max":
        result = result.scatter_reduce(0, bag[:, None].expand_as(rows), rows, "amax", include_self=False)
    else:
        result = result.index_add(0, bag, rows)
    if call.mode == "mean":
        result = result / torch.bincount(bag, minlength=call.bags).clamp_min(1)[:, None]
    return result.to(call.dtype)
