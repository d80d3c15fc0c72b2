"""How much each weight matters. Every score is a tensor (N, K), higher for what is worth keeping; units add theirs up.

magnitude  |w|; of units larger than a weight w^2, so that a unit's score is its squared L2 norm (Han et al. 2015).
wanda      |w| * ||x_k||, the norm of input k over all calibration tokens (Sun et al. 2023); squared as above.
taylor     |w * dL/dw|, summed over the batches: how far the loss moves, to first order, without it (Molchanov 2019).
movement   -w * dL/dw, summed over the batches: whether training moves it away from 0 (Sanh et al. 2020).
random     uniform, from a generator of its own.

All are computed in float32 or more, whatever the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calibration import Batch, evaluating, feed
from pycompress.nn import MaskedLinear
from pycompress.nn.float_linear import is_conv1d
from pycompress.pruning.patterns import Pattern, check_scores, is_finite

ScoreFn = Callable[[str, nn.Module], Tensor]
LossFn = Callable[[Any, Any], Tensor]
GRADIENT_METHODS = ("taylor", "movement")
CALIBRATED = (*GRADIENT_METHODS, "wanda")
METHODS = ("magnitude", *CALIBRATED, "random", "zeros")


class LazyScores(Mapping[str, Tensor]):
    """Scores made when they are read, so that those of one layer at a time are in memory."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = list(names), make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight (N, K), detached, of nn.Linear, Conv1D or MaskedLinear.

    Of a MaskedLinear with gradient="masked" it is 0 where it is pruned; with "dense" the weights behind the mask are
    seen too, so that a new mask may bring them back.
    """
    parameter = module._parameters["weight"]
    assert parameter is not None
    weight = parameter.detach()
    if isinstance(module, MaskedLinear) and module.gradient == "masked":
        return torch.where(module.mask, weight, 0)
    return weight.t() if is_conv1d(module) else weight


def check_weight(module: nn.Module, name: str, op: str) -> None:
    """Raises ValueError where a weight is NaN or infinite: no score could rank it."""
    if not is_finite(dense_weight(module)):
        raise ValueError(
            f"{op}: layer {name!r}: its weight holds NaN or Inf. The model is unchanged; to leave this layer out pass "
            f"skip={name!r}"
        )


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """|w| in float32 or more, or w^2 in float64 where units hold several weights; (N, K)."""
    if pattern.kind in ("unstructured", "n:m"):
        return _at_least_float32(weight).abs()
    return weight.detach().double().square()  # float64: 1e-30 squared is still more than 0


def random_scores(pattern: Pattern, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform for every unit, a unit at a ragged edge included; (N, K) float64 on the CPU."""
    if pattern.kind in ("unstructured", "n:m", "head"):
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    units = torch.rand(pattern.units(shape), generator=generator, dtype=torch.float64)
    return pattern.spread(units / pattern.weights(shape), shape)


def called_scores(function: ScoreFn, name: str, module: nn.Module, op: str) -> Tensor:
    """What a user's function returns for a layer, checked."""
    weight = dense_weight(module)
    scores = function(name, module)
    check_scores(scores, name, op=op)
    if scores.shape != weight.shape:
        raise ValueError(
            f"{op}: method returned scores {tuple(scores.shape)} for layer {name!r}; expected (outputs, inputs) = "
            f"{tuple(weight.shape)}"
        )
    return scores.detach().to(weight.device)


def input_norms(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Batch], op: str
) -> dict[str, Tensor]:
    """||x_k|| (K,) of each layer over all tokens of `batches`; layers that no batch reached are missing."""
    squares: dict[str, Tensor] = {}
    handles = []
    with evaluating(model), keeping_rng(model):
        try:
            for name, module in modules.items():
                handles.append(module.register_forward_pre_hook(_observe(name, squares, op), with_kwargs=True))
            _run(model, batches, op, lambda output, batch: None)
        finally:
            for handle in handles:
                handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


def _observe(name: str, squares: dict[str, Tensor], op: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.numel() == 0:
            return
        total = x.detach().reshape(-1, x.shape[-1]).double().square().sum(0)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"{op}: the input of layer {name!r} holds NaN or Inf; check the batch, or leave the layer out with skip"
            )
        squares[name] = squares[name] + total if name in squares else total

    return hook


def wanda(weight: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """|w| * ||x_k|| in float32 or more, or squared in float64 where units hold several weights; (N, K)."""
    if pattern.kind in ("unstructured", "n:m"):
        values = _at_least_float32(weight).abs()
        return values * norms.to(values.dtype)
    return (weight.detach().double() * norms).square()


def _at_least_float32(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def gradient_scores(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    loss_fn: LossFn | None,
    method: str,
    op: str,
) -> dict[str, Tensor]:
    """taylor or movement scores (N, K), float32, summed over `batches`; layers without a gradient are missing."""
    weights = {name: module._parameters["weight"] for name, module in modules.items()}
    scores: dict[str, Tensor] = {}

    def add(output: Any, batch: Batch) -> None:
        loss = _loss(output, batch, loss_fn, op)
        # Not backward(): nobody's .grad is touched.
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)  # type: ignore[arg-type]
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if gradient is not None and weight is not None:
                product = weight.detach().float() * gradient.float()
                product = product.abs_() if method == "taylor" else product.neg_()
                scores[name] = scores[name].add_(product) if name in scores else product

    with evaluating(model), keeping_rng(model), _requiring_grad(weights.values()), torch.enable_grad():
        _run(model, batches, op, add)
    for name, score in scores.items():
        if not is_finite(score):
            raise ValueError(
                f"{op}: the gradient of layer {name!r} holds NaN or Inf; check the batches and the loss, or leave the "
                "layer out with skip"
            )
    return {name: score.t() if is_conv1d(modules[name]) else score for name, score in scores.items()}


def _run(model: nn.Module, batches: Iterable[Batch], op: str, use: Callable[[Any, Batch], None]) -> None:
    count = 0
    for batch in batches:
        use(feed(model, batch, op), batch)
        count += 1
    if not count:
        raise ValueError(f"{op}: batches is empty; pass at least one (is it a generator that is used up?)")


def _loss(output: Any, batch: Batch, loss_fn: LossFn | None, op: str) -> Tensor:
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(output, batch)
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"{op}: the model returned no loss (its output is a {type(output).__name__}); pass "
                "loss_fn=lambda output, batch: ..., or batches with labels to a model that computes its own"
            )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"{tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{op}: the loss is {got}; expected a tensor with one value")
    if not loss.requires_grad:
        raise ValueError(f"{op}: the loss does not depend on the layers to prune; does loss_fn or the model detach it?")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"{op}: the loss is {float(loss.detach())}; check the batches")
    return loss.reshape(())


@contextmanager
def keeping_rng(model: nn.Module) -> Iterator[None]:
    """The random number generators of torch are afterwards what they were, those of the model's devices included."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        yield


@contextmanager
def _requiring_grad(weights: Iterable[nn.Parameter | None]) -> Iterator[None]:
    frozen = [weight for weight in weights if weight is not None and not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
