"""linear_distill_loss inside torch: opcheck, compile, export, autocast, copies of the module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress.nn import LinearDistillationLoss
from pycompress.ops import linear_distill_loss


def inputs(tokens: int = 20, classes: int = 50, *, grad: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    tensors = {
        "student_hidden": torch.randn(tokens, 16, requires_grad=grad),
        "student_weight": torch.randn(classes, 16, requires_grad=grad),
        "teacher_hidden": torch.randn(tokens, 24),
        "teacher_weight": torch.randn(classes, 24),
    }
    labels = torch.randint(0, classes, (tokens,))
    labels[3] = -100
    return tensors, labels


def gradients(loss: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [t for t in tensors.values() if t.requires_grad])


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, wanted: tuple[bool, bool, bool]) -> None:
    tensors, labels = inputs(grad=any(wanted))
    bias = torch.randn(50, requires_grad=wanted[2])
    wanted = wanted if reduction != "none" else (False, False, False)  # then the backward asks for them itself
    arguments = (
        tensors["student_hidden"].detach().requires_grad_(wanted[0]),
        tensors["student_weight"].detach().requires_grad_(wanted[1]),
        bias.detach().requires_grad_(wanted[2]),
        tensors["teacher_hidden"],
        tensors["teacher_weight"],
        None,
        labels,
        None,
        None,
        None,
        *(2.0, 0.5, "forward_kl", 0.5, -100, 0.0, reduction, 1.0, 1.0, None, None, 7),
        *wanted,
        None,
        "auto",
    )
    torch.library.opcheck(torch.ops.pycompress.linear_distill_loss.default, arguments)


def test_compile() -> None:
    tensors, labels = inputs()
    loss_fn = LinearDistillationLoss(2.0, 0.3, divergence="reverse_kl", chunk_tokens=8)

    def train(tensors: dict[str, Tensor]) -> Tensor:
        return loss_fn(tensors["student_hidden"] * 2, *list(tensors.values())[1:], labels)

    expected = train(tensors)
    loss = torch.compile(train, fullgraph=True)(tensors)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(3 * loss, tensors), gradients(3 * expected, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_export() -> None:
    tensors, labels = inputs(grad=False)
    loss_fn = LinearDistillationLoss(2.0, 0.3)
    exported = torch.export.export(loss_fn, (*tensors.values(), labels))
    torch.testing.assert_close(exported.module()(*tensors.values(), labels), loss_fn(*tensors.values(), labels))


def test_autocast() -> None:
    """The products are those of bfloat16 tensors; the gradients are those of float32 parameters."""
    tensors, labels = inputs(200, 300)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_distill_loss(**tensors, labels=labels)
    assert isinstance(loss, Tensor)
    assert loss.dtype == torch.float32
    rounded = {name: t.detach().bfloat16().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    expected = linear_distill_loss(**rounded, labels=labels)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for ours, theirs in zip(gradients(loss, tensors), gradients(expected, rounded), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=0.02, atol=float(theirs.abs().max()) / 64)


def test_second_order_is_refused() -> None:
    tensors, labels = inputs()
    loss = linear_distill_loss(**tensors, labels=labels)
    assert isinstance(loss, Tensor)
    with pytest.raises(RuntimeError, match="linear_distill_loss: second-order gradients are not supported"):
        torch.autograd.grad(loss, tensors["student_hidden"], create_graph=True)


def test_parts_have_no_gradient() -> None:
    tensors, labels = inputs()
    parts: Any = linear_distill_loss(**tensors, labels=labels, alpha=0.25, return_parts=True)
    assert (parts.loss.requires_grad, parts.hard.requires_grad, parts.soft.requires_grad) == (True, False, False)
    torch.testing.assert_close(parts.loss.detach(), 0.25 * parts.hard + 0.75 * parts.soft)


def test_in_a_training_step() -> None:
    """Through a tied head and a body, as a training step has them, equal to the composition."""
    body, head = nn.Linear(16, 16), nn.Linear(16, 50)
    x, (tensors, labels) = torch.randn(20, 16), inputs()
    teacher = tensors["teacher_hidden"] @ tensors["teacher_weight"].t()
    loss_fn = LinearDistillationLoss(1.0, 0.5, chunk_tokens=6)
    loss_fn(
        body(x), head.weight, tensors["teacher_hidden"], tensors["teacher_weight"], labels, student_bias=head.bias
    ).backward()
    ours = [p.grad.clone() for p in (*body.parameters(), *head.parameters()) if p.grad is not None]
    body.zero_grad()
    head.zero_grad()
    logits, valid = head(body(x)), labels != -100
    soft = nn.functional.kl_div(logits[valid].log_softmax(-1), teacher[valid].softmax(-1), reduction="batchmean")
    (0.5 * nn.functional.cross_entropy(logits, labels) + 0.5 * soft).backward()
    for got, parameter in zip(ours, (*body.parameters(), *head.parameters()), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(copied: Any) -> None:
    tensors, labels = inputs()
    loss_fn = LinearDistillationLoss(2.0, 0.3, student_softcap=5.0)
    assert torch.equal(copied(loss_fn)(*tensors.values(), labels), loss_fn(*tensors.values(), labels))
