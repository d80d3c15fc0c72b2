"""What the workflow's objective refuses before any training, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pycompress.recipe.sections import Attention, Distillation, Hidden
from pycompress.workflow.objective import Objective
from tests.workflow_models import Encoder, net, token_batch

pytestmark = pytest.mark.usefixtures("one_thread")
X, LABELS = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 4, 0])


def refused(said: str, d: Distillation | None, student: Any, teacher: Any, batch: Any, loss_fn: Any = None) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        Objective.make(d, student, teacher, loss_fn, batch)


PAIR = (X, LABELS)


def test_no_task_loss() -> None:
    refused("no labels and the model, which returned a Tensor, made no loss; give batches", None, net(0), None, X)
    refused(r"alpha=0\.5 weights the task's loss, but .* or set alpha: 0", Distillation(), net(0), net(1), X)
    encoder = Encoder(logits=False)
    refused("has neither logits nor a loss", None, encoder, None, token_batch(3, 5))
    refused("loss_fn.* gave a tensor", None, net(0), None, PAIR, lambda output, batch: output)
    refused("loss_fn.* gave a float", None, net(0), None, PAIR, lambda output, batch: 0.5)


def test_labels_that_do_not_fit() -> None:
    refused(r"labels are torch.int64 \(3,\) for logits \(6, 5\)", None, net(0), None, (X, LABELS[:3]))
    refused(r"labels are torch.float32 \(6, 5\)", None, net(0), None, (X, torch.rand(6, 5)))
    refused("labels are a list", None, net(0), None, (X, [1, 2]))
    refused("one class", None, net(0, classes=1), None, (X, LABELS * 0))


def test_teachers_that_do_not_fit() -> None:
    student = net(0)
    refused("there is no teacher", Distillation(), student, None, PAIR)
    refused("the teacher is the student itself", Distillation(), student, student, PAIR)
    refused("the teacher is the student itself", Distillation(), student, nn.Sequential(student), PAIR)
    refused("student has 5 classes .* and the teacher 9", Distillation(), student, net(1, classes=9), PAIR)
    refused(
        r"logits are \(6, 5\) and the teacher's \(6, 1, 5\)",
        Distillation(),
        student,
        nn.Sequential(net(1), nn.Unflatten(1, (1, 5))),
        PAIR,
    )
    refused("the teacher, a Linear, fails with a batch", Distillation(), student, nn.Linear(3, 5), PAIR)
    refused(r"the student, a Sequential, fails .*\(Tensor\)", Distillation(), student, net(1), (X[:, :3], LABELS))
    batch = token_batch(3, 5, labels=False)
    refused(
        "the teacher returned none; use loss: none", Distillation(alpha=0.0), Encoder(), Encoder(logits=False), batch
    )


def test_losses_that_are_0_at_every_step() -> None:
    refused("one class", Distillation(alpha=0.0), net(0, classes=1), net(1, classes=1), X)
    refused("one class", None, net(0, classes=1), None, (X, LABELS * 0))


def features(**terms: Any) -> Distillation:
    return Distillation(loss="none", alpha=0.0, **terms)


def test_layers_that_do_not_match() -> None:
    batch = token_batch(3, 5, labels=False)
    student, teacher = Encoder(layers=2), Encoder(seed=1, layers=3)
    every = features(hidden=Hidden(layers="all"))
    refused("2 layers of the student and 3 of the teacher", every, student, teacher, batch)
    refused("2 layers of the student and 3", features(attention=Attention(layers="all")), student, teacher, batch)
    refused("4 layers of the student and 2 of the teacher", every, Encoder(layers=4), Encoder(seed=1), batch)
    refused("takes no output_hidden_states", features(hidden=Hidden()), net(0), net(1), X)
    refused("takes no output_attentions", features(attention=Attention()), net(0), net(1), X)


def test_modules_that_are_not_there() -> None:
    student, teacher, batch = Encoder(), Encoder(seed=1), token_batch(3, 5, labels=False)
    hidden = features(hidden=Hidden(layers={"embedd": "embed"}))
    refused("the student has no module 'embedd'; the closest names are 'embed'", hidden, student, teacher, batch)
    hidden = features(hidden=Hidden(layers={"embed": "blocks.9"}))
    refused("the teacher has no module 'blocks.9'; the closest", hidden, student, teacher, batch)
    refused("hidden.layers is empty", features(hidden=Hidden(layers={})), student, teacher, batch)
    hidden = features(hidden=Hidden(layers={"unused": "embed"}))
    refused("the student's module 'unused' ran 0 times", hidden, student, teacher, batch)
    hidden = features(hidden=Hidden(layers={"pooler": "embed"}))
    refused("same leading shape", hidden, student, teacher, batch)


def test_attention_that_is_not_returned() -> None:
    batch = token_batch(3, 5, labels=False)
    refused(
        "the student returned no attentions .*attn_implementation='eager'",
        features(attention=Attention()),
        Encoder(sdpa=True),
        Encoder(seed=1),
        batch,
    )
