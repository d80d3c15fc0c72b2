"""Int8 convolution weights: quantising, packing for the native kernels, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import has_values
from pycompress.ops.int8_matmul_weight import aligned, quantize_weight


def quantize_conv_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by output channel, as :func:`quantize_weight` by row: ``scale[o] = max |w[o]| / 127``.

    Args:
        weight: ``(O, I / groups, kh, kw)``, any real floating dtype.

    Returns:
        ``(q, scale)``: int8 of the same shape and fp32 ``(O,)``.

    Raises:
        ValueError: not 4-D, not floating, on the meta device, or NaN or Inf in a channel.
    """
    if weight.dim() != 4 or not weight.is_floating_point():
        raise ValueError(
            "quantize_conv_weight: expected a floating (O, I / groups, kh, kw) weight, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    q, scale = quantize_weight(weight.reshape(weight.shape[0], weight.shape[1:].numel()))
    return q.reshape(weight.shape), scale


def pack_conv_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Lay an int8 ``(O, I / groups, kh, kw)`` CPU weight out for the best native kernel of this machine.

    Returns a 1-D uint8 tensor: a checked header with the shape, and a packed matrix for each group. It belongs to this
    machine's instruction set: keep the int8 weight in files, see :func:`unpack_conv_weight`.
    """
    if weight.dtype != torch.int8 or weight.dim() != 4 or weight.device.type != "cpu":
        raise ValueError(
            "pack_conv_weight: expected an int8 (O, I / groups, kh, kw) weight on the CPU, "
            f"got {weight.dtype} {tuple(weight.shape)} on {weight.device}; quantize_conv_weight makes one"
        )
    weight = weight.contiguous()
    shape = (*weight.shape, groups)
    packed = torch.empty(_C.conv_packed_bytes(shape), dtype=torch.uint8, device="cpu")
    if has_values(weight):
        _C.conv_pack(weight.data_ptr(), shape, packed.data_ptr())
    return packed


def packed_conv_shape(packed: Tensor) -> tuple[int, int, int, int, int]:
    """``(O, I / groups, kh, kw, groups)`` of what :func:`pack_conv_weight` returned.

    Raises:
        ValueError: the header does not fit the buffer (damaged, or not a packed weight).
    """
    source = aligned(packed)
    out, per_group, kh, kw, groups = _C.conv_packed_shape(source.data_ptr(), source.numel())
    return out, per_group, kh, kw, groups


def unpack_conv_weight(packed: Tensor) -> Tensor:
    """The int8 ``(O, I / groups, kh, kw)`` weight inside the result of :func:`pack_conv_weight`, whoever packed it.

    Raises:
        ValueError: the header does not fit the buffer (damaged, or not a packed weight).
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"unpack_conv_weight: expected 1-D uint8, got {packed.dtype} {tuple(packed.shape)}")
    source = aligned(packed.cpu())
    weight = torch.empty(packed_conv_shape(source)[:4], dtype=torch.int8, device="cpu")
    _C.conv_unpack(source.data_ptr(), source.numel(), weight.data_ptr())
    return weight.to(packed.device)


def conv_kernel_name(packed: Tensor) -> str:
    """Name of the native kernel that runs with this packed weight here, e.g. ``int8_conv2d_6x64_avx512vnni``."""
    source = aligned(packed)
    return str(_C.conv_kernel_name(source.data_ptr(), source.numel()))


def plain_conv(weight: Tensor) -> Tensor:
    """int8 (O, I / groups, kh, kw), whether given so or packed."""
    return unpack_conv_weight(weight) if weight.dtype == torch.uint8 else weight
