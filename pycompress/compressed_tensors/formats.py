"""The tensors of one layer: those of a pycompress layer's state_dict, and those of the compressed-tensors library.

    int-quantized   weight int8 [N, K], weight_scale [N, 1] (per tensor: [1])
                    static activations: input_scale [1], and where they are affine input_zero_point int8 [1]
    pack-quantized  weight_packed int32 [N, ceil(K*bits/32)], weight_scale [N, G], weight_shape int64 [2] = (N, K)
                    affine: weight_zero_point int32 [ceil(N*bits/32), G]
    sparse-bitmask  bitmask uint8 [N, ceil(K/8)], compressed [nnz], row_offsets int64 [N], shape int64 [2]

A word of int32 holds 32/bits values, the first in its low bits, each with 2^(bits-1) added; what is left of the last
word is 0. Weights are packed along K, zero points along N.

    pycompress    weight_packed of 4 bits is the ``weight`` of Int4Linear, padded to whole words
                  input_zero_point = theirs + 128: their activations are -128..127, ours 0..255
                  bitmask and compressed are ``weight_bitmap`` and ``weight_values`` of SparseLinear

A tensor is a :class:`Pending`: shapes and dtypes are checked, and errors raised, before any value is read or packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pycompress.compressed_tensors.config import PACKED, CompressedTensorsError, Scheme
from pycompress.ops.sparse_linear_weight import row_starts
from pycompress.tensor_file import Pending

State = Mapping[str, Pending]
SHIFT = 128  # between their zero point of activations and ours
BITMASK_KEYS = ("bitmask", "compressed", "row_offsets", "shape")
PACKED_KEYS = ("weight_packed", "weight_shape", "weight_zero_point")
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


# ---- writing --------------------------------------------------------------------------------------------------------


def encode_int8(state: State, scheme: Scheme, scale_dtype: torch.dtype) -> dict[str, Pending]:
    """The tensors of an Int8Linear."""
    weight = state["weight"]
    n, k = weight.shape
    found = {"weight_scale": _scale(state["weight_scale"], (n, 1), scale_dtype)}
    if scheme.format == PACKED:
        packed = _mapped(weight, torch.int32, (n, _words(k, 8)), lambda w: _to_words(w.view(torch.uint8) ^ 0x80))
        found |= {"weight_packed": packed, "weight_shape": _shape_tensor(n, k)}
    else:
        found["weight"] = weight
    if scheme.activations == "tensor":
        found["input_scale"] = _scale(state["input_scale"], (1,), scale_dtype)
    if scheme.affine:
        zero_point = state["input_zero_point"]
        found["input_zero_point"] = _mapped(zero_point, torch.int8, (1,), lambda z: (z - SHIFT).view(1).to(torch.int8))
    return found


def encode_int4(state: State, k: int, scheme: Scheme, scale_dtype: torch.dtype) -> dict[str, Pending]:
    """The tensors of an Int4Linear of the format int4, K = k."""
    n, groups = state["weight_scale"].shape
    found = {
        "weight_packed": _mapped(state["weight"], torch.int32, (n, _words(k, 4)), _to_words),
        "weight_scale": _scale(state["weight_scale"], (n, groups), scale_dtype),
        "weight_shape": _shape_tensor(n, k),
    }
    if not scheme.symmetric:
        found["weight_zero_point"] = _mapped(
            state["weight_zero_point"], torch.int32, (_words(n, 4), groups), pack_zero_points
        )
    return found


def encode_bitmask(bitmap: Pending, values: Pending, k: int) -> dict[str, Pending]:
    """The tensors of a pruned (N, k) weight."""
    n = bitmap.shape[0]
    offsets = _mapped(bitmap, torch.int64, (n,), lambda found: row_starts(found, k)[:-1].contiguous())
    return {"bitmask": bitmap, "compressed": values, "row_offsets": offsets, "shape": _shape_tensor(n, k)}


def _scale(item: Pending, shape: tuple[int, ...], dtype: torch.dtype) -> Pending:
    def make(scale: Tensor) -> Tensor:
        cast = scale.to(dtype)
        if not torch.equal(cast.float(), scale):
            raise ValueError(
                f"its scales are not exact in {dtype}, scale {float(scale[cast.float() != scale][0])} among them; "
                "leave scale_dtype out, readers convert as they need"
            )
        return cast.view(shape)

    return _mapped(item, dtype, shape, make)


def _mapped(
    item: Pending, dtype: torch.dtype, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]
) -> Pending:
    return Pending(dtype, shape, lambda: change(item.make()))


def _shape_tensor(n: int, k: int) -> Pending:
    return Pending(torch.int64, (2,), lambda: torch.tensor([n, k], dtype=torch.int64))


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def _to_words(data: Tensor) -> Tensor:
    """uint8 (R, B) as int32 (R, ceil(B/4)), little-endian, zeros behind."""
    rows, size = data.shape
    words = torch.zeros(rows, -(-size // 4), dtype=torch.int32)
    words.view(torch.uint8)[:, :size] = data.cpu()
    return words


def _to_bytes(words: Tensor, size: int) -> Tensor:
    """The first `size` bytes of each row of int32 (R, W)."""
    return words.contiguous().view(torch.uint8)[:, :size].contiguous()


def pack_zero_points(zero_point: Tensor) -> Tensor:
    """uint8 (N, G), 0..15, as int32 (ceil(N/8), G)."""
    groups = zero_point.t().cpu()
    padded = torch.zeros(groups.shape[0], groups.shape[1] + groups.shape[1] % 2, dtype=torch.uint8)
    padded[:, : groups.shape[1]] = groups
    return _to_words(padded[:, ::2] | padded[:, 1::2] << 4).t().contiguous()


def unpack_zero_points(words: Tensor, n: int) -> Tensor:
    """uint8 (n, G) from int32 (ceil(n/8), G)."""
    data = _to_bytes(words.t(), -(-n // 2))
    return torch.stack((data & 0x0F, data >> 4), dim=-1).flatten(1)[:, :n].t().contiguous()


# ---- reading --------------------------------------------------------------------------------------------------------


def decode(raw: State, scheme: Scheme, n: int, k: int) -> dict[str, Pending]:
    """The state of the Int8Linear or Int4Linear (n, k) that these tensors are, their keys without the layer's name.

    Raises:
        CompressedTensorsError: naming the tensor that is missing, superfluous, or not what the scheme says.
    """
    left = dict(raw)
    groups = 1 if scheme.group_size is None else -(-k // scheme.group_size)
    if scheme.group_size is not None and k % scheme.group_size:
        raise CompressedTensorsError(f"its {k} inputs are no multiple of its group_size {scheme.group_size}")
    scale_shapes: tuple[tuple[int, ...], ...] = ((n, groups), (n,)) if groups == 1 else ((n, groups),)
    if scheme.per_tensor:
        scale_shapes = (1,), (), (1, 1)
    if scheme.format == PACKED:
        packed = _take(left, "weight_packed", (torch.int32,), (n, _words(k, scheme.bits)))
        _check_shape(_take(left, "weight_shape", (torch.int64, torch.int32), (2,)), n, k, "weight_shape")
        found = {"weight": _packed_weight(packed, scheme.bits, n, k)}
    else:
        found = {"weight": _take(left, "weight", (torch.int8,), (n, k))}
    scale = _take(left, "weight_scale", _SCALES, *scale_shapes)
    own_shape = (n,) if scheme.bits == 8 else (n, groups)
    found["weight_scale"] = _read_scale(scale, "weight_scale", own_shape)
    if not scheme.symmetric:
        words = _take(left, "weight_zero_point", (torch.int32,), (_words(n, 4), groups))
        found["weight_zero_point"] = _mapped(words, torch.uint8, (n, groups), lambda w: unpack_zero_points(w, n))
    else:
        _drop_zeros(left, "weight_zero_point")
    if scheme.activations == "tensor":
        found |= _static_inputs(left, scheme)
    if "bias" in left:
        found["bias"] = left.pop("bias")
    if left:
        raise CompressedTensorsError(f"there is a tensor {min(left)!r}, which {scheme} has none of")
    return found


def decode_bitmask(raw: State, shape: tuple[int, ...]) -> dict[str, Pending]:
    """bitmap (N, ceil(K/8)) and values (nnz,) of a pruned weight of this shape, (N, K) or (K,)."""
    rows, k = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
    at = (*shape[:-1], -(-k // 8))
    left = {key: raw[key] for key in BITMASK_KEYS if key in raw}
    bitmap = _take(left, "bitmask", (torch.uint8,), at)
    sizes = _take(left, "shape", (torch.int64, torch.int32), (len(shape),))
    if (there := _values(sizes, "shape")) != list(shape):
        raise CompressedTensorsError(f"its shape says {there}; expected {list(shape)}")
    offsets = _take(left, "row_offsets", (torch.int64,), shape[:1] if len(shape) == 2 else ())
    values = left.pop("compressed", None)
    if values is None or len(values.shape) != 1 or values.shape[0] > rows * k:
        got = "missing" if values is None else f"{tuple(values.shape)}"
        raise CompressedTensorsError(f"its compressed is {got}; expected one dimension of at most {rows * k} values")
    nnz = values.shape[0]

    def read_bitmap() -> Tensor:
        found = bitmap.make().view(rows, -1)
        try:
            starts = row_starts(found, k)
        except ValueError as error:
            raise CompressedTensorsError(str(error)) from error
        if not torch.equal(offsets.make().view(-1), starts[:-1]) or int(starts[-1]) != nnz:
            raise CompressedTensorsError("its bitmask, row_offsets and compressed disagree; the file is damaged")
        return found

    return {"bitmap": Pending(torch.uint8, (rows, at[-1]), read_bitmap), "values": values}


def _packed_weight(packed: Pending, bits: int, n: int, k: int) -> Pending:
    if bits == 8:
        return _mapped(packed, torch.int8, (n, k), lambda words: (_to_bytes(words, k) ^ 0x80).view(torch.int8))

    def nibbles(words: Tensor) -> Tensor:
        data = _to_bytes(words, -(-k // 2))
        if k % 2:
            data[:, -1] &= 0x0F
        return data

    return _mapped(packed, torch.uint8, (n, -(-k // 2)), nibbles)


def _static_inputs(left: dict[str, Pending], scheme: Scheme) -> dict[str, Pending]:
    scale = _read_scale(_take(left, "input_scale", _SCALES, (1,), ()), "input_scale", (), least=0.0)
    if not scheme.affine:
        _drop_zeros(left, "input_zero_point")
        return {"input_scale": scale, "input_zero_point": _constant(SHIFT)}
    theirs = _take(left, "input_zero_point", (torch.int8, torch.int32), (1,), ())

    def shifted(zero_point: Tensor) -> Tensor:
        value = int(zero_point)
        if not -SHIFT <= value < SHIFT:
            raise CompressedTensorsError(f"its input_zero_point is {value}; expected -128 to 127")
        return torch.tensor(value + SHIFT, dtype=torch.int32)

    return {"input_scale": scale, "input_zero_point": _mapped(theirs, torch.int32, (), shifted)}


def _constant(value: int) -> Pending:
    return Pending(torch.int32, (), lambda: torch.tensor(value, dtype=torch.int32))


def _read_scale(item: Pending, key: str, shape: tuple[int, ...], least: float | None = None) -> Pending:
    def make(scale: Tensor) -> Tensor:
        scale = scale.float()
        if not scale.isfinite().all() or (least is not None and not (scale > least).all()):
            raise CompressedTensorsError(f"its {key} holds NaN, Inf or no scale; the file is damaged")
        return scale.reshape(()).expand(shape).clone() if scale.numel() == 1 else scale.reshape(shape)

    return _mapped(item, torch.float32, shape, make)


def _take(left: dict[str, Pending], key: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> Pending:
    item = left.pop(key, None)
    if item is None or item.dtype not in dtypes or item.shape not in shapes:
        got = "missing" if item is None else f"{item.dtype} {item.shape}"
        raise CompressedTensorsError(f"its {key} is {got}; expected {' or '.join(map(str, dtypes))} {shapes[0]}")
    return item


def _drop_zeros(left: dict[str, Pending], key: str) -> None:
    """Older files hold the zero points of symmetric schemes: zeros."""
    item = left.pop(key, None)
    if item is not None and item.make().any():
        raise CompressedTensorsError(f"its {key} is not 0, and its scheme is symmetric")


def _check_shape(item: Pending, n: int, k: int, key: str) -> None:
    if (there := _values(item, key)) != [n, k]:
        raise CompressedTensorsError(f"its {key} says {there}; expected {[n, k]}")


def _values(item: Pending, key: str) -> list[int]:
    return [int(value) for value in item.make()]
