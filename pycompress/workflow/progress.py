"""What a person sees while a stage trains: a bar, and a line when it is done; nothing where stderr is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pycompress.workflow.trainer import StepInfo

_SECONDS = 0.25  # between two drawings: one takes about a millisecond, and reads the step's loss


class StageProgress:
    """A context: `update(info)` after each step, `done(line)` at the end; the bar goes when the context is left.

    title: the stage, as "2/4 prune". shown=False, or a console that is no terminal: both do nothing. No thread redraws
    the bar, so training has the interpreter for itself.
    """

    def __init__(self, title: str, total: int, *, shown: bool = True, console: Console | None = None) -> None:
        self._title, self._total = title, total
        self._next = 0.0
        self._console = _terminal(console) if shown else None

    def __enter__(self) -> StageProgress:
        if self._console is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
                transient=True,
                auto_refresh=False,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=self._total, facts="")
            self._progress.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console is not None:
            self._progress.stop()

    def update(self, info: StepInfo) -> None:
        if self._console is None or (now := time.perf_counter()) < self._next:
            return
        self._progress.update(self._task, completed=info.step, facts=facts(info), refresh=True)
        self._next = now + _SECONDS

    def done(self, line: str) -> None:
        """The stage's one line, which stays."""
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False)


def say(line: str) -> None:
    """One line for who watches, on stderr; nothing where that is no terminal."""
    if (console := _terminal(None)) is not None:
        console.print(line, markup=False, highlight=False)


def facts(info: StepInfo) -> str:
    """Loss, sparsity, learning rate and time left, as "loss 0.1234 · 71 % sparse · lr 5e-04 · 1:05 left"."""
    parts = [f"loss {info.loss:.4g}"]
    if (sparsity := info.sparsity) is not None:
        parts.append(f"{100 * sparsity:.3g} % sparse")
    return " · ".join([*parts, f"lr {info.lr:.2g}", f"{clock(info.seconds_left)} left"])


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    if not 0 <= seconds < 360_000:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _terminal(console: Console | None) -> Console | None:
    from rich.console import Console

    console = console or Console(stderr=True)
    return console if console.is_terminal else None
