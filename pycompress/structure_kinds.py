"""The kinds of modules that a compressed model may hold where its class builds another: a table, one row a kind.

A row says which options of a module a description keeps, what they may be, which module of the fresh model it may take
the place of, and how it is made on the meta device and filled with the tensors of a file. Linear layers stand in
``structure_linear.py``, convolutions and embeddings in ``structure_layers.py``, attention in
``structure_attention.py``.
"""

from __future__ import annotations

from torch import nn

from pycompress.structure_attention import ATTENTION_KINDS
from pycompress.structure_kind import Kind, Options
from pycompress.structure_layers import LAYER_KINDS
from pycompress.structure_linear import LINEAR_KINDS, ORIGINAL, is_scaled


def _make_identity(options: Options, old: nn.Module) -> nn.Module | None:
    return None if type(old) is nn.Identity else nn.Identity()


KINDS = (
    *LINEAR_KINDS,
    Kind(nn.Identity, {}, lambda options, old: "", _make_identity, is_ours=False),
    *LAYER_KINDS,
    *ATTENTION_KINDS,
)
OURS_BY_NAME = {kind.name: kind for kind in KINDS}
_BY_CLASS = {kind.cls: kind for kind in KINDS}


def kind_of(module: nn.Module) -> Kind | None:
    """The row of a module that its model's class may not have built; None for any other."""
    if type(module) is nn.Linear and not hasattr(module, ORIGINAL[0]):
        return None
    return None if type(module) is nn.Sequential and not is_scaled(module) else _BY_CLASS.get(type(module))
