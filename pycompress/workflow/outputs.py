"""Calling a model with a batch's inputs, and finding logits, loss, hidden states and attention maps in its output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def call(model: nn.Module, inputs: Any, ask: Mapping[str, Any]) -> Any:
    """model(**inputs), model(*inputs) or model(inputs), with the keyword arguments `ask` besides."""
    if isinstance(inputs, Mapping):
        return model(**inputs, **ask)
    if isinstance(inputs, Tensor):
        return model(inputs, **ask)
    return model(*inputs, **ask)


def named(output: Any, name: str) -> Any:
    """An item or attribute of the output, or None."""
    if isinstance(output, Mapping):  # ModelOutput is one; its attributes that are None are no items
        return output.get(name)
    return getattr(output, name, None)


def logits_of(output: Any) -> Tensor | None:
    """`logits`, or the output itself or its first item where these are plain tensors without names."""
    if isinstance(output, Tensor):
        return output
    found = named(output, "logits")
    if found is None and not isinstance(output, Mapping) and isinstance(output, (tuple, list)) and output:
        found = output[0]
    return found if isinstance(found, Tensor) else None


def loss_of(output: Any) -> Tensor | None:
    """`loss`, where the model made one."""
    found = named(output, "loss")
    return found if isinstance(found, Tensor) else None


def first_tensor(output: Any) -> Tensor | None:
    """Of what a module inside the model returned: its hidden states."""
    if isinstance(output, Tensor):
        return output
    found = named(output, "last_hidden_state")
    if found is None and not isinstance(output, Mapping) and isinstance(output, (tuple, list)) and output:
        found = output[0]
    return found if isinstance(found, Tensor) else None


def maps_of(output: Any, name: str) -> tuple[Tensor, ...]:
    """`hidden_states` or `attentions`: one tensor a layer; empty where the model did not return all of them."""
    found = named(output, name)
    if not isinstance(found, (tuple, list)) or not all(isinstance(item, Tensor) for item in found):
        return ()
    return tuple(found)


class MaskFinder:
    """Where a batch's inputs hold the attention mask (batch, tokens): by name, or by its place in the forward."""

    def __init__(self, model: nn.Module) -> None:
        self._place: int | None = None
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            return
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if "attention_mask" in positional:
            self._place = positional.index("attention_mask")

    def __call__(self, inputs: Any) -> Tensor | None:
        found = None
        if isinstance(inputs, Mapping):
            found = inputs.get("attention_mask")
        elif self._place is not None and isinstance(inputs, (tuple, list)) and self._place < len(inputs):
            found = inputs[self._place]
        return found if isinstance(found, Tensor) else None


def describe(output: Any) -> str:
    """The output for an error message: its type, and the names in it."""
    names = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) and output else ""
    return f"{type(output).__name__}{names}"
