"""The arithmetic of taking units out of layers: what a linear layer becomes, computed before any module is touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycompress.nn.masked_linear import MaskedLinear
from pycompress.pruning.shrink_find import Step


class Draft:
    """A linear layer on its way to a smaller one. `weight` is W ⊙ mask (N, K); the module itself is never changed.

    rows, columns: which outputs and inputs of the original are left.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        mask = module.mask if isinstance(module, MaskedLinear) else None
        weight = module.weight.detach()
        self.weight = weight if mask is None else torch.where(mask, weight, 0)
        self.bias = None if module.bias is None else module.bias.detach()
        self.rows = torch.arange(weight.shape[0], device=weight.device)
        self.columns = torch.arange(weight.shape[1], device=weight.device)

    @property
    def is_changed(self) -> bool:
        return (len(self.rows), len(self.columns)) != (self.module.out_features, self.module.in_features)

    def zero_rows(self) -> Tensor:
        """bool (N,): the outputs whose weights are all zero."""
        return ~(self.weight != 0).any(1)  # NaN is not zero

    def zero_columns(self) -> Tensor:
        """bool (K,): the inputs whose weights are all zero."""
        return ~(self.weight != 0).any(0)

    def keep_rows(self, keep: Tensor) -> None:
        self.weight, self.rows = self.weight[keep], self.rows[keep]
        if self.bias is not None:
            self.bias = self.bias[keep]

    def keep_columns(self, keep: Tensor, constants: Tensor) -> None:
        """Drop the other inputs; `constants` float64 (K,): what they were, whose part passes on to the bias."""
        gone = ~keep
        # Only where the weight is not zero: a constant may be infinite, and 0 * inf is NaN.
        weight = self.weight[:, gone].double()
        passed_on = torch.where(weight == 0, 0.0, weight * constants[gone]).sum(1)
        self.weight, self.columns = self.weight[:, keep], self.columns[keep]
        if self.bias is not None:
            self.bias = (self.bias.double() + passed_on).to(self.bias.dtype)
        elif bool((passed_on != 0).any()):
            self.bias = passed_on.to(self.weight.dtype)

    @property
    def mask(self) -> Tensor | None:
        """What is left of the mask, if it still prunes something."""
        if not isinstance(self.module, MaskedLinear):
            return None
        mask = self.module.mask[self.rows][:, self.columns]
        return None if bool(mask.all()) else mask

    @property
    def is_plain(self) -> bool:
        """Whether an nn.Linear is what there will be."""
        return not isinstance(self.module, MaskedLinear) or (self.is_changed and self.mask is None)

    def build(self) -> nn.Linear:
        """The smaller layer: nn.Linear, or MaskedLinear where its mask still prunes something."""
        old, weight = self.module, self.weight
        if isinstance(old, MaskedLinear) and old.gradient == "dense":  # latent values stay behind the mask
            weight = old.weight.detach()[self.rows][:, self.columns]
        new = nn.Linear(len(self.columns), len(self.rows), self.bias is not None, device="meta")
        new.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), old.weight.requires_grad)
        if self.bias is not None:
            trained = old.weight.requires_grad if old.bias is None else old.bias.requires_grad
            new.bias = nn.Parameter(self.bias.clone(), trained)
        new.train(old.training)
        if isinstance(old, MaskedLinear) and (mask := self.mask) is not None:
            new = MaskedLinear.from_linear(new, mask, old.gradient)
        if self.is_changed:  # for structure.py: the size that the model's class gives the layer
            for side in ("out_features", "in_features"):
                first: Any = getattr(old, f"original_{side}", getattr(old, side))
                setattr(new, f"original_{side}", first)
        return new


def shrink_pair(first: Draft, second: Draft, steps: tuple[Step, ...]) -> int:
    """Take out the units between two layers that carry nothing but a constant, or that nobody reads.

    A unit whose weights in `first` are all zero has the value steps(bias) for every input; its part of `second`
    becomes part of the bias. One unit always stays: a layer without any is none. Returns how many went.
    """
    constant, unread = first.zero_rows(), second.zero_columns()
    keep = ~(constant | unread)
    if not bool(keep.any()) and len(keep):
        keep[0] = True
    gone = int((~keep).sum())
    if gone:
        bias = first.bias if first.bias is not None else first.weight.new_zeros(len(constant))
        values = bias.double()
        for step in steps:
            values = step.in_float64(values)
        first.keep_rows(keep)
        second.keep_columns(keep, values)
    return gone
