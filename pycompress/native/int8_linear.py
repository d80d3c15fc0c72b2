"""``Int8Linear`` from numpy arrays; the formulas are those of ``pycompress/ops/int8_matmul.py``."""

from __future__ import annotations

import numpy as np

from pycompress.codes import (
    ACTIVATION_CODES,
    ACTIVATIONS,
    MODE_CODES,
    MODES,
    SMALLEST_SCALE,
    check_option,
    static_qparams,
)
from pycompress.native.arrays import Array, address, aligned_bytes, as_array, bias_code, float_values, plain_array
from pycompress.native.layer import Layer, Run, RunStrided
from pycompress.native.runtime import core

_OP = "native.Int8Linear"


def quantize_weight(weight: Array) -> tuple[Array, Array]:
    """Symmetric int8 by output row: ``scale[n] = max_k |w[n, k]| / 127``, ``q = clamp(round(w / scale), -127, 127)``.

    Args:
        weight: ``(N, K)``, float32, float64, float16 or ml_dtypes.bfloat16.

    Returns:
        ``(q, scale)``: int8 ``(N, K)`` and float32 ``(N,)``, those of ``pycompress.ops.quantize_weight``.

    Raises:
        TypeError, ValueError: no floating array ``(N, K)``, or NaN or Inf in a row.
    """
    array = as_array("quantize_weight", "weight", weight)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"quantize_weight: weight has dtype {array.dtype}, expected a floating one")
    if array.ndim != 2:
        raise ValueError(f"quantize_weight: weight has shape {array.shape}, expected (N, K)")
    w = array.astype(np.float32)
    largest = np.maximum(w.max(axis=1), -w.min(axis=1)) if w.shape[1] else np.zeros(w.shape[0], np.float32)
    bad = np.flatnonzero(~np.isfinite(largest))
    if bad.size:
        raise ValueError(
            f"quantize_weight: row {bad[0]} of the weight holds NaN or Inf ({bad.size} such rows); repair the weight "
            "or leave this layer in float"
        )
    scale = np.maximum(largest / np.float32(127), np.float32(SMALLEST_SCALE))
    return np.clip(np.rint(w / scale[:, None]), -127, 127).astype(np.int8), scale


class Int8Linear(Layer):
    """``act(x @ (weight * weight_scale)^T + bias)`` with int8 weights, as ``pycompress.nn.Int8Linear``.

    Args:
        weight: int8 ``(N, K)``, and weight_scale: float32 ``(N,)``; :func:`quantize_weight` makes both. The weight is
            packed for this CPU and not kept otherwise.
        bias: floating ``(N,)`` or None.
        mode: ``"dynamic"`` (x quantised per token), ``"static"`` (with the calibrated input_scale and
            input_zero_point) or ``"weight_only"`` (x stays float).
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        input_scale, input_zero_point: static mode only: a positive float, a whole number in 0..255.
        threads: the most that a call uses; by default :func:`pycompress.native.get_num_threads`.

    Raises:
        TypeError, ValueError: what does not fit, with what was expected.
    """

    _op = _OP

    def __init__(
        self,
        weight: Array,
        weight_scale: Array,
        bias: Array | None = None,
        *,
        mode: str = "dynamic",
        activation: str = "none",
        input_scale: float | None = None,
        input_zero_point: int | None = None,
        threads: int | None = None,
    ) -> None:
        check_option(_OP, "mode", mode, MODES)
        check_option(_OP, "activation", activation, ACTIVATIONS)
        plain = plain_array(_OP, "weight", weight, np.int8, (-1, -1))
        n, k = plain.shape
        self.in_features, self.out_features, self.mode, self.activation = k, n, mode, activation
        self.weight_scale = plain_array(_OP, "weight_scale", weight_scale, np.float32, (n,))
        self.bias = float_values(_OP, bias, n)
        self._statics = _statics(mode, input_scale, input_zero_point)
        self._packed = aligned_bytes(core.int8_packed_bytes(n, k))
        core.int8_pack(address(plain), n, k, k, address(self._packed))
        self._set_threads(threads)
        self._plan = core.Int8Plan(
            address(self._packed),
            self._packed.size,
            address(self.weight_scale),
            n,
            address(self.bias),
            bias_code(self.bias),
            address(self._statics[0]),
            address(self._statics[1]),
            MODE_CODES[mode],
            ACTIVATION_CODES[activation],
        )
        self._both: tuple[Run, RunStrided] = self._plan.run, self._plan.run_strided
        self(np.zeros((1, k), np.float32))  # a value that the kernel refuses is said now

    @classmethod
    def from_float(
        cls,
        weight: Array,
        bias: Array | None = None,
        *,
        mode: str = "dynamic",
        activation: str = "none",
        input_range: tuple[float, float] | None = None,
        threads: int | None = None,
    ) -> Int8Linear:
        """Quantise a floating weight ``(N, K)``. input_range: least and greatest x, static mode only."""
        check_option(_OP, "mode", mode, MODES)
        scale, zero_point = static_qparams(mode, input_range, f"{_OP}.from_float") or (None, None)
        return cls(
            *quantize_weight(weight),
            bias,
            mode=mode,
            activation=activation,
            input_scale=scale,
            input_zero_point=zero_point,
            threads=threads,
        )

    @property
    def weight(self) -> Array:
        """int8 (N, K), unpacked anew at each access."""
        plain = np.empty((self.out_features, self.in_features), np.int8)
        core.int8_unpack(address(self._packed), self._packed.size, address(plain), self.in_features)
        return plain

    @property
    def kernel(self) -> str:
        return str(core.int8_kernel_name(address(self._packed), self._packed.size))

    def memory_bytes(self) -> int:
        """Bytes of memory that the layer holds."""
        held = (self._packed, self.weight_scale, self.bias)
        return sum(array.nbytes for array in held if array is not None)

    def _runs(self, m: int) -> tuple[Run, RunStrided]:
        return self._both

    def _details(self) -> str:
        return f"mode={self.mode}, activation={self.activation}"


def _statics(mode: str, scale: float | None, zero_point: int | None) -> tuple[Array | None, Array | None]:
    if mode != "static":
        if scale is not None or zero_point is not None:
            raise ValueError(f"{_OP}: input_scale and input_zero_point belong to mode='static', not {mode!r}")
        return None, None
    if scale is None or zero_point is None:
        raise ValueError(
            f"{_OP}: mode='static' needs input_scale and input_zero_point, from a calibrated checkpoint; or use "
            "mode='dynamic'"
        )
    if isinstance(zero_point, bool) or int(zero_point) != zero_point or not 0 <= zero_point <= 255:
        raise ValueError(f"{_OP}: input_zero_point={zero_point!r}, expected a whole number in 0..255")
    return np.array([scale], np.float32), np.array([zero_point], np.int32)
