"""The layers of a model, one by one, beside those of the model it came from: error, sparsity, bytes, time, work.

Layers are matched by name. In the model a name may hold another kind of layer, several (LowRankLinear), or one with
the activation behind it folded in; the baseline's output then goes through that activation before it is compared.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calibration import evaluating, feed
from pycompress.convert import shape_of
from pycompress.nn import Int4Linear, Int8Linear, LowRankLinear, SparseLinear
from pycompress.nn.fake_quant_linear import FakeQuantLinear
from pycompress.ops.int8_matmul_reference import apply_activation
from pycompress.ops.sparse_linear_reference import DENSE, INDEX
from pycompress.report import model_bytes
from pycompress.workflow.measure import device_of, is_linear, sizes

# Numbers of outputs that are kept to compare, of all layers together; a layer's tokens are thinned out evenly to fit.
_KEPT = 64 << 20
# An error that a factor for each channel makes so many times smaller comes from such factors.
_SCALED = 4.0


@dataclass(frozen=True)
class Side:
    """A layer as one of the two models has it.

    kind: its class; form: how it holds its weight, in words. precision: what it multiplies in. seconds: median of a
    forward on the sample, all its calls; None where it was not timed. flops: operations really done, a multiplication
    and its sum as 2. moved: bytes of weight, input and output, each once a call.
    """

    kind: str
    form: str
    precision: str
    sparsity: float
    bytes: int
    seconds: float | None
    flops: int
    moved: int

    @property
    def intensity(self) -> float | None:
        """Operations per byte."""
        return self.flops / self.moved if self.moved else None


@dataclass(frozen=True)
class LayerRow:
    """One layer. before or after is None where only one of the models has it.

    error: relative L2 distance of the layer's output from the baseline's, inside each model, on the sample: what the
    layer adds and what its input brought along. None where it cannot be said; `note` tells why.
    tokens: rows of input in one forward. flops: 2 * tokens * N * K, whatever is spared.
    """

    name: str
    shape: tuple[int, ...]  # (outputs, inputs)
    activation: str  # the one folded in, or ""
    calls: int
    tokens: int
    error: float | None
    note: str
    flops: int
    before: Side | None
    after: Side | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; each side with its `intensity`."""
        found = dataclasses.asdict(self)
        for key, side in (("before", self.before), ("after", self.after)):
            if side is not None:
                found[key]["intensity"] = side.intensity
        return found


def layer_rows(baseline: nn.Module, model: nn.Module, sample: Any, rounds: int = 15) -> list[LayerRow]:
    """A row for each linear layer of either model, in the baseline's order.

    sample: a batch of model inputs as `calibrate` takes them, on the models' device. rounds: of timing; 0: no times.
    Both models run in eval mode without gradients; hooks are removed and flags put back, whatever happens.
    """
    names = _units(baseline)
    only_after = [name for name in _units(model) if not _covered(name, names)]
    taps: dict[str, _Pair] = {name: (_Tap(baseline.get_submodule(name)), _Tap.of(_at(model, name))) for name in names}
    taps |= {name: (None, _Tap(model.get_submodule(name))) for name in only_after}
    with evaluating(baseline), evaluating(model):
        _compare(baseline, model, sample, taps)
        _time(baseline, model, sample, taps, rounds)
    return [_row(name, *taps[name]) for name in taps]


def _units(model: nn.Module) -> list[str]:
    """The names of the linear layers; of a LowRankLinear its own, not those of its parts."""
    found: list[str] = []
    for name, module in model.named_modules():
        if (is_linear(module) or isinstance(module, LowRankLinear)) and not _covered(name, found):
            found.append(name)
    return found


def _covered(name: str, names: list[str]) -> bool:
    return any(name == other or not other or name.startswith(other + ".") for other in names)


def _at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


# ---- looking at layers from inside --------------------------------------------------------------------------------


@dataclass(eq=False)
class _Tap:
    """What is seen of one layer by hooks. outputs: of the baseline, thinned out, until they are compared."""

    module: nn.Module
    calls: int = 0
    tokens: int = 0
    moved_x: int = 0  # bytes of input and output
    x_dtype: torch.dtype = torch.float32
    seconds: list[float] = field(default_factory=list)  # by round
    outputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module | None) -> _Tap | None:
        return None if module is None else cls(module)

    def see(self, x: object, y: object, keep: int) -> None:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return
        rows = y.detach().reshape(-1, y.shape[-1]) if y.dim() and y.numel() else y.detach().reshape(0, 1)
        self.calls += 1
        self.tokens += rows.shape[0]
        self.moved_x += x.nbytes + y.nbytes
        self.x_dtype = x.dtype
        step = max(1, math.ceil(rows.numel() / max(keep, 1)))
        self.outputs.append(rows[::step].float())


