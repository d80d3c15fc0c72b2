"""Int8 weights: quantising, packing for the native kernels, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import has_values
from pycompress.codes import ALIGNMENT, SMALLEST_SCALE, affine_qparams, static_qparams

__all__ = [
    "ALIGNMENT",
    "SMALLEST_SCALE",
    "affine_qparams",
    "aligned",
    "kernel_name",
    "pack_weight",
    "plain",
    "quantize_weight",
    "static_qparams",
    "static_tensors",
    "unpack_weight",
]


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by output row: ``scale[n] = max_k |w[n, k]| / 127``, ``q = clamp(round(w / scale), -127, 127)``.

    Args:
        weight: ``(N, K)``, any real floating dtype.

    Returns:
        ``(q, scale)``: int8 ``(N, K)`` and fp32 ``(N,)``. A zero row has q = 0.

    Raises:
        ValueError: not 2-D, not floating, on the meta device, or NaN or Inf in a row.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_weight: expected a floating (N, K) weight, got {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.is_meta:
        raise ValueError("quantize_weight: the weight is on the meta device; load its values first")
    w = weight.detach().to(torch.float32)
    largest = torch.maximum(w.amax(dim=1), -w.amin(dim=1)) if w.shape[1] else w.new_zeros(w.shape[0])
    bad = (~largest.isfinite()).nonzero()
    if bad.numel():
        raise ValueError(
            f"quantize_weight: row {int(bad[0])} of the weight holds NaN or Inf ({bad.numel()} such rows); "
            "repair the weight or leave this layer in float"
        )
    scale = (largest / 127.0).clamp_min(SMALLEST_SCALE)
    return (w / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def pack_weight(weight: Tensor) -> Tensor:
    """Lay an int8 ``(N, K)`` CPU weight out for the best native kernel of this machine.

    Returns a 1-D uint8 tensor: a checked header ``{layout, N, K, version}``, column sums, and panels. It belongs to
    this machine's instruction set: keep the int8 weight in files, see :func:`unpack_weight`.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.device.type != "cpu":
        raise ValueError(
            "pack_weight: expected an int8 (N, K) weight on the CPU, "
            f"got {weight.dtype} {tuple(weight.shape)} on {weight.device}; quantize_weight makes one"
        )
    weight = weight.contiguous()
    n, k = weight.shape
    packed = torch.empty(_C.int8_packed_bytes(n, k), dtype=torch.uint8, device="cpu")
    if has_values(weight):
        _C.int8_pack(weight.data_ptr(), n, k, k, packed.data_ptr())
    return packed


def unpack_weight(packed: Tensor) -> Tensor:
    """The int8 ``(N, K)`` weight inside the result of :func:`pack_weight`, whatever machine packed it.

    Raises:
        ValueError: the header does not fit the buffer (damaged, or not a packed weight).
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"unpack_weight: expected 1-D uint8, got {packed.dtype} {tuple(packed.shape)}")
    source = aligned(packed.cpu())
    n, k = _C.int8_packed_shape(source.data_ptr(), source.numel())
    weight = torch.empty(n, k, dtype=torch.int8, device="cpu")
    _C.int8_unpack(source.data_ptr(), source.numel(), weight.data_ptr(), k)
    return weight.to(packed.device)


def kernel_name(weight: Tensor) -> str:
    """Name of the native kernel that runs with this packed weight here, e.g. ``int8_matmul_6x64_avx512vnni``."""
    source = aligned(weight)
    return str(_C.int8_kernel_name(source.data_ptr(), source.numel()))


def static_tensors(
    qparams: tuple[float, int] | None, device: torch.device | str | None
) -> tuple[Tensor | None, Tensor | None]:
    """``input_scale`` and ``input_zero_point`` as the operators take them; None and None without any."""
    if qparams is None:
        return None, None
    scale, zero_point = qparams
    return torch.tensor(scale, dtype=torch.float32, device=device), torch.tensor(
        zero_point, dtype=torch.int32, device=device
    )


def aligned(packed: Tensor) -> Tensor:
    """``packed`` itself where the kernels can read it, else a copy that they can.

    Raises:
        ValueError: a meta or fake tensor.
    """
    if not has_values(packed):
        raise ValueError("a packed weight is a meta or fake tensor, whose values are not known; load them first")
    if packed.data_ptr() % ALIGNMENT == 0 and packed.is_contiguous():
        return packed
    return torch.empty(packed.shape, dtype=packed.dtype, device=packed.device).copy_(packed)


def plain(weight: Tensor) -> Tensor:
    """int8 (N, K), whether given so or packed."""
    return unpack_weight(weight) if weight.dtype == torch.uint8 else weight
