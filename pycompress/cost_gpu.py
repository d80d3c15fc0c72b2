"""The cost model of a GPU: what a layer's forms cost there, counted and estimated, or measured with CUDA events.

The forms are those of pycompress/ops/sparse_linear_gpu.py. Each takes

    seconds = a + b n + c k + d bytes + e places      at each number of tokens of a grid, as in cost_core.py

bytes: of the weight in that form; places: what is multiplied, pruned places of a kept block included. Where nothing was
measured, as under Triton's interpreter, the coefficients are `estimated_fits`: the bytes over the documented bandwidth,
and the operations over the documented rates, of a known GPU of the device's architecture. Their ratios choose a form;
no time in seconds is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pycompress import gpu
from pycompress.cost_core import VALUE_BYTES, Fit, Shape
from pycompress.ops.sparse_linear_forms import BLOCKS, KIND_NAMES, TWO_OF_FOUR
from pycompress.ops.sparse_linear_gpu import structure_of
from pycompress.ops.sparse_linear_reference import dense_dtype
from pycompress.ops.sparse_linear_weight import SPARSE_DTYPES

if TYPE_CHECKING:
    from pycompress.nn import SparseLinear

GPU_DTYPES = tuple(SPARSE_DTYPES)
STRUCTURES = (*(f"block{block}" for block in BLOCKS), KIND_NAMES[TWO_OF_FOUR])
GPU_FIGURES = ("bitmap", *STRUCTURES, "dense")
GPU_COUNTS = 5  # coefficients of a form
_NAMES = {dtype: name for name, dtype in SPARSE_DTYPES.items()}


@dataclass(frozen=True)
class GpuShape(Shape):
    """structure: of STRUCTURES, or "" where there is no index form. stored: places of the weight that it holds."""

    structure: str = ""
    stored: int = 0

    @classmethod
    def of_gpu_layer(cls, layer: SparseLinear, backends: tuple[str, ...]) -> GpuShape:
        """Of a SparseLinear whose kernels are those of `backends`; waits for the device."""
        from pycompress.nn.sparse_forms import dtype_of_x

        n, k, nnz = layer.out_features, layer.in_features, layer.nnz
        structure, stored = structure_of(layer.weight_bitmap, layer.weight_values, k, backends)
        values = layer.weight_values.dtype
        dense = layer.dtype if layer.dtype == "int8" else _NAMES[dense_dtype(values, dtype_of_x(layer))]
        return cls(n, k, nnz, layer.dtype, 0, 0, 0, dense, structure, stored)

    def key(self) -> tuple[int | str, ...]:
        cells = max(self.n * self.k, 1)
        kept, stored = (round(100 * count / cells) for count in (self.nnz, self.stored))
        return self.n, self.k, self.dtype, self.dense, kept, stored, self.structure

    def figures(self, form: str) -> tuple[str, str]:
        return (self.dense, form) if form == "dense" else (self.dtype, self.structure if form == "index" else form)

    def step(self, form: str) -> int:
        return 1

    def counts(self, form: str) -> tuple[float, ...]:
        n, k, cells, size = self.n, self.k, self.n * self.k, VALUE_BYTES[self.dtype]
        if form == "dense":
            return (1.0, n, k, cells * VALUE_BYTES[self.dense], cells)
        if form == "bitmap":
            return (1.0, n, k, cells / 8 + self.nnz * size, cells)
        return (1.0, n, k, self.stored * size, self.stored)


# ---- estimates ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What the data sheet of a GPU says, a second: bytes of memory; operations (a multiply-add is two)."""

    name: str
    memory: float
    fp32: float
    tensor16: float
    tensor8: float


# The best known GPU of each architecture; dense rates.
RATES = {
    80: Rates("A100", 2.04e12, 19.5e12, 312e12, 624e12),
    86: Rates("A10", 0.60e12, 31.2e12, 125e12, 250e12),
    89: Rates("L40S", 0.86e12, 91.6e12, 362e12, 733e12),
    90: Rates("H100", 3.35e12, 67e12, 989e12, 1979e12),
    100: Rates("B200", 8.0e12, 75e12, 2250e12, 4500e12),
    120: Rates("RTX 5090", 1.79e12, 105e12, 210e12, 838e12),
}
_GRID = (1, 4, 16, 32, 64, 128, 512, 2048)
_CALL = 1e-5  # a call in eager mode; that int8 has a launch more is in its x
_CACHED = 3.0  # times memory: the rate at which the second-level cache is read
# What of the documented rate a kernel reaches, at many tokens: cuBLAS is tuned, ours have never been timed.
_REACH = {"dense": 0.7, "index": 0.5}
# Instructions that find a place's weight from the bitmap and multiply it, counted in the machine code of the Triton
# kernel for sm_80. A multiply-add, two operations of a data sheet, is one of them.
_EXPAND = 27.0
_BITMAP_TOKENS = (1, 4, 16)  # of kernels/sparse_linear.py: rows of x for which a weight is expanded once


