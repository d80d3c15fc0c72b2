"""The range of each layer's input over sample batches, which static int8 turns into one scale and zero point.

minmax: the smallest and largest value seen.
percentile: the values below which 100 - p and p percent of all inputs lie, so that rare outliers are clipped.
mse: the range that loses least in 8-bit affine quantisation, clipping error and rounding error together.
The last two read a histogram whose range doubles as wider values arrive: old bins are merged in pairs, so a
value is never counted in the wrong bin, and nothing but the histogram is kept of a batch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pycompress.layer_kinds import ATTENTION, kinds_of
from pycompress.nn import MaskedLinear
from pycompress.nn.projected_attention import ProjectedAttention
from pycompress.ops import affine_qparams
from pycompress.selection import OURS, FilterFn, Layer, ModuleMap, select
from pycompress.tracing import Shadow

METHODS = ("minmax", "percentile", "mse")
BINS = 4096  # the range may be up to twice what was seen, so at least 2048 bins cover the data
_FORMAT = "pycompress.calibration"
_VERSION = 1

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Item = TypeVar("Item")


class Calibration(Mapping[str, tuple[float, float]]):
    """The input range (min, max) of each calibrated layer, by qualified name. Immutable; saved as JSON."""

    def __init__(self, ranges: Mapping[str, tuple[float, float]], method: str) -> None:
        self.method = method
        self._ranges = {name: _checked_range(name, *values) for name, values in ranges.items()}

    def __getitem__(self, name: str) -> tuple[float, float]:
        return self._ranges[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def __repr__(self) -> str:
        lines = "".join(f"\n  {name}: [{lo:.6g}, {hi:.6g}]" for name, (lo, hi) in self.items())
        return f"Calibration(method={self.method!r}, {len(self)} layers{lines}\n)"

    def to_json(self) -> str:
        content = {"format": _FORMAT, "version": _VERSION, "method": self.method, "ranges": self._ranges}
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Raises ValueError on anything that to_json did not write."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Calibration: not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"Calibration: no {_FORMAT!r} file; expected one written by Calibration.save")
        if content.get("version") != _VERSION:
            raise ValueError(f"Calibration: version is {content.get('version')!r}; expected {_VERSION}")
        ranges, method = content.get("ranges"), content.get("method")
        if not isinstance(ranges, dict) or method not in METHODS:
            raise ValueError("Calibration: the file lacks its ranges or method; calibrate and save again")
        for name, values in ranges.items():
            if not isinstance(values, list) or len(values) != 2:
                raise ValueError(f"Calibration: layer {name!r} has range {values!r}; expected [min, max]")
        return cls({name: (lo, hi) for name, (lo, hi) in ranges.items()}, method)

    def save(self, path: str | os.PathLike[str]) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        with open(path, encoding="utf-8") as file:
            return cls.from_json(file.read())


def _checked_range(name: str, lo: Any, hi: Any) -> tuple[float, float]:
    for value in (lo, hi):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"Calibration: layer {name!r} has range [{lo!r}, {hi!r}]; expected numbers")
    if lo > hi:
        raise ValueError(f"Calibration: layer {name!r} has min {lo} above max {hi}")
    return float(lo), float(hi)


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    method: str = "minmax",
    *,
    percentile: float = 99.99,
    layers: str | Iterable[str] = "linear",
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    progress: bool = True,
) -> Calibration:
    """Run `batches` through the model and return the range of every input that quantize_ would make int8, and of
    those of MaskedLinear, which prepare_qat_ takes too.

    batches: iterable of model inputs: a tensor -> model(x), a tuple or list -> model(*x), a mapping (a
        tokenizer's BatchEncoding too) -> model(**x). They must be on the model's device. A hundred samples
        usually do.
    method: "minmax", "percentile" (both tails at `percentile`, 50 < p <= 100) or "mse".
    layers, skip, filter_fn: as for quantize_; give both the same. Of attention the inputs of its four projections are
        observed: while the model runs, layers with the same weights stand for it.
    progress: show a progress bar on stderr.

    The model runs in eval mode without gradients; each module's own training flag is restored, whatever
    happens. Raises ValueError when there is nothing to calibrate, no batch, or a layer's input has NaN or
    Inf.
    """
    if method not in METHODS:
        raise ValueError(f"calibrate: unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if not 50 < percentile <= 100:
        raise ValueError(f"calibrate: percentile={percentile}; expected 50 < percentile <= 100")
    check_batches(batches, "calibrate")
    kinds = kinds_of(layers, "calibrate")
    modules = ModuleMap(model)
    shadow = Shadow(model, opaque=OURS)
    takes = (MaskedLinear,)
    found = select(modules, shadow, op="calibrate", skip=skip, filter_fn=filter_fn, takes=takes, kinds=kinds)
    chosen = [layer for layer in found if not layer.reason and layer.kind.inputs]
    if not chosen:
        raise ValueError("calibrate: nothing to calibrate; quantize_ would swap no layer of this model")

    observers: dict[str, _Range] = {}
    handles = []
    count = 0
    with evaluating(model), _opened(chosen) as watched:
        try:
            for name, module in watched.items():
                observers[name] = _Range() if method == "minmax" else _Histogram()
                hook = _observe(name, observers[name])
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for batch in with_progress(batches, progress, "calibrating"):
                feed(model, batch, "calibrate")
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    if count == 0:
        raise ValueError("calibrate: batches is empty; pass at least one (is it a generator that is used up?)")
    seen = {name: observer for name, observer in observers.items() if observer.count}
    return Calibration({name: _result(o, method, percentile) for name, o in seen.items()}, method)


@contextmanager
def _opened(layers: list[Layer]) -> Iterator[dict[str, nn.Module]]:
    """What reads each input that static mode wants a range of, by name. nn.MultiheadAttention calls none of its
    projections: layers that share its weights take its place meanwhile.
    """
    watched: dict[str, nn.Module] = {}
    held: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
    try:
        for layer in layers:
            if layer.kind is not ATTENTION:
                watched[layer.name] = layer.module
                continue
            assert isinstance(layer.module, nn.MultiheadAttention)
            opened = ProjectedAttention.opened(layer.module)
            for parent, key in layer.slots:
                held.append((parent._modules, key, layer.module))
                parent._modules[key] = opened
            watched.update((f"{layer.name}.{part}", opened.get_submodule(part)) for part in layer.kind.inputs)
        yield watched
    finally:
        for target, key, module in held:
            target[key] = module


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and none of torch's fused encoder paths, which would go past the hooks."""
    training = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, flag in training:
            module.training = flag


def check_batches(batches: object, op: str) -> None:
    """Raises TypeError where `batches` is no iterable of model inputs."""
    if isinstance(batches, (Tensor, Mapping, str)):
        raise TypeError(f"{op}: batches is one {type(batches).__name__}; expected an iterable, as [batch]")
    if not isinstance(batches, Iterable):
        raise TypeError(f"{op}: batches is a {type(batches).__name__}; expected an iterable of batches")


def with_progress(items: Iterable[Item], progress: bool, what: str) -> Iterable[Item]:
    """The same items, with a progress bar on stderr that says `what` is done with them."""
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:  # where track would leave an empty line
        return items
    return track(items, description=what, console=console, transient=True)


def feed(model: nn.Module, batch: Batch, op: str) -> Any:
    """What the model returns for one batch of model inputs, as `calibrate` describes them."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    raise TypeError(f"{op}: a batch is a {type(batch).__name__}; expected tensor, tuple, list or mapping")


def _observe(name: str, observer: _Range) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook that shows the layer's input to the observer."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.numel() == 0:
            return
        x = x.detach().float()
        lo, hi = (value.item() for value in x.aminmax())
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise ValueError(
                f"calibrate: the input of layer {name!r} has {'NaN' if math.isnan(lo + hi) else 'Inf'}; "
                "check the batch, or leave the layer out with skip"
            )
        observer.update(x, lo, hi)

    return hook


class _Range:
    """The smallest and largest value seen, and how many."""

    def __init__(self) -> None:
        self.lo, self.hi, self.count = math.inf, -math.inf, 0

    def update(self, x: Tensor, lo: float, hi: float) -> None:
        """x: fp32, any shape, not empty, finite; lo, hi its extremes."""
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.count += x.numel()


class _Histogram(_Range):
    """Counts in BINS equal bins over [start, start + width), which doubles to either side as needed."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.width = 0.0, 0.0
        self.bins = torch.zeros(BINS, dtype=torch.float64)

    def update(self, x: Tensor, lo: float, hi: float) -> None:
        super().update(x, lo, hi)
        if self.width == 0.0:
            # A little wider than the data: an fp32 bound must not round past the extreme values.
            margin = 1e-3 * (hi - lo) or 1e-3 * abs(hi) or 1e-6
            self.start, self.width = lo - margin, hi - lo + 2 * margin
        while lo < self.start:
            self.bins = torch.cat((torch.zeros(BINS // 2, dtype=torch.float64), self._pairs()))
            self.start, self.width = self.start - self.width, 2 * self.width
        while hi > self.start + self.width:
            self.bins = torch.cat((self._pairs(), torch.zeros(BINS // 2, dtype=torch.float64)))
            self.width = 2 * self.width
        self.bins += torch.histc(x, BINS, self.start, self.start + self.width).double().cpu()

    def _pairs(self) -> Tensor:
        return self.bins.view(-1, 2).sum(1)

    def edges(self) -> Tensor:
        return self.start + self.width / BINS * torch.arange(BINS + 1, dtype=torch.float64)

    def quantile(self, q: float) -> float:
        """The value below which a fraction q lies, linear within its bin and never beyond what was seen."""
        cumulative = torch.cat((torch.zeros(1, dtype=torch.float64), self.bins.cumsum(0)))
        target = q * cumulative[-1].item()
        index = int(torch.searchsorted(cumulative[1:], target, right=False).clamp(max=BINS - 1))
        below, inside = cumulative[index].item(), self.bins[index].item()
        value = self.start + self.width / BINS * (index + ((target - below) / inside if inside else 0.0))
        return min(max(value, self.lo), self.hi)


def _result(observer: _Range, method: str, percentile: float) -> tuple[float, float]:
    if method == "percentile" and isinstance(observer, _Histogram) and percentile < 100:
        return observer.quantile(1 - percentile / 100), observer.quantile(percentile / 100)
    if method == "mse" and isinstance(observer, _Histogram):
        return _least_error(observer)
    return observer.lo, observer.hi


def _least_error(histogram: _Histogram) -> tuple[float, float]:
    """The range whose 8-bit affine quantisation has the least squared error over the histogram.

    The two ends are searched in turn over 64 fractions of the full range (which contains 0), then twice
    around the best in finer steps. The full range is where the search starts, so mse never loses to minmax.
    """
    used = histogram.bins > 0
    centers = (histogram.edges()[:-1] + histogram.width / BINS / 2)[used]
    # The outermost bins may reach past the data; quantising beyond what was seen would be no error.
    centers, counts = centers.clamp(histogram.lo, histogram.hi), histogram.bins[used]
    full = (min(histogram.lo, 0.0), max(histogram.hi, 0.0))
    if full == (0.0, 0.0):
        return full
    around, error = [1.0, 1.0], _quantisation_error(centers, counts, *full)
    for step, reach in ((1 / 64, 63), (1 / 512, 12), (1 / 4096, 12)):
        for end in (0, 1, 0, 1):
            if full[end] == 0.0:
                continue
            middle = around[end]
            for fraction in (middle + n * step for n in range(-reach, reach + 1)):
                trial = list(around)
                trial[end] = fraction
                if 0.0 < fraction <= 1.0:
                    loss = _quantisation_error(centers, counts, full[0] * trial[0], full[1] * trial[1])
                    if loss < error:
                        around, error = trial, loss
    return full[0] * around[0], full[1] * around[1]


def _quantisation_error(values: Tensor, counts: Tensor, lo: float, hi: float) -> float:
    """The squared error of 8-bit affine quantisation with range [lo, hi], over `counts` of `values`."""
    scale, zero_point = affine_qparams(lo, hi)
    quantised = (values / scale).round_().add_(zero_point).clamp_(0, 255).sub_(zero_point).mul_(scale)
    return float((quantised.sub_(values).square_() * counts).sum())
