"""4-bit weights: quantising by groups, the plain form of files, and back to float.

``w[n, k] = weight_scale[n, g] * value``, ``g = k // group_size``, the last group short where K is no multiple.

======  ============================  ==============================================================================
format  value                         scale of a group
======  ============================  ==============================================================================
int4    ``q - zero_point``, q 0..15   symmetric: ``max |w| / 7.5``, the zero point 8 everywhere and not kept;
                                      asymmetric: ``(max - min) / 15`` of the group's range and 0,
                                      ``zero_point = rne(-min / scale)``
nf4     ``NF4[q]``                    ``max |w|``
======  ============================  ==============================================================================

The plain weight is uint8 ``(N, ceil(K / 2))``: byte j holds k = 2j in its low nibble and k = 2j + 1 in the high one; an
odd K ends in a nibble of 0.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pycompress import _C
from pycompress._native import has_values
from pycompress.ops.int8_matmul_weight import SMALLEST_SCALE, aligned
from pycompress.ops.linear_common import check_option

FORMATS = ("int4", "nf4")

# NF4 of QLoRA (Dettmers et al. 2023, appendix E), to the last bit as bitsandbytes has it: quantiles of a normal
# distribution, scaled to [-1, 1], 0 among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _bounds() -> Tensor:
    """Up to where the lower of two neighbours is the nearest, or as near: the largest such float32, so that to compare
    in float32 is exact.
    """
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(NF4)], dtype=torch.float64, device="cpu")
    rounded = middles.float()
    return torch.where(rounded.double() > middles, rounded.nextafter(torch.full_like(rounded, -2.0)), rounded)


_BOUNDS = _bounds()


def quantize_weight_int4(
    weight: Tensor, format: str = "int4", group_size: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """4 bits a weight and one scale a group of ``group_size`` neighbours in a row; see the module for the formulas.

    A symmetric scale is ``max |w| / 7.5``, as compressed-tensors takes it, and not ``/ 7``: that only the negative
    end reaches the grid's last step costs the positive one less than the finer grid gives all others. Mean squared
    error over the linear weights of MiniLM: 5.40e-5 instead of 6.04e-5 in groups of 128, 3.68e-5 instead of 3.84e-5
    in groups of 32.

    Args:
        weight: ``(N, K)``, any real floating dtype.
        format: ``"int4"`` (evenly spaced) or ``"nf4"`` (spaced for weights that are normally distributed).
        group_size: weights that share a scale, 1 or more; -1 for a whole row.
        symmetric: int4 only: False keeps a zero point a group, for weights whose range is lopsided.

    Returns:
        ``(weight, scale, zero_point)``: uint8 ``(N, ceil(K / 2))``, float32 and uint8 ``(N, G)``,
        ``G = ceil(K / group_size)``; zero_point is None where symmetric. 0 comes back as 0, a group of zeros too.

    Raises:
        ValueError: not 2-D, not floating, on the meta device, NaN or Inf in a row, an unknown option.
    """
    check_weight_options("quantize_weight_int4", format, symmetric)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_weight_int4: expected a floating (N, K) weight, got {weight.dtype} {tuple(weight.shape)}"
        )
    size = group_size_of("quantize_weight_int4", group_size, weight.shape[1])
    if weight.is_meta:
        raise ValueError("quantize_weight_int4: the weight is on the meta device; load its values first")
    w = _in_groups(weight.detach().to(torch.float32), size)
    low, high = (w.amin(dim=2), w.amax(dim=2)) if w.numel() else (w.new_zeros(w.shape[:2]),) * 2
    _check_finite(torch.maximum(high, -low))
    largest = torch.maximum(high, -low)
    if format == "nf4":
        scale, zero_point = largest.clamp_min(SMALLEST_SCALE), None
        q = torch.bucketize(w / scale[..., None], _BOUNDS.to(w.device), out_int32=True)
    elif symmetric:
        scale, zero_point = (largest / 7.5).clamp_min(SMALLEST_SCALE), None
        q = (w / scale[..., None]).round_().clamp_(-8, 7).add_(8)
    else:
        low, high = low.clamp_max(0).double(), high.clamp_min(0).double()  # in float32 the difference could overflow
        scale = ((high - low) / 15.0).float().clamp_min(SMALLEST_SCALE)
        zero_point = (-low.float() / scale).round_().clamp_(0, 15)
        q = (w / scale[..., None]).round_().add_(zero_point[..., None]).clamp_(0, 15)
        zero_point = zero_point.to(torch.uint8)
    k = weight.shape[1]
    return pack_nibbles(q.to(torch.uint8).flatten(1)[:, :k]), scale, zero_point


def _in_groups(w: Tensor, size: int) -> Tensor:
    """(N, G, group size), the last group filled up with zeros: none of its range's ends moves."""
    n, k = w.shape
    size = min(size, max(k, 1))
    groups = -(-k // size)
    if k % size:
        w = torch.nn.functional.pad(w, (0, groups * size - k))
    return w.reshape(n, groups, size)


def _check_finite(largest: Tensor) -> None:
    bad = (~largest.isfinite()).any(dim=1).nonzero()
    if bad.numel():
        raise ValueError(
            f"quantize_weight_int4: row {int(bad[0])} of the weight holds NaN or Inf ({bad.numel()} such rows); "
            "repair the weight or leave this layer in float"
        )


def dequantize_weight_int4(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    in_features: int,
    format: str = "int4",
    group_size: int = 128,
) -> Tensor:
    """The float32 ``(N, K)`` weight of what :func:`quantize_weight_int4` returned; K is ``in_features``.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, an unknown option.
    """
    check_plain("dequantize_weight_int4", weight, scale, zero_point, in_features, format, group_size)
    q = unpack_nibbles(weight, in_features)
    size = group_size_of("dequantize_weight_int4", group_size, in_features)
    if format == "nf4":
        values = torch.tensor(NF4, dtype=torch.float32, device=weight.device)[q.int()]
    else:
        offset = 8 if zero_point is None else per_weight(zero_point, in_features, size).float()
        values = q.float() - offset
    return values * per_weight(scale, in_features, size)


def per_weight(of_groups: Tensor, k: int, group_size: int) -> Tensor:
    """(N, G) as (N, K): of each weight the value of its group."""
    return of_groups.repeat_interleave(min(group_size, max(k, 1)), dim=1)[:, :k]


def pack_nibbles(q: Tensor) -> Tensor:
    """uint8 ``(N, K)`` of 0..15, two a byte: ``(N, ceil(K / 2))``, even k in the low nibbles."""
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, k: int) -> Tensor:
    """The inverse of :func:`pack_nibbles`: uint8 ``(N, K)``."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :k]


# ---- checks: each raises ValueError in the name of `op` -----------------------------------------------------------


def check_weight_options(op: str, format: str, symmetric: bool) -> None:
    """Raises for an unknown format, and for nf4 with zero points."""
    check_option(op, "format", format, FORMATS)
    if format == "nf4" and not symmetric:
        raise ValueError(f"{op}: symmetric=False with format='nf4', whose values are fixed; use format='int4'")


def group_size_of(op: str, group_size: int, k: int) -> int:
    """The group size in weights, that of -1 too: K, or 1 without any."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or not (group_size >= 1 or group_size == -1):
        raise ValueError(f"{op}: group_size={group_size!r}, expected 1 or more, or -1 for one group a row")
    return max(k, 1) if group_size == -1 else group_size


