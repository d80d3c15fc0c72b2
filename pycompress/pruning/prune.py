"""prune_: choose what goes by a pattern and a score, and put the masks into the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calibration import Batch, check_batches
from pycompress.nn import MaskedLinear
from pycompress.nn.masked_linear import GRADIENTS
from pycompress.pruning import scores as scoring
from pycompress.pruning.choose import SCOPES, Limit, Masks, select_masks
from pycompress.pruning.patterns import ROUNDING, Pattern, check_fraction
from pycompress.pruning.report import PruneReport, make_report
from pycompress.pruning.scores import CALIBRATED, GRADIENT_METHODS, METHODS, LossFn, ScoreFn
from pycompress.pruning.swap import Found, find_layers, swap_in
from pycompress.selection import FilterFn, check_root

DEFAULT_SPARSITY = 0.8
_OP = "prune_"


def prune_(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    pattern: str = "unstructured",
    method: str | ScoreFn = "magnitude",
    scope: str = "layer",
    threshold: float | None = None,
    min_sparsity: Limit = 0.0,
    max_sparsity: Limit = 1.0,
    batches: Iterable[Batch] | None = None,
    loss_fn: LossFn | None = None,
    gradient: str | None = None,
    seed: int = 0,
    skip: str | Iterable[str] = (),
    filter_fn: FilterFn | None = None,
) -> PruneReport:
    """Prune the linear layers of `model`, in place, and say what was done.

    They become pycompress.nn.MaskedLinear around the same weight parameter, so that an optimizer goes on with it;
    a MaskedLinear gets a new mask. Layers that a swap would break are left, as quantize_ leaves them.

    sparsity: the fraction of units to prune, 0 to 1; 0.8 by default, and with N:M 1 - N/M. Exactly
        `round(sparsity * units)` units go, those with the lowest scores, of equal scores those with the lower index.
    pattern: what a unit is, in outputs x inputs: "unstructured" (one weight), a block "4x1", "1x4", "4x4", "16x16" or
        any "RxC", "row" (an output), "column" (an input), "2:4" or any "N:M" (at most N of M consecutive inputs are
        kept), "head" (an attention head of Hugging Face's BERT family: rows of query, key and value and columns of
        the output projection). At a ragged edge a unit is smaller.
    method: the score, which a unit's weights add up: "magnitude", "taylor", "wanda" or "movement" (see scores.py),
        "random" (by `seed`), or a function (name, module) -> scores (N, K), float. "zeros" takes the mask from the
        exact zeros of the weights, whole units of them, and needs no sparsity.
    scope: "layer" prunes each layer alike, "global" ranks the units of all layers together, by the raw scores. With
        "layer", wanda's unstructured masks compare the weights of each output among themselves, as in its paper.
    threshold: instead of a sparsity, with method "magnitude": prune what is below, |w| < threshold, and of larger
        units those whose root mean square is.
    min_sparsity, max_sparsity: of every layer: one number, or {name: number}.
    batches: for taylor, wanda and movement: an iterable of model inputs, as calibrate takes them.
    loss_fn: for taylor and movement: loss_fn(model's output, batch) -> a scalar tensor; by default the output's loss.
    gradient: of the new layers, "masked" or "dense"; see MaskedLinear.
    skip, filter_fn: as for quantize_.

    The model runs in eval mode; training flags, gradients, requires_grad and the random number generators of torch
    are afterwards what they were. Raises TypeError or ValueError for a bad argument, for weights, inputs or gradients
    that are NaN or infinite, and for a layer too small for the pattern, naming it. Whenever it raises, the model is
    what it was.
    """
    check_root(model, _OP)
    parsed = Pattern.parse(pattern, op=_OP)
    wanted = _check_arguments(parsed, sparsity, method, scope, threshold, batches, loss_fn, gradient)
    found = find_layers(model, parsed, op=_OP, skip=skip, filter_fn=filter_fn)
    with torch.inference_mode(False), torch.no_grad():  # masks are to be used outside too
        for name, module in found.chosen.items():
            scoring.check_weight(module, name, _OP)
        if method == "zeros":
            masks = {name: _mask_of_zeros(module, name, parsed) for name, module in found.chosen.items()}
        else:
            scores, found = _scores(model, found, parsed, method, batches, loss_fn, seed)
            masks = select_masks(
                scores,
                parsed,
                wanted,
                threshold=threshold,
                scope=scope,
                min_sparsity=min_sparsity,
                max_sparsity=max_sparsity,
                per_row=method == "wanda" and scope == "layer",
                heads=found.heads,
                op=_OP,
            )
        made = swap_in(found, masks, gradient, op=_OP)
    return make_report(found, made, parsed, _name_of(method), scope)


def _name_of(method: str | ScoreFn) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


def _check_arguments(
    pattern: Pattern,
    sparsity: float | None,
    method: object,
    scope: str,
    threshold: float | None,
    batches: object,
    loss_fn: object,
    gradient: str | None,
) -> float | None:
    """The sparsity to reach; None where the method or a threshold decides."""
    if not callable(method) and method not in METHODS:
        raise ValueError(f"{_OP}: unknown method {method!r}; expected one of {', '.join(METHODS)}, or a function")
    if scope not in SCOPES:
        raise ValueError(f"{_OP}: unknown scope {scope!r}; expected one of {', '.join(SCOPES)}")
    if gradient is not None and gradient not in GRADIENTS:
        raise ValueError(f"{_OP}: unknown gradient {gradient!r}; expected one of {', '.join(GRADIENTS)}")
    if (batches is None) == (method in CALIBRATED):
        needs = "needs batches, an iterable of model inputs" if batches is None else "takes no batches"
        raise ValueError(f"{_OP}: method={method!r} {needs}")
    if batches is not None:
        check_batches(batches, _OP)
    if loss_fn is not None and method not in GRADIENT_METHODS:
        raise ValueError(f"{_OP}: method={method!r} takes no loss_fn; {' and '.join(GRADIENT_METHODS)} do")
    if sparsity is not None:
        check_fraction(sparsity, f"{_OP}: sparsity")
    if threshold is not None:
        _check_threshold(threshold, pattern, sparsity, method)
        return None
    if method == "zeros":
        _check_zeros(pattern, sparsity)
        return None
    if pattern.sparsity is None:
        return DEFAULT_SPARSITY if sparsity is None else sparsity
    if sparsity is not None and abs(sparsity - pattern.sparsity) > ROUNDING:
        raise ValueError(
            f"{_OP}: sparsity={sparsity} with pattern {pattern.text!r}, which prunes {pattern.sparsity:g}; leave it out"
        )
    return pattern.sparsity


def _check_threshold(threshold: Any, pattern: Pattern, sparsity: float | None, method: object) -> None:
    if sparsity is not None:
        raise ValueError(f"{_OP}: both sparsity={sparsity} and threshold={threshold}; pass one of them")
    if method != "magnitude" or pattern.kind == "n:m":
        raise ValueError(f"{_OP}: threshold is for method='magnitude' and every pattern but N:M, which has a number")
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold < math.inf:
        raise ValueError(f"{_OP}: threshold={threshold!r}; expected a number from 0 on")


def _check_zeros(pattern: Pattern, sparsity: float | None) -> None:
    if sparsity is not None:
        raise ValueError(f"{_OP}: method='zeros' takes what is 0 already; leave sparsity={sparsity} out")
    if pattern.kind == "head":
        raise ValueError(f"{_OP}: method='zeros' with pattern 'head'; use 'row' or 'unstructured', which find the same")


def _mask_of_zeros(module: nn.Module, name: str, pattern: Pattern) -> Tensor:
    nonzero = scoring.dense_weight(module) != 0
    if pattern.kind == "n:m":
        full = int((pattern.kept_of_groups(nonzero) > pattern.keep[0]).sum())
        if full:
            raise ValueError(
                f"{_OP}: layer {name!r} is not {pattern.text}: {full} of its groups of {pattern.keep[1]} inputs have "
                f"more than {pattern.keep[0]} weights that are not 0; use pattern='unstructured'"
            )
        return nonzero.contiguous()
    return pattern.spread(pattern.unit_scores(nonzero.float()) > 0, nonzero.shape)


def _scores(
    model: nn.Module,
    found: Found,
    pattern: Pattern,
    method: str | ScoreFn,
    batches: Iterable[Batch] | None,
    loss_fn: LossFn | None,
    seed: int,
) -> tuple[Mapping[str, Tensor], Found]:
    """The scores of the chosen layers, and which these are: the batches may not have reached some."""
    chosen = found.chosen
    if callable(method):
        return {name: scoring.called_scores(method, name, module, _OP) for name, module in chosen.items()}, found
    if method == "random":
        return _pruned_first(_random(chosen, pattern, seed), chosen), found
    if method in GRADIENT_METHODS and batches is not None:
        scores = scoring.gradient_scores(model, chosen, batches, loss_fn, method, _OP) if chosen else {}
        if method == "movement":
            scores = _pruned_first(scores, chosen)
        return scores, found.without(chosen.keys() - scores.keys(), "the loss does not depend on it", _OP)
    if method == "wanda" and batches is not None:
        norms = scoring.input_norms(model, chosen, batches, _OP)
        found = found.without(chosen.keys() - norms.keys(), "was not reached by the batches", _OP)
        return scoring.LazyScores(
            found.chosen, lambda name: scoring.wanda(scoring.dense_weight(chosen[name]), norms[name], pattern)
        ), found
    return scoring.LazyScores(
        chosen, lambda name: scoring.magnitude(scoring.dense_weight(chosen[name]), pattern)
    ), found


def _pruned_first(scores: Masks, chosen: Mapping[str, nn.Module]) -> Masks:
    """The scores with what is pruned already at the bottom: it is 0, and would come back as 0.

    A score from the weight itself needs no such care; a movement is negative where a weight shrinks, and 0 at 0.
    """
    bottom = min((float(layer.min()) for layer in scores.values()), default=0.0)
    return {
        name: torch.where(module.mask, layer, bottom)
        if isinstance(module := chosen[name], MaskedLinear) and module.gradient == "masked"
        else layer
        for name, layer in scores.items()
    }


def _random(chosen: Mapping[str, nn.Module], pattern: Pattern, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, module in chosen.items():
        weight = scoring.dense_weight(module)
        scores[name] = scoring.random_scores(pattern, weight.shape, generator).to(weight.device)
    return scores
