"""What a person sees while a stage trains."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pycompress.workflow import progress
from pycompress.workflow.progress import StageProgress, clock, facts


def info(step: int, **values: Any) -> Any:
    return SimpleNamespace(
        **{"step": step, "loss": 0.123456, "sparsity": 0.714, "lr": 5e-4, "seconds_left": 65.2} | values
    )


class Unread:
    """A step whose loss nobody may look at."""

    step = 1

    @property
    def loss(self) -> float:
        raise AssertionError("read")


def terminal() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=120), stream


def test_a_bar_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    console, stream = terminal()
    with StageProgress("2/4 prune", 40, console=console) as bar:
        bar.update(info(7))
        bar.done("2/4 prune: [80 %] sparse")
    shown = stream.getvalue()
    for part in ("2/4 prune", "7/40", "loss 0.1235", "71.4 % sparse", "lr 0.0005", "1:05 left"):
        assert part in shown
    assert "2/4 prune: [80 %] sparse" in shown
    assert shown.endswith("\n") or "\x1b" in shown


def test_it_is_drawn_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    console, stream = terminal()
    with StageProgress("1/1 distill", 40, console=console) as bar:
        bar.update(info(1))
        drawn = len(stream.getvalue())
        bar.update(Unread())  # type: ignore[arg-type]
        assert len(stream.getvalue()) == drawn
        now[0] += 1
        bar.update(info(3))
        assert "3/40" in stream.getvalue()[drawn:]


@pytest.mark.parametrize("shown", [True, False])
def test_quiet(shown: bool) -> None:
    """Where it is not wanted, or where it would fill a log file."""
    console, stream = terminal()
    if shown:
        console = Console(file=stream)
    with StageProgress("1/1 distill", 40, shown=shown, console=console) as bar:
        bar.update(Unread())  # type: ignore[arg-type]
        bar.done("done")
    assert stream.getvalue() == ""


def test_the_bar_goes_when_a_stage_fails() -> None:
    console, stream = terminal()
    with pytest.raises(RuntimeError, match="mine"), StageProgress("1/1 qat", 4, console=console):
        raise RuntimeError("mine")
    assert stream.getvalue().count("\x1b[?25h") == 1, "the cursor is shown again"


def test_facts() -> None:
    assert facts(info(1)) == "loss 0.1235 · 71.4 % sparse · lr 0.0005 · 1:05 left"
    assert facts(info(1, sparsity=None)) == "loss 0.1235 · lr 0.0005 · 1:05 left"
    assert [clock(s) for s in (0, 59.6, 3661, float("inf"), float("nan"), -1)] == [
        "0:00",
        "1:00",
        "1:01:01",
        "?",
        "?",
        "?",
    ]
