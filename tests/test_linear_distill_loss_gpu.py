"""``linear_distill_loss`` on each GPU backend, against float64: the logits of a chunk at a time, nothing left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pycompress import ops
from pycompress.nn import LinearDistillationLoss
from pycompress.ops import linear_distill_loss
from tests.distill_gpu import moved
from tests.gpu import Gpu
from tests.linear_distill_oracle import NAMES, Answer, Problem, problem
from tests.test_linear_distill_loss import check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy's, of infinities


def run(gpu: Gpu, of: Problem, **more: Any) -> Answer:
    leaves = {n: moved(t.detach(), gpu.device).requires_grad_(n.startswith("student")) for n, t in of.tensors.items()}
    hidden = [leaves.pop(n) for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    options = {name: moved(value, gpu.device) for name, value in {**of.options, **more}.items()}
    labels = moved(of.labels, gpu.device)
    parts = linear_distill_loss(*hidden, labels, **leaves, **options, return_parts=True, backend=gpu.backend)
    assert isinstance(parts, ops.DistillLossParts)
    parts.loss.backward(moved(of.upstream, gpu.device))
    student = dict(zip(NAMES[:3], (hidden[0], hidden[1], leaves.get("student_bias")), strict=True))
    grads = {name: t.grad.cpu() for name, t in student.items() if t is not None and t.grad is not None}
    return Answer(*(x.cpu() for x in parts), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", ops.DIVERGENCES)
@pytest.mark.parametrize("capped", [False, True])
def test_against_float64(gpu: Gpu, capped: bool, divergence: str, dtype: torch.dtype) -> None:
    heads = {"student_softcap": 3.0, "teacher_softcap": 2.0, "student_logit_scale": 0.7, "teacher_logit_scale": 1.5}
    of = problem(
        dtype=dtype, temperature=2.0, alpha=0.3, divergence=divergence, beta=0.3, token_weight=torch.rand(23),
        chunk_tokens=9, **(heads if capped else {}),
    )  # fmt: skip
    check(of, run(gpu, of))


@pytest.mark.parametrize("options", [
    {"alpha": 0.0}, {"alpha": 1.0, "label_smoothing": 0.1}, {"ignore_index": 3, "ignored": 0}, {"num_items": 7.5},
    {"teacher_classes": 40}, {"teacher_classes": 80, "teacher_width": 24}, {"bias": False, "ignored": 0},
], ids=str)  # fmt: skip
def test_options(gpu: Gpu, options: dict[str, Any]) -> None:
    of = problem(chunk_tokens=10, temperature=1.5, **options)
    check(of, run(gpu, of))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_reductions(gpu: Gpu, reduction: str, weighted: bool) -> None:
    of = problem((3, 7), reduction=reduction, token_weight=torch.rand(3, 7) if weighted else None)
    upstream = torch.randn((3, 7) if reduction == "none" else ())
    of = Problem(of.tensors, of.labels, {**of.options, "chunk_tokens": 8}, upstream)
    check(of, run(gpu, of))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_ignored_tokens_hold_is_never_seen(gpu: Gpu, reduction: str) -> None:
    of = problem(ignored=3, reduction=reduction, chunk_tokens=8, token_weight=torch.ones(23))
    of.options["token_weight"][1] = 0
    of = Problem(of.tensors, of.labels, of.options, torch.randn(23) if reduction == "none" else None)
    want = run(gpu, of)
    for name in ("student_hidden", "teacher_hidden"):
        of.tensors[name][::3] = math.nan
        of.tensors[name][1] = math.inf
    got = run(gpu, of)
    for a, b in zip((got.loss, got.hard, got.soft), (want.loss, want.hard, want.soft), strict=True):
        assert torch.equal(a, b)
    for name, grad in want.grads.items():
        torch.testing.assert_close(got.grads[name], grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ignored_index", [-100, 0])
def test_weights_alone_tell_what_is_never_seen(gpu: Gpu, ignored_index: int) -> None:
    of = problem(alpha=0.0, ignored=0, chunk_tokens=8, token_weight=torch.rand(23) + 0.1)
    of.options["token_weight"][1] = 0
    of.options["ignore_index"] = ignored_index
    of = Problem(of.tensors, None, of.options, None)
    want = run(gpu, of)
    of.tensors["student_hidden"][1] = math.nan
    got = run(gpu, of)
    assert torch.equal(got.loss, want.loss)
    for name, grad in want.grads.items():
        torch.testing.assert_close(got.grads[name], grad, rtol=1e-6, atol=1e-9)


def test_no_token_counts(gpu: Gpu) -> None:
    of = problem((6,), ignored=1)
    got = run(gpu, of)
    assert got.loss == got.hard == got.soft == 0
    assert all((grad == 0).all() for grad in got.grads.values())
    got = run(gpu, problem((0,), ignored=0))
    assert got.loss == 0
    assert all((grad == 0).all() for grad in got.grads.values())


def test_values_out_of_range_are_nan(gpu: Gpu) -> None:
    """Not an error, which would wait for the device; the other tokens' gradients stay."""
    of = problem((6,), ignored=0)
    assert of.labels is not None
    for change in ("label", "weight"):
        labels, weight = of.labels.clone(), torch.ones(6)
        if change == "label":
            labels[2] = 61
        else:
            weight[2] = -1
        got = run(gpu, Problem(of.tensors, labels, {**of.options, "token_weight": weight}))
        assert got.loss.isnan()
        grad = got.grads["student_hidden"]
        assert grad[2].isnan().all()
        assert grad[[0, 1, 3, 4, 5]].isfinite().all()


def test_module(gpu: Gpu) -> None:
    of = problem(temperature=2.0)
    module = LinearDistillationLoss(2.0, backend=gpu.backend)
    tensors = {name: moved(t.clone(), gpu.device) for name, t in of.tensors.items()}
    hidden = tensors["student_hidden"].requires_grad_()
    weight = tensors["student_weight"].requires_grad_()
    biases = {name: tensors[name] for name in ("student_bias", "teacher_bias")}
    labels = moved(of.labels, gpu.device)
    loss = module(hidden, weight, tensors["teacher_hidden"], tensors["teacher_weight"], labels, **biases)
    loss.backward()
    want = run(gpu, of)
    torch.testing.assert_close(loss.detach().cpu(), want.loss)
    for got, name in ((hidden, "student_hidden"), (weight, "student_weight")):
        assert got.grad is not None
        torch.testing.assert_close(got.grad.cpu(), want.grads[name], rtol=1e-5, atol=1e-7)
