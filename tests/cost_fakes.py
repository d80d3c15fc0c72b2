"""A machine whose times are a formula, for tests of the cost model: nothing is timed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import nn

from pycompress import cost_calibration
from pycompress.cost_core import FORMS, CostModel, Fit, Shape, fit

_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_RATE = {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11}  # multiply-adds a second


def seconds_of(form: str, m: int, shape: Shape) -> float:
    """A plain roofline: bandwidth for few tokens, arithmetic for many; whole registers of tokens."""
    cells, size = shape.n * shape.k, _BYTES[shape.dtype]
    if form == "dense":
        return 4e-6 + max(m * cells / _RATE[shape.dense], cells * _BYTES[shape.dense] / 4e10)
    if form == "bitmap":
        return 3e-6 + max(1.0, m / 3) * (cells / 8 + shape.nnz * size) / 4e10
    walked = 3 * shape.columns + shape.nnz if shape.dtype != "int8" else 3 * shape.blocks + shape.units
    return 5e-6 + math.ceil(m / 16) * (shape.n * 1e-9 + shape.k * 2e-9 + walked * 3e-11)


def model_of(dtype: str, noise: float = 0.0) -> CostModel:
    """Fitted to seconds_of as a calibration would."""
    generator = random.Random(0)
    fits = {}
    for form in FORMS:
        samples = []
        layers = cost_calibration._INT8_LAYERS if dtype == "int8" else cost_calibration._FLOAT_LAYERS
        for n, k, sparsity, _ in layers:
            shape = Shape.random(n, k, sparsity, dtype)
            for m in cost_calibration._TOKENS[form]:
                measured = seconds_of(form, m, shape) * (1 + noise * generator.uniform(-1, 1))
                samples.append((m, shape.counts(form), measured))
        fits[dtype, form] = fit(samples)
    return CostModel(fits, threads=2, measured=frozenset((dtype,)))


def flat(**seconds: float | dict[int, float]) -> CostModel:
    """A model in which a form takes so long whatever the shape; a number or {M: seconds}."""
    fits = {}
    for form, value in seconds.items():
        table = value if isinstance(value, dict) else {1: value, 10**6: value}
        width = len(Shape.random(8, 8, 0.5, "float32").counts(form)) - 1
        fits["float32", form] = Fit(tuple(table), tuple((t, *[0.0] * width) for t in table.values()))
    return CostModel(fits, threads=1, measured=frozenset(("float32",)))


class FakeMachine:
    """A clock, and modules that move it."""

    def __init__(self, slower: dict[str, float] | None = None) -> None:
        self.now = 0.0
        self.calls = 0
        self.slower = slower or {}
        self.stall: Callable[[int], float] = lambda call: 0.0  # seconds that other programs take of a call

    def clock(self) -> float:
        return self.now

    def module(self, form: str, shape: Shape) -> nn.Module:
        machine = self

        class Timed(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                machine.now += seconds_of(form, x.shape[0], shape) * machine.slower.get(form, 1.0)
                machine.calls += 1
                machine.now += machine.stall(machine.calls)
                return x

        return Timed()
