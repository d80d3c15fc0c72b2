"""``DistillationLoss``: options, state, what it hands to the operator; and everything that a call may refuse."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress
from pycompress import ops
from pycompress.nn import DistillationLoss
from pycompress.ops.distill_loss import pick
from pycompress.ops.distill_loss_call import Call
from tests.distill_check import Result, check
from tests.distill_oracle import DIVERGENCES, REDUCTIONS, Case

NAN, INF = float("nan"), float("inf")
BACKENDS = ("native", "reference")


def draw(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape, requires_grad=True), torch.randn(shape), torch.randint(shape[-1], shape[:-1])


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_option_reaches_the_operator(divergence: str, reduction: str, backend: str) -> None:
    student, teacher, labels = draw(2, 9, 30)
    labels[0, :3] = 7
    weight, items = torch.rand(2, 9), 5.5 if reduction == "mean" else None
    teacher.requires_grad_()
    module = DistillationLoss(
        1.7, 0.2, divergence=divergence, beta=0.3, ignore_index=7, label_smoothing=0.15, reduction=reduction,
        teacher_grad=True, backend=backend,
    )  # fmt: skip
    parts = module(student, teacher, labels, token_weight=weight, num_items=items, return_parts=True)
    assert isinstance(parts, ops.DistillLossParts)
    upstream = torch.ones(2, 9) if reduction == "none" else torch.tensor(1.0)
    grads = torch.autograd.grad(parts.loss, (student, teacher), upstream)
    check(
        Case(student.detach(), teacher.detach(), labels, 1.7, 0.2, divergence, 0.3, 7, 0.15, reduction, weight, items,
             True, upstream if reduction == "none" else None),
        Result(*(part.detach() for part in parts), *grads),
    )  # fmt: skip
    assert torch.equal(module(student, teacher, labels, token_weight=weight, num_items=items), parts.loss)


def test_defaults() -> None:
    """Half cross-entropy, half forward KL at temperature 1, mean over the tokens."""
    student, teacher, labels = draw(6, 20)
    parts = DistillationLoss()(student, teacher, labels, return_parts=True)
    hard = nn.functional.cross_entropy(student, labels)
    soft = nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(parts.hard, hard.detach())
    torch.testing.assert_close(parts.soft, soft.detach())
    torch.testing.assert_close(parts.loss, (hard + soft) / 2)


def test_labels_are_optional_without_a_hard_term() -> None:
    student, teacher, _ = draw(6, 20)
    loss = DistillationLoss(2.0, 0.0)
    assert loss(student, teacher).requires_grad
    assert loss(student, teacher, return_parts=True).hard == 0


def test_it_has_no_state() -> None:
    module = DistillationLoss(2.0, 0.3, divergence="jsd", beta=0.1, reduction="none", backend="reference")
    assert module.state_dict() == {}
    assert list(module.parameters()) == []
    student, teacher, labels = draw(6, 20)
    want = module(student, teacher, labels)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to(torch.float64), module.eval()):
        assert torch.equal(other(student, teacher, labels), want)
        assert repr(other) == repr(module)


def test_repr_names_what_matters() -> None:
    assert repr(DistillationLoss(2.0)).startswith("DistillationLoss(temperature=2.0, alpha=0.5, divergence=forward_kl")
    shown = repr(DistillationLoss(divergence="jsd", beta=0.2, label_smoothing=0.1, reduction="sum", ignore_index=0))
    for part in ("divergence=jsd", "beta=0.2", "label_smoothing=0.1", "reduction=sum", "ignore_index=0", "backend="):
        assert part in shown


@pytest.mark.parametrize(("beta", "limit"), [(0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_that_is_always_zero_warns(beta: float, limit: str) -> None:
    with pytest.warns(UserWarning, match=f"(?s)jsd.*beta={beta:g}.*{limit}"):
        DistillationLoss(divergence="jsd", beta=beta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DistillationLoss(divergence="jsd", beta=0.5)
        DistillationLoss(beta=0)


def test_one_training_step_learns() -> None:
    torch.manual_seed(1)
    head, loss = nn.Linear(16, 12), DistillationLoss(2.0)
    x, teacher, labels = torch.randn(64, 16), torch.randn(64, 12), torch.randint(12, (64,))
    optimizer, values = torch.optim.SGD(head.parameters(), lr=0.5), []
    for _ in range(10):
        optimizer.zero_grad()
        value = loss(head(x), teacher, labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True)


def test_exported() -> None:
    assert "DistillationLoss" in pycompress.nn.__all__
    for name in ("distill_loss", "TopKLogits", "DistillLossParts", "DIVERGENCES", "REDUCTIONS", "DISTILL_BACKENDS"):
        assert name in ops.__all__
    assert ops.DIVERGENCES == DIVERGENCES
    assert ops.REDUCTIONS == REDUCTIONS
    assert set(ops.DISTILL_BACKENDS) == {"auto", *BACKENDS, "cuda", "triton"}
    assert pycompress.nn.TopKLogits is ops.TopKLogits


# ---- errors ---------------------------------------------------------------------------------------------------------

OPTION_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature 0": ({"temperature": 0.0}, r"temperature=0\.0, expected a positive finite number"),
    "temperature negative": ({"temperature": -1.0}, r"temperature=-1\.0"),
    "temperature nan": ({"temperature": NAN}, "temperature=nan"),
    "temperature inf": ({"temperature": INF}, "temperature=inf"),
    "alpha low": ({"alpha": -0.1}, r"alpha=-0\.1, expected 0 .*to 1"),
    "alpha high": ({"alpha": 1.5}, r"alpha=1\.5"),
    "alpha nan": ({"alpha": NAN}, "alpha=nan"),
    "beta low": ({"beta": -0.5, "divergence": "jsd"}, r"beta=-0\.5, expected 0 to 1"),
    "beta high": ({"beta": 2.0}, r"beta=2\.0"),
    "smoothing low": ({"label_smoothing": -0.1}, r"label_smoothing=-0\.1"),
    "smoothing high": ({"label_smoothing": 1.1}, r"label_smoothing=1\.1"),
    "divergence": ({"divergence": "kl"}, "divergence='kl', expected one of forward_kl, reverse_kl, jsd"),
    "reduction": ({"reduction": "batchmean"}, "reduction='batchmean', expected one of mean, sum, none"),
    "backend": ({"backend": "gpu"}, "backend='gpu', expected one of auto, native, cuda, triton, reference"),
}


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_option_errors(case: str) -> None:
    """In the constructor already, and in the function."""
    options, message = OPTION_ERRORS[case]
    with pytest.raises(ValueError, match=f"^distill_loss: {message}"):
        DistillationLoss(**options)
    student, teacher, labels = draw(3, 10)
    with pytest.raises(ValueError, match=f"^distill_loss: {message}"):
        ops.distill_loss(student, teacher, labels, **options)


S, T, Y = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([1, 2, -100, 9])
HIGH = torch.tensor([1, 2, -100, 10])
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "tokens": ((S, T[:3], Y), {}, r"student_logits are \(4, 10\) but teacher_logits \(3, 10\)"),
    "dimensions": ((S, T[None], Y), {}, "all dimensions but the last must agree"),
    "student dtype": ((S.int(), T, Y), {}, "student_logits are torch.int32, expected float32, bfloat16 or float16"),
    "teacher dtype": ((S, T.long(), Y), {}, "teacher_logits are torch.int64, expected float32"),
    "complex": ((S, T.to(torch.complex64), Y), {}, "teacher_logits are torch.complex64"),
    "sparse": ((S.to_sparse(), T, Y), {}, r"student_logits are torch.sparse_coo, .* use .to_dense\(\)"),
    "scalar": ((torch.tensor(1.0), T, Y), {}, r"student_logits are \(\), expected \(..., V\)"),
    "no classes": ((S[:, :0], T, Y), {}, r"student_logits are \(4, 0\), expected \(..., V\) with V > 0"),
    "no teacher classes": ((S, T[:, :0], Y), {}, r"teacher_logits are \(4, 0\)"),
    "label shape": ((S, T, Y[:3]), {}, r"labels has shape \(3,\), expected \(4,\)"),
    "label dtype": ((S, T, Y.float()), {}, "labels are torch.float32, expected class indices"),
    "no labels": ((S, T), {}, "alpha=0.5 needs labels; give them, or alpha=0"),
    "label high": ((S, T, HIGH), {}, r"label 10 at token 3 is out of range for V=10 \(ignore_index=-100\)"),
    "label low": ((S, T, Y), {"ignore_index": -1}, r"label -100 at token 2 is out of range .*\(ignore_index=-1\)"),
    "label of the teacher": ((S[:, :9], T, Y), {}, "label 9 at token 3 is out of range for V=9"),
    "mask out of range": ((S, T, HIGH), {"alpha": 0.0}, "label 10 at token 3"),
    "weight shape": ((S, T, Y), {"token_weight": torch.ones(4, 1)}, r"has shape \(4, 1\), expected \(4,\)"),
    "weight negative": ((S, T, Y), {"token_weight": torch.tensor([1.0, 1, 1, -2])}, "token_weight -2.* at token 3"),
    "weight nan": ((S, T, Y), {"token_weight": torch.tensor([1.0, NAN, 1, 1])}, "token_weight -?nan at token 1"),
    "weight inf": ((S, T, Y), {"token_weight": torch.tensor([INF, 1, 1, 1])}, "token_weight inf.* at token 0"),
    "weight of an ignored token": ((S, T, Y), {"token_weight": torch.tensor([1, 1, -1.0, 1])}, "token_weight -1"),
    "items of a sum": ((S, T, Y), {"num_items": 3, "reduction": "sum"}, "num_items belongs to reduction='mean'"),
    "items of none": ((S, T, Y), {"num_items": 3, "reduction": "none"}, "num_items belongs to reduction='mean'"),
    "no items": ((S, T, Y), {"num_items": 0}, "num_items=0 but some tokens are valid"),
    "items negative": ((S, T, Y), {"num_items": -2}, "num_items=-2, expected a finite number >= 0"),
    "items nan": ((S, T, Y), {"num_items": NAN}, "num_items=nan"),
    "items inf": ((S, T, Y), {"num_items": torch.tensor(INF)}, "num_items=inf"),
    "many items": ((S, T, Y), {"num_items": torch.ones(2)}, r"num_items is torch.float32 \(2,\), expected one"),
    "device": ((S, T.to("meta"), Y), {}, r"student_logits are on cpu but teacher_logits on meta; move one"),
    "label device": ((S, T, Y.to("meta")), {}, "student_logits are on cpu but labels on meta"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, backend: str) -> None:
    args, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^distill_loss: .*{message}"):
        ops.distill_loss(*args, **options, backend=backend)


def test_a_refused_call_changes_nothing() -> None:
    student, teacher, labels = draw(4, 10)
    before = student.detach().clone(), teacher.clone()
    with pytest.raises(ValueError, match="out of range"):
        ops.distill_loss(student, teacher, labels + 100)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    assert student.grad is None


def test_native_refuses_what_it_cannot_do() -> None:
    """It is the reference that takes float64, and other devices; a backend that was named never falls back."""
    student, teacher, labels = draw(4, 10)
    for s, t in ((student.double(), teacher), (student, teacher.double())):
        with pytest.raises(ValueError, match=r"distill_loss: backend='native' cannot run this: .*float64"):
            ops.distill_loss(s, t, labels, backend="native")
        loss = ops.distill_loss(s, t, labels)
        assert loss.dtype == torch.float64
    meta = Call(
        *(x.to("meta") for x in (student, teacher, labels)), None, None, None, None, 1.0, 0.5, "forward_kl", 0.5, -100,
        0.0, "mean", False, False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"backend='native' cannot run this: .*meta"):
        pick("native", meta)
    assert pick("auto", meta).name == "reference"
