"""Measures what cost_core.py fits: a few layers in every form, at a few numbers of tokens, in a few seconds.

The machine may be shared, so the candidates of one comparison take turns and each keeps its least time: a slow
moment falls on all alike, and what is left is what the code costs.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pycompress.cost_builtin import BUILTIN_FITS
from pycompress.cost_core import FORMS, Fit, Shape, fit

if TYPE_CHECKING:
    from pycompress.nn import SparseLinear

Run = Callable[[], object]
Clock = Callable[[], float]
Progress = Callable[[int, int], None]  # layers done, layers in all

# (N, K, sparsity, block): tiny, where the call itself takes the time, small, the sizes of transformers, one past the
# last-level cache of most machines.
_FLOAT_LAYERS = (
    (32, 64, 0.75, (1, 1)),
    (256, 256, 0.8, (1, 1)),
    (768, 768, 0.5, (1, 1)),
    (768, 768, 0.9, (4, 1)),
    (3072, 768, 0.8, (1, 1)),
    (768, 3072, 0.95, (1, 1)),
    (256, 3072, 0.35, (1, 1)),
    (1536, 1536, 0.7, (1, 1)),
    (3072, 256, 0.98, (1, 1)),
    (3072, 3072, 0.8, (1, 1)),
)
_INT8_LAYERS = (
    (32, 64, 0.75, (4, 4)),
    (256, 256, 0.8, (4, 4)),
    (768, 768, 0.5, (4, 4)),
    (768, 768, 0.9, (1, 4)),
    (768, 768, 0.9, (1, 1)),
    (3072, 768, 0.8, (4, 1)),
    (768, 3072, 0.9, (4, 4)),
    (256, 3072, 0.5, (1, 1)),
    (768, 3072, 0.75, (1, 1)),
    (1536, 1536, 0.8, (1, 1)),
    (3072, 256, 0.95, (4, 1)),
    (3072, 768, 0.6, (1, 4)),
    (3072, 3072, 0.8, (4, 4)),
)
_TOKENS = {
    "bitmap": (1, 2, 4, 8, 16, 64),
    "index": (1, 16, 32, 64, 128, 512),
    "dense": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
}
_MOST_WORK = 1.3e9  # M * N * K of one call; the largest layer is not timed at the largest M
_SECONDS = 0.012  # spent on each comparison, beyond the least number of rounds
_LEAST_ROUNDS, _MOST_ROUNDS = 4, 200
_SAME, _PATIENCE = 1.05, 4.0
_LONG = 0.003  # seconds
_ENOUGH = 6.0  # seconds; from then on each comparison is short, as the machine is busy
_OUT_OF_LINE = 4.0  # times what a form usually takes here
_SLOWEST_MACHINE = 20.0  # times what the built-in figures say; the scalar kernels are that slow
_MOST_DROPPED = 0.3


def least_times(
    runs: Mapping[str, Run],
    seconds: float = _SECONDS,
    *,
    clock: Clock = time.perf_counter,
    rounds: int = _LEAST_ROUNDS,
    patience: float = _PATIENCE,
) -> dict[str, float]:
    """The least time of each, in seconds; they take turns for about `seconds`, at least `rounds` times.

    On a busy machine it takes longer, up to `patience` times `seconds`: until every least time was nearly reached a
    second time.
    """
    for run in runs.values():
        run()  # makes what is made lazily
    least = {name: [math.inf, math.inf] for name in runs}  # and the second
    start = clock()
    done = 0
    with _no_collection():
        while (
            done < rounds
            or (spent := clock() - start) < seconds
            or (spent < patience * seconds and any(second > _SAME * first for first, second in least.values()))
        ):
            for name, run in runs.items():
                # The first call of a turn refills the caches that the others emptied; a long one does not notice.
                for _ in range(1 if _LONG < least[name][0] < math.inf else 2):
                    begin = clock()
                    run()
                    least[name] = sorted((*least[name], clock() - begin))[:2]
            done += 1
            if done == _MOST_ROUNDS:
                break
    return {name: max(first, 1e-9) for name, (first, _) in least.items()}


@contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Bench:
    """What is measured, and on what. This one: the CPU."""

    tokens: Mapping[str, Sequence[int]] = _TOKENS
    most_work = _MOST_WORK
    out_of_line = _OUT_OF_LINE
    slowest = _SLOWEST_MACHINE

    def layers(self, dtype: str) -> Sequence[tuple[int, int, float, Any]]:
        return _INT8_LAYERS if dtype == "int8" else _FLOAT_LAYERS

    def in_forms(self, spec: tuple[int, int, float, Any], dtype: str) -> tuple[dict[str, nn.Module], Shape]:
        """One of the layers in each form that it has, and what its time depends on."""
        n, k, sparsity, block = spec
        return _layer_in_forms(n, k, sparsity, block, dtype)

    def activations(self, m: int, k: int, dense: str) -> Tensor:
        return activations(m, k, dense)

    def expected(self) -> Mapping[tuple[str, str], Fit]:
        """Figures that are right but for a factor of each form."""
        return BUILTIN_FITS


_CPU = Bench()


def variant(layer: SparseLinear, form: str, dense: str) -> nn.Module:
    """The same layer in one form whatever M; "dense": the layer that would be there without sparsity.

    That is an nn.Linear of dtype `dense` (with its activation behind it), or where this is "int8" an Int8Linear.
    """
    from pycompress.nn import Int8Linear, SparseLinear

    if form == "dense":
        if dense == "int8":
            return Int8Linear.from_float(_linear(layer, torch.float32), activation=layer.activation)
        linear = _linear(layer, getattr(torch, dense))
        if layer.activation == "none":
            return linear
        activation = list(layer.to_float().children())[1]
        return nn.Sequential(linear, activation)
    if form not in FORMS:
        raise ValueError(f"cost_model: unknown form {form!r}; expected one of {', '.join(FORMS)}")
    new = SparseLinear(
        *(layer.in_features, layer.out_features, layer.bias is not None),
        dtype=layer.dtype, format=form, activation=layer.activation, backend=layer.backend, device="meta",
    )  # fmt: skip
    new.load_state_dict(layer.state_dict(), assign=True)
    return new.train(layer.training)


def _linear(layer: SparseLinear, dtype: torch.dtype) -> nn.Linear:
    bias = layer.bias is not None
    linear = nn.Linear(layer.in_features, layer.out_features, bias, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(layer.to_dense().to(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return linear


def activations(m: int, k: int, dense: str) -> Tensor:
    """x (m, k) as a dense layer of this dtype is fed: bf16 or fp32. No random state is spent."""
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=generator).to(torch.bfloat16 if dense == "bfloat16" else torch.float32)


def runner(module: nn.Module, x: Tensor) -> Run:
    def run() -> object:
        return module(x)

    return run


class BusyMachineError(RuntimeError):
    """What was measured makes no sense: other programs kept the cores."""


@dataclass
class _Sample:
    layer: int
    form: str
    m: int
    shape: Shape
    seconds: float

    @property
    def figures(self) -> tuple[str, str]:
        return self.shape.figures(self.form)

    def ratio(self, expected: Mapping[tuple[str, str], Fit]) -> float:
        """To what the built-in figures say: alike for all samples of a form, whatever the machine."""
        return self.seconds / expected[self.figures].predict(self.m, self.shape.counts(self.form))


def measure_fits(
    dtype: str, *, clock: Clock = time.perf_counter, progress: Progress | None = None, bench: Bench = _CPU
) -> dict[tuple[str, str], Fit]:
    """The fits of one weight dtype on this machine, with torch's threads, or on the bench's. Takes a few seconds.

    Times that are out of line are measured once more, and left out if they still are.

    Raises:
        BusyMachineError: too many of them are, so that nothing can be learnt now.
    """
    layers = bench.layers(dtype)
    samples: list[_Sample] = []
    start = clock()

    def hurry() -> bool:
        return clock() - start > _ENOUGH

    for done in range(len(layers)):
        samples += _measure_layer(bench, done, dtype, None, clock, hurry())
        if progress is not None:
            progress(done + 1, len(layers))
    for layer in () if hurry() else sorted({s.layer for s in _outliers(samples, bench)}):
        worse = {s.m for s in _outliers(samples, bench) if s.layer == layer}
        again = _measure_layer(bench, layer, dtype, worse, clock, hurry())
        better = {(s.form, s.m): s.seconds for s in again}
        for s in samples:
            if s.layer == layer:
                s.seconds = min(s.seconds, better.get((s.form, s.m), math.inf))
    fits = {}
    dropped = {id(s) for s in _outliers(samples, bench)}
    for figures in dict.fromkeys(s.figures for s in sorted(samples, key=lambda s: FORMS.index(s.form))):
        mine = [s for s in samples if s.figures == figures]
        kept = [(s.m, s.shape.counts(s.form), s.seconds) for s in mine if id(s) not in dropped]
        if len(kept) < (1 - _MOST_DROPPED) * len(mine) or {m for m, _, _ in kept} != {s.m for s in mine}:
            some = f"{len(mine) - len(kept)} of {len(mine)}"
            raise BusyMachineError(f"{some} times of the {figures[1]} form are out of line")
        fits[figures] = fit(kept)
    return fits


def _outliers(samples: Sequence[_Sample], bench: Bench) -> list[_Sample]:
    """Those that are slower than the fastest of their form by far more than the built-in figures tell."""
    expected, usual = bench.expected(), {}
    ratio = {id(s): s.ratio(expected) for s in samples}
    for figures in {s.figures for s in samples}:
        ratios = sorted(ratio[id(s)] for s in samples if s.figures == figures)
        usual[figures] = min(ratios[len(ratios) // 5], bench.slowest)
    return [s for s in samples if ratio[id(s)] > bench.out_of_line * usual[s.figures]]


def _measure_layer(
    bench: Bench, index: int, dtype: str, only: Collection[int] | None, clock: Clock, hurry: bool
) -> list[_Sample]:
    """The times of one of the layers at each M, or at those in `only`, which are worth more time."""
    modules, shape = bench.in_forms(bench.layers(dtype)[index], dtype)
    samples = []
    for m in sorted({m for tokens in bench.tokens.values() for m in tokens} if only is None else only):
        if m * shape.n * shape.k > bench.most_work:
            continue
        x = bench.activations(m, shape.k, dtype)
        runs = {form: runner(modules[form], x) for form in FORMS if m in bench.tokens[form] and form in modules}
        with torch.no_grad():
            seconds = _SECONDS if only is None else 4 * _SECONDS
            rounds, patience = (2, 0.0) if hurry else (_LEAST_ROUNDS, _PATIENCE)
            times = least_times(runs, seconds, clock=clock, rounds=rounds, patience=patience)
        samples += [_Sample(index, form, m, shape, seconds) for form, seconds in times.items()]
    return samples


def _layer_in_forms(
    n: int, k: int, sparsity: float, block: tuple[int, int], dtype: str
) -> tuple[dict[str, nn.Module], Shape]:
    """A random layer with this share of its blocks pruned, in each form."""
    from pycompress.nn import SparseLinear

    generator = torch.Generator().manual_seed(n + k)
    linear = nn.Linear(k, n, device="meta")
    linear.weight = nn.Parameter(torch.randn(n, k, generator=generator) / k**0.5, requires_grad=False)
    linear.bias = nn.Parameter(torch.zeros(n), requires_grad=False)
    if dtype == "bfloat16":
        linear.bfloat16()
    blocks = torch.rand(n // block[0], k // block[1], generator=generator) >= sparsity
    mask = blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    layer = SparseLinear.from_dense(linear, mask, dtype=dtype, format="bitmap")
    modules: dict[str, nn.Module] = {form: variant(layer, form, dtype) for form in FORMS}
    return modules, Shape.of(layer.weight_bitmap, k, dtype)
