"""Regrowth: at each change of masks some kept units are exchanged for pruned ones (RigL, Evci et al. 2020).

Of the kept units the fraction `alpha / 2 * (1 + cos(pi * progress))` is dropped, those with the lowest scores, and as
many are grown, those with the largest gradient, whose weights start at 0. The sparsity stays what it was. The fraction
falls from alpha to 0, so that at the end the masks rest.
"""

from __future__ import annotations

import math

from torch import Tensor

from pycompress.pruning.patterns import Pattern, is_finite, lowest
from pycompress.pruning.scores import magnitude

REGROWING = ("unstructured", "block", "row", "column")  # kinds of Pattern whose units stand alone


def regrow_fraction(alpha: float, progress: float) -> float:
    """The fraction of the kept units to exchange; progress from 0 (begin) to 1 (end)."""
    return alpha / 2 * (1 + math.cos(math.pi * progress))


def regrow_mask(pattern: Pattern, mask: Tensor, scores: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    """The mask (N, K) with `round(fraction * kept units)` units exchanged; as many units are kept as before.

    scores, gradient: (N, K) float; the gradient is that of the dense weight. A dropped unit may be grown again, as in
    the paper: it then keeps its weights. Of a gradient that is not finite (an overflow in mixed precision) nothing is
    learnt, and the mask is returned as it is.
    """
    if not is_finite(gradient):
        return mask
    kept = pattern.unit_scores(mask.float()) > 0
    count = round(fraction * int(kept.sum()))
    if not count:
        return mask
    ranks = pattern.unit_scores(scores).double().masked_fill(~kept, math.inf)
    remaining = kept & ~lowest(ranks, count)
    steepness = pattern.unit_scores(magnitude(gradient, pattern)).double()
    grown = lowest((-steepness).masked_fill(remaining, math.inf), count)
    # A unit that was kept all along, or came back, keeps what a finer mask had pruned in it.
    stays = mask & pattern.spread(remaining | (grown & kept), mask.shape)
    return stays | pattern.spread(grown & ~kept, mask.shape)
