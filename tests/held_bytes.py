"""The memory that a module really holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def held_bytes(module: nn.Module, *parts: type) -> int:
    """Bytes of every distinct storage reachable from the module, and from the slots of the `parts` that it holds."""
    found: dict[int, int] = {}
    todo: list[Any] = [module.__dict__]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, tuple):
            todo += item
        elif isinstance(item, parts):
            todo += [getattr(item, name) for name in type(item).__slots__]
    return sum(found.values())
