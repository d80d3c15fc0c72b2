"""``linear_distill_loss`` against float64: values, gradients, edges, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pycompress import ops
from pycompress.bench import memory
from pycompress.ops import linear_distill_loss
from pycompress.ops import linear_distill_loss_chunks as chunks
from tests.linear_distill_oracle import NAMES, ROUNDOFF, Answer, Problem, composed, problem, truth

BACKENDS = ("native", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
HALVES = (torch.bfloat16, torch.float16)


def run(of: Problem, **more: Any) -> Answer:
    leaves = {name: t.detach().requires_grad_(name.startswith("student")) for name, t in of.tensors.items()}
    hidden = [leaves.pop(n) for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    parts = linear_distill_loss(*hidden, of.labels, **leaves, **of.options, **more, return_parts=True)
    assert isinstance(parts, ops.DistillLossParts)
    parts.loss.backward(of.upstream)
    student = dict(zip(NAMES[:3], (hidden[0], hidden[1], leaves.get("student_bias")), strict=True))
    return Answer(*parts, {name: t.grad for name, t in student.items() if t is not None and t.grad is not None})


def check(of: Problem, got: Answer, *, dtype: torch.dtype | None = None) -> None:
    """Within three times what torch's composition misses by, and some roundings of the gradient's dtype.

    Both sum in float32, but in another order, and round logits (and, for bfloat16, the gradient by them) to the dtype
    of the inputs: errors of the same size that differ in every element, so that a maximum may be that much larger.
    ``dtype``: of the products, where it is not the inputs'.
    """
    want, solution = truth(of)
    dtype = dtype or of.tensors["student_hidden"].dtype
    tensors = {name: tensor.to(dtype) for name, tensor in of.tensors.items()}
    by_token, grads = composed(Problem(tensors, of.labels, of.options, of.upstream), solution)
    exact = truth(of.but(reduction="none", num_items=None, token_weight=None))[0].loss.numpy().reshape(-1)
    missed = np.nan_to_num(np.abs(by_token - exact), nan=0, posinf=0) * solution.each
    for name in ("loss", "hard", "soft"):
        value, expected, what = getattr(got, name), getattr(want, name), f"{name}: {{}}".format
        assert value.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert value.shape == expected.shape
        total = 3 * missed.max(initial=0) if of.options.get("reduction") == "none" else 3 * missed.sum()
        slack = float(np.max(getattr(solution, f"{name}_slack"), initial=0)) * ROUNDOFF[dtype] * 16
        torch.testing.assert_close(
            value.double(), expected, rtol=0, atol=total + slack, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert got.grads.keys() == want.grads.keys()
    for name, expected in want.grads.items():
        grad, own, what = got.grads[name], of.tensors[name].dtype, f"{name}: {{}}".format
        assert grad.dtype == own
        assert grad.shape == expected.shape
        assert grad.is_contiguous()
        if not expected.numel():
            continue
        torch_error = (grads[name].double() - expected).abs().max().item()
        tiny = 2.0**-24 if own is torch.float16 else 2.0**-126
        allowed = 3 * torch_error + 8 * ROUNDOFF[own] * expected.abs().max().item() + tiny
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=allowed, msg=what)


# ---- values and gradients ---------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("divergence", ops.DIVERGENCES)
@pytest.mark.parametrize("capped", [False, True])
def test_against_float64(capped: bool, divergence: str, dtype: torch.dtype, backend: str) -> None:
    heads = {"student_softcap": 3.0, "teacher_softcap": 2.0, "student_logit_scale": 0.7, "teacher_logit_scale": 1.5}
    of = problem(
        dtype=dtype, temperature=2.0, alpha=0.3, divergence=divergence, beta=0.3, token_weight=torch.rand(23),
        chunk_tokens=5, **(heads if capped else {}),
    )  # fmt: skip
    check(of, run(of, backend=backend))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_more_classes_than_a_block(
    bias: bool, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_BLOCK_BYTES", 0)  # the smallest, of 256 classes
    of = problem((9,), 2 * 256 + 3, 24, dtype, bias=bias, student_softcap=5.0, temperature=1.5, chunk_tokens=4)
    check(of, run(of, backend=backend))


def test_every_instruction_set(isa: str) -> None:
    of = problem((40,), 777, 32, temperature=2.0, chunk_tokens=16)
    check(of, run(of, backend="native"))


@pytest.mark.parametrize("options", [
    {"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.0, "temperature": 7.0}, {"label_smoothing": 0.2},
    {"alpha": 1.0, "label_smoothing": 0.1},
    {"temperature": 0.2}, {"divergence": "jsd", "beta": 0.9}, {"student_logit_scale": 3.0}, {"student_softcap": 0.5},
    {"teacher_softcap": 1.0, "teacher_logit_scale": 4.0}, {"ignore_index": 3},
], ids=str)  # fmt: skip
@every_backend
def test_options(options: dict[str, Any], backend: str) -> None:
    of = problem(chunk_tokens=10, ignored=0, **options)
    check(of, run(of, backend=backend))


@every_backend
@pytest.mark.parametrize("chunk_tokens", [1, 5, 22, 23, 24, 1000, None])
def test_chunk_sizes(chunk_tokens: int | None, backend: str) -> None:
    of = problem(ignored=0, temperature=2.0, chunk_tokens=chunk_tokens)
    check(of, run(of, backend=backend))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_reductions(reduction: str, weighted: bool, dtype: torch.dtype, backend: str) -> None:
    """With what arrives from above: for "none" one number a token, of either sign."""
    of = problem((3, 7), dtype=dtype, reduction=reduction, token_weight=torch.rand(3, 7) if weighted else None)
    upstream = torch.randn((3, 7) if reduction == "none" else ())
    of = replace(of.but(chunk_tokens=8, temperature=2.0), upstream=upstream)
    check(of, run(of, backend=backend))


def test_reference_in_float64() -> None:
    of = problem(dtype=torch.float64, temperature=2.0, student_softcap=4.0, chunk_tokens=6, token_weight=torch.rand(23))
    check(of, run(of, backend="reference"))
    check(of, run(of))  # what auto takes
    with pytest.raises(ValueError, match=r"backend='native' cannot run this: student_hidden is torch\.float64"):
        run(of, backend="native")


@every_backend
def test_student_and_teacher_that_differ(backend: str) -> None:
    """In width, vocabulary and dtype."""
    for classes, teacher_classes in ((61, 40), (40, 61)):
        of = problem((23,), classes, 16, teacher_classes=teacher_classes, teacher_width=24, temperature=2.0)
        check(of, run(of, backend=backend))
    of = problem()
    mixed = {n: t.bfloat16() if n.startswith("teacher") else t for n, t in of.tensors.items()}
    rounded = {n: t.float() for n, t in mixed.items()}
    got, want = run(Problem(mixed, of.labels), backend=backend), run(Problem(rounded, of.labels), backend=backend)
    torch.testing.assert_close(got.loss, want.loss, rtol=0.01, atol=0)  # the teacher's logits are rounded to bfloat16
    assert got.grads["student_weight"].dtype == torch.float32


def test_strided_and_leading_dimensions() -> None:
    of = problem((2, 3, 5), chunk_tokens=4, temperature=2.0)
    want = run(of)
    wide = {name: torch.cat([t, t], -1) for name, t in of.tensors.items()}
    strided = {name: t[..., : t.shape[-1] // 2] for name, t in wide.items() if not name.endswith("bias")}
    strided["student_weight"] = of.tensors["student_weight"].t().contiguous().t()  # as transformers' Conv1D keeps it
    strided |= {name: t for name, t in of.tensors.items() if name.endswith("bias")}
    assert of.labels is not None
    got = run(Problem(strided, of.labels.transpose(0, 1).contiguous().transpose(0, 1), of.options))
    torch.testing.assert_close(got.loss, want.loss)
    for name, grad in want.grads.items():
        torch.testing.assert_close(got.grads[name], grad, rtol=1e-5, atol=1e-7)


def test_agrees_with_distill_loss() -> None:
    of = problem(temperature=2.0, label_smoothing=0.1)
    t = of.tensors
    student = t["student_hidden"] @ t["student_weight"].t() + t["student_bias"]
    teacher = t["teacher_hidden"] @ t["teacher_weight"].t() + t["teacher_bias"]
    parts = ops.distill_loss(student, teacher, of.labels, **of.options, return_parts=True)
    for a, b in zip(run(of).__dict__.values(), parts, strict=False):
        torch.testing.assert_close(a, b)


# ---- tokens that do not count -----------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_what_ignored_tokens_hold_is_never_seen(reduction: str, dtype: torch.dtype, backend: str) -> None:
    of = problem(dtype=dtype, ignored=3, reduction=reduction, chunk_tokens=4, token_weight=torch.ones(23))
    of.options["token_weight"][1] = 0
    upstream = torch.randn(23) if reduction == "none" else None
    of = Problem(of.tensors, of.labels, of.options, upstream)
    want = run(of, backend=backend)
    for name in ("student_hidden", "teacher_hidden"):
        of.tensors[name][::3] = math.nan
        of.tensors[name][1] = math.inf
    got = run(of, backend=backend)
    for name in ("loss", "hard", "soft"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    for name, grad in want.grads.items():
        assert torch.equal(got.grads[name], grad)
    assert (got.grads["student_hidden"][::3] == 0).all()
    assert (got.grads["student_hidden"][1] == 0).all()


@every_backend
@pytest.mark.parametrize("tokens", [(0,), (2, 0), (5,)])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_no_token_counts(reduction: str, tokens: tuple[int, ...], backend: str) -> None:
    of = problem(tokens, ignored=1, reduction=reduction)
    upstream = torch.ones(tokens) if reduction == "none" else None
    for options in ({}, {"num_items": 0}) if reduction == "mean" else ({},):
        got = run(Problem(of.tensors, of.labels, {**of.options, **options}, upstream), backend=backend)
        assert got.loss.shape == (tokens if reduction == "none" else ())
        assert (got.loss == 0).all()
        assert got.grads.keys() == set(NAMES[:3])
        assert all((grad == 0).all() and grad.shape == of.tensors[name].shape for name, grad in got.grads.items())


@every_backend
def test_parts_of_a_batch_add_up(backend: str) -> None:
    of = problem((24,), temperature=2.0, token_weight=torch.rand(24))
    whole = run(of, backend=backend)
    assert of.labels is not None
    weight = of.options["token_weight"]
    items = float(weight[of.labels != -100].sum())
    total, grads = torch.zeros(()), {name: torch.zeros_like(g) for name, g in whole.grads.items()}
    for part in (slice(0, 7), slice(7, 24)):
        tensors = {name: t[part] if name.endswith("hidden") else t for name, t in of.tensors.items()}
        for number in (items, torch.tensor(items)):
            options = {**of.options, "token_weight": weight[part], "num_items": number}
            got = run(Problem(tensors, of.labels[part], options), backend=backend)
        total += got.loss
        for name, grad in got.grads.items():
            grads[name][part if name.endswith("hidden") else slice(None)] += grad
    torch.testing.assert_close(total, whole.loss)
    for name, grad in whole.grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-7)


# ---- masks, NaN ------------------------------------------------------------------------------------------------


@every_backend
def test_masked_classes(backend: str) -> None:
    """A bias of -inf masks a class: no mass, no NaN; a label on it is an infinite loss with a finite gradient."""
    of = problem(ignored=0)
    assert of.labels is not None
    of.labels[of.labels == 7] = 8
    for who in ("student", "teacher"):
        of.tensors[f"{who}_bias"][7] = -math.inf
    for divergence in ops.DIVERGENCES:
        got = run(of.but(divergence=divergence), backend=backend)
        assert got.loss.isfinite()
        assert all(grad.isfinite().all() for grad in got.grads.values())
        assert (got.grads["student_weight"][7] == 0).all()
    of.labels[2] = 7
    got = run(of, backend=backend)
    assert got.loss == math.inf
    assert all(grad.isfinite().all() for grad in got.grads.values())


@every_backend
def test_nan_stays_in_its_row(backend: str) -> None:
    of = problem(ignored=0, reduction="none", chunk_tokens=6)
    of.tensors["student_hidden"][5, 0] = math.nan
    got = run(Problem(of.tensors, of.labels, of.options, torch.ones(23)), backend=backend)
    rows = torch.arange(23) == 5
    assert torch.equal(got.loss.isnan(), rows)
    assert torch.equal(got.grads["student_hidden"].isnan().all(1), rows)
    assert not got.grads["student_hidden"][~rows].isnan().any()


# ---- precision ----------------------------------------------------------------------------------------------------


def test_bfloat16_weight_gradient_is_summed_in_float32() -> None:
    """64 chunks that pull the same way. Summed in bfloat16, the late ones would be rounded off."""
    of = problem((256,), 48, 16, torch.bfloat16, ignored=0, bias=True, chunk_tokens=4, reduction="sum")
    of.tensors["student_hidden"].abs_()
    got, want = run(of).grads, truth(of)[0].grads
    by_chunk = {name: torch.zeros_like(want[name]).bfloat16() for name in ("student_weight", "student_bias")}
    assert of.labels is not None
    for start in range(0, 256, 4):
        part = slice(start, start + 4)
        tensors = {name: t[part] if name.endswith("hidden") else t for name, t in of.tensors.items()}
        for name, grad in run(Problem(tensors, of.labels[part], of.options)).grads.items():
            if name in by_chunk:
                by_chunk[name] += grad
    for name, summed in by_chunk.items():
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        rounded = (summed.double() - want[name]).norm() / want[name].norm()
        assert error < 2 * ROUNDOFF[torch.bfloat16]
        assert error < rounded / 3


def test_float16_gradients_do_not_underflow() -> None:
    """Those of a mean over 4096 tokens are a few of float16's smallest steps; the scaled loss brings them back."""
    of = problem((4096,), 64, 8, torch.float16, ignored=0, bias=False)
    for name in ("student_weight", "teacher_weight"):
        of.tensors[name] /= 256
    scale = torch.tensor(2.0**16)
    want = truth(Problem(of.tensors, of.labels, of.options, scale))[0].grads
    got = run(Problem(of.tensors, of.labels, of.options, scale)).grads
    assert want["student_hidden"].abs().median() / scale < 8 * 2.0**-24
    for name, grad in want.items():
        assert (got[name].double() - grad).norm() <= 0.01 * grad.norm()


