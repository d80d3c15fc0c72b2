"""factorize_: linear layers become products of two smaller ones, by singular values, plain or as inputs weigh them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pycompress.calibration import Batch, check_batches, evaluating, feed, with_progress
from pycompress.convert import apply_edits, attention_rows, carry_marks, shape_of, unchanged_error
from pycompress.fuse import Edit, fast_path_edits
from pycompress.nn import LowRankLinear, MaskedLinear
from pycompress.nn.float_linear import float_weight
from pycompress.nn.low_rank_linear import Spectrum, largest_rank
from pycompress.pruning.scores import keeping_rng
from pycompress.report import described, grouped, starred
from pycompress.selection import FLOATS, OURS, FilterFn, Layer, ModuleMap, check_root, closest, covers, select
from pycompress.text_table import TextTable
from pycompress.tracing import Shadow

__all__ = ["FactorizeReport", "FactorizedLayer", "factorize_"]

_OP = "factorize_"
Ranks = int | Mapping[str, int]


def factorize_(
    model: nn.Module,
    *,
    rank: Ranks | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    batches: Iterable[Batch] | None = None,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
    progress: bool = True,
) -> FactorizeReport:
    """Replace the linear layers of `model` by LowRankLinear, in place, and say what was done.

    Exactly one of these three says how far. Only weights are counted, r (K + N) against K N; a rank at which a layer
    would not get smaller leaves it as it is, and the report names the largest rank that shrinks it.

    rank: one for every layer, or {qualified name or glob pattern: rank}, where a name also covers what is below it, a
        layer's own name goes before patterns and otherwise the first that fits holds. Layers that none fits are left.
    energy: 0 < energy <= 1, the smallest rank that keeps this share of the squared singular values.
    ratio: 0 < ratio < 1, the largest rank whose factors hold at most this share of the layer's weights.

    batches: an iterable of model inputs, as calibrate takes them. With them the error of each layer's *output* over
        these inputs is what is least, instead of that of its weight. `energy` is then of the output too, whose mean and
        few largest channels may hold most of it: 0.99 and more is usual there. Needs K^2 float64 values a layer
        meanwhile. Layers that the batches never reach are left.
    skip, filter_fn: as for quantize_.
    progress: show a progress bar on stderr.

    Both factors are new parameters of the weight's dtype; the bias is a copy. Everything is computed in float64. A
    MaskedLinear is left, as its zeros would be lost: factorize first and prune the factors. Raises TypeError or
    ValueError for a bad argument, for a weight or an input that is NaN or infinite, for a layer that `rank` asks for
    by its own name and that cannot be made smaller, and where no layer can. Whenever it raises, the model is what it
    was.
    """
    check_root(model, _OP)
    _check_arguments(rank, energy, ratio, batches)
    modules = ModuleMap(model)
    layers = _find(modules, skip, filter_fn)
    if isinstance(rank, Mapping):
        _check_names(rank, modules, layers)
    with torch.inference_mode(False), torch.no_grad():  # the new parameters are to be trained outside
        chosen = {layer.name: layer.module for layer in layers if not layer.reason}
        _check_weights(chosen)
        moments = _second_moments(model, chosen, batches) if batches is not None and chosen else None
        if moments is not None:
            layers = [_reached(layer, moments) for layer in layers]
        made: dict[nn.Module, _Made] = {}
        for i, layer in enumerate(with_progress(list(layers), progress, "factorizing")):
            if layer.reason:
                continue
            moment = None if moments is None else moments.pop(layer.name)
            outcome = _factorized(layer, moment, _Size(rank, energy, ratio))
            if isinstance(outcome, str):
                layers[i] = replace(layer, reason=outcome)
            else:
                made[layer.module] = outcome
    if not made:
        raise ValueError(f"{_OP}: nothing to factorize: {_why_nothing(layers)}. The model is unchanged")
    edits = [
        Edit(parent._modules, key, made[layer.module].module)
        for layer in layers
        if layer.module in made
        for parent, key in layer.slots
    ]
    apply_edits([*edits, *fast_path_edits(modules, set(made))])
    return _report(modules, layers, made, "output" if batches is not None else "weight")


# ---- arguments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Size:
    """How small the layers become; exactly one is not None."""

    rank: Ranks | None
    energy: float | None
    ratio: float | None


def _check_arguments(rank: object, energy: object, ratio: object, batches: object) -> None:
    given = {"rank": rank, "energy": energy, "ratio": ratio}
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"{_OP}: {', '.join(named) or 'no size'} given; pass exactly one of rank, energy and ratio")
    if rank is not None:
        for value in rank.values() if isinstance(rank, Mapping) else (rank,):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{_OP}: rank={value!r}; expected an integer from 1 on, or {{name: integer}}")
        if rank == {}:
            raise ValueError(f"{_OP}: rank is empty; name at least one layer")
    for name, value, top in (("energy", energy, "energy <= 1"), ("ratio", ratio, "ratio < 1")):
        if value is not None:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= 1 or (name == "ratio" and value == 1):  # type: ignore[operator]
                raise ValueError(f"{_OP}: {name}={value!r}; expected 0 < {top}")
    if batches is not None:
        check_batches(batches, _OP)


def _find(modules: ModuleMap, skip: str | Iterable[str], filter_fn: FilterFn | None) -> list[Layer]:
    """The linear layers, each with the reason that keeps it, in the words of this operation."""
    shadow = Shadow(modules.model, opaque=OURS)
    dtypes = (*FLOATS, torch.float64)
    layers = select(
        modules, shadow, op=_OP, skip=skip, filter_fn=filter_fn, takes=(MaskedLinear,), dtypes=dtypes,
        keeps_weight=False,
    )  # fmt: skip

    def why(layer: Layer) -> str:
        if isinstance(layer.module, MaskedLinear):
            return "is a MaskedLinear, which would lose its zeros; factorize first and prune the factors"
        if any(isinstance(parent, LowRankLinear) for parent, _ in layer.slots):
            return "is a factor of a LowRankLinear already"
        return ""

    return [layer if layer.reason else replace(layer, reason=why(layer)) for layer in layers]


def _check_names(ranks: Mapping[str, int], modules: ModuleMap, layers: Sequence[Layer]) -> None:
    """Every key of `ranks` fits a linear layer, and one that is a layer's own name a layer that can go."""
    names = [name for layer in layers for name in layer.names]
    for key in ranks:
        if not isinstance(key, str):
            raise TypeError(f"{_OP}: rank holds the key {key!r}; expected qualified names or glob patterns (str)")
        if not any(covers(key, name) for name in names):
            close = closest(key, names)
            hint = f"; the closest names are {', '.join(map(repr, close))}" if close else ""
            raise ValueError(f"{_OP}: rank names {key!r}, which fits no linear layer of the model{hint}")
        kept = next((layer for layer in layers if key in layer.names and layer.reason), None)
        if kept is not None:
            raise ValueError(f"{_OP}: layer {key!r} cannot be factorized: {kept.reason}. The model is unchanged")


