"""Who computes an operation: the table that every operation has, and the choice from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Call = TypeVar("Call")
Run = TypeVar("Run")


@dataclass(frozen=True)
class Backend(Generic[Call, Run]):
    """One row of the table. ``missing(call)`` says why the backend cannot take the call, or None.

    ``leaves_to(call)`` names a later row that ``"auto"`` takes instead, where that one can take the call; or None.
    """

    name: str
    missing: Callable[[Call], str | None]
    run: Run
    leaves_to: Callable[[Call], str | None] | None = None


class Backends(Generic[Call, Run]):
    """The rows, best first; the last one takes every call. ``"auto"`` takes the first that can; a backend that was
    named runs or raises.

    op: what errors call the operation. names: what callers may write.
    """

    def __init__(self, op: str, *rows: Backend[Call, Run]) -> None:
        self._op, self._rows = op, rows
        self.names = ("auto", *(row.name for row in rows))

    def check(self, backend: str) -> None:
        """Raises ``ValueError`` for a name that is not one of ``names``."""
        if backend not in self.names:
            raise ValueError(f"{self._op}: backend={backend!r}, expected one of {', '.join(self.names)}")

    def pick(self, backend: str, call: Call) -> Backend[Call, Run]:
        """Raises ``ValueError`` for an unknown name, and for a named backend that cannot take the call."""
        for row in self._rows:
            if backend in ("auto", row.name):
                reason = row.missing(call)
                if reason is None:
                    return self._left_to(row, call) if backend == "auto" else row
                if backend != "auto":
                    raise ValueError(f"{self._op}: backend={backend!r} cannot run this: {reason}")
        self.check(backend)
        raise AssertionError("the last row takes every call")

    def _left_to(self, row: Backend[Call, Run], call: Call) -> Backend[Call, Run]:
        name = row.leaves_to(call) if row.leaves_to is not None else None
        return next((other for other in self._rows if other.name == name and other.missing(call) is None), row)
