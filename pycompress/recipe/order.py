"""Which stage may follow which.

[low_rank | prune | distill | finetune | qat]*, then sparsify, then quantize, each of the last two at most once:
quantize takes the layers that sparsify left. Nothing trains or changes weights after them, nothing is factorised once
it is pruned, and nothing is pruned or factorised once its rounding was trained (qat).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pycompress.recipe.problems import Problem

if TYPE_CHECKING:
    from pycompress.recipe.sections import Stage

_CHANGING = ("low_rank", "prune", "distill", "finetune", "qat")
_PACKING = ("sparsify", "quantize")
_RANK = {"low_rank": 0, "prune": 1, "distill": 1, "finetune": 1, "qat": 2, "sparsify": 3, "quantize": 4}

# (earlier, later): why not.
_FORBIDDEN = {
    (packing, later): f"{packing} leaves the weights as they are run, and none is trained or changed after it"
    for packing in _PACKING
    for later in _CHANGING
} | {
    ("sparsify", "sparsify"): "the first one has taken every pruned layer",
    ("quantize", "quantize"): "the first one has taken every layer; its skip and sensitivity choose among them",
    ("quantize", "sparsify"): "quantize makes pruned layers dense int8; after sparsify it takes the others",
    ("qat", "prune"): "qat fits the weights to their rounding, which pruning changes",
    ("qat", "low_rank"): "qat fits the weights to their rounding, and factors are other weights",
    ("prune", "low_rank"): "the factors of a pruned weight are dense; prune the factors instead",
}  # fmt: skip


def order_problems(names: Sequence[str]) -> list[Problem]:
    """At most one problem a stage, with the first of those before it that it cannot follow. "" is an unknown stage."""
    problems = []
    for later, name in enumerate(names):
        for earlier in range(later):
            if (why := _FORBIDDEN.get((names[earlier], name))) is not None:
                text = f"{name} (stage {later + 1}) cannot come after {names[earlier]} (stage {earlier + 1}): {why}"
                problems.append(Problem(("stages", later), f"{text}. This order works: {', '.join(working(names))}"))
                break
    return problems


def working(names: Sequence[str]) -> list[str]:
    """The same stages in an order that works; of sparsify and quantize one each."""
    kept = [name for i, name in enumerate(names) if name and not (name in _PACKING and name in names[:i])]
    return sorted(kept, key=_RANK.__getitem__)


def agreement_problems(stages: Sequence[Stage]) -> list[Problem]:
    """Where qat trains for other arithmetic than sparsify uses; quantize converts a layer as it was trained."""
    from pycompress.recipe.sections import Qat, Sparsify

    problems = []
    qat: Qat | None = None
    for i, stage in enumerate(stages):
        text = ""
        if isinstance(stage, Qat):
            if qat is not None and qat.mode != stage.mode:
                text = f"qat.mode is {stage.mode!r}, but an earlier qat trains for {qat.mode!r}; one mode is enough"
            qat = stage
        elif qat is not None and isinstance(stage, Sparsify) and (stage.dtype, qat.mode) != ("int8", "dynamic"):
            text = (
                f"sparsify.dtype is {stage.dtype!r} after qat with mode {qat.mode!r}; what qat trains for is kept only "
                "by sparsify with dtype: int8 after qat with mode: dynamic"
            )
        if text:
            problems.append(Problem(("stages", i), text))
    return problems
