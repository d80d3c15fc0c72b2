"""history.jsonl: a line every few steps of training; what a killed process wrote twice or half is mended on resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycompress.atomic_file import write_text


class History:
    """The lines of a run, in memory and, where there is a path, in its file.

    Lines are collected, and appended to the file by `flush`, which is called before a checkpoint is written: what a
    resumed run goes on behind is there.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._waiting: list[str] = []

    def add(self, line: Mapping[str, Any]) -> None:
        self.lines.append(dict(line))
        self._waiting.append(json.dumps(line, allow_nan=False))

    def flush(self) -> None:
        """Raises OSError as the system says; the lines then wait on."""
        if self.path is not None and self._waiting:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write("".join(line + "\n" for line in self._waiting))
        self._waiting = []

    def load(self) -> None:
        """Read the file; half a line at its end is no line."""
        self.lines, self._waiting = [line for line in map(_parsed, self._text().splitlines()) if line], []

    def rewind(self, stage: int, step: int) -> None:
        """Drop what comes after this step of this stage."""
        self.lines, self._waiting = [line for line in self.lines if (line["stage"], line["step"]) <= (stage, step)], []
        kept = "".join(json.dumps(line) + "\n" for line in self.lines)
        if self.path is not None and kept != self._text():
            write_text(self.path, kept)

    def _text(self) -> str:
        try:
            return "" if self.path is None else self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = isinstance(line, dict) and isinstance(line.get("stage"), int) and isinstance(line.get("step"), int)
    return line if known else None
