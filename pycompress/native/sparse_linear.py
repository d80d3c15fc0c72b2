"""``SparseLinear`` from numpy arrays; the forms of the weight are those of ``pycompress/ops/sparse_linear.py``."""

from __future__ import annotations

import numpy as np

from pycompress.codes import ACTIVATION_CODES, ACTIVATIONS, check_option
from pycompress.native.arrays import (
    Array,
    address,
    aligned_bytes,
    as_array,
    bias_code,
    float_code,
    float_values,
    in_order,
    plain_array,
)
from pycompress.native.int8_linear import quantize_weight
from pycompress.native.layer import Layer, Run, RunStrided
from pycompress.native.runtime import core

_OP = "native.SparseLinear"
FORMATS = ("auto", "bitmap", "index")
BITMAP_TOKENS = 8  # of them the bitmap kernels expand the weight once; beyond, the lists of the index form win
_WEIGHT_TYPES = {0: 0, 1: 1}  # float_code -> WeightType of csrc/sparse_linear: float32, bfloat16
_INT8 = 2


class SparseLinear(Layer):
    """``act(x @ (W ⊙ mask)^T + bias)`` with a pruned weight, as ``pycompress.nn.SparseLinear``.

    Args:
        weight_bitmap: uint8 ``(N, ceil(K/8))``: bit ``k % 8`` of byte ``k // 8`` of row n is 1 where a weight is kept.
        weight_values: ``(nnz,)`` float32, bfloat16 or int8: the kept weights, row after row.
        weight_scale: float32 ``(N,)``, with int8 values only; x is then quantised per token.
        bias: floating ``(N,)`` or None.
        in_features: K, which the bitmap knows only to the next byte; by default 8 times its width.
        format: ``"bitmap"``: few tokens; ``"index"``: many; ``"auto"``: the bitmap for up to 8 tokens, the index form
            beyond. A format that was named saves the memory of the other form.
        activation, threads: as of :class:`pycompress.native.Int8Linear`.

    Raises:
        TypeError, ValueError: what does not fit, a bit past K or a wrong number of values included.
    """

    _op = _OP

    def __init__(
        self,
        weight_bitmap: Array,
        weight_values: Array,
        weight_scale: Array | None = None,
        bias: Array | None = None,
        *,
        in_features: int | None = None,
        activation: str = "none",
        format: str = "auto",
        threads: int | None = None,
    ) -> None:
        check_option(_OP, "activation", activation, ACTIVATIONS)
        check_option(_OP, "format", format, FORMATS)
        self._bitmap = plain_array(_OP, "weight_bitmap", weight_bitmap, np.uint8, (-1, -1))
        n, width = self._bitmap.shape
        k = 8 * width if in_features is None else in_features
        if -(-k // 8) != width:
            raise ValueError(f"{_OP}: in_features={k} needs {-(-k // 8)} bytes a row, weight_bitmap has {width}")
        self.in_features, self.out_features, self.activation, self.format = k, n, activation, format
        self._values, self._type = _values(weight_values)
        self.weight_scale = _scale(weight_scale, self._type == _INT8, n)
        self.bias = float_values(_OP, bias, n)
        self._row_start = self._starts()
        self._index = None if format == "bitmap" else self._pack_index()
        self._set_threads(threads)
        self._plan = core.SparsePlan(
            self._type,
            n,
            k,
            address(self.weight_scale),
            address(self.bias),
            bias_code(self.bias),
            ACTIVATION_CODES[activation],
            address(self._bitmap),
            address(self._values),
            address(self._row_start),
            address(self._index),
            0 if self._index is None else self._index.size,
        )
        self._few: tuple[Run, RunStrided] = self._plan.run_bitmap, self._plan.run_bitmap_strided
        self._many = self._few if self._index is None else (self._plan.run_index, self._plan.run_index_strided)
        self._most_few = -1 if format == "index" else BITMAP_TOKENS

    @classmethod
    def from_dense(
        cls,
        weight: Array,
        mask: Array | None = None,
        bias: Array | None = None,
        *,
        dtype: str = "float32",
        activation: str = "none",
        format: str = "auto",
        threads: int | None = None,
    ) -> SparseLinear:
        """From a floating weight ``(N, K)``.

        Args:
            mask: bool ``(N, K)``, True where a weight is kept; by default where it is not 0.
            dtype: ``"float32"`` or ``"int8"``: of the kept weights. bfloat16 values are given to the constructor.
        """
        op = f"{_OP}.from_dense"
        check_option(op, "dtype", dtype, ("float32", "int8"))
        array = as_array(op, "weight", weight)
        if array.ndim != 2:
            raise ValueError(f"{op}: weight has shape {array.shape}, expected (N, K)")
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise TypeError(f"{op}: weight has dtype {array.dtype}, expected a floating one")
        w = array.astype(np.float32)
        kept = w != 0 if mask is None else plain_array(op, "mask", mask, np.bool_, w.shape)
        w = np.where(kept, w, np.float32(0))
        bad = np.flatnonzero(~np.isfinite(w).all(axis=1))
        if bad.size:
            raise ValueError(
                f"{op}: row {bad[0]} of the weight holds NaN or Inf ({bad.size} such rows); repair the weight or leave "
                "this layer as it is"
            )
        scale = None
        values: Array = w
        if dtype == "int8":
            values, scale = quantize_weight(w)
        return cls(
            np.packbits(kept, axis=1, bitorder="little"),
            values[kept],
            scale,
            bias,
            in_features=w.shape[1],
            activation=activation,
            format=format,
            threads=threads,
        )

    def to_dense(self) -> Array:
        """``W ⊙ mask`` (N, K): in the kept weights' dtype, or int8 times scale in float32."""
        kept = np.unpackbits(self._bitmap, axis=1, count=self.in_features, bitorder="little").astype(bool)
        dense = np.zeros(kept.shape, self._values.dtype)
        dense[kept] = self._values
        return dense if self.weight_scale is None else dense.astype(np.float32) * self.weight_scale[:, None]

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return self._values.size

    @property
    def kernel(self) -> str:
        few = str(core.sparse_bitmap_kernel_name(self._type))
        if self._index is None:
            return few
        many = str(core.sparse_index_info(address(self._index), self._index.size)["kernel"])
        return many if self.format == "index" else f"{few}+{many}"

    def memory_bytes(self) -> int:
        """Bytes of memory that the layer holds."""
        held = (self._bitmap, self._values, self.weight_scale, self.bias, self._row_start, self._index)
        return sum(array.nbytes for array in held if array is not None)

    def _runs(self, m: int) -> tuple[Run, RunStrided]:
        return self._few if m <= self._most_few else self._many

    def _starts(self) -> Array:
        """Where each row's values begin, and their number, which is checked; so are bits past K."""
        starts = np.zeros(self.out_features + 1, np.int64)
        core.sparse_scan(address(self._bitmap), self.out_features, self.in_features, address(starts))
        if starts[-1] != self._values.size:
            raise ValueError(
                f"{_OP}: weight_bitmap keeps {starts[-1]} weights but there are {self._values.size} values; one of "
                "them is damaged or of another layer"
            )
        return starts

    def _pack_index(self) -> Array | None:
        places = address(self._bitmap), address(self._values), address(self._row_start)
        packed = core.sparse_pack_index(*places, self.out_features, self.in_features, self._type)
        if not packed:  # a weight so wide that no list holds its columns: the bitmap computes every call
            return None
        index = aligned_bytes(len(packed))
        index[:] = np.frombuffer(packed, np.uint8)
        return index


def _values(value: object) -> tuple[Array, int]:
    array = as_array(_OP, "weight_values", value)
    if array.ndim != 1:
        raise ValueError(f"{_OP}: weight_values have shape {array.shape}, expected (nnz,)")
    if array.dtype == np.int8:
        return in_order(array.copy()), _INT8
    code = float_code(array.dtype)
    if code not in _WEIGHT_TYPES:
        remedy = "; values.astype(numpy.float32) makes them so" if array.dtype == np.float16 else ""
        raise TypeError(
            f"{_OP}: weight_values have dtype {array.dtype}, expected float32, int8 or bfloat16 (ml_dtypes.bfloat16, "
            f"or its bits in uint16){remedy}"
        )
    return in_order(array.copy()), _WEIGHT_TYPES[code]


def _scale(value: object, wanted: bool, n: int) -> Array | None:
    if (value is not None) != wanted:
        raise ValueError(
            f"{_OP}: weight_scale is {'given' if value is not None else 'missing'}; int8 values need one, others take "
            "none"
        )
    return plain_array(_OP, "weight_scale", value, np.float32, (n,)) if wanted else None
