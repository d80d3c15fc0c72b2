"""What an objective refuses before any training, each with the way out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pycompress.recipe.sections import Distillation
from pycompress.workflow.batches import Feed
from pycompress.workflow.outputs import describe, logits_of
from pycompress.workflow.task_loss import NONE, PLAIN, SHIFTED, are_classes

OP = "distillation"


def check_teacher(student: nn.Module, teacher: nn.Module | None) -> None:
    """What can be told without running the models."""
    if teacher is None:
        raise ValueError(f"{OP}: there is no teacher; pass one")
    own = {id(p) for p in student.parameters()}
    if teacher is student or (own and own <= {id(p) for p in teacher.parameters()}):
        raise ValueError(
            f"{OP}: the teacher is the student itself, whose distance from itself is 0 at every step; pass another "
            "model, or a copy of it from before it was compressed"
        )


def check_task(task: str, d: Distillation | None, feed: Feed, output: Any) -> None:
    """Whether there is a task loss to train on, and the labels fit the logits."""
    if task == NONE:
        what = f"train: alpha={d.alpha:g} weights the task's loss, but" if d is not None else "train:"
        without = ", or set alpha: 0 to learn from the teacher alone" if d is not None else ""
        lacks = (
            f"the batches have no labels and the model, which returned a {describe(output)}, made no loss"
            if feed.labels is None
            else f"the model, which returned a {describe(output)}, has neither logits nor a loss of its own"
        )
        raise ValueError(
            f"{what} {lacks}; give batches of (inputs, labels) for logits, or loss_fn(output, batch){without}"
        )
    if task not in (PLAIN, SHIFTED):
        return
    labels, logits = feed.labels, logits_of(output)
    assert logits is not None
    if not are_classes(labels, logits):
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise ValueError(
            f"train: labels are {got} for logits {tuple(logits.shape)}; expected class indices "
            f"{tuple(logits.shape[:-1])} for cross-entropy, or give loss_fn(output, batch)"
        )
    if logits.shape[-1] == 1:
        raise ValueError("train: the logits have one class, whose cross-entropy is 0 at every step; give loss_fn")


def check_logits(d: Distillation, student: Tensor | None, teacher: Tensor | None) -> None:
    """Whether D can compare them."""
    for side, logits in (("student", student), ("teacher", teacher)):
        if logits is None:
            raise ValueError(
                f"{OP}: loss {d.loss!r} compares logits, and the {side} returned none; use loss: none with a hidden or "
                "attention term for an encoder"
            )
        if not logits.is_floating_point() or logits.dim() == 0:
            raise ValueError(
                f"{OP}: the {side}'s logits are {logits.dtype} {tuple(logits.shape)}; expected floats (..., V)"
            )
    assert student is not None
    assert teacher is not None
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"{OP}: the student has {student.shape[-1]} classes (its vocabulary) and the teacher {teacher.shape[-1]}; "
            f"loss {d.loss!r} compares them class by class. Take a teacher with the same, or loss: none with a hidden "
            "term"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"{OP}: for one batch the student's logits are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}; expected the same shape"
        )
    if student.shape[-1] == 1:
        raise ValueError(
            f"{OP}: the logits have one class, so that loss {d.loss!r} is 0 at every step; use loss: none with a "
            "hidden term, or compare the values in loss_fn"
        )
