"""How many tokens of a term a batch holds, known before it is run: what the parts of a step are weighted by.

Tokens of the logits are counted by labels, or by the attention mask, or by the inputs. Hidden states and attention maps
count the tokens of the mask, and where there is none the inputs; with kind "mse" an attention map counts pairs of
tokens. The inputs count the ids of a 2-dimensional tensor of integers (batch, tokens), of another input the samples:
its tokens, as an image's patches, are as many for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycompress.workflow.task_loss import IGNORE, are_classes

LABELS, MASK, ALL = "labels", "mask", "all"  # which rows of the logits take part
SAMPLES = "samples"


class Counts(NamedTuple):
    tokens: float
    task: float
    hidden: list[float]  # one a pair of layers, as the next
    attention: list[float]


def choose_tokens(labels: Any, mask: Tensor | None, logits: Tensor) -> str:
    """Which rows of logits that are not trained on labels take part."""
    if are_classes(labels, logits):
        return LABELS
    return MASK if mask is not None and mask.shape == logits.shape[:-1] else ALL


def tokens(which: str, labels: Any, inputs: Any, mask: Tensor | None) -> float:
    if which == LABELS:
        return int((labels != IGNORE).sum())
    if which == MASK and mask is not None:
        return int((mask != 0).sum())
    return unmasked(inputs)[0]


def labelled(labels: Any, inputs: Any) -> float:
    """What a mean that the model or loss_fn made is over."""
    if not isinstance(labels, Tensor):
        return samples(inputs)
    return labels.numel() if labels.is_floating_point() else int((labels != IGNORE).sum())


def unmasked(inputs: Any) -> tuple[float, int]:
    """Tokens in all, and of one sample: 1 where the input holds no token ids."""
    first = _first(inputs)
    if first is None or first.dim() == 0:
        return 1, 1
    is_ids = first.dim() == 2 and not first.is_floating_point()
    return (first.numel(), first.shape[1]) if is_ids else (first.shape[0], 1)


def samples(inputs: Any) -> float:
    first = _first(inputs)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def _first(inputs: Any) -> Tensor | None:
    """The first tensor of a batch's inputs: token ids come before masks, and images before all else."""
    if isinstance(inputs, Tensor):
        return inputs
    if isinstance(inputs, Mapping) and isinstance(inputs.get("input_ids"), torch.Tensor):
        return inputs["input_ids"]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next((value for value in values if isinstance(value, Tensor)), None)
