"""The task's loss of a training step: the user's function, the model's own, or cross-entropy of logits and labels.

Most models' own loss is plain cross-entropy, for causal language models with the labels shifted by a token. Where it
is, it is computed from the logits by the project's kernel, in one sweep with the distillation term, and the model is
not asked for it: see `recognise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycompress.workflow.batches import Feed
from pycompress.workflow.outputs import call, logits_of, loss_of

IGNORE = -100
PLAIN, SHIFTED, OWN, FUNCTION, NONE = "cross-entropy", "shifted cross-entropy", "the model's", "loss_fn", "none"
_SAME = 1e-5  # relative; the auxiliary loss of a mixture of experts is more than that
LossFn = Callable[[Any, Any], Tensor]


def shifted(labels: Tensor) -> Tensor:
    """Of each token the label of the next, as a causal language model predicts it; the last has none."""
    return functional.pad(labels[..., 1:], (0, 1), value=IGNORE)


def are_classes(labels: Any, logits: Tensor | None) -> bool:
    """Whether these are class indices, one for each row of logits."""
    if not isinstance(labels, Tensor) or logits is None or labels.is_floating_point() or labels.dtype is torch.bool:
        return False
    return labels.shape == logits.shape[:-1]


def recognise(model: nn.Module, feed: Feed, output: Any) -> str:
    """PLAIN or SHIFTED where the loss in `output` is that cross-entropy, else OWN. The model is in eval mode.

    Told by its value, for the labels at hand and for others: what equals cross-entropy for two sets of labels has no
    class weights, label smoothing or further terms.
    """
    logits, labels = logits_of(output), feed.labels
    if not isinstance(feed.inputs, Mapping) or logits is None or not are_classes(labels, logits):
        return OWN
    classes = logits.shape[-1]
    others = torch.arange(labels.numel(), device=labels.device).view(labels.shape) * 7 % classes
    others = torch.where(labels == IGNORE, IGNORE, others.to(labels.dtype))
    for kind, place in ((PLAIN, lambda x: x), (SHIFTED, shifted)):
        if kind == SHIFTED and labels.dim() < 2:
            continue
        if all(_agrees(model, feed, given, place(given)) for given in (labels, others)):
            return kind
    return OWN


def _agrees(model: nn.Module, feed: Feed, given: Tensor, meant: Tensor) -> bool:
    output = call(model, {**feed.inputs, "labels": given}, {})
    found, logits = loss_of(output), logits_of(output)
    if found is None or logits is None or found.numel() != 1:
        return False
    for scores in (logits.float(), logits):  # a model in half precision may or may not widen its logits first
        expected = functional.cross_entropy(scores.flatten(0, -2), meant.long().flatten(), ignore_index=IGNORE).float()
        if bool((found.float() - expected).abs() <= _SAME * expected.abs() + 1e-7):
            return True
    return False


def needs_labels(model: nn.Module, feed: Feed, output: Any) -> bool:
    """Whether the model makes its logits from the labels, as T5 does of its decoder's inputs, or has none."""
    expected = logits_of(output)
    if expected is None:
        return True
    bare = {key: value for key, value in feed.inputs.items() if key != "labels"}
    try:
        logits = logits_of(call(model, bare, {}))
    except Exception:  # whatever a model says that lacks an input
        return True
    return logits is None or logits.shape != expected.shape or not torch.allclose(logits, expected, equal_nan=True)


def check_scalar(loss: Any, what: str) -> Tensor:
    """0-dim. Raises ValueError for what is no scalar tensor."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss if loss.dim() == 0 else loss.reshape(())
    got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise ValueError(f"train: {what} gave {got}; expected a tensor with one value, the mean over the batch")
