"""StageRecord: what is known of the model after a stage, and whether it can be read back from run.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = "baseline"
WARNING = "warning: "  # what a summary says where a stage did nothing


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run; stage 0 is the model as it came, "baseline".

    index, name, options: from the recipe; options leave defaults out. seconds: the stage's own work, over all
        interruptions, without evaluation and timing. steps: optimizer steps, 0 where nothing was trained.
    metrics: what eval_fn said, by name; empty without one.
    parameters: numbers that the model computes with, a pruned weight counted in full. nonzero: those that are not 0.
    sparsity: the share of zeros in the weights of the linear layers.
    memory_bytes: of parameters and buffers as they lie in memory. file_bytes: of the model saved after this stage.
    latency: seconds of a call, the median, by batch size.
    summary: what the stage did, in a line; "warning: ..." where that was nothing.
    """

    index: int
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    nonzero: int = 0
    sparsity: float = 0.0
    memory_bytes: int = 0
    file_bytes: int = 0
    latency: dict[str, float] = field(default_factory=dict)
    summary: str = ""

    @property
    def warning(self) -> str:
        """The warning in the summary, if there is one."""
        found = next((part for part in self.summary.split("; ") if part.startswith(WARNING)), "")
        return found[len(WARNING) :]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a metric that is not finite becomes None, which JSON can say."""
        content = dataclasses.asdict(self)
        content["metrics"] = {name: v if math.isfinite(v) else None for name, v in self.metrics.items()}
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StageRecord:
        """Raises ValueError for what to_dict did not make."""
        if not isinstance(content, Mapping):
            raise ValueError(f"a stage is a {type(content).__name__}; expected an object")
        values = {}
        for known in dataclasses.fields(cls):
            if known.name not in content:
                raise ValueError(f"a stage lacks {known.name!r}")
            value = content[known.name]
            kind = _KINDS[known.name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not dict):
                raise ValueError(f"a stage has {known.name}={value!r}")
            values[known.name] = value
        values["metrics"] = {name: math.nan if v is None else float(v) for name, v in values["metrics"].items()}
        return cls(**values)


_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    "index": int, "name": str, "options": dict, "seconds": _NUMBER, "steps": int, "metrics": dict, "parameters": int,
    "nonzero": int, "sparsity": _NUMBER, "memory_bytes": int, "file_bytes": int, "latency": dict, "summary": str,
}  # fmt: skip