# ---- gradients: only where wanted, again, and scaled --------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), ()])
def test_only_wanted_gradients(wanted: tuple[int, ...], reduction: str) -> None:
    of = problem(reduction=reduction)
    every = run(Problem(of.tensors, of.labels, of.options, torch.ones(23) if reduction == "none" else None)).grads
    leaves = {name: of.tensors[name].clone().requires_grad_(i in wanted) for i, name in enumerate(NAMES[:3])}
    teacher = {name: of.tensors[name].clone().requires_grad_() for name in NAMES[3:]}
    loss = linear_distill_loss(labels=of.labels, **leaves, **teacher, **of.options)
    assert isinstance(loss, Tensor)
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.sum().backward()
    for i, (name, leaf) in enumerate(leaves.items()):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, every[name])
        else:
            assert leaf.grad is None
    assert all(t.grad is None for t in teacher.values())


def test_unwanted_gradients_are_not_computed() -> None:
    """A frozen head costs neither its gradient's memory nor its time: the operator gives none."""
    t = problem().tensors
    flat = [t[name] for name in NAMES]
    arguments = (None, None, None, None, 1.0, 0.0, "forward_kl", 0.5, -100, 0.0, "mean", 1.0, 1.0, None, None, None)
    op = torch.ops.pycompress.linear_distill_loss.default
    shapes = [tuple(g.shape) for g in op(*flat, *arguments, True, False, False, None, "auto")[3:]]
    assert shapes == [(23, 16), (0,), (0,)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_again_and_scaled(reduction: str, dtype: torch.dtype) -> None:
    of = problem(dtype=dtype, reduction=reduction)
    hidden, weight = (of.tensors[name].requires_grad_() for name in NAMES[:2])
    teacher = [of.tensors[name] for name in NAMES[3:5]]
    loss = linear_distill_loss(hidden, weight, *teacher, of.labels, **of.options)
    assert isinstance(loss, Tensor)
    first = torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True)
    before = [grad.clone() for grad in first]
    for count in (1, 2, 3):  # accumulated in .grad, where it must not reach what is kept
        loss.sum().backward(retain_graph=True)
        for leaf, grad in zip((hidden, weight), before, strict=True):
            torch.testing.assert_close(leaf.grad, count * grad, rtol=4 * ROUNDOFF[dtype], atol=1e-7)
    halved = torch.autograd.grad(0.5 * loss.sum(), (hidden, weight))
    for got, grad, start in zip(halved, before, first, strict=True):
        torch.testing.assert_close(got, 0.5 * grad, rtol=ROUNDOFF[dtype], atol=1e-7)
        assert torch.equal(start, grad)


