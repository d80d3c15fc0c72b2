"""What goes into a ``SparseLinear``: the weight and mask of a pruned layer, or a checkpoint, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress._native import has_values
from pycompress.nn.float_linear import float_weight, is_conv1d

if TYPE_CHECKING:
    from pycompress.nn.sparse_linear import SparseLinear

_FROM = "SparseLinear.from_dense"


def pruned_weight(linear: nn.Module, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``weight ⊙ mask`` and the mask, both (N, K).

    mask: as given; else the layer's own (``MaskedLinear``, or the hook style of ``torch.nn.utils.prune``), which counts
    in any case; else what is not exactly 0.

    Raises:
        ValueError: no such layer, a weight that is not floating or on the meta device, a kept weight that is NaN or
            Inf, a mask that does not fit.
    """
    weight = getattr(linear, "weight_orig", None)
    if isinstance(weight, Tensor):  # torch.nn.utils.prune: `weight` is what the last forward made of it
        weight = weight.t() if is_conv1d(linear) else weight
    else:
        weight = float_weight(linear, _FROM)
    if not weight.is_floating_point():
        raise ValueError(f"{_FROM}: the weight is {weight.dtype}, expected a floating one")
    if weight.is_meta:
        raise ValueError(f"{_FROM}: the weight is on the meta device; load its values first")
    weight = weight.detach()
    own = _own_mask(linear)
    if own is not None:
        weight = torch.where(own.to(weight.device), weight, 0.0)  # behind the mask there may be other values
    if mask is None:
        mask = (weight != 0) if own is None else own
    elif mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"{_FROM}: the mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(weight.shape)}, "
            "True where a weight is kept"
        )
    mask = mask.to(weight.device)
    kept = torch.where(mask, weight, 0.0)
    bad = (~kept.isfinite()).any(1).nonzero()
    if bad.numel():
        raise ValueError(
            f"{_FROM}: row {int(bad[0])} of the weight holds NaN or Inf ({bad.numel()} such rows); repair the weight "
            "or leave this layer as it is"
        )
    return kept, mask


def _own_mask(linear: nn.Module) -> Tensor | None:
    hooked = getattr(linear, "weight_mask", None)
    if isinstance(hooked, Tensor):
        return (hooked.t() if is_conv1d(linear) else hooked) != 0
    mask = getattr(linear, "mask", None)
    return mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None


def state_errors(module: SparseLinear, new: Mapping[str, object], bias: object, prefix: str) -> list[str]:
    """Why these tensors cannot be the module's state; empty where they can, or where none is given."""
    n, k = module.out_features, module.in_features
    expected: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {
        "weight_bitmap": (torch.uint8, (n, -(-k // 8))),
        "weight_values": (module.weight_values.dtype, None),
    }
    if module.weight_scale is not None:
        expected["weight_scale"] = (torch.float32, (n,))
    errors = []
    if new and len(new) != len(expected):
        lacking = [name for name in expected if name not in new]
        errors.append(
            f"SparseLinear: {prefix}{next(iter(new))} comes without {', '.join(prefix + name for name in lacking)}; "
            "they belong together"
        )
    for name, tensor in new.items():
        dtype, shape = expected[name]
        if isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.layout is torch.strided:
            fits = tensor.dim() == 1 if shape is None else tuple(tensor.shape) == shape
        else:
            fits = False
        if not fits:
            want = "(nnz,)" if shape is None else str(shape)
            errors.append(f"SparseLinear: {prefix}{name} is {_described(tensor)}, expected {dtype} {want}")
    own = module.bias
    if own is not None and bias is not None and (not isinstance(bias, Tensor) or bias.shape != own.shape):
        errors.append(f"SparseLinear: {prefix}bias is {_described(bias)}, expected {tuple(own.shape)}")
    if new and not errors:
        bitmap, values = new["weight_bitmap"], new["weight_values"]
        assert isinstance(bitmap, Tensor)
        assert isinstance(values, Tensor)
        devices = {str(tensor.device) for tensor in new.values() if isinstance(tensor, Tensor)}
        if len(devices) > 1:
            where = " and ".join(sorted(devices))
            errors.append(f"SparseLinear: {prefix}weight_* are on {where}; they belong together, on one device")
            return errors
        try:
            if has_values(bitmap):
                ops.validate_sparse(bitmap, values, n, k)
        except ValueError as error:
            errors.append(f"SparseLinear: {prefix}weight_bitmap: {error}")
    return errors


def _described(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype} {tuple(tensor.shape)}{layout}"
