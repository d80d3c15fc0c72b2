"""run.json: what is known of a run, and reading it back with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pycompress.version import __version__
from pycompress.workflow.fingerprint import first_difference, text_digest
from pycompress.workflow.records import StageRecord

FORMAT, VERSION = "pycompress.run", 1
STATUSES = ("running", "interrupted", "failed", "finished")


@dataclass
class RunState:
    """recipe: as Recipe.to_dict gives it. model, teacher: identities, see fingerprint.py; teacher None where the
    recipe has none or it is the model itself.

    stages: the records so far, the baseline first. files: {name in the folder: {"bytes", "crc32"}}. choices: by the
    number of a stage that is not done yet what it found by measuring, to be repeated. layers, latency: see measure.py.
    notes: what was mended on the way. restarting: the files of an earlier run are about to be removed.
    """

    recipe: dict[str, Any]
    model: dict[str, Any]
    teacher: dict[str, Any] | None
    machine: dict[str, Any]
    status: str = "running"
    error: str | None = None
    stages: list[StageRecord] = field(default_factory=list)
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, Any] = field(default_factory=dict)
    restarting: bool = False

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "pycompress": __version__,
            "status": self.status,
            "error": self.error,
            "recipe": self.recipe,
            "model": self.model,
            "teacher": self.teacher,
            "machine": self.machine,
            "stages": [record.to_dict() for record in self.stages],
            "layers": self.layers,
            "latency": self.latency,
            "files": self.files,
            "choices": self.choices,
            "notes": self.notes,
            "restarting": self.restarting,
        }
        return json.dumps(_finite(content), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunState:
        """Raises ValueError saying what is wrong."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is damaged: not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"is no {FORMAT!r} file")
        version = content.get("version")
        if isinstance(version, int) and version > VERSION:
            made_by = content.get("pycompress")
            raise ValueError(
                f"has version {version}, of pycompress {made_by}; this is pycompress {__version__}, which reads "
                f"version {VERSION}: upgrade pycompress"
            )
        if version != VERSION:
            raise ValueError(f"has version {version!r}; expected {VERSION}")
        values = {}
        for name, kind in _KINDS.items():
            if name not in content:
                raise ValueError(f"is damaged: it lacks {name!r}")
            if not isinstance(content[name], kind):
                raise ValueError(f"is damaged: {name!r} is a {type(content[name]).__name__}")
            values[name] = content[name]
        if values["status"] not in STATUSES:
            raise ValueError(f"is damaged: its status is {values['status']!r}")
        try:
            values["stages"] = [StageRecord.from_dict(record) for record in values["stages"]]
        except (ValueError, TypeError) as error:
            raise ValueError(f"is damaged: {error}") from error
        if [record.index for record in values["stages"]] != list(range(len(values["stages"]))):
            raise ValueError("is damaged: its stages are not 0, 1, 2, ...")
        for name, mark in values["files"].items():
            if not isinstance(mark, Mapping) or not all(isinstance(mark.get(key), int) for key in ("bytes", "crc32")):
                raise ValueError(f"is damaged: the file {name!r} has {mark!r}")
        return cls(**values)

    @property
    def identity(self) -> str:
        """What files of this run are marked with: same recipe, model and teacher, same results."""
        teacher = None if self.teacher is None else self.teacher.get("fingerprint")
        return text_digest([self.recipe.get("stages"), self.recipe.get("seed", 0), self.model["fingerprint"], teacher])

    def difference(self, other: RunState) -> str | None:
        """The first thing in which `other`, of this call, is another run; None where it may go on with this one.

        How often it saves and what it times may change.
        """
        if (stored := self.recipe.get("seed", 0)) != (given := other.recipe.get("seed", 0)):
            return f"the recipe's seed was {stored!r} and is {given!r}"
        if found := _stage_difference(self.recipe.get("stages"), other.recipe["stages"]):
            return found
        if found := first_difference(self.model, other.model):
            return f"the model is another: {found}"
        if (self.teacher is None) != (other.teacher is None):
            return "the run had no teacher of its own" if self.teacher is None else "the run had a teacher of its own"
        if self.teacher is not None and other.teacher is not None:
            found = first_difference(self.teacher, other.teacher)
            return found and f"the teacher is another: {found}"
        return None


_KINDS: dict[str, Any] = {
    "recipe": dict, "model": dict, "teacher": (dict, type(None)), "machine": dict, "status": str,
    "error": (str, type(None)), "stages": list, "files": dict, "choices": dict, "notes": list, "layers": list,
    "latency": dict, "restarting": bool,
}  # fmt: skip


def _stage_difference(stored: Any, given: list[dict[str, Any]]) -> str | None:
    if not isinstance(stored, list) or not all(isinstance(stage, dict) and len(stage) == 1 for stage in stored):
        return "its recipe has no list of stages"
    for i, (old, new) in enumerate(zip(stored, given, strict=False), 1):
        ((old_name, old_options),), ((new_name, new_options),) = old.items(), new.items()
        if old_name != new_name:
            return f"stage {i} was {old_name!r} and is {new_name!r}"
        if found := _option_difference(old_options or {}, new_options or {}, ""):
            return f"stage {i} ({new_name}) {found}"
    if len(stored) != len(given):
        return f"the recipe had {len(stored)} stages and has {len(given)}"
    return None


def _option_difference(old: Any, new: Any, where: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*new, *(key for key in old if key not in new)):
            place = f"{where}.{key}" if where else key
            if key not in old or key not in new:
                was, now = (repr(side[key]) if key in side else "left out" for side in (old, new))
                return f"had {place} {was} and has {now}"
            if found := _option_difference(old[key], new[key], place):
                return found
        return None
    return None if old == new else f"had {where}={old!r} and has {where}={new!r}"


def _finite(value: Any) -> Any:
    """With None for what is not finite: JSON knows neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
