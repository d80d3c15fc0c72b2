"""Pruning: which weights go, when, and what is done with the holes.

prune.py       prune_, the whole of it in one call: patterns.py says what is pruned together, scores.py what matters,
               choose.py makes masks of scores, swap.py puts them into a model, report.py tells.
schedule.py    PruningSchedule, the same step by step in training; regrow.py brings weights back.
shrink.py      shrink_: what was pruned as a whole becomes smaller dense layers; heads.py knows attention heads.
"""

from __future__ import annotations

from pycompress.pruning.patterns import Pattern
from pycompress.pruning.prune import prune_
from pycompress.pruning.report import PrunedLayer, PruneReport
from pycompress.pruning.schedule import PruningSchedule
from pycompress.pruning.shrink import ShrinkReport, shrink_
from pycompress.pruning.swap import masked_layers

__all__ = [
    "Pattern",
    "PruneReport",
    "PrunedLayer",
    "PruningSchedule",
    "ShrinkReport",
    "masked_layers",
    "prune_",
    "shrink_",
]