def group_count(k: int, group_size: int) -> int:
    """G, of a group size that :func:`group_size_of` gave."""
    return -(-k // group_size)


def check_plain(
    op: str, weight: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, format: str, group_size: int
) -> None:
    """Raises unless these are the parts of a weight with K = k."""
    check_weight_options(op, format, zero_point is None)
    groups = group_count(k, group_size_of(op, group_size, k))
    if weight.dtype != torch.uint8 or weight.dim() != 2:
        raise ValueError(f"{op}: weight has {weight.dtype} {tuple(weight.shape)}, expected uint8 (N, ceil(K / 2))")
    if weight.shape[1] != (k + 1) // 2:
        raise ValueError(
            f"{op}: K={k} but weight has {weight.shape[1]} bytes a row, which hold K="
            f"{max(2 * weight.shape[1] - 1, 0)} or {2 * weight.shape[1]}"
        )
    check_groups(op, scale, zero_point, k, groups)
    if weight.shape[0] != scale.shape[0]:
        raise ValueError(f"{op}: weight has N={weight.shape[0]} but weight_scale has N={scale.shape[0]}")


def check_groups(op: str, scale: Tensor, zero_point: Tensor | None, k: int, groups: int) -> None:
    """Raises unless scales and zero points are (N, G) for this G."""
    for name, tensor, dtype in (("weight_scale", scale, torch.float32), ("weight_zero_point", zero_point, torch.uint8)):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.dim() != 2 or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} has {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {dtype} (N, G)"
            )
        if tensor.shape[1] != groups or tensor.shape[0] != scale.shape[0]:
            raise ValueError(
                f"{op}: {name} is {tuple(tensor.shape)}, expected {(scale.shape[0], groups)} for K={k} "
                "and this group_size"
            )


