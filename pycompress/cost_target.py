"""What differs between the machines that a layer may be on, for the cost model: the CPU, or a GPU.

Everything else in the cost model asks the target of a layer: which counts its time depends on, what figures there are
before any was measured, how it is measured, and under which key the figures are kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycompress import cost_cache, cost_calibration
from pycompress.cost_builtin import BUILTIN_FITS, BUILTIN_THREADS
from pycompress.cost_calibration import Bench, Clock, Progress
from pycompress.cost_core import DTYPES, CostModel, Fit, Shape
from pycompress.cost_gpu import (
    GPU_DTYPES,
    GPU_LAYERS,
    GPU_MOST_WORK,
    GPU_TOKENS,
    EventClock,
    GpuShape,
    estimated_fits,
    gpu_layer,
    rates_of,
)
from pycompress.ops.sparse_linear_gpu import gpu_backends
from pycompress.version import __version__

if TYPE_CHECKING:
    from pycompress.nn import SparseLinear


class CpuTarget:
    """The CPU, with torch's number of threads."""

    dtypes: tuple[str, ...] = DTYPES
    device_type = "cpu"
    can_measure: bool = True

    def key(self) -> dict[str, Any]:
        """What the times depend on besides the layer."""
        return cost_cache.machine_key(torch.get_num_threads())

    def machine(self) -> dict[str, Any] | None:
        """The key as a CostModel keeps it."""
        return None

    def builtin(self) -> CostModel:
        """The model before anything was measured."""
        return CostModel(BUILTIN_FITS, threads=BUILTIN_THREADS, measured=frozenset())

    def is_of(self, model: CostModel) -> bool:
        """Whether a model is of such a machine at all."""
        return not model.machine

    def shape(self, layer: SparseLinear) -> Shape:
        return Shape.of_layer(layer)

    def measure(self, dtype: str, progress: Progress | None) -> dict[tuple[str, str], Fit]:
        """The fits of a weight dtype, see measure_fits."""
        return cost_calibration.measure_fits(dtype, progress=progress)

    def clock(self) -> Clock:
        return time.perf_counter

    def activations(self, m: int, k: int, dense: str) -> Tensor:
        """x (m, k) as a dense layer of this dtype is fed."""
        return cost_calibration.activations(m, k, dense)

    def figures(self, model: CostModel, shape: Shape) -> str:
        """In words, where a layer's predictions come from."""
        known = {shape.dtype, shape.dense} <= model.measured
        words = "this machine's calibration" if known else "built-in figures"
        return f"{words} for {model.threads} thread{'s' if model.threads > 1 else ''}"

    def predicted(self, model: CostModel, shape: Shape) -> str:
        """The word for a time that was not measured on the layer."""
        return "predicted"


class GpuTarget(CpuTarget):
    """A GPU, with the backends that run there. On the CPU, where kernels are emulated or interpreted: estimates."""

    dtypes = GPU_DTYPES

    def __init__(self, device: torch.device, backends: tuple[str, ...]) -> None:
        self.device, self.device_type, self.backends = device, device.type, backends
        self.can_measure = device.type == "cuda"

    def key(self) -> dict[str, Any]:
        name, capability = "none", 80
        if self.can_measure:
            name = torch.cuda.get_device_name(self.device)
            major, minor = torch.cuda.get_device_capability(self.device)
            capability = 10 * major + minor
        return {
            "gpu": name,
            "capability": capability,
            "backends": "+".join(self.backends),
            "cuda": torch.version.cuda,
            "triton": _triton_version(),
            "torch": torch.__version__,
            "pycompress": __version__,
            "version": cost_cache.VERSION,
        }

    def machine(self) -> dict[str, Any] | None:
        return self.key()

    def builtin(self) -> CostModel:
        return CostModel(estimated_fits(rates_of(self.device)), threads=1, measured=frozenset(), machine=self.key())

    def is_of(self, model: CostModel) -> bool:
        return bool(model.machine)

    def shape(self, layer: SparseLinear) -> Shape:
        return GpuShape.of_gpu_layer(layer, self.backends)

    def measure(self, dtype: str, progress: Progress | None) -> dict[tuple[str, str], Fit]:
        bench = GpuBench(self)
        return cost_calibration.measure_fits(dtype, clock=self.clock(), progress=progress, bench=bench)

    def clock(self) -> Clock:
        return EventClock(self.device)

    def activations(self, m: int, k: int, dense: str) -> Tensor:
        x = cost_calibration.activations(m, k, dense)
        return x.to(self.device, torch.float16 if dense == "float16" else x.dtype)

    def figures(self, model: CostModel, shape: Shape) -> str:
        if {shape.dtype, shape.dense} <= model.measured:
            return "this GPU's calibration"
        return f"counted bytes and the data sheet of {rates_of(self.device).name}: estimated, not measured"

    def predicted(self, model: CostModel, shape: Shape) -> str:
        return "predicted" if {shape.dtype, shape.dense} <= model.measured else "estimated"


class GpuBench(Bench):
    """What is measured on a GPU."""

    tokens = GPU_TOKENS
    most_work = GPU_MOST_WORK
    # Estimates leave out what a call costs the host; a stall of another program is longer still.
    out_of_line = 25.0
    slowest = 100.0

    def __init__(self, target: GpuTarget) -> None:
        self._target = target

    def layers(self, dtype: str) -> Sequence[tuple[int, int, float, Any]]:
        return GPU_LAYERS

    def in_forms(self, spec: tuple[int, int, float, Any], dtype: str) -> tuple[dict[str, nn.Module], Shape]:
        n, k, sparsity, structure = spec
        layer = gpu_layer(n, k, sparsity, structure, dtype, self._target.device)
        shape = GpuShape.of_gpu_layer(layer, self._target.backends)
        forms = ("bitmap", "index", "dense") if shape.structure else ("bitmap", "dense")
        return {form: cost_calibration.variant(layer, form, dtype) for form in forms}, shape

    def activations(self, m: int, k: int, dense: str) -> Tensor:
        return self._target.activations(m, k, dense)

    def expected(self) -> dict[tuple[str, str], Fit]:
        return estimated_fits(rates_of(self._target.device))


def _triton_version() -> str | None:
    from importlib import metadata  # triton itself is not imported for this

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def check_model(model: object, target: CpuTarget) -> None:
    """Raises ValueError for a model of a CPU where the layer is on a GPU, or the other way round."""
    if isinstance(model, CostModel) and not target.is_of(model):
        its = "a GPU" if model.machine else "a CPU"
        raise ValueError(
            f"cost_model: it is of {its}, the layer is not on one; calibrate_cost_model(device=...) measures a device"
        )


def target_of(layer: SparseLinear) -> CpuTarget:
    """Where a layer's forms are read."""
    from pycompress.nn.sparse_forms import NATIVE, backends_of

    backends = backends_of(layer.weight_values, layer.backend)
    return GpuTarget(layer.weight_bitmap.device, backends) if backends and backends != NATIVE else CpuTarget()


def target_on(device: torch.device | str | None) -> CpuTarget:
    """The CPU for None; else the device.

    Raises:
        ValueError: a device without kernels.
    """
    device = torch.device("cpu" if device is None else device)
    if device.type == "cpu":
        return CpuTarget()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"cost_model: device={device}, but torch finds no GPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    backends = gpu_backends(torch.empty(0, device=device), "auto")
    if not backends:
        raise ValueError(f"cost_model: device={device}, where none of the kernels run; pycompress info says why")
    return GpuTarget(device, backends)
