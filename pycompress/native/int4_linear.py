"""``Int4Linear`` from numpy arrays; the formats are those of ``pycompress/ops/int4_matmul_weight.py``."""

from __future__ import annotations

import numpy as np

from pycompress.codes import ACTIVATION_CODES, ACTIVATIONS, INT4_FORMATS, check_option
from pycompress.native.arrays import Array, address, aligned_bytes, bias_code, float_values, plain_array
from pycompress.native.layer import Layer, Run, RunStrided
from pycompress.native.runtime import core

_OP = "native.Int4Linear"


class Int4Linear(Layer):
    """``act(x @ W^T + bias)`` with 4 bits a weight and one scale a group, as ``pycompress.nn.Int4Linear``.

    Args:
        weight: uint8 ``(N, ceil(K/2))``: byte j holds k = 2j in its low nibble and k = 2j + 1 in the high one.
        weight_scale: float32 ``(N, ceil(K/group_size))``.
        weight_zero_point: uint8, as the scales, of format ``"int4"``; by default 8 everywhere.
        bias: floating ``(N,)`` or None.
        in_features: K; by default twice the weight's width.
        group_size: neighbours in a row that share a scale; -1: the whole row.
        format: ``"int4"``: ``scale * (q - zero_point)``, or ``"nf4"``: ``scale * NF4[q]``.
        activation, threads: as of :class:`pycompress.native.Int8Linear`.

    Raises:
        TypeError, ValueError: what does not fit, with what was expected.
    """

    _op = _OP

    def __init__(
        self,
        weight: Array,
        weight_scale: Array,
        weight_zero_point: Array | None = None,
        bias: Array | None = None,
        *,
        in_features: int | None = None,
        group_size: int = 128,
        format: str = "int4",
        activation: str = "none",
        threads: int | None = None,
    ) -> None:
        check_option(_OP, "format", format, INT4_FORMATS)
        check_option(_OP, "activation", activation, ACTIVATIONS)
        plain = plain_array(_OP, "weight", weight, np.uint8, (-1, -1))
        n, width = plain.shape
        k = 2 * width if in_features is None else in_features
        if -(-k // 2) != width:
            raise ValueError(f"{_OP}: in_features={k} needs {-(-k // 2)} bytes a row of weight, which has {width}")
        size = max(k, 1) if group_size == -1 else group_size
        if size < 1:
            raise ValueError(f"{_OP}: group_size={group_size}, expected at least 1, or -1 for the whole row")
        if weight_zero_point is not None and format != "int4":
            raise ValueError(f"{_OP}: weight_zero_point belongs to format='int4', not {format!r}")
        groups = (n, -(-k // size))
        scale = plain_array(_OP, "weight_scale", weight_scale, np.float32, groups)
        zero = None
        if weight_zero_point is not None:
            zero = plain_array(_OP, "weight_zero_point", weight_zero_point, np.uint8, groups)
        self.in_features, self.out_features, self.activation = k, n, activation
        self.group_size, self.format, self.symmetric = size, format, zero is None
        self.bias = float_values(_OP, bias, n)
        code, asymmetric = INT4_FORMATS.index(format), zero is not None
        self._packed = aligned_bytes(core.int4_packed_bytes(n, k, size, code, asymmetric))
        places = address(plain), address(scale), address(zero)
        core.int4_pack(*places, n, k, size, code, asymmetric, address(self._packed))
        self._set_threads(threads)
        held = address(self._packed), self._packed.size
        self._plan = core.Int4Plan(*held, address(self.bias), bias_code(self.bias), ACTIVATION_CODES[activation])
        self._both: tuple[Run, RunStrided] = self._plan.run, self._plan.run_strided

    @property
    def kernel(self) -> str:
        return str(core.int4_kernel_name(address(self._packed), self._packed.size))

    def memory_bytes(self) -> int:
        """Bytes of memory that the layer holds."""
        return self._packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def _runs(self, m: int) -> tuple[Run, RunStrided]:
        return self._both

    def _details(self) -> str:
        symmetric = "" if self.symmetric else ", symmetric=False"
        return f"format={self.format}, group_size={self.group_size}{symmetric}, activation={self.activation}"
