"""Numpy arrays for the kernels: dtypes, rows of any strides, aligned memory, and the checks of both."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycompress.codes import ALIGNMENT, RowLayout, row_layout

Array = np.ndarray[Any, Any]
F32, BF16, F16 = 0, 1, 2  # Dtype of csrc/common/dtype.h
_FLOATS = "float32, float16 or bfloat16 (ml_dtypes.bfloat16, or its bits in uint16)"
_FLOAT32, _FLOAT16, _UINT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint16)


def float_code(dtype: np.dtype[Any]) -> int | None:
    """What the kernels call a floating dtype; None where they take none such."""
    if dtype == _FLOAT32:
        return F32
    if dtype == _FLOAT16:
        return F16
    bfloat16 = dtype == _UINT16 or (dtype.name == "bfloat16" and dtype.itemsize == 2)
    return BF16 if bfloat16 else None


def as_array(op: str, what: str, value: object) -> Array:
    """value itself; raises TypeError where it is no numpy array."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{op}: {what} is a {type(value).__name__}, expected a numpy array; numpy.asarray makes one")
    return value


def in_order(array: Array) -> Array:
    """The array, or a copy that is contiguous and aligned."""
    return np.require(array, requirements=("C", "A"))


def plain_array(op: str, what: str, value: object, dtype: type[np.generic], shape: tuple[int, ...]) -> Array:
    """A copy of ``value``, contiguous; -1 in ``shape`` is any size.

    Raises:
        TypeError, ValueError: no array, another dtype, another shape.
    """
    array = as_array(op, what, value)
    if array.dtype != dtype:
        raise TypeError(f"{op}: {what} has dtype {array.dtype}, expected {np.dtype(dtype).name}")
    same = len(shape) == array.ndim and all(a in (-1, b) for a, b in zip(shape, array.shape, strict=True))
    if not same:
        expected = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{op}: {what} has shape {array.shape}, expected ({expected})")
    return np.array(array, order="C", copy=True)


def float_values(op: str, bias: object, n: int) -> Array | None:
    """A copy of a bias, or None.

    Raises:
        TypeError, ValueError: not floating, or not (N,).
    """
    if bias is None:
        return None
    array = as_array(op, "bias", bias)
    if float_code(array.dtype) is None:
        raise TypeError(f"{op}: bias has dtype {array.dtype}, expected {_FLOATS}")
    if array.shape != (n,):
        raise ValueError(f"{op}: bias has shape {array.shape}, expected ({n},), one value an output")
    return np.array(array, order="C", copy=True)


def bias_code(bias: Array | None) -> int:
    """The code of the dtype of what float_values gave."""
    return F32 if bias is None else float_code(bias.dtype) or F32


def rows_of(op: str, x: object, k: int) -> tuple[Array, RowLayout, int]:
    """x as the kernels read it, how its rows lie, and the code of its dtype.

    Copied only where the kernels could not read it: more than two levels of rows, steps back, elements out of line.

    Raises:
        TypeError, ValueError: no array, not floating, a scalar, another K.
    """
    array = as_array(op, "x", x)
    code = float_code(array.dtype)
    if code is None:
        remedy = "; x.astype(numpy.float32) makes it so" if array.dtype.kind in "fiub" else ""
        raise TypeError(f"{op}: x has dtype {array.dtype}, expected {_FLOATS}{remedy}")
    if array.ndim == 0:
        raise ValueError(f"{op}: x is a scalar, expected (..., K={k})")
    if array.shape[-1] != k:
        raise ValueError(f"{op}: x has K={array.shape[-1]} but weight has K={k}")
    size = array.itemsize
    if array.flags.aligned and not array.flags.c_contiguous and all(s >= 0 and s % size == 0 for s in array.strides):
        layout = row_layout(array.shape, [stride // size for stride in array.strides])
        if layout is not None:
            return array, layout, code
    array = in_order(array)
    m = array.size // k if k else int(np.prod(array.shape[:-1]))
    return array, (m, k, max(m, 1), 0, k, 1), code


def address(array: Array | None) -> int:
    """Of its first element; 0 for None."""
    return 0 if array is None else array.__array_interface__["data"][0]


def aligned_bytes(count: int) -> Array:
    """uint8 (count,) that starts at a multiple of ALIGNMENT."""
    memory = np.empty(count + ALIGNMENT, dtype=np.uint8)
    begin = -address(memory) % ALIGNMENT
    return memory[begin : begin + count]
