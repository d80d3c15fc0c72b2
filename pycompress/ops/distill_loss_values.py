"""What the reference asks of the values in a call: which tokens take part, what they weigh, whether indices are right.

The native kernels ask the same, in the same words (csrc/distill_loss/check_args.cpp). Of the logits only shape, dtype
and device are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.ops.distill_loss_call import Call, accumulator, num_items_of


def tokens(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """valid, weight and labels (T,) of a checked call. The label of a token that is not valid is 0.

    Raises:
        ValueError: a label, weight or top-k index out of its range, or a top-k index that is repeated.
    """
    count, v, device = call.student.shape[:-1].numel(), call.student.shape[-1], call.student.device
    valid = torch.ones(count, dtype=torch.bool, device=device)
    weight = torch.ones(count, dtype=accumulator(call), device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    if call.topk_indices is not None:
        _check_indices(call.topk_indices.reshape(count, call.topk_indices.shape[-1]), v)
    if call.labels is not None:
        labels = call.labels.reshape(count).to(torch.int64)
        valid = labels != call.ignore_index
        at = _first(valid & ((labels < 0) | (labels >= v)))
        if at is not None:
            raise ValueError(
                f"distill_loss: label {int(labels[at])} at token {at} is out of range for V={v} "
                f"(ignore_index={call.ignore_index})"
            )
    if call.token_weight is not None:
        weight = call.token_weight.reshape(count).to(weight.dtype)
        at = _first(~((weight >= 0) & weight.isfinite()))
        if at is not None:
            raise ValueError(
                f"distill_loss: token_weight {float(weight[at]):f} at token {at}, expected a finite number of at least "
                "0"
            )
        valid = valid & (weight > 0)
    return valid, weight, torch.where(valid, labels, 0)


def items(call: Call, valid: Tensor, weight: Tensor) -> Tensor:
    """What the sum over the tokens is divided by, 0-dim: 1 for ``"sum"`` and ``"none"``.

    Raises:
        ValueError: ``num_items`` is negative, not finite, or 0 though tokens are valid.
    """
    if call.reduction != "mean":
        return weight.new_ones(())
    if call.num_items is None:
        return torch.where(valid, weight, 0.0).sum(dtype=torch.float64).to(weight.dtype)
    number = num_items_of(call.num_items)
    if number == 0 and bool(valid.any()):
        raise ValueError("distill_loss: num_items=0 but some tokens are valid")
    return weight.new_tensor(number)


def _check_indices(indices: Tensor, v: int) -> None:
    bad = (indices < 0) | (indices >= v)
    at = _first(bad.any(dim=1))
    if at is not None:
        raise ValueError(
            f"distill_loss: top-k index {int(indices[at][bad[at]][0])} at token {at} is out of range for V={v}"
        )
    ordered = indices.sort(dim=1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    at = _first(twice.any(dim=1))
    if at is not None:
        raise ValueError(
            f"distill_loss: top-k index {int(ordered[at, 1:][twice[at]][0])} at token {at} is repeated; expected k "
            "different classes"
        )


def _first(bad: Tensor) -> int | None:
    return int(bad.nonzero()[0]) if bool(bad.any()) else None
