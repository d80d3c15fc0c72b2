"""HiddenStateLoss and AttentionLoss against float64 formulas over the valid tokens alone; bad input."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pycompress.nn import AttentionLoss, HiddenStateLoss

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """The tolerance is that of the accumulation in float32: the inputs are the same numbers on both sides."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def close_gradient(actual: Tensor, expected: Tensor, terms: int = 1) -> None:
    """Two roundings to the gradient's dtype, and eight to float32 of the largest: the cosine's terms cancel.

    terms: how many gradients of that dtype torch has added up; those of several may cancel too.
    """
    eps = torch.finfo(actual.dtype).eps
    accumulator = eps if actual.dtype == torch.float64 else torch.finfo(torch.float32).eps
    # Below the normal numbers of float16 the spacing no longer shrinks.
    atol = torch.finfo(actual.dtype).smallest_normal * eps
    atol += (8 * accumulator + (terms - 1) * eps) * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2 * eps, atol=atol)


def hidden_pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype).requires_grad_()


def maps(heads: int, mask: Tensor | None = None, size: int = 5, batch: int = 3) -> Tensor:
    """Attention probabilities as a model returns them: 0 at masked keys."""
    scores = torch.randn(batch, heads, size, size)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    return scores.softmax(-1)


# ---- hidden states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, MASK, MASK.bool()], ids=["whole", "int", "bool"])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_state_loss_is_the_formula(kind: str, mask: Tensor | None, dtype: torch.dtype) -> None:
    student, teacher = hidden_pair(3, 5, 8, dtype=dtype)
    chosen = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask.bool()
    leaf = student.detach().double().requires_grad_()
    s, t = leaf[chosen], teacher.detach().double()[chosen]
    if kind == "mse":
        expected = functional.mse_loss(s, t)
    else:
        expected = (1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))).mean()
    loss = HiddenStateLoss(kind)(student, teacher, mask)
    close(loss, expected, dtype)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    expected.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    close_gradient(student.grad, leaf.grad)
    assert teacher.grad is None


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_state_reductions_agree(kind: str) -> None:
    student, teacher = hidden_pair(3, 5, 8)
    none = HiddenStateLoss(kind, reduction="none")(student, teacher, MASK)
    assert none.shape == (3, 5)
    assert torch.equal(none == 0, MASK == 0)
    close(HiddenStateLoss(kind, reduction="sum")(student, teacher, MASK), none.sum())
    close(HiddenStateLoss(kind)(student, teacher, MASK), none.sum() / 4)


@pytest.mark.parametrize("shape", [(8,), (6, 8), (2, 3, 4, 8), (0, 8)])
def test_hidden_state_loss_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    student, teacher = hidden_pair(*shape)
    loss = HiddenStateLoss("mse")(student, teacher)
    close(loss, functional.mse_loss(student, teacher) if student.numel() else torch.tensor(0.0))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_masked_tokens_may_hold_anything(kind: str) -> None:
    module = HiddenStateLoss(kind, student_dim=8, teacher_dim=6)
    student, teacher = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
    expected = module(student, teacher, MASK)
    student[MASK == 0], teacher[MASK == 0] = math.nan, math.inf
    student.requires_grad_()
    loss = module(student, teacher, MASK)
    assert loss == expected
    loss.backward()
    assert torch.equal(student.grad == 0, (MASK == 0)[..., None].expand(3, 5, 8))
    assert module.projection.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_no_valid_token_is_zero(kind: str) -> None:
    student, teacher = hidden_pair(2, 3, 4)
    loss = HiddenStateLoss(kind)(student, teacher, torch.zeros(2, 3, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros(2, 3, 4))


def test_cosine_of_zero_states_has_a_finite_gradient() -> None:
    student = torch.zeros(2, 4, requires_grad=True)
    HiddenStateLoss("cosine")(student, torch.randn(2, 4)).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_is_learned(dtype: torch.dtype) -> None:
    module = HiddenStateLoss("mse", student_dim=4, teacher_dim=6)
    assert [tuple(p.shape) for p in module.parameters()] == [(6, 4)]
    student, teacher = torch.randn(3, 5, 4).to(dtype), torch.randn(3, 5, 6).to(dtype)
    close(module(student, teacher), functional.mse_loss(student.float() @ module.projection.weight.T, teacher.float()))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        losses.append(module(student, teacher))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_equal_widths_need_no_projection() -> None:
    assert HiddenStateLoss(student_dim=4, teacher_dim=4).projection is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l1"}, "kind='l1', expected one of: 'mse', 'cosine'"),
        ({"reduction": "max"}, "reduction='max', expected one of: 'mean', 'sum', 'none'"),
        ({"student_dim": 3}, "student_dim=3, teacher_dim=None; give both"),
        ({"student_dim": 0, "teacher_dim": 3}, "student_dim=0, expected a positive width"),
    ],
)
def test_hidden_state_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"HiddenStateLoss: {message}")):
        HiddenStateLoss(**options)


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "message"),
    [
        ((2, 3, 4), (2, 2, 4), None, "student_hidden has shape (2, 3, 4) and teacher_hidden (2, 2, 4), expected"),
        ((2, 3, 4), (2, 3, 6), None, "width 4 but teacher_hidden has 6; give student_dim and teacher_dim"),
        ((2, 3, 4), (2, 3, 4), (2, 1, 1, 3), "attention_mask has shape (2, 1, 1, 3), expected (2, 3)"),
        ((2, 3, 4), (2, 3, 4), (3, 2), "attention_mask has shape (3, 2), expected (2, 3)"),
    ],
)
def test_hidden_state_shapes(student: tuple, teacher: tuple, mask: tuple | None, message: str) -> None:
    attention_mask = None if mask is None else torch.ones(mask, dtype=torch.long)
    with pytest.raises(ValueError, match=re.escape(message)):
        HiddenStateLoss()(torch.randn(student), torch.randn(teacher), attention_mask)