def test_inputs_are_left_alone() -> None:
    of = problem(chunk_tokens=3, student_softcap=2.0, student_logit_scale=0.5)
    before = {name: t.clone() for name, t in of.tensors.items()}
    run(of)
    assert all(torch.equal(t, before[name]) for name, t in of.tensors.items())


# ---- memory -------------------------------------------------------------------------------------------------------

_MEMORY = """
import torch
from pycompress.bench.memory import peak_extra_bytes
from pycompress.nn import LinearDistillationLoss
torch.set_num_threads(1)
def step(tokens, classes):
    x = [torch.randn(*s, requires_grad=g) for s, g in
         [((tokens, 32), True), ((classes, 32), True), ((tokens, 32), False), ((classes, 32), False)]]
    y = torch.randint(0, classes, (tokens,))
    return lambda: LinearDistillationLoss(2.0, chunk_tokens=32)(*x, y).backward()
step(64, 64)()
print(peak_extra_bytes(step(1024, 16384)))
"""


@pytest.mark.skipif(not memory.can_measure(), reason="needs /proc/self/clear_refs")
def test_memory_is_the_gradients_and_a_chunk() -> None:
    """1024 tokens of 16384 classes: 67 MB of logits for each model, of which the buffers hold 2.1 MB."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    gradients, buffers = 4 * 32 * (1024 + 16384), 2 * 4 * 32 * 16384
    margin = 16 * 10**6  # of the libraries: packed operands, code that is loaded at the first large product
    assert int(done.stdout) < gradients + buffers + margin
