"""Parts of a step: the objective of several batches adds up to that of all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pycompress.recipe.sections import Attention, Distillation, Hidden
from pycompress.workflow.objective import Objective
from tests.workflow_models import Encoder, Lm, ids, net, token_batch

pytestmark = pytest.mark.usefixtures("one_thread")


def parts(batch: Any, sizes: list[int]) -> list[Any]:
    if isinstance(batch, dict):
        columns = {key: x.split(sizes) for key, x in batch.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(len(sizes))]
    if isinstance(batch, tuple):
        return list(zip(*(x.split(sizes) for x in batch), strict=True))
    return list(batch.split(sizes))


CASES: dict[str, tuple[Any, ...]] = {
    "cross-entropy": (None, Encoder, token_batch(7, 5)),
    "pair": (Distillation(), Encoder, (ids(7, 5), token_batch(7, 5)["labels"])),
    "shifted": (Distillation(), lambda seed=0: Lm("shifted", seed=seed), token_batch(7, 5)),
    "own": (Distillation(), lambda seed=0: Lm("smoothed", seed=seed), token_batch(7, 5)),
    "mask": (Distillation(alpha=0.0), Encoder, token_batch(7, 5, labels=False)),
    "all": (Distillation(alpha=0.0), Encoder, {"input_ids": ids(7, 5)}),
    "hidden": (
        Distillation(loss="none", alpha=0.0, hidden=Hidden(layers="all", kind="cosine")),
        Encoder,
        token_batch(7, 5, labels=False),
    ),
    "attention": (
        Distillation(loss="none", alpha=0.0, attention=Attention(kind="mse", layers="all")),
        Encoder,
        token_batch(7, 5, labels=False),
    ),
    "everything": (
        Distillation(alpha=0.3, hidden=Hidden(weight=2.0), attention=Attention(weight=0.5)),
        Encoder,
        token_batch(7, 5),
    ),
    "modules": (
        Distillation(alpha=0.3, hidden=Hidden(layers={"embed": "embed", "pooler": "pooler"})),
        Encoder,
        token_batch(7, 5),
    ),
    "samples": (Distillation(alpha=0.0, hidden=Hidden(layers={"0": "2"})), net, torch.randn(7, 12)),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_batch_add_up_to_it(name: str) -> None:
    d, make, batch = CASES[name]
    student, teacher = make(), make(1) if make is net else make(seed=1)
    objective = Objective.make(d, student, teacher if d is not None else None, None, batch)
    used = [p for p in student.parameters() if p.requires_grad]
    loss, terms = objective(batch)
    whole = torch.autograd.grad(loss, used, allow_unused=True)
    given = parts(batch, [1, 4, 2])
    sums: dict[str, float] = {}
    total, gradients = 0.0, [torch.zeros_like(p) for p in used]
    for part, share in zip(given, objective.share_out(given), strict=True):
        loss_of_part, terms_of_part = objective(part, share)
        total += float(loss_of_part.detach())
        for name, term in terms_of_part.items():
            sums[name] = sums.get(name, 0.0) + float(term)
        for gradient, new in zip(gradients, torch.autograd.grad(loss_of_part, used, allow_unused=True), strict=True):
            gradient += 0 if new is None else new
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sums == {name: pytest.approx(float(term), rel=1e-5) for name, term in terms.items()}
    for a, b in zip(whole, gradients, strict=True):
        torch.testing.assert_close(b, torch.zeros_like(b) if a is None else a, rtol=1e-4, atol=1e-6)


def test_a_part_without_a_label_adds_nothing() -> None:
    """Not NaN either, which cross-entropy of nothing is."""
    model, batch = Lm("smoothed"), token_batch(4, 5)
    objective = Objective.make(None, model, None, None, batch)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    shares = objective.share_out([batch, empty])
    assert float(objective(empty, shares[1])[0]) == 0
    assert objective(batch, shares[0])[0].item() == pytest.approx(objective(batch)[0].item())
