"""``linear_distill_loss`` under autocast, compiled per token, without gradient, from several threads, on other CPUs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from pycompress.nn import LinearDistillationLoss
from pycompress.ops import linear_distill_loss
from pycompress.ops import linear_distill_loss_chunks as chunks
from pycompress.ops.linear_distill_loss_call import Head
from tests.linear_distill_oracle import NAMES, ROUNDOFF, Problem, problem
from tests.test_linear_distill_loss import check, run


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_compiled_without_reduction(softcap: float | None) -> None:
    """The backward pass computes the logits again, inside the compiled graph."""
    torch._dynamo.reset()
    module = LinearDistillationLoss(2.0, student_softcap=softcap, reduction="none")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 17):
        of = problem((2, tokens))
        results = []
        for function in (module, compiled):
            leaves = {n: t.clone().requires_grad_(n.startswith("student")) for n, t in of.tensors.items()}
            loss = function(labels=of.labels, token_weight=torch.ones(2, tokens), **leaves)
            (2 * loss.sum()).backward()
            results.append((loss.detach(), *(leaves[name].grad for name in NAMES[:3])))
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in autocast's dtype or a wider one; gradients in the parameters' own, and not rounded to it."""
    monkeypatch.setattr(chunks, "_BLOCK_BYTES", 0)  # the smallest, of 256 classes
    of = problem((23,), 300, chunk_tokens=6, reduction=reduction)
    of = Problem(of.tensors, of.labels, of.options, torch.randn(23) if reduction == "none" else None)
    with torch.autocast("cpu", dtype=dtype):
        got = run(of)
    head = Head(of.tensors["student_hidden"], of.tensors["student_weight"], None, 1.0, None)
    assert torch.equal(got.loss, run(of).loss) == (chunks.compute_dtype(head, dtype) is torch.float32)
    check(of, got, dtype=dtype)
    weight = got.grads["student_weight"]
    assert (weight.to(dtype).float() != weight).any()


def test_autocast_takes_mixed_dtypes_and_leaves_float64() -> None:
    of = problem()
    mixed = {n: t.bfloat16() if n.endswith("hidden") else t for n, t in of.tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(Problem(mixed, of.labels))
        assert got.grads["student_hidden"].dtype == torch.bfloat16
        assert got.grads["student_weight"].dtype == torch.float32
        wide = Problem({name: t.double() for name, t in of.tensors.items()}, of.labels)
        check(wide, run(wide))


def test_backward_outside_of_autocast_is_as_inside() -> None:
    of = problem(reduction="none")
    grads = []
    for inside in (True, False):
        hidden = of.tensors["student_hidden"].clone().requires_grad_()
        rest = [of.tensors[name] for name in ("student_weight", "teacher_hidden", "teacher_weight")]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = linear_distill_loss(hidden, *rest, of.labels, **of.options)
            assert isinstance(loss, Tensor)
            if inside:
                loss.sum().backward()
        if not inside:
            loss.sum().backward()
        assert hidden.grad is not None
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_without_gradient() -> None:
    of = problem(temperature=2.0)
    leaves = {name: t.requires_grad_() for name, t in of.tensors.items()}
    want = linear_distill_loss(labels=of.labels, **leaves, **of.options)
    assert isinstance(want, Tensor)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = linear_distill_loss(labels=of.labels, **leaves, **of.options)
            assert isinstance(loss, Tensor)
            assert not loss.requires_grad
            torch.testing.assert_close(loss, want.detach())


def test_threads_at_once() -> None:
    problems = [problem((40,), 301, chunk_tokens=7) for _ in range(4)]
    want, got = [run(of) for of in problems], {}

    def work(i: int) -> None:
        for _ in range(3):
            got[i] = run(problems[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, answer in enumerate(want):
        torch.testing.assert_close(got[i].loss, answer.loss)
        for name, grad in answer.grads.items():
            torch.testing.assert_close(got[i].grads[name], grad, rtol=1e-5, atol=8 * ROUNDOFF[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_without_products_of_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are widened, block by block; the answer is closer, not another."""

    def widened(head: Any, matmul_dtype: torch.dtype | None) -> torch.dtype:
        return torch.float32

    of = problem((23,), 300, dtype=dtype, chunk_tokens=6)
    monkeypatch.setattr(chunks, "_BLOCK_BYTES", 0)  # the smallest, of 256 classes
    monkeypatch.setattr(chunks, "compute_dtype", widened)
    check(of, run(of, backend="reference"))
    check(of, run(of, backend="native"))
