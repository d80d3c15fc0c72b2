"""How far a model's output moves when some of its layers are quantised: the float output once, then one trial after the
other on the same cached batches. The layers are swapped in for a trial and out again, whatever happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.calibration import Batch, evaluating, feed
from pycompress.convert import FLOAT, Ranges, apply_edits, input_range, new_layer
from pycompress.fuse import Edit
from pycompress.layer_kinds import How
from pycompress.selection import Layer

OutputFn = Callable[[Any, Batch], Tensor]
_OP = "sensitivity"
_OUTPUTS = ("logits", "last_hidden_state", "pooler_output", "prediction_logits", "image_embeds", "text_embeds")


@dataclass(frozen=True)
class Error:
    """cosine: 1 - the mean cosine between the rows of the output before and after. l2: |after - before| / |before|."""

    cosine: float
    l2: float


def main_output(output: Any, batch: Batch) -> Tensor:
    """The tensor that a model is judged by: its logits or last hidden state, the output itself or its first item."""
    found = output
    if isinstance(output, Mapping):
        found = next((output[key] for key in _OUTPUTS if output.get(key) is not None), None)
        if found is None:
            found = next((value for value in output.values() if isinstance(value, Tensor) and value.dim() > 0), None)
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(
            f"{_OP}: the model returns a {type(output).__name__} without a tensor of numbers that is known; pass "
            "output_fn=lambda output, batch: ..."
        )
    return found


def rows_of(output: Tensor, batch: Batch) -> Tensor:
    """The output as (rows, values), fp64: a row is a token where the output is (batch, tokens, values), else a sample.

    Tokens that the batch's attention_mask leaves out are left out. Of one value a sample all are one row.
    """
    output = output.detach().double()
    if output.dim() == 3:
        mask = batch.get(_mask_of(batch)) if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == output.shape[:2]:
            return output[mask.to(output.device) != 0]
        return output.flatten(0, 1)
    rows = output.flatten(1) if output.dim() > 1 else output.reshape(1, -1)
    return rows.reshape(1, -1) if rows.shape[1] == 1 else rows


def _mask_of(batch: Mapping[str, Any]) -> str:
    """The mask of the tokens that come out: of an encoder-decoder the decoder's."""
    decodes = any(key.startswith("decoder_") and batch[key] is not None for key in batch)
    return "decoder_attention_mask" if decodes else "attention_mask"


class Trial:
    """A model, cached batches, and its float output on them.

    layers: those that may be quantised, by name. calibration: for static mode.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        layers: Mapping[str, Layer],
        output_fn: OutputFn | None,
        calibration: Ranges | None,
        backend: str,
    ) -> None:
        self.model, self.batches, self.layers = model, batches, layers
        self._output_fn = output_fn or main_output
        self._calibration, self._backend = calibration, backend
        self._made: dict[tuple[str, str], nn.Module] = {}
        with evaluating(model):
            self._expected = [self._rows(batch) for batch in batches]
        if not all(bool(torch.isfinite(rows).all()) for rows in self._expected):
            raise ValueError(f"{_OP}: the float model's output has NaN or Inf; check the batches")
        if not any(rows.numel() for rows in self._expected):
            raise ValueError(f"{_OP}: the model's output on the batches is empty; nothing can be compared")

    def _rows(self, batch: Batch) -> Tensor:
        return rows_of(self._output_fn(feed(self.model, batch, _OP), batch), batch)

    def quantised(self, name: str, mode: str) -> nn.Module:
        """The layer as quantize_ would make it, made once until `forget`."""
        if (name, mode) not in self._made:
            layer, ranges = self.layers[name], self._calibration if mode == "static" else None
            found = None if ranges is None else input_range(layer, ranges)
            self._made[name, mode] = new_layer(layer, How(mode, input_range=found, backend=self._backend), _OP)
        return self._made[name, mode]

    def forget(self) -> None:
        self._made.clear()

    def error(self, modes: Mapping[str, str]) -> Error:
        """Of the model's output when these layers have these modes, and all others are float."""
        apart = moved = size = 0.0
        count = 0
        with self._swapped(modes), evaluating(self.model):
            for batch, expected in zip(self.batches, self._expected, strict=True):
                actual = self._rows(batch)
                cosines = _cosines(actual, expected)
                apart += float((1.0 - cosines).sum())
                count += len(cosines)
                moved += float((actual - expected).square().sum())
                size += float(expected.square().sum())
        l2 = math.sqrt(moved / size) if size else (math.inf if moved else 0.0)
        worst = not (math.isfinite(apart) and math.isfinite(moved))
        return Error(math.inf, math.inf) if worst else Error(max(apart / count, 0.0), l2)

    @contextmanager
    def _swapped(self, modes: Mapping[str, str]) -> Iterator[None]:
        edits = [
            Edit(parent._modules, key, self.quantised(name, mode))
            for name, mode in modes.items()
            if mode != FLOAT
            for parent, key in self.layers[name].slots
        ]
        undo = [Edit(target, key, target[key]) for target, key, _ in edits]
        apply_edits(edits)
        try:
            yield
        finally:
            for target, key, value in undo:
                target[key] = value


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each row; two rows of zeros are alike."""
    products = (a * b).sum(1)
    norms = a.norm(dim=1) * b.norm(dim=1)
    same = (a == b).all(1)
    return torch.where(same, 1.0, torch.where(norms > 0, products / norms.clamp(min=1e-300), products * 0.0))
