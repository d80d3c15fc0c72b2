"""What the tests of shrink_ share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycompress.nn import MaskedLinear
from pycompress.pruning.shrink import ShrinkReport, shrink_

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def prune_rows(linear: nn.Linear, rows: list[int]) -> None:
    """As prune_(pattern="row") leaves the layer, without the mask."""
    with torch.no_grad():
        linear.weight[rows] = 0


def prune_columns(linear: nn.Linear, columns: list[int]) -> None:
    with torch.no_grad():
        linear.weight[:, columns] = 0


def mask_in(parent: nn.Module, name: str, rows: list[int] = (), columns: list[int] = (), **options: Any) -> None:  # type: ignore[assignment]
    """Put a MaskedLinear with these rows and columns pruned in the place of parent.name."""
    linear = parent.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    mask = torch.ones_like(linear.weight, dtype=torch.bool)
    mask[list(rows)] = False
    mask[:, list(columns)] = False
    parent.set_submodule(name, MaskedLinear.from_linear(linear, mask, **options))


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        y = model(**x) if isinstance(x, dict) else model(x)
    return [y] if isinstance(y, Tensor) else [v for v in y.values() if isinstance(v, Tensor)]


def shrink_equal(model: nn.Module, x: Any, tolerance: float | None = None) -> ShrinkReport:
    """Shrink, and check that outputs, with and without gradients enabled, are what they were."""
    dtype = next(model.parameters()).dtype
    tolerance = tolerance or TOLERANCE[dtype]
    before = outputs(model, x)
    report = shrink_(model)
    after = outputs(model, x)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance)
    return report


def mlp(*activations: nn.Module, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 12, bias), *activations, nn.Linear(12, 5, bias)).to(dtype)
