"""The options of the linear layers by name, and the numbers that the compiled module has for them; without torch."""

from __future__ import annotations

from collections.abc import Sequence

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
MODES = ("dynamic", "static", "weight_only")
MODE_CODES = {name: code for code, name in enumerate(MODES)}
INT4_FORMATS = ("int4", "nf4")  # by their position
ALIGNMENT = 64  # bytes, of packed weights

SMALLEST_SCALE = 2.0**-126  # the least normal float32 keeps 1 / scale finite; see csrc/int8_matmul/int8_matmul.h


def check_option(op: str, what: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ``ValueError`` for a name that is not one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{op}: {what}={value!r}, expected one of {', '.join(allowed)}")


def affine_qparams(x_min: float, x_max: float) -> tuple[float, int]:
    """Scale and zero point (0..255) of the uint8 grid over ``[x_min, x_max]``, widened so that 0 is on the grid.

    Raises:
        ValueError: a bound is not finite, or ``x_min > x_max``.
    """
    low, high = min(float(x_min), 0.0), max(float(x_max), 0.0)
    if not (x_min <= x_max and high - low < float("inf")):
        raise ValueError(f"affine_qparams: [{x_min}, {x_max}] is not a finite range with x_min <= x_max")
    scale = max((high - low) / 255.0, SMALLEST_SCALE)
    return scale, min(max(round(-low / scale), 0), 255)


def static_qparams(mode: str, input_range: tuple[float, float] | None, caller: str) -> tuple[float, int] | None:
    """Scale and zero point of static mode; None for the others.

    Raises:
        ValueError: a missing or superfluous range, or one that is none.
    """
    if (input_range is not None) != (mode == "static"):
        raise ValueError(
            f"{caller}: input_range={input_range} with mode={mode!r}; static mode needs a range "
            "(calibrate finds it), the others take none"
        )
    return None if input_range is None else affine_qparams(*input_range)


RowLayout = tuple[int, int, int, int, int, int]


def row_layout(shape: Sequence[int], strides: Sequence[int]) -> RowLayout | None:
    """(M, K, inner_rows, outer_stride, row_stride, col_stride) of an array ``(..., K)``: its rows in two levels.

    strides: in elements. None where the rows need three levels.
    """
    levels: list[tuple[int, int]] = []  # (size, stride) of the leading dimensions, adjacent ones merged
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == stride * size:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    inner, row_stride = levels[-1] if levels else (1, 0)
    outer, outer_stride = levels[0] if len(levels) == 2 else (1, 0)
    return inner * outer, shape[-1], max(inner, 1), outer_stride, row_stride, strides[-1]
