"""Runs the distillation loss on a GPU backend; ``distill_check.py`` compares, on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pycompress import ops
from tests.distill_check import Result, Truth, check
from tests.distill_oracle import Case
from tests.gpu import Gpu


def moved(x: Any, device: str) -> Any:
    """The same on the device, with the same strides; what is no tensor stays."""
    if isinstance(x, ops.TopKLogits):
        return ops.TopKLogits(*(moved(part, device) for part in x))
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(device)
    return torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())


def run(gpu: Gpu, case: Case) -> Result:
    """Forward and backward on the device; the results on the CPU."""
    student, teacher = moved(case.student.detach(), gpu.device).requires_grad_(), moved(case.teacher, gpu.device)
    if isinstance(teacher, Tensor):
        teacher = teacher.detach().requires_grad_(case.teacher_grad)
    options = {name: moved(value, gpu.device) for name, value in case.options().items()}
    labels, upstream = moved(case.labels, gpu.device), moved(case.upstream, gpu.device)
    parts = ops.distill_loss(student, teacher, labels, **options, return_parts=True, backend=gpu.backend)
    assert isinstance(parts, ops.DistillLossParts)
    parts.loss.backward(upstream)
    assert student.grad is not None
    teacher_grad = teacher.grad if isinstance(teacher, Tensor) else None
    loss, hard, soft = (x.cpu() for x in parts)
    return Result(loss, hard, soft, student.grad.cpu(), None if teacher_grad is None else teacher_grad.cpu())


def check_all(gpu: Gpu, known: Iterable[Truth]) -> None:
    for each in known:
        check(each, run(gpu, each.case))
