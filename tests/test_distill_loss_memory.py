"""The operator's memory: what it allocates, that it copies no logits, and sizes beyond 32 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pycompress import ops
from pycompress.bench.memory import can_measure, in_subprocess, peak_extra_bytes
from tests.distill_check import ENGINES, Result, check, every_engine, forced, run
from tests.distill_oracle import Case, solve

BEST = ENGINES[1]


@every_engine
def test_offsets_beyond_32_bits(engine: str) -> None:
    """Rows, and columns, gigabytes apart: of the memory in between nothing is touched."""
    row_step, column_step = 2**30 + 9, 2**29 + 5
    for shape, strides in (((3, 700), (row_step, 1)), ((700, 5), (1, column_step)), ((2, 5), (1, column_step))):
        far = torch.empty((shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + 1, dtype=torch.bfloat16)
        student = torch.as_strided(far, shape, strides).copy_(torch.randn(shape))
        case = Case(student, torch.randn(shape), torch.arange(shape[0]) % shape[1], divergence="reverse_kl")
        check(case, run(engine, case))


def test_more_gradient_than_32_bits() -> None:
    """T * V above 2^31, best kernel: nearly all tokens are ignored, and the memory of the logits is shared."""
    v = 2**16
    t = 2**31 // v + 3
    row, labels, ends = torch.randn(v).bfloat16(), torch.full((t,), -100), [0, t - 1]
    labels[ends] = torch.tensor([5, v - 1])
    case = Case(row.expand(t, v), row.flip(0).expand(t, v), labels, temperature=2.0)
    result = run(BEST, case)
    assert not result.grad[[1, t // 2, t - 2]].any()
    result = Result(result.loss, result.hard, result.soft, result.grad[ends], None)
    check(case.but(student=row.expand(2, v), teacher=row.flip(0).expand(2, v), labels=labels[ends]), result)


def test_more_elements_than_32_bits() -> None:
    """A value for each of more than 2^31 / V tokens: an expanded row is read again and again, and never copied."""
    v = 2**16
    t = 2**31 // v + 3
    row = torch.randn(v).bfloat16()
    with torch.no_grad(), forced(BEST) as backend:
        losses = ops.distill_loss(
            row.expand(t, v), row.flip(0).expand(t, v), alpha=0.0, reduction="none", backend=backend
        )  # fmt: skip
    want = solve(Case(row[None], row.flip(0)[None], None, alpha=0.0, reduction="none"))
    assert isinstance(losses, torch.Tensor)
    torch.testing.assert_close(losses.double(), torch.full((t,), float(want.loss[0])).double(), rtol=1e-6, atol=0)


# ---- what a call allocates ------------------------------------------------------------------------------------------

TOKENS, CLASSES = 192, 40_000  # gradients that the pool for large ones does not take
MEASURED: list[dict[str, Any]] = [
    {"dtype": "float32", "divergence": "forward_kl", "student_grad": False},
    {"dtype": "float32", "divergence": "jsd"},
    {"dtype": "bfloat16", "divergence": "reverse_kl", "upstream": 0.25},
    {"dtype": "float16", "reduction": "none", "upstream": 0.25},
    {"dtype": "float32", "reduction": "none", "teacher_grad": True, "upstream": 2.0},
    {"dtype": "bfloat16", "divergence": "reverse_kl", "reduction": "sum", "transposed": True},
]


def extra_bytes(
    dtype: str, divergence: str = "forward_kl", reduction: str = "mean", upstream: float = 1.0,
    student_grad: bool = True, teacher_grad: bool = False, transposed: bool = False,
) -> int:  # fmt: skip
    """The peak of forward and backward above what was there before; in an interpreter that does nothing else."""
    to, v = getattr(torch, dtype), CLASSES
    if transposed:
        student, teacher = (torch.empty(v, TOKENS, dtype=to).normal_().t() for _ in range(2))
    else:
        wide = torch.empty(2, 2 * TOKENS, v + 64, dtype=to).normal_()
        student, teacher = wide[0, ::2, 32:-32], wide[1, ::2, 32:-32]
    labels, each = torch.randint(v, (TOKENS,)), torch.full((TOKENS,) if reduction == "none" else (), upstream)

    def call(rows: int) -> object:
        s, t = student[:rows].detach().requires_grad_(student_grad), teacher[:rows].detach()
        loss = ops.distill_loss(
            s, t.requires_grad_(teacher_grad), labels[:rows], temperature=2.0, divergence=divergence,
            reduction=reduction, teacher_grad=teacher_grad, backend="native",
        )  # fmt: skip
        assert isinstance(loss, torch.Tensor)
        if not student_grad:
            return loss
        return torch.autograd.grad(loss, (s, t) if teacher_grad else s, each[:rows] if reduction == "none" else each)

    call(4)  # what the first call sets up for good
    return peak_extra_bytes(lambda: call(TOKENS))


def measure() -> list[int]:
    return [extra_bytes(**each) for each in MEASURED]


@pytest.mark.skipif(not can_measure(), reason="this system does not tell the peak of a process's memory")
def test_nothing_but_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No T x V beside it: no copy of the logits (which are slices of wider tensors), no second gradient."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    for options, extra in zip(MEASURED, in_subprocess("tests.test_distill_loss_memory:measure"), strict=True):
        size = TOKENS * CLASSES * getattr(torch, options["dtype"]).itemsize
        gradients = options.get("student_grad", True) + options.get("teacher_grad", False)
        assert extra <= gradients * size + (3 << 20), options  # 1 MB a thread, and what torch allocates