_Pair = tuple[_Tap | None, _Tap | None]  # before, after
_Taps = Mapping[str, _Pair]
_Hooks = tuple[Callable[..., None], Callable[..., None]]  # before a layer's forward, after it


@contextmanager
def _hooked(taps: list[_Tap], hooks: Callable[[_Tap], _Hooks]) -> Iterator[None]:
    """The hooks nearest to the layer's forward: others that it has are outside of what is timed."""
    with ExitStack() as handles:
        for tap in taps:
            before, after = hooks(tap)
            handles.callback(tap.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            handles.callback(tap.module.register_forward_hook(after, prepend=True, with_kwargs=True).remove)
        yield


def _compare(baseline: nn.Module, model: nn.Module, sample: Any, taps: _Taps) -> None:
    """One forward of each model, in which every tap sees its layer's input and output."""
    keep = _KEPT // max(1, len(taps))

    def hooks(tap: _Tap) -> _Hooks:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: object) -> None:
            tap.see(args[0] if args else next(iter(kwargs.values()), None), y, keep)

        return lambda *_: None, after

    for side, root in enumerate((baseline, model)):
        with _hooked([tap for pair in taps.values() if (tap := pair[side]) is not None], hooks):
            feed(root, sample, "layer_rows")


def _time(baseline: nn.Module, model: nn.Module, sample: Any, taps: _Taps, rounds: int) -> None:
    """Fills each tap's `seconds`: the models in turns, who goes first changing from round to round."""
    sides = [
        (root, [tap for pair in taps.values() if (tap := pair[side]) is not None])
        for side, root in enumerate((baseline, model))
    ]
    for index in range(rounds):
        for root, side in sides if index % 2 else reversed(sides):
            clock = _CudaClock() if device_of(root).type == "cuda" else _HostClock()
            with _hooked(side, clock.hooks):
                feed(root, sample, "layer_rows")
            for tap, seconds in clock.read().items():
                tap.seconds.append(seconds)


class _HostClock:
    """Adds up the seconds of each tap's calls in one forward."""

    def __init__(self) -> None:
        self._seconds: dict[_Tap, float] = {}

    def hooks(self, tap: _Tap) -> _Hooks:
        start = 0.0

        def before(*_: object) -> None:
            nonlocal start
            start = time.perf_counter()

        def after(*_: object) -> None:
            taken = time.perf_counter() - start
            self._seconds[tap] = self._seconds.get(tap, 0.0) + taken

        return before, after

    def read(self) -> dict[_Tap, float]:
        return self._seconds


class _CudaClock:
    """The same by events on the current stream."""

    def __init__(self) -> None:
        self._events: list[tuple[_Tap, Any, Any]] = []

    def hooks(self, tap: _Tap) -> _Hooks:
        start = None

        def before(*_: object) -> None:
            nonlocal start
            start = torch.cuda.Event(enable_timing=True)
            start.record()

        def after(*_: object) -> None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((tap, start, end))

        return before, after

    def read(self) -> dict[_Tap, float]:
        torch.cuda.synchronize()
        found: dict[_Tap, float] = {}
        for tap, start, end in self._events:
            found[tap] = found.get(tap, 0.0) + 1e-3 * start.elapsed_time(end)
        return found


# ---- from what was seen to a row ----------------------------------------------------------------------------------


def _row(name: str, before: _Tap | None, after: _Tap | None) -> LayerRow:
    first = before or after
    assert first is not None
    shape = _shape(first.module)
    activation = _activation(after.module) if after is not None else ""
    if before is not None and _activation(before.module) == activation:
        activation = ""  # was folded in already
    error, note = _error(before, after, activation)
    flops = 2 * first.tokens * math.prod(shape) if shape else 0
    sides = (None if tap is None else _side(tap) for tap in (before, after))
    return LayerRow(name, shape, activation, first.calls, first.tokens, error, note, flops, *sides)


def _shape(unit: nn.Module) -> tuple[int, ...]:
    if isinstance(unit, LowRankLinear):
        return unit.out_features, unit.in_features
    return shape_of(unit)


def _activation(unit: nn.Module) -> str:
    """The activation that the unit's last layer has folded in, or an empty text."""
    name = next((str(leaf.activation) for leaf in reversed(_leaves(unit)) if hasattr(leaf, "activation")), "none")
    return "" if name == "none" else name


def _leaves(unit: nn.Module) -> list[nn.Module]:
    return [module for module in unit.modules() if is_linear(module)]