# ---- packed for the native kernels --------------------------------------------------------------------------------


def pack_weight_int4(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    in_features: int,
    format: str = "int4",
    group_size: int = 128,
) -> Tensor:
    """Lay a plain weight, its scales and its zero points out for the best native kernel of this machine.

    Returns a 1-D uint8 tensor, with a checked header. It belongs to this machine's instruction set: keep the plain
    tensors in files, see :func:`unpack_weight_int4`.

    Raises:
        ValueError: tensors that do not fit each other or are not on the CPU, an unknown option.
    """
    check_plain("pack_weight_int4", weight, scale, zero_point, in_features, format, group_size)
    for tensor in (weight, scale, zero_point):
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueError(f"pack_weight_int4: the native kernels run on the CPU, this is on {tensor.device}")
    n, k, size = weight.shape[0], in_features, group_size_of("pack_weight_int4", group_size, in_features)
    weight, code = weight.contiguous(), FORMATS.index(format)
    has_zero_point = zero_point is not None
    packed = torch.empty(_C.int4_packed_bytes(n, k, size, code, has_zero_point), dtype=torch.uint8, device="cpu")
    if has_values(weight):
        at = 0 if zero_point is None else zero_point.data_ptr()
        _C.int4_pack(weight.data_ptr(), scale.data_ptr(), at, n, k, size, code, has_zero_point, packed.data_ptr())
    return packed


def unpack_weight_int4(packed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain weight, scales and zero points inside the result of :func:`pack_weight_int4`, to the last bit.

    Raises:
        ValueError: the header does not fit the buffer (damaged, or not a packed weight).
    """
    source = aligned(_one_dimensional("unpack_weight_int4", packed).cpu())
    n, k, size, _, has_zero_point = packed_info(source)
    weight = torch.empty(n, (k + 1) // 2, dtype=torch.uint8, device="cpu")
    scale = torch.empty(n, group_count(k, size), dtype=torch.float32, device="cpu")
    zero_point = torch.empty(scale.shape, dtype=torch.uint8, device="cpu") if has_zero_point else None
    at = 0 if zero_point is None else zero_point.data_ptr()
    _C.int4_unpack(source.data_ptr(), source.numel(), weight.data_ptr(), scale.data_ptr(), at)
    device = packed.device
    return weight.to(device), scale.to(device), None if zero_point is None else zero_point.to(device)


def packed_info(packed: Tensor) -> tuple[int, int, int, str, bool]:
    """(N, K, group size, format, whether there are zero points) of a packed weight on the CPU, its header checked."""
    n, k, size, code, has_zero_point = _C.int4_packed_info(packed.data_ptr(), packed.numel())
    return n, k, size, FORMATS[code], has_zero_point


def int4_kernel_name(packed: Tensor) -> str:
    """Name of the native kernel that runs with this packed weight here, e.g. ``int4_matmul_6x64_avx512``."""
    source = aligned(_one_dimensional("int4_kernel_name", packed))
    return str(_C.int4_kernel_name(source.data_ptr(), source.numel()))


def _one_dimensional(op: str, packed: Tensor) -> Tensor:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"{op}: expected 1-D uint8, got {packed.dtype} {tuple(packed.shape)}")
    return packed