def test_hidden_state_inputs_of_the_wrong_kind() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="student_hidden has width 4, expected student_dim=5"):
        HiddenStateLoss(student_dim=5, teacher_dim=4)(x, x)
    with pytest.raises(ValueError, match=r"teacher_hidden is torch\.int64, expected a tensor of floats"):
        HiddenStateLoss()(x, x.long())
    with pytest.raises(ValueError, match=r"student_hidden is NoneType.*output_hidden_states=True"):
        HiddenStateLoss()(None, x)
    with pytest.raises(ValueError, match=r"attention_mask is torch\.float32, expected bool or integer"):
        HiddenStateLoss()(x, x, torch.zeros(2, 3))


# ---- attention --------------------------------------------------------------------------------------------------


def attention_oracle(kind: str, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Sentence by sentence over its real tokens alone; heads weigh alike."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for s, t, m in zip(student.double(), teacher.double(), mask.bool(), strict=True):
        s, t = s[:, m][:, :, m], t[:, m][:, :, m]
        if kind == "mse":
            total = total + (s - t).square().sum()
            count += s.numel()
        else:
            total = total + (t * (t.log() - s.log())).sum()
            count += s.shape[0] * s.shape[1]
    return total / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_attention_loss_is_the_formula(kind: str, mask: Tensor | None, dtype: torch.dtype) -> None:
    student, teacher = maps(4, mask).to(dtype).requires_grad_(), maps(4, mask).to(dtype)
    loss = AttentionLoss(kind)(student, teacher, mask)
    close(loss, attention_oracle(kind, student, teacher, torch.ones(3, 5) if mask is None else mask), dtype)
    loss.backward()
    assert student.grad.isfinite().all()
    if mask is not None:
        outside = (mask[:, None, :, None] * mask[:, None, None, :] == 0).expand_as(student)
        assert (student.grad[outside] == 0).all()


def test_masked_pairs_may_hold_anything() -> None:
    student, teacher = maps(2, MASK), maps(2, MASK)
    outside = (MASK[:, None, :, None] * MASK[:, None, None, :] == 0).expand_as(student)
    for kind in ("mse", "kl"):
        expected = AttentionLoss(kind)(student, teacher, MASK)
        assert AttentionLoss(kind)(*(x.masked_fill(outside, math.nan) for x in (student, teacher)), MASK) == expected
        assert AttentionLoss(kind)(student, teacher, torch.zeros_like(MASK)) == 0


def test_attention_scores_of_masked_keys_count_as_zero() -> None:
    """TinyBERT compares scores, with -10000 added to those of padding."""
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    student[..., 3], teacher[..., 3] = -10000 + torch.randn(2, 3, 4), -math.inf
    plain = [x.clone() for x in (student, teacher)]
    for x in plain:
        x[..., 3] = 0
    close(AttentionLoss("mse")(student, teacher), functional.mse_loss(*plain))


def test_attention_without_mass_at_the_student_is_large_and_finite() -> None:
    student = torch.tensor([[[[1.0, 0.0]]]], requires_grad=True)
    loss = AttentionLoss("kl")(student, torch.tensor([[[[0.5, 0.5]]]]))
    loss.backward()
    assert 40 < loss < 50
    assert student.grad.isfinite().all()


def test_equal_maps_have_no_distance() -> None:
    x = maps(3, MASK)
    assert AttentionLoss("mse")(x, x, MASK) == 0
    close(AttentionLoss("kl")(x, x, MASK), torch.tensor(0.0))


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_head_counts_that_differ_are_averaged_on_request(kind: str) -> None:
    student, teacher = maps(2, MASK), maps(6, MASK)
    with pytest.raises(ValueError, match='student has 2 heads and the teacher 6; heads="mean"'):
        AttentionLoss(kind)(student, teacher, MASK)
    close(
        AttentionLoss(kind, heads="mean")(student, teacher, MASK),
        AttentionLoss(kind)(student.mean(1, keepdim=True), teacher.mean(1, keepdim=True), MASK),
    )


def test_attention_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=re.escape("AttentionLoss: kind='ce', expected one of: 'mse', 'kl'")):
        AttentionLoss("ce")
    with pytest.raises(ValueError, match="heads='max', expected one of: 'match', 'mean'"):
        AttentionLoss(heads="max")
    x, loss = maps(2), AttentionLoss()
    with pytest.raises(ValueError, match=re.escape("teacher_maps has shape (2, 5, 5), expected (batch, heads,")):
        loss(x, x[0])
    with pytest.raises(ValueError, match="expected the same batch, queries and keys"):
        loss(x, maps(2, size=6))
    with pytest.raises(ValueError, match=r"student_maps is NoneType.*attn_implementation='eager'"):
        loss(None, x)
    with pytest.raises(ValueError, match="maps of 4 queries and 5 keys"):
        loss(x[:, :, :4], x[:, :, :4], MASK)
    assert loss(x[:, :, :4], x[:, :, :4]) == 0  # cross-attention, without a mask
