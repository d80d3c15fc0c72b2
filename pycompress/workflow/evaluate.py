"""Calling eval_fn, and what counts as an answer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pycompress.workflow.job import EvalFn
from pycompress.workflow.rng import keeping_all_rng, seed_all, seed_of

METRIC = "metric"  # what a single number is called


def evaluate(eval_fn: EvalFn | None, model: nn.Module, seed: int) -> dict[str, float]:
    """The metrics of `model` by name; none without eval_fn. The model is in eval mode before and after.

    Whatever eval_fn draws from torch's, numpy's and Python's generators is the same after every stage.

    Raises TypeError for an answer that is neither a number nor a mapping of names to numbers.
    """
    if eval_fn is None:
        return {}
    model.eval()
    with keeping_all_rng():
        seed_all(seed_of(seed, "eval_fn"))
        answer = eval_fn(model)
    model.eval()
    for parameter in model.parameters():
        parameter.grad = None
    if isinstance(answer, Mapping):
        if not answer or not all(isinstance(name, str) for name in answer):
            raise TypeError(f"eval_fn returned {_shown(answer)}; expected a number, or {{name: number}}")
        return {name: _number(value, f"{name!r}: ") for name, value in answer.items()}
    return {METRIC: _number(answer, "")}


def _number(value: Any, name: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    # numpy's numbers are registered with `numbers`, or have item() like its arrays of one.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number and getattr(value, "size", None) == 1 and hasattr(value, "item"):
        value, is_number = value.item(), True
    if not is_number or isinstance(value, (str, bytes)):
        raise TypeError(f"eval_fn returned {name}{_shown(value)}; expected a number, or {{name: number}}")
    return float(value)


def not_finite(metrics: Mapping[str, float]) -> str | None:
    """The first metric that is NaN or infinite, in words."""
    return next((f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)), None)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    text = repr(value)
    return f"a {type(value).__name__}" if len(text) > 60 else f"{text} ({type(value).__name__})"
