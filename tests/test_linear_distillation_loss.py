"""``LinearDistillationLoss`` as a module, and the errors of its operator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pycompress.nn import LinearDistillationLoss
from pycompress.ops import linear_distill_loss
from tests.linear_distill_oracle import problem
from tests.test_linear_distill_loss import every_backend, run


def test_module() -> None:
    of = problem((2, 11), temperature=2.0, alpha=0.25, student_softcap=4.0)
    module = LinearDistillationLoss(2.0, 0.25, student_softcap=4.0, chunk_tokens=5)
    t = of.tensors
    arguments = [t[name] for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    biases = {name: t[name] for name in ("student_bias", "teacher_bias")}
    parts = module(*arguments, of.labels, **biases, return_parts=True)
    torch.testing.assert_close(parts.loss, run(of).loss)
    torch.testing.assert_close(parts.loss, 0.25 * parts.hard + 0.75 * parts.soft)
    assert not parts.hard.requires_grad
    assert torch.equal(module(*arguments, of.labels, **biases), parts.loss)
    assert repr(module) == (
        "LinearDistillationLoss(temperature=2.0, alpha=0.25, divergence=forward_kl, student_softcap=4.0, "
        "chunk_tokens=5, backend=auto)"
    )
    assert not list(module.parameters())
    assert not module.state_dict()


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0.0}, "temperature=0.0, expected a positive finite number"),
    ({"alpha": 1.5}, "alpha=1.5"),
    ({"divergence": "kl"}, "divergence='kl', expected one of forward_kl"),
    ({"reduction": "max"}, "reduction='max'"),
    ({"student_softcap": 0.0}, "student_softcap=0.0, expected a positive finite number, or None"),
    ({"teacher_softcap": math.inf}, "teacher_softcap=inf"),
    ({"student_logit_scale": -1.0}, "student_logit_scale=-1.0, expected a positive finite number"),
    ({"teacher_logit_scale": math.nan}, "teacher_logit_scale=nan"),
    ({"chunk_tokens": 0}, "chunk_tokens=0, expected at least 1, or None"),
    ({"backend": "gpu"}, "backend='gpu', expected one of auto, native, cuda, triton, reference"),
])  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearDistillationLoss(**options)
    with pytest.raises(ValueError, match=message):
        run(problem(**options))


def test_a_divergence_of_zero_warns() -> None:
    with pytest.warns(UserWarning, match="is 0 for all logits"):
        LinearDistillationLoss(divergence="jsd", beta=0.0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"student_hidden": torch.randn(23, 8)}, "student_hidden has H=8 but student_weight has H=16"),
    ({"teacher_hidden": torch.randn(22, 16)}, r"student_hidden is \(23, 16\) but teacher_hidden \(22, 16\)"),
    ({"student_weight": torch.randn(16)}, r"student_weight is \(16,\), expected \(V, H\) with V > 0"),
    ({"teacher_weight": torch.randn(0, 16)}, r"teacher_weight is \(0, 16\), expected"),
    ({"student_hidden": torch.tensor(1.0)}, "student_hidden is a scalar"),
    ({"student_bias": torch.randn(60)}, r"student_bias is \(60,\), expected \(61,\)"),
    (
        {"student_weight": torch.randn(61, 16).bfloat16()},
        "student_hidden is torch.float32 but student_weight torch.bfloat16",
    ),
    ({"teacher_bias": torch.randn(61).half()}, "teacher_hidden is torch.float32 but teacher_bias torch.float16"),
    ({"student_hidden": torch.ones(23, 16, dtype=torch.int64)}, "student_hidden is torch.int64, expected float32"),
    ({"student_weight": torch.eye(61, 16).to_sparse()}, "student_weight is torch.sparse_coo, expected a dense tensor"),
    ({"student_weight": torch.empty(61, 16, device="meta")}, "student_hidden is on cpu but student_weight on meta"),
])  # fmt: skip
def test_bad_tensors(changes: dict[str, Tensor], message: str) -> None:
    of = problem()
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(labels=of.labels, **{**of.tensors, **changes})


@pytest.mark.parametrize(("changes", "message"), [
    ({"labels": None}, "alpha=0.5 needs labels"),
    ({"labels": torch.zeros(22, dtype=torch.int64)}, r"labels has shape \(22,\), expected \(23,\)"),
    ({"labels": torch.zeros(23)}, "labels are torch.float32, expected class indices"),
    ({"labels": torch.full((23,), 61)}, "label 61 at token 0 is out of range for V=61"),
    ({"labels": torch.full((23,), -1)}, "label -1 at token 0 is out of range"),
    ({"token_weight": torch.ones(22)}, r"token_weight has shape \(22,\)"),
    ({"token_weight": torch.full((23,), -1.0)}, "token_weight -1.0+ at token 0"),
    ({"token_weight": torch.full((23,), math.nan)}, "token_weight nan at token 0"),
    ({"num_items": 0}, "num_items=0 but"),
    ({"num_items": -1}, "num_items=-1, expected a finite number"),
    ({"num_items": 3, "reduction": "sum"}, "num_items belongs to reduction='mean'"),
])  # fmt: skip
@every_backend
def test_bad_tokens(changes: dict[str, Any], message: str, backend: str) -> None:
    of = problem(ignored=0)
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(**{**of.tensors, "labels": of.labels, "backend": backend, **changes})
