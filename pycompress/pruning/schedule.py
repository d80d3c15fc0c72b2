"""``PruningSchedule``: masks that change while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.nn import MaskedLinear
from pycompress.pruning import scores as scoring
from pycompress.pruning.choose import Limit, Masks, limits, select_masks
from pycompress.pruning.patterns import Pattern, is_finite
from pycompress.pruning.regrow import regrow_fraction, regrow_mask
from pycompress.pruning.report import PruneReport, make_report
from pycompress.pruning.schedule_checks import (
    OP,
    check_choices,
    check_found,
    check_optimizer,
    check_trained,
    final_sparsity,
)
from pycompress.pruning.schedule_plan import Plan
from pycompress.pruning.schedule_state import State, load_state, save_state
from pycompress.pruning.scores import GRADIENT_METHODS, LazyScores, ScoreFn
from pycompress.pruning.swap import Found, find_layers, set_masks, swap_in
from pycompress.selection import FilterFn, check_root


class PruningSchedule:
    """Prunes a model step by step while it trains.

    ::

        schedule = PruningSchedule(model, optimizer, sparsity=0.9, end=1000)
        for x, label in batches:
            loss(model(x), label).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    The linear layers become MaskedLinear at once, around the same parameters. Steps are counted by the calls of
    :meth:`step`, the first being 1. Masks change at `begin`, every `every` steps from there, and at `end`; after that
    `step` returns without doing anything. Where a mask changes, what the optimizer keeps for the weight (momentum,
    second moments, any tensor of its shape) and its gradient are cleared at pruned and at regrown positions, and the
    weights there are 0: nothing revives them.

    Args:
        model: the model; changed in place.
        optimizer: the one that trains it; without one nothing is cleared, and momentum has to be 0.
        sparsity: the fraction of units that are pruned from `end` on, exactly; 0.8 by default, with N:M 1 - N/M.
        initial_sparsity: that at `begin`.
        begin, end: the first and the last step at which masks change. With begin=0 the sparsity of step 0 is there
            at construction. `end` may be left out with kind="one_shot", which is done at `begin`.
        kind: from initial to final sparsity ``"cubic"``, s_f + (s_i - s_f) (1 - p)^3 where p goes from 0 to 1 (Zhu and
            Gupta 2017), ``"linear"``, ``"constant"`` (the final one from `begin` on) or ``"one_shot"``.
        every: steps between two changes.
        pattern, scope, min_sparsity, max_sparsity, gradient, seed, skip, filter_fn: as for prune_. Floors grow with
            the sparsity. N:M is reached group by group.
        method: ``"magnitude"``, ``"random"``, a function (name, module) -> scores (N, K), or ``"taylor"`` and
            ``"movement"``, which add up |w * grad| and -w * grad of what ``weight.grad`` is at each call of `step`, so
            call it before zero_grad().
        regrow: the fraction of the kept units that is exchanged at each change for those with the largest gradient,
            falling along a cosine to 0 at `end` (RigL, Evci et al. 2020; 0.3 there). The backward before such a change
            computes the dense gradient, which DistributedDataParallel averages like any other; the optimizer's step
            with it is undone at pruned positions. Clipping by norm sees the larger gradient.

    With ``gradient="masked"`` a pruned unit stays pruned unless it is regrown. With ``"dense"`` weights go on training
    behind the mask, each change looks at all of them and may bring any back, and nothing is cleared.

    Raises TypeError or ValueError for a bad argument; the model is then what it was.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        sparsity: float | None = None,
        initial_sparsity: float = 0.0,
        begin: int = 0,
        end: int | None = None,
        kind: str = "cubic",
        every: int = 1,
        pattern: str = "unstructured",
        method: str | ScoreFn = "magnitude",
        scope: str = "layer",
        min_sparsity: Limit = 0.0,
        max_sparsity: Limit = 1.0,
        regrow: float = 0.0,
        gradient: str = "masked",
        seed: int = 0,
        skip: str | Iterable[str] = (),
        filter_fn: FilterFn | None = None,
    ) -> None:
        check_root(model, OP)
        self.pattern, self.method, self.scope = Pattern.parse(pattern, op=OP), method, scope
        self.gradient, self.regrow, self.seed = gradient, regrow, seed
        final = final_sparsity(self.pattern, sparsity)
        self.plan = Plan.make(kind, begin, end, every, initial_sparsity, final, op=OP)
        self._bounds = min_sparsity, max_sparsity
        check_choices(self.plan, self.pattern, method, scope, gradient, regrow)
        found = find_layers(model, self.pattern, op=OP, skip=skip, filter_fn=filter_fn)
        check_found(found)
        check_optimizer(optimizer, found)
        if method in GRADIENT_METHODS or regrow:
            check_trained(found)
        self._optimizer, self._found = optimizer, found
        self.step_count = 0
        with torch.no_grad():
            for name, module in found.chosen.items():
                scoring.check_weight(module, name, OP)
            self._check_limits()
            masks = self._first_masks(found)
            self._layers = swap_in(found, masks, gradient, op=OP)
            self._clear(self._layers, {name: layer.mask for name, layer in self._layers.items()})
        zeros = {n: torch.zeros_like(layer.weight, dtype=torch.float32) for n, layer in self._layers.items()}
        self._sums: dict[str, Tensor] = zeros if method in GRADIENT_METHODS else {}
        self._prepare()

    # ---- the plan ---------------------------------------------------------------------------------------------

    def sparsity_at(self, step: int) -> float:
        """The sparsity planned for a step; before `begin` there is none."""
        return self.plan.sparsity(step)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that is pruned now."""
        total = sum(layer.mask.numel() for layer in self._layers.values())
        kept = sum(int(layer.mask.sum()) for layer in self._layers.values())
        return 1.0 - kept / total if total else 0.0

    @property
    def layers(self) -> dict[str, MaskedLinear]:
        """The layers that the schedule prunes, by name."""
        return dict(self._layers)

    def report(self) -> PruneReport:
        """The masks as they are, layer by layer, and what was left with the reason."""
        method = self.method if isinstance(self.method, str) else getattr(self.method, "__name__", "function")
        return make_report(self._found, self._layers, self.pattern, method, self.scope)

    def __repr__(self) -> str:
        return (
            f"PruningSchedule(step {self.step_count} of {self.plan.begin}..{self.plan.end}, {self.plan.kind}, "
            f"pattern={self.pattern.text}, sparsity {self.sparsity:.4g} of {self.plan.final:.4g})"
        )

    # ---- steps ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> bool:
        """Count one step, to be called after optimizer.step(); returns whether masks were chosen anew.

        Raises RuntimeError where a gradient is needed and there is none, ValueError for weights that are NaN or
        infinite when they are ranked; the schedule has then not moved on.
        """
        if self.step_count >= self.plan.end:
            return False
        now = self.step_count + 1
        sums = self._add_gradients(in_place=not self.plan.changes(now))  # only a change of masks may yet raise
        if self.plan.changes(now):
            self._change(now, sums)
        self._sums, self.step_count = sums if now < self.plan.end else {}, now
        self._prepare()
        return self.plan.changes(now)

    def _add_gradients(self, in_place: bool) -> dict[str, Tensor]:
        """The sums with this step's products of weight and gradient."""
        if not self._sums:
            return {}
        self._need_gradients(f"method={self.method!r}")
        sums = dict(self._sums)
        for name, layer in self._layers.items():
            if (gradient := layer.weight.grad) is not None:
                product = layer.weight.detach().float() * gradient.float()
                if is_finite(product):  # else an overflow in mixed precision, which was not stepped
                    product = product.abs_() if self.method == "taylor" else product.neg_()
                    total = sums[name].to(product.device)  # the model may have moved
                    sums[name] = total.add_(product) if in_place else total + product
        return sums

    def _need_gradients(self, what: str) -> None:
        if self._layers and all(layer.weight.grad is None for layer in self._layers.values()):
            raise RuntimeError(
                f"{OP}.step: {what} needs the gradients, and no layer has one; call step() after backward() and "
                "before zero_grad()"
            )

    def _change(self, step: int, sums: Mapping[str, Tensor]) -> None:
        exchange = self._exchange_at(step)
        if exchange:
            self._need_gradients(f"regrow={self.regrow}")
        scores = self._scores(step, self._layers, sums)
        masks = self._select(scores, self.sparsity_at(step))
        before = {name: layer.mask.clone() for name, layer in self._layers.items()}
        if self.gradient == "masked":
            masks = {name: mask & before[name] for name, mask in masks.items()}
        if exchange:
            for name, mask in masks.items():
                gradient = self._layers[name].weight.grad
                if gradient is not None and not bool(before[name].all()):  # else nothing is there to come back
                    masks[name] = regrow_mask(self.pattern, mask, scores[name], gradient, exchange)
        set_masks({name: self._layers[name] for name in masks}, masks, op=OP)
        self._clear(self._layers, before)

    def _exchange_at(self, step: int) -> float:
        if not self.regrow or not self.plan.changes(step):
            return 0.0
        return regrow_fraction(self.regrow, self.plan.progress(step))

    def _prepare(self) -> None:
        """Have the next backward compute the dense gradient where the step after it wants to regrow."""
        if not self.regrow:
            return
        wanted = "dense" if self._exchange_at(self.step_count + 1) else "masked"
        for layer in self._layers.values():
            if layer.gradient != wanted:
                layer.gradient = wanted
                layer.set_mask(layer.mask)  # what the other kind kept for eval goes

    def _clear(self, layers: Mapping[str, MaskedLinear], before: Mapping[str, Tensor]) -> None:
        """Zero weight, gradient and optimizer state of everything that is not kept now and was not kept before."""
        if self.gradient == "dense":
            return
        for name, layer in layers.items():
            weight = layer.weight
            gone = ~(layer.mask & before[name])
            state = self._optimizer.state.get(weight, {}) if self._optimizer is not None else {}
            for tensor in (weight, weight.grad, *state.values()):
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                    tensor.masked_fill_(gone, 0)

    # ---- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step, masks (a bit a weight), taylor and movement scores, and weights behind masks; no options.

        With the model's and the optimizer's, a schedule made with the same options goes on from it exactly.
        """
        latent = {}
        if self.gradient == "dense":
            latent = {name: layer.weight.detach()[~layer.mask] for name, layer in self._layers.items()}
        masks = {name: layer.mask for name, layer in self._layers.items()}
        return save_state(State(self.step_count, masks, self._sums, latent))

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state; load the model's own before, which brings the weights.

        Raises ValueError where it does not fit the schedule's layers and method; nothing is changed then.
        """
        sums_until = self.plan.end if self.method in GRADIENT_METHODS else 0
        state = load_state(state_dict, self._layers, sums_until, self.gradient == "dense", f"{OP}.load_state_dict")
        for name, weights in state.latent.items():
            self._layers[name].weight[~state.masks[name]] = weights
        set_masks(self._layers, state.masks, op=OP)
        self._sums, self.step_count = state.sums, state.step
        self._prepare()

    # ---- masks ------------------------------------------------------------------------------------------------

    def _first_masks(self, found: Found) -> Masks:
        """The masks at construction: those of step 0, if any."""
        if self.plan.begin > 0 or not self.sparsity_at(0):
            return {}
        masks = self._select(self._scores(0, found.chosen, {}), self.sparsity_at(0))
        if self.gradient == "masked":
            olds = {name: m.mask for name, m in found.chosen.items() if isinstance(m, MaskedLinear)}
            masks = {name: mask & olds[name] if name in olds else mask for name, mask in masks.items()}
        return masks

    def _select(self, scores: Mapping[str, Tensor], sparsity: float) -> Masks:
        low, high = self._bounds
        return select_masks(
            scores,
            self.pattern,
            sparsity,
            scope=self.scope,
            min_sparsity=low if sparsity == self.plan.final else self._floors(sparsity),
            max_sparsity=high,
            heads=self._found.heads,
            op=OP,
        )

    def _floors(self, sparsity: float) -> dict[str, float]:
        """min_sparsity on the way: in proportion to the sparsity, and a unit lower, so that rounding cannot clash."""
        if self.pattern.kind == "head":
            units = {attention.name: attention.heads for attention in self._found.heads}
        else:
            weights = {name: scoring.dense_weight(module) for name, module in self._found.chosen.items()}
            units = {name: self.pattern.units(weight.shape) for name, weight in weights.items()}
        floors, _ = limits(*self._bounds, list(units), OP)
        share = sparsity / self.plan.final if self.plan.final else 0.0
        return {name: max(0.0, floors[name] * share - 1 / max(units[name], 1)) for name in units}

    def _scores(self, step: int, modules: Mapping[str, nn.Module], sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The scores (N, K) by layer; those of pruned units are below all others, unless weights train behind masks."""
        make: Callable[[str], Tensor]
        lowest_score = -1.0  # below every |w| and every random number
        if self.method == "magnitude":

            def make(name: str) -> Tensor:
                return scoring.magnitude(scoring.dense_weight(modules[name]), self.pattern)
        elif self.method == "random":

            def make(name: str) -> Tensor:
                return self._random(step, name, modules[name])
        else:
            if isinstance(self.method, str):
                known = dict(sums)
            else:
                known = {n: scoring.called_scores(self.method, n, module, OP) for n, module in modules.items()}
            totals = [float(score.double().abs().sum()) for score in known.values()]
            lowest_score = -1.0 - max(totals, default=0.0)
            make = known.__getitem__
        if self.gradient == "dense":
            return LazyScores(modules, make)
        return LazyScores(modules, lambda name: self._pruned_last(make(name), modules[name], lowest_score))

    def _random(self, step: int, name: str, module: nn.Module) -> Tensor:
        """From a generator of its own for each step and layer: the same after a resume."""
        place = list(self._found.chosen).index(name)
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 1_000_003 + place) % 2**63)
        weight = scoring.dense_weight(module)
        return scoring.random_scores(self.pattern, weight.shape, generator).to(weight.device)

    def _pruned_last(self, scores: Tensor, module: nn.Module, lowest_score: float) -> Tensor:
        if not isinstance(module, MaskedLinear) or bool(module.mask.all()):
            return scores
        mask = module.mask
        if self.pattern.kind in ("unstructured", "n:m", "head"):
            return scores.masked_fill(~mask, lowest_score)
        # A pruned weight in a unit that is kept, from a finer mask, counts as nothing.
        pruned_units = self.pattern.unit_scores(mask.float()) == 0
        return scores.masked_fill(~mask, 0).masked_fill(self.pattern.spread(pruned_units, mask.shape), lowest_score)

    def _check_limits(self) -> None:
        """Raises where the final sparsity cannot be reached, before training starts."""
        if self._bounds == (0.0, 1.0):
            return
        shapes = {name: scoring.dense_weight(module).shape for name, module in self._found.chosen.items()}
        self._select(LazyScores(shapes, lambda name: torch.zeros(shapes[name])), self.plan.final)
