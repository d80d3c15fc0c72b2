"""The cost model of a GPU: its clock, its key, calibration and cache. Nothing is timed: a made-up GPU stands in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import cost_cache, cost_calibration, cost_model, cost_target
from pycompress.cost_core import FORMS, Fit
from pycompress.cost_gpu import (
    GPU_COUNTS,
    GPU_DTYPES,
    GPU_FIGURES,
    RATES,
    EventClock,
    GpuShape,
    estimated_fits,
    gpu_layer,
)
from pycompress.cost_target import GpuBench, GpuTarget
from pycompress.ops import SPARSE_DTYPES
from tests.gpu import Gpu


class FakeCuda:
    """What torch.cuda says of a GPU that is not there; its events tell a clock that calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, later: Event) -> float:
                return 1e3 * (later.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(cost_target, "rates_of", lambda device: RATES[90])


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> GpuTarget:
    FakeCuda(monkeypatch)
    return GpuTarget(torch.device("cuda", 0), ("cuda", "triton"))


def test_event_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    clock = EventClock(torch.device("cuda", 0))
    start = clock()
    cuda.now += 0.25
    assert clock() - start == pytest.approx(0.25)
    cuda.now += 1e-5
    assert clock() - start == pytest.approx(0.25001)


def test_key_names_what_times_depend_on(h100: GpuTarget) -> None:
    key = h100.key()
    assert key["gpu"] == "NVIDIA H100 80GB HBM3"
    assert (key["capability"], key["backends"]) == (90, "cuda+triton")
    assert set(key) == {"gpu", "capability", "backends", "cuda", "triton", "torch", "pycompress", "version"}
    other = GpuTarget(torch.device("cuda", 0), ("triton",)).key()
    assert cost_cache.cache_path(key) != cost_cache.cache_path(other)


def test_calibrated_once_and_kept_on_disk(h100: GpuTarget, own_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(self: GpuTarget, dtype: str, progress: object) -> dict[tuple[str, str], Fit]:
        measured.append(dtype)
        return {(dtype, f): Fit((1, 8), ((1e-6, 0, 0, 0, 0.5e-12),) * 2) for f in GPU_FIGURES}

    monkeypatch.setattr(GpuTarget, "measure", measure)
    model = cost_model._calibrate(h100, "float16", False, None)
    assert (model.measured, model.machine, measured) == ({"float16"}, h100.key(), ["float16"])
    assert cost_model._calibrate(h100, "float16", False, None) is model
    cost_model._models.clear()  # as another process
    again = cost_model._model_of(h100)
    assert (again.fits, again.measured, again.machine) == (model.fits, model.measured, model.machine)
    assert measured == ["float16"]
    assert cost_model.default_cost_model().measured == frozenset(), "the CPU's is another"
    (path,) = own_cache.iterdir()
    monkeypatch.setenv("PYCOMPRESS_COST_MODEL", str(path))
    assert cost_model._model_of(h100).measured == {"float16"}
    assert cost_model.default_cost_model().measured == frozenset(), "a file of a GPU says nothing of the CPU"
    content = json.loads(path.read_text())
    for name in ("float16 csr", "int4 dense"):
        path.write_text(json.dumps({**content, "fits": {name: {"tokens": [1], "rows": [[1.0] * GPU_COUNTS]}}}))
        with pytest.raises(ValueError, match="it has figures for"):
            cost_cache.from_json(path.read_text())


def test_a_made_up_gpu_is_measured(h100: GpuTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """measure_fits finds the figures of a machine whose times are those of an A10, from its own guess of an H100."""
    real = estimated_fits(RATES[86])
    now = [0.0]

    class Made(GpuBench):
        def in_forms(self, spec: Any, dtype: str) -> Any:
            n, k, sparsity, structure = spec
            kept = round(n * k * (1 - sparsity))
            shape = GpuShape(n, k, kept, dtype, 0, 0, 0, dtype, structure, kept if structure else 0)
            return {f: self.timed(f, shape) for f in (FORMS if structure else ("bitmap", "dense"))}, shape

        def timed(self, form: str, shape: GpuShape) -> nn.Module:
            class Timed(nn.Module):
                def forward(self, x: Tensor) -> Tensor:
                    now[0] += real[shape.figures(form)].predict(x.shape[0], shape.counts(form))
                    return x

            return Timed()

        def activations(self, m: int, k: int, dense: str) -> Tensor:
            return torch.empty(m, 1)

    monkeypatch.setattr(cost_calibration, "_SECONDS", 0.0)
    fits = cost_calibration.measure_fits("float16", clock=lambda: now[0], bench=Made(h100))
    assert set(fits) == {("float16", figure) for figure in GPU_FIGURES}
    for figure in GPU_FIGURES:
        form = figure if figure in ("bitmap", "dense") else "index"
        shape = GpuShape(2048, 2048, 2**21, "float16", 0, 0, 0, "float16", figure, 2**21)
        for m in (1, 16, 64):
            counts = shape.counts(form)
            assert fits["float16", figure].predict(m, counts) == pytest.approx(
                real["float16", figure].predict(m, counts), rel=0.3
            ), (figure, m)


def test_layers_of_the_calibration_are_what_they_say(gpu: Gpu) -> None:
    for structure in ("", "block32", "2:4"):
        for dtype in ("float16", "int8"):
            module = gpu_layer(128, 96, 0.5, structure, dtype, torch.device(gpu.device))
            shape = GpuShape.of_gpu_layer(module, ("cuda", "triton"))
            assert (shape.n, shape.k, shape.dtype, shape.structure) == (128, 96, dtype, structure)
            assert len(shape.counts("index")) == GPU_COUNTS
    assert set(GPU_DTYPES) == set(SPARSE_DTYPES)
