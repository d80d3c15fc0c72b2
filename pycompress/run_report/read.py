"""A RUN folder as `compress` left it, read and checked; whatever made it, only numbers and text come out.

A part that is missing, because it was not asked for or the run did not get so far, is empty or None; one that is there
and is not what it should be raises ValueError, which names the file and the place in it.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycompress.workflow.records import StageRecord
from pycompress.workflow.run_state import RunState

MODEL_FILE = "model.safetensors"
_NUMBER = (int, float)


@dataclass(frozen=True)
class Step:
    """A line of history.jsonl; None where a value was not written or is not finite."""

    stage: int
    step: int
    loss: float | None
    terms: dict[str, float]
    lr: float | None
    sparsity: float | None


@dataclass(frozen=True)
class Run:
    """latency: by batch size, {"before", "after", "speedup": {"p25", "p50", "p75"}, "rounds"}. layers: as
    `LayerRow.to_dict`. model_bytes: size of the final model's file, None before it is there. unreadable: lines of
    history.jsonl that are none; the last one is cut off where a process was killed.
    """

    path: Path
    status: str
    error: str
    model: dict[str, Any]
    recipe: dict[str, Any]
    machine: dict[str, Any]
    notes: list[str]
    records: list[StageRecord]
    latency: dict[str, dict[str, Any]]
    layers: list[dict[str, Any]]
    history: list[Step]
    unreadable: int
    model_bytes: int | None


def read_run(path: str | os.PathLike[str]) -> Run:
    """Raises FileNotFoundError where there is no run, ValueError for a damaged one."""
    folder = Path(path)
    file = folder / "run.json"
    if not file.is_file():
        inside = sorted(str(found.parent) for found in folder.glob("*/run.json"))
        hint = f"; runs are in {', '.join(inside[:5])}" if inside else ", `out` of compress()"
        raise FileNotFoundError(f"report: there is no {file}; expected the folder of a run{hint}")
    try:
        return _checked(folder, RunState.from_json(file.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise ValueError(f"report: {file} is damaged: not UTF-8 ({error})") from error
    except RecursionError as error:
        raise ValueError(f"report: {file} is damaged: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"report: {file} {error}") from error


def _checked(folder: Path, state: RunState) -> Run:
    found = _Reader()
    history, unreadable = _read_history(folder / "history.jsonl")
    final = folder / MODEL_FILE
    return Run(
        path=folder,
        status=state.status,
        error=clean(state.error or ""),
        model=clean(state.model),
        recipe=clean(state.recipe),
        machine=clean(state.machine),
        notes=[found.text(note, f"notes[{i}]") for i, note in enumerate(clean(state.notes))],
        records=[found.record(record) for record in state.stages],
        latency=found.latency(clean(state.latency)),
        layers=found.layers(clean(state.layers)),
        history=history,
        unreadable=unreadable,
        model_bytes=final.stat().st_size if final.is_file() else None,
    )


def clean(value: Any) -> Any:
    """The same with characters replaced that no page can show, or that turn the text around them; numbers finite."""
    if isinstance(value, str):
        return "".join("\ufffd" if _unprintable(c) else c for c in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def _unprintable(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn") and c not in "\n\t"


class _Reader:
    """Takes values out of JSON, each of the type that it has to be."""

    def wrong(self, where: str, value: object, expected: str) -> ValueError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return ValueError(f"is damaged: {where} is {shown}; expected {expected}")

    def mapping(self, value: object, where: str) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(where, value, "an object")
        return value

    def items(self, value: object, where: str) -> list[Any]:
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(where, value, "a list")
        return value

    def number(self, value: object, where: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, _NUMBER):
            raise self.wrong(where, value, "a number")
        return value

    def text(self, value: object, where: str) -> str:
        if value is not None and not isinstance(value, str):
            raise self.wrong(where, value, "text")
        return value or ""

    def batch(self, key: str, where: str) -> None:
        if not (key.isascii() and key.isdigit() and int(key) > 0):
            raise self.wrong(f"a key of {where}", key, "a batch size")

    def record(self, record: StageRecord) -> StageRecord:
        where = f"stages[{record.index}].latency"
        for batch, seconds in record.latency.items():
            self.batch(batch, where)
            self.number(seconds, f"{where}[{batch!r}]")
        return StageRecord.from_dict(clean(record.to_dict()))

    def latency(self, value: object) -> dict[str, dict[str, Any]]:
        found = {}
        for batch, item in self.mapping(value, "latency").items():
            where = f"latency[{batch!r}]"
            self.batch(batch, "latency")
            item = self.mapping(item, where)
            quartiles = {}
            for kind in ("before", "after", "speedup"):
                given = self.mapping(item.get(kind), f"{where}.{kind}")
                values = {q: self.number(given.get(q), f"{where}.{kind}.{q}") for q in ("p25", "p50", "p75")}
                if any(v is None or v <= 0 for v in values.values()):
                    raise self.wrong(f"{where}.{kind}", given, "positive p25, p50 and p75")
                quartiles[kind] = values
            found[batch] = {**quartiles, "rounds": self.number(item.get("rounds"), f"{where}.rounds")}
        return dict(sorted(found.items(), key=lambda pair: int(pair[0])))

    def layers(self, value: object) -> list[dict[str, Any]]:
        return [self.layer(item, f"layers[{i}]") for i, item in enumerate(self.items(value, "layers"))]

    def layer(self, value: object, where: str) -> dict[str, Any]:
        item = self.mapping(value, where)
        shape = self.items(item.get("shape"), f"{where}.shape")
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
            raise self.wrong(f"{where}.shape", shape, "whole numbers")
        texts = {key: self.text(item.get(key), f"{where}.{key}") for key in ("name", "activation", "note")}
        numbers = {key: self.number(item.get(key), f"{where}.{key}") for key in ("calls", "tokens", "error", "flops")}
        sides = {key: self.side(item.get(key), f"{where}.{key}") for key in ("before", "after")}
        return {**texts, "shape": shape, **numbers, **sides}

    def side(self, value: object, where: str) -> dict[str, Any] | None:
        if value is None:
            return None
        item = self.mapping(value, where)
        numbers = ("sparsity", "bytes", "seconds", "flops", "moved", "intensity")
        return {
            **{key: self.text(item.get(key), f"{where}.{key}") for key in ("kind", "form", "precision")},
            **{key: self.number(item.get(key), f"{where}.{key}") for key in numbers},
        }


def _read_history(path: Path) -> tuple[list[Step], int]:
    """The steps in their order, and how many lines are none. A step that was taken again after an interruption counts
    as it was taken last.
    """
    if not path.is_file():
        return [], 0
    steps: dict[tuple[int, int], Step] = {}
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            step = _step(line) if line.strip() else None
            if step is not None:
                steps[step.stage, step.step] = step
            elif line.strip():
                unreadable += 1
    return [steps[key] for key in sorted(steps)], unreadable


def _step(line: str) -> Step | None:
    try:
        content = clean(json.loads(line))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not all(type(content.get(key)) is int for key in ("stage", "step")):
        return None
    terms = content.get("terms")
    numbers = [content.get(key) for key in ("loss", "lr", "sparsity")]
    if not isinstance(terms, (dict, type(None))) or not all(v is None or _is_number(v) for v in numbers):
        return None
    terms = {name: float(value) for name, value in (terms or {}).items() if _is_number(value)}
    loss, lr, sparsity = numbers
    return Step(content["stage"], content["step"], loss, terms, lr, sparsity)


def _is_number(value: object) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool)