def _check_weights(chosen: Mapping[str, nn.Module]) -> None:
    for name, module in chosen.items():
        if not bool(torch.isfinite(module._parameters["weight"]).all()):  # type: ignore[arg-type]
            raise ValueError(
                f"{_OP}: layer {name!r}: its weight holds NaN or Inf. The model is unchanged; to leave this layer out "
                f"pass skip={name!r}"
            )


# ---- inputs ---------------------------------------------------------------------------------------------------------


def _second_moments(model: nn.Module, chosen: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The sum of x x^T (K, K), float64, of each layer over all tokens; layers that no batch reached are missing."""
    moments: dict[str, Tensor] = {}
    handles, count = [], 0
    with evaluating(model), keeping_rng(model):
        try:
            for name, module in chosen.items():
                handles.append(module.register_forward_pre_hook(_observe(name, moments), with_kwargs=True))
            for batch in batches:
                feed(model, batch, _OP)
                count += 1
        finally:
            for handle in handles:
                handle.remove()
    if not count:
        raise ValueError(f"{_OP}: batches is empty; pass at least one (is it a generator that is used up?)")
    return moments


def _observe(name: str, moments: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.numel() == 0:
            return
        x = x.detach().reshape(-1, x.shape[-1]).double()
        moment = x.T @ x
        if not bool(torch.isfinite(moment.diagonal()).all()):
            raise ValueError(
                f"{_OP}: the input of layer {name!r} holds NaN or Inf; check the batch, or leave the layer out by skip"
            )
        moments[name] = moments[name].add_(moment) if name in moments else moment

    return hook


def _reached(layer: Layer, moments: Mapping[str, Tensor]) -> Layer:
    missing = not layer.reason and layer.name not in moments
    return replace(layer, reason="was not reached by the batches") if missing else layer


# ---- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    module: LowRankLinear
    error: float


def _factorized(layer: Layer, moment: Tensor | None, size: _Size) -> _Made | str:
    """What takes the place of the layer, or why it stays; raises with its name where neither can be said."""
    n, k = shape_of(layer.module)
    if size.rank is not None:
        rank = _wanted_rank(layer, size.rank)
        if rank is None:
            return "rank names neither it nor a module above it"
        if why := _too_large(rank, n, k):  # before the work
            return _refused(layer, why, size.rank)
    if size.ratio is not None and not (most := int(size.ratio * n * k / (n + k))):
        return f"ratio={size.ratio:g} leaves it no rank; rank 1 is {(n + k) / (n * k):.3g} of its weights"
    try:
        spectrum = Spectrum.of(float_weight(layer.module, _OP), moment)
        if size.energy is not None:
            rank = spectrum.rank_for(size.energy)
            if why := _too_large(rank, n, k):
                return f"energy={size.energy:g} needs {why}"
        elif size.ratio is not None:
            rank = most
        assert rank is not None
        new = LowRankLinear._cut(layer.module, spectrum, rank)
        made = _Made(new, spectrum.error(new))
    except Exception as error:
        raise unchanged_error(_OP, layer, error) from error
    carry_marks(layer.module, new)
    return made


def _wanted_rank(layer: Layer, rank: Ranks) -> int | None:
    if isinstance(rank, int):
        return rank
    named = [rank[name] for name in layer.names if name in rank]
    fitting = [value for key, value in rank.items() if any(covers(key, name) for name in layer.names)]
    return next(iter(named + fitting), None)


def _too_large(rank: int, n: int, k: int) -> str:
    """Why the rank would not make a layer (N, K) smaller; empty if it does."""
    most = largest_rank(k, n)
    if rank <= most:
        return ""
    remedy = f"the largest rank that shrinks it is {most}" if most else "no rank shrinks it"
    return f"rank {rank}, which takes {rank * (n + k)} weights where {n}x{k} takes {n * k}; {remedy}"


def _refused(layer: Layer, why: str, rank: Ranks) -> str:
    """The reason of a layer that stays; raises where it was asked for by its own name."""
    if isinstance(rank, Mapping) and any(name in rank for name in layer.names):
        raise ValueError(f"{_OP}: layer {layer.name!r}: {why}. The model is unchanged")
    return why


def _why_nothing(layers: Sequence[Layer]) -> str:
    if not layers:
        return "the model has no linear layer"
    parts = [f"{layer.name}: {layer.reason}" for layer in layers]
    return "; ".join(parts[:3]) + (f"; and {len(parts) - 3} more" if len(parts) > 3 else "")


# ---- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactorizedLayer:
    """One layer. Parameters are its weights; `error` is ||(W - up down) S|| / ||W S||, see FactorizeReport."""

    name: str
    action: str  # "factorized" or "left"
    reason: str
    shape: tuple[int, ...]  # (outputs, inputs)
    parameters_before: int
    parameters_after: int
    rank: int = 0
    error: float = 0.0
    aliases: tuple[str, ...] = ()  # further names of the same module


@dataclass(frozen=True)
class FactorizeReport(TextTable):
    """The result of factorize_. `print(report)` shows a table; rich shows the same one in colour.

    error_of: "weight", or with batches "output": what the relative errors (root mean square) are of.
    """

    error_of: str
    layers: list[FactorizedLayer] = field(default_factory=list)

    header: ClassVar[tuple[str, ...]] = (
        "layer", "count", "shape", "action", "rank", "parameters before", "after", "relative error", "why",
    )  # fmt: skip
    right: ClassVar[frozenset[str]] = frozenset(("count", "rank", "parameters before", "after", "relative error"))

    @property
    def factorized(self) -> list[FactorizedLayer]:
        return [layer for layer in self.layers if layer.action == "factorized"]

    @property
    def left(self) -> list[FactorizedLayer]:
        return [layer for layer in self.layers if layer.action == "left"]

    def summary(self) -> str:
        """One line: how many layers were factorized and left, and what became of the weights of all of them."""
        before = sum(layer.parameters_before for layer in self.layers)
        after = sum(layer.parameters_after for layer in self.layers)
        share = f" ({after / before:.3g} of them)" if before else ""
        return (
            f"factorize_: {len(self.factorized)} factorized, {len(self.left)} left as they were; linear weights "
            f"{before} -> {after}{share}; errors are of the {self.error_of}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text; layers that differ only by a number in their name share one row."""
        return [_row(group) for group in grouped(self.layers, _alike)]

    def is_dim(self, row: tuple[str, ...]) -> bool:
        return row[self.header.index("action")] == "left"


def _alike(layer: FactorizedLayer) -> tuple[object, ...]:
    return layer.action, starred(layer.reason), layer.shape


def _row(group: Sequence[FactorizedLayer]) -> tuple[str, ...]:
    first = group[0]
    name, reason = described(group)
    shape = "x".join(map(str, first.shape))
    before, after = (str(sum(getattr(g, f"parameters_{when}") for g in group)) for when in ("before", "after"))
    if first.action == "left":
        return name, str(len(group)), shape, first.action, "", before, after, "", reason
    ranks, errors = _span([g.rank for g in group]), _span([g.error for g in group])
    return name, str(len(group)), shape, first.action, ranks, before, after, errors, reason


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}..{high}"


def _report(
    modules: ModuleMap, layers: Sequence[Layer], made: Mapping[nn.Module, _Made], error_of: str
) -> FactorizeReport:
    rows = []
    for layer in layers:
        shape, new = shape_of(layer.module), made.get(layer.module)
        size, aliases = shape[0] * shape[1] if shape else 0, layer.names[1:]
        if new is None:
            rows.append(FactorizedLayer(layer.name, "left", layer.reason, shape, size, size, aliases=aliases))
        else:
            after = new.module.rank * sum(shape)
            row = FactorizedLayer(layer.name, "factorized", "", shape, size, after, new.module.rank, new.error, aliases)
            rows.append(row)
    for bare in attention_rows(modules):
        size = bare.shape[0] * bare.shape[1]
        rows.append(FactorizedLayer(bare.name, "left", bare.reason, bare.shape, size, size))
    return FactorizeReport(error_of, rows)