def _error(before: _Tap | None, after: _Tap | None, activation: str) -> tuple[float | None, str]:
    """The relative L2 distance over all calls, or why there is none."""
    if before is None or after is None:
        return None, f"only in the {'compressed model' if before is None else 'baseline'}"
    expected, found = before.outputs, after.outputs
    if not expected or not found:
        never = "is never called" if not (expected or found) else "is called in one of the models only"
        return None, f"{never} on the sample (its weight may be read directly)"
    if [y.shape for y in expected] != [y.shape for y in found]:
        return None, "its output has another shape than in the baseline"
    sums = torch.zeros(4, expected[0].shape[1], dtype=torch.float64)  # (b-a)^2, a^2, b^2, ab of each channel
    for a, b in zip(expected, found, strict=True):
        a = (apply_activation(a, activation) if activation else a).double()
        b = b.double()
        sums += torch.stack([(x * y).sum(0) for x, y in ((b - a, b - a), (a, a), (b, b), (a, b))]).cpu()
    if not bool(sums.isfinite().all()):
        return None, "its output holds NaN or Inf"
    distance, norm = float(sums[0].sum()), float(sums[1].sum())
    if norm == 0:
        return (0.0, "") if distance == 0 else (None, "the baseline's output is 0 everywhere")
    error = math.sqrt(distance / norm)
    # A layer that took in the factors of a smoothed one behind it gives other outputs, and the same after those.
    _, aa, bb, ab = sums
    scaled = math.sqrt(float((aa - ab.square() / bb.clamp(min=1e-300)).clamp(min=0).sum()) / norm)
    if error > _SCALED * max(scaled, 1e-6) and error > 0.01:
        return scaled, "its channels are scaled, as SmoothQuant does: compared up to a factor a channel"
    return error, ""


def _side(tap: _Tap) -> Side:
    unit, leaves = tap.module, _leaves(tap.module)
    parts = [_work(leaf, tap) for leaf in leaves]
    kinds = [type(leaf).__name__ for leaf in leaves]
    form = ", ".join(dict.fromkeys(_form(leaf) for leaf in leaves))
    if isinstance(unit, LowRankLinear):
        form = f"rank {unit.rank} of {' and '.join(dict.fromkeys(kinds))}, {form}"
    elif leaves and unit is not leaves[-1]:
        form = f"{' + '.join(type(child).__name__ for child in unit.children())}, {form}"
    between = sum(2 * tap.tokens * shape_of(leaf)[0] * tap.x_dtype.itemsize for leaf in leaves[:-1])
    return Side(
        kind=type(unit).__name__,
        form=form,
        precision=parts[-1][2] if parts else "",
        sparsity=sizes(unit).sparsity,
        bytes=model_bytes(unit),
        seconds=statistics.median(tap.seconds) if tap.seconds else None,
        flops=sum(flops for flops, _, _ in parts),
        moved=sum(read for _, read, _ in parts) + tap.moved_x + between if tap.calls else 0,
    )


def _work(leaf: nn.Module, tap: _Tap) -> tuple[int, int, str]:
    """Operations of a forward, bytes of weight that it reads, and what it multiplies in."""
    n, k = shape_of(leaf)
    dense, held = 2 * tap.tokens * n * k, model_bytes(leaf)
    if isinstance(leaf, (Int8Linear, FakeQuantLinear)):
        precision = "int8" if leaf.mode != "weight_only" else _name(tap.x_dtype)
        return dense, (held if isinstance(leaf, Int8Linear) else n * k) * tap.calls, precision
    if isinstance(leaf, Int4Linear):
        return dense, held * tap.calls, _name(tap.x_dtype)
    if isinstance(leaf, SparseLinear):
        code = _form_used(leaf, tap.tokens // max(1, tap.calls))
        unused = {"_dense", "_index"} - {"_dense" if code == DENSE else "_index" if code == INDEX else ""}
        if code in (DENSE, INDEX):
            unused |= {"weight_bitmap", "weight_values", "_row_start"}
        left_alone = sum(t.nbytes for key, t in leaf._buffers.items() if key in unused and t is not None)
        flops = dense if code == DENSE else 2 * tap.tokens * leaf.nnz
        return flops, (held - left_alone) * tap.calls, "int8" if leaf.dtype == "int8" else leaf.dtype
    weight = getattr(leaf, "weight", None)
    size = weight.nbytes if isinstance(weight, Tensor) else held
    return dense, size * tap.calls, _name(weight.dtype if isinstance(weight, Tensor) else tap.x_dtype)


def _form_used(leaf: SparseLinear, tokens: int) -> int:
    """The code of what computes so many tokens."""
    return next(code for most, code in zip(leaf.choice[::2], leaf.choice[1::2], strict=True) if tokens <= most)


def _form(leaf: nn.Module) -> str:
    if isinstance(leaf, (Int8Linear, FakeQuantLinear)):
        return f"int8 {leaf.mode}"
    if isinstance(leaf, Int4Linear):
        return f"{leaf.format} in groups of {leaf.group_size}"
    if isinstance(leaf, SparseLinear):
        return f"{leaf.dtype} {'+'.join(leaf.forms())}"
    weight = getattr(leaf, "weight", None)
    return _name(weight.dtype) if isinstance(weight, Tensor) else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
