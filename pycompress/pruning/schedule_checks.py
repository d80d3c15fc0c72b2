"""Whether the options of a PruningSchedule go together, and with the model and the optimizer."""

from __future__ import annotations

from typing import Any

from pycompress.nn.float_linear import is_conv1d
from pycompress.nn.masked_linear import GRADIENTS
from pycompress.pruning.choose import SCOPES
from pycompress.pruning.patterns import ROUNDING, Pattern, check_fraction
from pycompress.pruning.prune import DEFAULT_SPARSITY
from pycompress.pruning.regrow import REGROWING
from pycompress.pruning.schedule_plan import Plan
from pycompress.pruning.scores import GRADIENT_METHODS
from pycompress.pruning.scores import METHODS as METHODS_OF_PRUNE
from pycompress.pruning.swap import Found

OP = "PruningSchedule"
METHODS = ("magnitude", *GRADIENT_METHODS, "random")


def final_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    """The sparsity to reach: what was asked for, or what the pattern says."""
    if sparsity is not None:
        sparsity = check_fraction(sparsity, f"{OP}: sparsity")
    if pattern.sparsity is None:
        return DEFAULT_SPARSITY if sparsity is None else sparsity
    if sparsity is not None and abs(sparsity - pattern.sparsity) > ROUNDING:
        raise ValueError(
            f"{OP}: sparsity={sparsity} with pattern {pattern.text!r}, which prunes {pattern.sparsity:g}; leave it out"
        )
    return pattern.sparsity


def check_choices(plan: Plan, pattern: Pattern, method: Any, scope: str, gradient: str, regrow: float) -> None:
    if not callable(method) and method not in METHODS:
        elsewhere = "; prune_ has it" if method in METHODS_OF_PRUNE else ""
        raise ValueError(
            f"{OP}: unknown method {method!r}; expected one of {', '.join(METHODS)}, or a function{elsewhere}"
        )
    for what, value, choices in (("scope", scope, SCOPES), ("gradient", gradient, GRADIENTS)):
        if value not in choices:
            raise ValueError(f"{OP}: unknown {what} {value!r}; expected one of {', '.join(choices)}")
    if method in GRADIENT_METHODS and plan.begin == 0 and plan.sparsity(0):
        raise ValueError(f"{OP}: method={method!r} with begin=0: no gradient was seen yet; begin at 1 or later")
    if not check_fraction(regrow, f"{OP}: regrow"):
        return
    if gradient == "dense":
        raise ValueError(
            f"{OP}: regrow={regrow} with gradient='dense', where masks follow the weights behind them anyway; "
            "leave one of them out"
        )
    if plan.kind == "one_shot":
        raise ValueError(f"{OP}: regrow={regrow} with kind='one_shot', whose masks never change again; leave it out")
    if pattern.kind not in REGROWING:
        raise ValueError(
            f"{OP}: regrow={regrow} with pattern {pattern.text!r}; it exchanges single weights, blocks, rows or "
            "columns. With gradient='dense' masks of any pattern change"
        )


def check_found(found: Found) -> None:
    if not found.chosen:
        why = next((f": {layer.name!r} {layer.reason}" for layer in found.layers), "")
        raise ValueError(f"{OP}: the model has no linear layer that could be pruned{why}")


def check_optimizer(optimizer: Any, found: Found) -> None:
    if optimizer is None:
        return
    if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"{OP}: optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    weights = {name: module._parameters["weight"] for name, module in found.chosen.items()}
    if all(id(weight) not in trained for weight in weights.values()):
        raise ValueError(
            f"{OP}: the optimizer holds no weight of the layers to prune, as {next(iter(weights))!r}; pass the one "
            "that trains this model, made from its parameters"
        )
    for name, module in found.chosen.items():
        if is_conv1d(module) and id(weights[name]) in trained:
            raise ValueError(
                f"{OP}: layer {name!r} is a Conv1D, whose weight becomes a new parameter, which the optimizer would "
                "not train; call prune_(model, 0.0) first and then make the optimizer"
            )


def check_trained(found: Found) -> None:
    """For methods that look at gradients: every layer has to get one."""
    for name, module in found.chosen.items():
        weight = module._parameters["weight"]
        if weight is not None and not weight.requires_grad:
            raise ValueError(
                f"{OP}: layer {name!r} is frozen (requires_grad=False), so that no gradient would rank its weights; "
                f"leave it out with skip={name!r}, or choose another method"
            )
