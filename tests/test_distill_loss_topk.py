"""A teacher given as its k largest logits, the mass outside them known or not: every engine, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import ops
from pycompress.ops import TopKLogits
from tests.distill_check import ENGINES, cases, check, check_all, each_token, every_engine, run, truth
from tests.distill_oracle import DIVERGENCES, DTYPES, Case, solve

INF, NAN = float("inf"), float("nan")


def make(t: int, v: int, k: int, dtype: torch.dtype = torch.float32, tail: bool = True, **options: Any) -> Case:
    temperature = options.setdefault("temperature", 2.0)
    student, teacher = (2 * torch.randn(2, t, v)).to(dtype)
    top = TopKLogits.from_logits(teacher, k, temperature)
    labels = torch.randint(v, (t,))
    labels[1::4] = -100
    return Case(student, top if tail else top._replace(logsumexp=None), labels, **options)


# ---- the formula ----------------------------------------------------------------------------------------------------


@cases
def drawn(shape: tuple[int, int, int], dtype: torch.dtype, tail: bool) -> Iterator[Case]:
    for divergence in DIVERGENCES if tail else ("forward_kl", "jsd"):
        for alpha in (0.0, 0.4):
            yield make(*shape, dtype, tail, divergence=divergence, alpha=alpha, beta=0.3, label_smoothing=alpha / 4)
        yield each_token(make(*shape, dtype, tail, divergence=divergence, temperature=0.7))


@every_engine
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [
    (1, 1, 1), (17, 2, 1), (16, 10, 3), (33, 65, 16), (15, 64, 63), (3, 1000, 1), (3, 1000, 17), (2, 5001, 64),
    (2, 30522, 100), (1, 4097, 3000),
], ids=str)  # fmt: skip
def test_matches_float64(engine: str, shape: tuple[int, int, int], dtype: torch.dtype, tail: bool) -> None:
    check_all(engine, drawn(shape, dtype, tail))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_oracle_agrees_with_autograd(divergence: str) -> None:
    """The truth itself: the rest as one class, written with logsumexp and differentiated in float64."""
    student = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    top = TopKLogits.from_logits(torch.randn(5, 12, dtype=torch.float64), 4, 1.5)
    case = Case(student, top, None, 1.5, 0.0, divergence, 0.3, reduction="sum")
    log_p = top.values / 1.5 - top.logsumexp[:, None]
    log_p = torch.cat([log_p, (1 - log_p.exp().sum(1, keepdim=True)).log()], 1)
    log_q = (student / 1.5).log_softmax(1)
    outside = torch.ones(5, 12, dtype=torch.bool).scatter_(1, top.indices, False)
    rest = torch.where(outside, log_q, -INF).logsumexp(1, keepdim=True)
    log_q = torch.cat([log_q.gather(1, top.indices), rest], 1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum()

    log_m = (0.3 * log_p.exp() + 0.7 * log_q.exp()).log()
    values = {"forward_kl": kl(log_p, log_q), "reverse_kl": kl(log_q, log_p)}
    values["jsd"] = 0.3 * kl(log_p, log_m) + 0.7 * kl(log_q, log_m)
    loss = 1.5**2 * values[divergence]
    loss.backward()
    want = solve(case)
    np.testing.assert_allclose(want.loss, loss.item(), rtol=1e-10)
    assert student.grad is not None
    np.testing.assert_allclose(want.grad, student.grad.numpy(), atol=1e-12)


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("v", [10, 64, 500])
def test_all_classes_are_the_dense_teacher(engine: str, v: int, divergence: str) -> None:
    """k = V leaves nothing outside, with or without the logsumexp, in whatever order."""
    student, teacher = torch.randn(9, v), torch.randn(9, v)
    dense = Case(student, teacher, torch.randint(v, (9,)), 1.5, divergence=divergence)
    want = run(engine, dense)
    top = TopKLogits.from_logits(teacher, v, 1.5)
    for given_teacher in (top, top._replace(logsumexp=None)):
        if given_teacher.logsumexp is None and divergence == "reverse_kl":
            continue
        result = run(engine, dense.but(teacher=given_teacher))
        torch.testing.assert_close(result.loss, want.loss, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(result.grad, want.grad, rtol=1e-5, atol=1e-7)


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_more_classes_come_nearer(engine: str, divergence: str) -> None:
    """Putting classes together can only lose divergence: it grows with k to that of the dense teacher."""
    student, teacher = 2 * torch.randn(2, 17, 300)
    dense = Case(student, teacher, None, alpha=0.0, divergence=divergence)
    values = [
        run(engine, dense.but(teacher=TopKLogits.from_logits(teacher, k))).loss.item() for k in (1, 5, 50, 150, 200)
    ]  # fmt: skip
    values.append(run(engine, dense).loss.item())
    assert all(b >= a * (1 - 1e-6) for a, b in pairwise(values))
    assert values[-2] == pytest.approx(values[-1], rel=0.2)


# ---- layouts, edges ---------------------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_dtypes(engine: str, dtype: torch.dtype) -> None:
    """Leading dimensions, strided values and indices, indices in any order, a logsumexp from a wider tensor."""
    student, teacher = torch.randn(2, 3, 4, 90)
    values, indices, logsumexp = TopKLogits.from_logits(teacher, 12, 2.0)
    order = torch.randperm(12)
    wide_values, wide_indices = values[..., order].repeat(1, 1, 2), indices[..., order].repeat(1, 1, 2)
    top = TopKLogits(wide_values.to(dtype)[..., :12], wide_indices[..., :12], logsumexp.repeat(1, 2)[:, :4])
    labels = torch.randint(90, (3, 4))
    for logits in (student, student.transpose(0, 1).contiguous().transpose(0, 1), student.mT.contiguous().mT):
        case = Case(logits.to(dtype), top, labels, 2.0)
        check(case, run(engine, case))
        check(case := each_token(case.but(divergence="reverse_kl")), run(engine, case))
    shared = Case(student[..., :80], top._replace(indices=torch.rand(3, 4, 80).argsort(-1)[..., :12]), labels % 80, 2.0)
    check(shared, run(engine, shared))


@cases
def masked_cases(divergence: str) -> Iterator[Case]:
    for v, k in ((12, 4), (64, 20), (700, 30)):
        student, teacher = 2 * torch.randn(2, 9, v)
        for masked in ("teacher", "student outside", "student inside", "both outside", "both"):
            s, t = student.clone(), teacher.clone()
            indices = t.topk(k).indices
            outside = torch.ones(9, v, dtype=torch.bool).scatter_(1, indices, False)
            inside = torch.zeros(9, v, dtype=torch.bool).scatter_(1, indices[:, 1:3], True)
            if masked in ("student outside", "both outside"):
                s[outside] = -INF
            if masked in ("student inside", "both"):
                s[inside] = -INF
            if masked in ("both outside", "teacher"):
                t[outside] = -INF
            if masked == "both":
                t[inside] = -INF
            logsumexp = t.logsumexp(1)
            top = TopKLogits(t.gather(1, indices), indices, logsumexp)
            yield each_token(Case(s, top, None, alpha=0.0, divergence=divergence))
            if divergence != "reverse_kl":
                yield each_token(Case(s, top._replace(logsumexp=None), None, alpha=0.0, divergence=divergence))


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_classes(engine: str, divergence: str) -> None:
    for known in masked_cases(divergence):
        result = run(engine, known.case)
        assert not result.loss.isnan().any()
        assert result.grad.isfinite().all()
        check(known, result)


@every_engine
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bad_rows_stay_alone(engine: str, divergence: str) -> None:
    for bad, where in ((NAN, "values"), (INF, "values"), (-INF, "values"), (NAN, "logsumexp"), (INF, "logsumexp"),
                       (NAN, "student"), (INF, "student"), (-INF, "student")):  # fmt: skip
        case = each_token(make(8, 100, 5, divergence=divergence))
        assert case.labels is not None
        clean = run(engine, case)
        spoiled = {name: getattr(case.teacher, name).clone() for name in ("values", "indices", "logsumexp")}
        student = case.student.clone()
        for row in (1, 4):  # an ignored token and one that counts
            (student if where == "student" else spoiled[where])[row] = bad
        result = run(engine, case.but(student=student, teacher=TopKLogits(**spoiled)))
        others = [0, 1, 2, 3, 5, 6, 7]
        assert torch.equal(result.loss[others], clean.loss[others])
        assert torch.equal(result.grad[others], clean.grad[others])
        if (bad, where) != (-INF, "values"):  # with a logsumexp that only says that all the mass is outside
            assert result.loss[4].isnan()
            assert result.grad[4].isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    t=st.integers(0, 20), v=st.integers(1, 120), part=st.floats(0, 1), seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES), divergence=st.sampled_from(DIVERGENCES), temperature=st.floats(0.3, 10),
    alpha=st.floats(0, 1), beta=st.floats(0, 1), tail=st.booleans(),
)  # fmt: skip
def test_drawn(
    t: int, v: int, part: float, seed: int, dtype: torch.dtype, divergence: str, temperature: float, alpha: float,
    beta: float, tail: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    k = 1 + int(part * (v - 1))
    options = {"divergence": divergence, "temperature": temperature, "alpha": alpha, "beta": beta}
    known = truth(make(t, v, k, dtype, tail or divergence == "reverse_kl", **options))
    for engine in ENGINES:
        check(known, run(engine, known.case))


# ---- making one, errors -----------------------------------------------------------------------------------------


def test_from_logits() -> None:
    logits = torch.randn(2, 3, 50, dtype=torch.bfloat16, requires_grad=True)
    top = TopKLogits.from_logits(logits, 7, 2.5)
    values, indices = logits.detach().topk(7)
    assert torch.equal(top.values, values)
    assert torch.equal(logits.detach().gather(-1, top.indices), values)
    assert top.indices.dtype == torch.int64
    assert indices.shape == top.indices.shape
    assert top.logsumexp is not None
    assert top.logsumexp.dtype == torch.float32
    torch.testing.assert_close(top.logsumexp, (logits.detach().float() / 2.5).logsumexp(-1))
    assert not top.values.requires_grad
    for k, temperature, message in ((0, 1.0, "k=0"), (51, 1.0, "k=51"), (5, 0.0, "temperature=0.0")):
        with pytest.raises(ValueError, match=message):
            TopKLogits.from_logits(logits, k, temperature)
    with pytest.raises(ValueError, match="expected floating"):
        TopKLogits.from_logits(torch.zeros(3, 4, dtype=torch.int64), 2)


S, TOP = torch.randn(3, 10), TopKLogits.from_logits(torch.randn(3, 10), 4)
Y = torch.tensor([1, 2, 3])


def indices(*rows: list[int]) -> TopKLogits:
    return TOP._replace(indices=torch.tensor(rows))


GOOD = [0, 1, 2, 3]
ERRORS: dict[str, tuple[TopKLogits, dict[str, Any], str]] = {
    "index high": (indices(GOOD, [0, 1, 10, 3], GOOD), {}, "top-k index 10 at token 1 is out of range for V=10"),
    "index low": (indices(GOOD, GOOD, [0, -1, 2, 3]), {}, "top-k index -1 at token 2 is out of range for V=10"),
    "index repeated": (indices(GOOD, [0, 5, 2, 5], GOOD), {}, "top-k index 5 at token 1 is repeated"),
    "shapes": (TOP._replace(indices=TOP.indices[:, :3]), {}, r"values are \(3, 4\) but indices \(3, 3\)"),
    "tokens": (TopKLogits(*(x[:2] for x in TOP)), {}, "all dimensions but the last must agree"),
    "index dtype": (TOP._replace(indices=TOP.indices.float()), {}, "top-k indices are torch.float32, expected int64"),
    "value dtype": (TOP._replace(values=TOP.values.int()), {}, "teacher_logits are torch.int32"),
    "logsumexp shape": (TOP._replace(logsumexp=torch.zeros(3, 1)), {}, r"logsumexp has shape \(3, 1\), expected"),
    "logsumexp dtype": (TOP._replace(logsumexp=torch.zeros(3).long()), {}, "logsumexp is torch.int64"),
    "too many": (TopKLogits.from_logits(torch.randn(3, 11), 11), {}, "k=11 but the student V=10"),
    "reverse": (TOP._replace(logsumexp=None), {"divergence": "reverse_kl"}, "reverse_kl.* is infinite .*logsumexp"),
    "teacher_grad": (TOP, {"teacher_grad": True}, "teacher_grad=True needs a teacher's whole logits"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, backend: str) -> None:
    top, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^distill_loss: .*{message}"):
        ops.distill_loss(S, top, Y, **options, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_masses_below_float32_keep_their_logarithm(backend: str) -> None:
    """A class may have no weight and still be far from masked: nothing is infinite, and the others are pulled back."""
    values, indices = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]])
    loss = ops.distill_loss(
        torch.tensor([[0.0, 90.0, 0.0, 0.0]]), ops.TopKLogits(values, indices, None), alpha=0.0, backend=backend
    )
    assert isinstance(loss, torch.Tensor)
    p = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(0)
    expected = (p * (p.log() - torch.tensor([0.0, 90.0, 0.0, 0.0], dtype=torch.float64).log_softmax(0)[:2])).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)

    student = torch.tensor([[300.0, 0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    (grad,) = torch.autograd.grad(
        ops.distill_loss(student, ops.TopKLogits.from_logits(teacher, 1), alpha=0.0, backend=backend), student
    )
    # The teacher's tail is 1 less what its rounded logsumexp says.
    torch.testing.assert_close(grad, student.detach().softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=0)