def rates_of(device: torch.device) -> Rates:
    """Of the newest known architecture that is no newer than the device's."""
    found = gpu.capability(torch.empty(0, device=device))
    return RATES[max(known for known in RATES if known <= max(found, 80))]


def estimated_fits(rates: Rates) -> dict[tuple[str, str], Fit]:
    """For every dtype and form, from documented rates alone."""
    return {
        (dtype, figure): Fit(_GRID, tuple(_estimate(dtype, figure, m, rates) for m in _GRID))
        for dtype in GPU_DTYPES
        for figure in GPU_FIGURES
    }


def _estimate(dtype: str, figure: str, m: int, rates: Rates) -> tuple[float, ...]:
    size = VALUE_BYTES[dtype]
    x_size = 5 if dtype == "int8" else size  # int8: x is read in 16 bits, its bytes are written and read
    tensor = rates.fp32 if dtype == "float32" else rates.tensor8 if dtype == "int8" else rates.tensor16
    if figure == "bitmap":
        tokens = next((t for t in _BITMAP_TOKENS if m <= t), _BITMAP_TOKENS[-1])
        passes = -(-m // tokens)
        again = (passes - 1) / (_CACHED * rates.memory)
        place = passes * (2 * _EXPAND / rates.fp32 + 2 * tokens / (tensor if tokens == 16 else rates.fp32))
        return (_CALL, m * max(size, 2) / rates.memory, m * x_size / rates.memory, 1 / rates.memory + again, place)
    padded = -(-m // 16) * 16
    place = 2 * padded / (tensor * _REACH["dense" if figure == "dense" else "index"])
    if figure.startswith("block"):  # each row of blocks reads its columns of x anew
        place += m * size / (int(figure.removeprefix("block")) * _CACHED * rates.memory)
    return (_CALL, m * max(size, 2) / rates.memory, m * x_size / rates.memory, 1 / rates.memory, place)


# ---- measuring ------------------------------------------------------------------------------------------------------


class EventClock:
    """Seconds on a device, by CUDA events: each call waits for what was launched before. Never while a graph is
    captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, 0.0
        self._last = self._event()

    def __call__(self) -> float:
        now = self._event()
        # Steps of one call each: as one span since the start, a float of milliseconds would lose the microseconds.
        self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds

    def _event(self) -> torch.cuda.Event:
        with torch.cuda.device(self._device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            event.synchronize()
        return event


# (N, K, sparsity, structure): where the call itself takes the time, the sizes of language models, past the cache.
GPU_LAYERS = (
    (256, 256, 0.8, ""),
    (1024, 1024, 0.5, ""),
    (4096, 1024, 0.9, ""),
    (4096, 4096, 0.8, ""),
    (8192, 4096, 0.7, ""),
    *(
        spec
        for block in BLOCKS
        for spec in (
            (512, 512, 0.75, f"block{block}"), (1024, 4096, 0.9, f"block{block}"), (4096, 4096, 0.8, f"block{block}"),
            (4096, 1024, 0.5, f"block{block}"),
        )
    ),
    *(
        (n, k, 0.5, KIND_NAMES[TWO_OF_FOUR])
        for n, k in ((512, 512), (1024, 4096), (4096, 1024), (4096, 4096), (8192, 4096))
    ),
)  # fmt: skip
GPU_TOKENS = {
    "bitmap": (1, 2, 4, 8, 16, 64),
    "index": (1, 16, 64, 128, 512, 2048),
    "dense": (1, 4, 16, 64, 128, 512, 2048),
}
GPU_MOST_WORK = 1e11


def gpu_layer(n: int, k: int, sparsity: float, structure: str, dtype: str, device: torch.device) -> SparseLinear:
    """A random layer of this structure and sparsity, in the bitmap form."""
    from pycompress.nn import SparseLinear

    generator = torch.Generator().manual_seed(n + k)
    float_dtype = torch.float32 if dtype == "int8" else SPARSE_DTYPES[dtype]
    linear = nn.Linear(k, n, device="meta")
    linear.weight = nn.Parameter(_normal((n, k), generator, device).to(float_dtype) / k**0.5, requires_grad=False)
    linear.bias = nn.Parameter(torch.zeros(n, device=device, dtype=float_dtype), requires_grad=False)
    if structure == KIND_NAMES[TWO_OF_FOUR]:
        order = torch.rand(n, k // 4, 4, generator=generator).argsort(2)
        mask = (order < 2).reshape(n, k)
    else:
        block = int(structure.removeprefix("block") or 1)
        mask = torch.rand(n // block, k // block, generator=generator) >= sparsity
        mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return SparseLinear.from_dense(linear, mask.to(device), dtype=dtype, format="bitmap")


def _normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(*shape, generator=generator).to(device)
