"""The distillation loss of the GPU backends inside torch: autograd, the module, the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn import DistillationLoss
from tests.distill_check import ROUNDOFF, check
from tests.distill_gpu import moved, run
from tests.distill_oracle import DTYPES, REDUCTIONS
from tests.gpu import Gpu
from tests.test_distill_loss import make

# What numpy says of infinities in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_scales_the_gradient(gpu: Gpu, dtype: torch.dtype, reduction: str) -> None:
    case = make(6, 30, dtype, reduction=reduction, teacher_grad=True, labels=torch.arange(6))
    for factor in (1.0, -3.0, 0.0):
        case = case.but(upstream=torch.full((6,) if reduction == "none" else (), factor))
        check(case, run(gpu, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 70), (300, 3), (2, 5000), (1, 1)], ids=str)
def test_scaling_in_place(gpu: Gpu, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """By one number, and by one a row, some of them 1."""
    from pycompress.ops.distill_loss_cuda import cuda_scale_in_place
    from pycompress.ops.distill_loss_triton import triton_scale_in_place

    scale = {"cuda": cuda_scale_in_place, "triton": triton_scale_in_place}[gpu.backend]
    each = torch.randn(shape[0])
    each[::2] = 1
    for factor in (torch.tensor(1.0), torch.tensor(-0.7), torch.tensor(torch.nan), each, each[:1].expand(shape[0])):
        grad = torch.randn(shape).to(dtype)
        want = (grad.float() * (factor[:, None] if factor.dim() else factor)).to(dtype)
        got = moved(grad.clone(), gpu.device)
        assert scale(got, moved(factor.clone(), gpu.device)) is got
        torch.testing.assert_close(got.cpu(), want, rtol=ROUNDOFF[dtype], atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retained_graph_gives_the_gradient_again(gpu: Gpu, dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(4, 40, device=gpu.device).to(dtype) for _ in range(2))
    labels = torch.arange(4, device=gpu.device)
    loss = ops.distill_loss(student.requires_grad_(), teacher, labels, backend=gpu.backend)
    assert isinstance(loss, Tensor)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    expected = first.clone()
    (three,) = torch.autograd.grad(loss, student, torch.tensor(3.0, device=gpu.device), retain_graph=True)
    torch.testing.assert_close(three, expected * 3, rtol=2 * ROUNDOFF[dtype], atol=2.0**-23)
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module(gpu: Gpu, reduction: str) -> None:
    """A training step: head, loss, gradients of the head."""
    head = nn.Linear(20, 30, device=gpu.device)
    x, teacher = torch.randn(3, 4, 20, device=gpu.device), torch.randn(3, 4, 30, device=gpu.device)
    labels = torch.randint(30, (3, 4), device=gpu.device)
    module = DistillationLoss(2.0, label_smoothing=0.1, reduction=reduction, backend=gpu.backend)
    exact = DistillationLoss(2.0, label_smoothing=0.1, reduction=reduction, backend="reference")
    results: list[Any] = []
    for loss in (module, exact):
        parts = loss(head(x), teacher, labels, token_weight=torch.ones(3, 4, device=gpu.device), return_parts=True)
        results.append([*parts, *torch.autograd.grad((parts.loss * 0.5).sum(), (head.weight, head.bias))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert f"backend={gpu.backend}" in repr(module)


def test_operator(gpu: Gpu) -> None:
    """Through torch's dispatcher, which compilers and modes see."""
    student, teacher = torch.randn(2, 6, 50, device=gpu.device)
    torch.library.opcheck(torch.ops.pycompress.distill_loss.default, (
        student.requires_grad_(), teacher.requires_grad_(), torch.arange(6, device=gpu.device), None, None, None, None,
        2.0, 0.5, "forward_kl", 0.5, -100, 0.0, "mean", True, True, gpu.backend,
    ), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))  # fmt: skip


def test_what_it_cannot_take(gpu: Gpu) -> None:
    wide = torch.randn(2, 5, dtype=torch.float64, device=gpu.device)
    with pytest.raises(ValueError, match=f"backend='{gpu.backend}' cannot run this: student_logits are torch.float64"):
        ops.distill_loss(wide, wide, alpha=0.0, backend=gpu.backend)
