"""Ctrl-C: the first one lets a training step finish and be saved, the second one ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_NOTE = b"\ncompress: finishing this step and saving it; Ctrl-C again ends at once\n"


class Interrupt:
    """While entered, and inside `deferring`, Ctrl-C only sets `requested`; anywhere else it is KeyboardInterrupt.

    Outside of training there is nothing to save that is not on the disk already. In other threads than the main one,
    and where Ctrl-C is ignored (a job in the background), everything stays as it is. The handler from before is put
    back.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._previous: object = None
        self._installed = False
        self._process = os.getpid()

    def __enter__(self) -> Interrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):  # None: a handler not from Python
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            self._installed = False
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a DataLoader's worker, which the terminal tells too; it lives until this process lets it go
        if self.requested or not self._deferred:
            self._deferred = False
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, _NOTE)  # print is not safe here: the step may be in the middle of one

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Training: on_step asks for `requested` and stops."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
