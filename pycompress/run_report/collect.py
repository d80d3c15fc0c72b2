"""From a run to what its report says: the JSON-ready content of report.json, numbers as they were measured.

Nothing is rounded here and nothing left out in silence: what was not measured is None, and `missing` says why.
"""

from __future__ import annotations

import math
from typing import Any

from pycompress.run_report import words
from pycompress.run_report.read import Run
from pycompress.version import __version__
from pycompress.workflow.records import StageRecord

FORMAT, VERSION = "pycompress.report", 1
# Beyond it the quartiles of a latency lie so far apart that the machine was busy with something else.
_RESTLESS = 1.5
_CURVE_POINTS = 400  # of each training curve; a bucket of steps becomes their mean


def collect(run: Run) -> dict[str, Any]:
    """headline: phrases. before_after: rows {"what", "unit", "batch", "before", "after", "speedup"}. disk_bytes: of the
    final model's file. stages: the records. curves: by trained stage, thinned out. latency, layers, recipe, machine: as
    run.json has them. missing: part of the report -> why it is empty. warnings: sentences.
    """
    rows = _before_after(run, run.records[0], run.records[-1]) if run.records else []
    if len(run.records) == 1:  # nothing has become of the baseline yet
        rows = [{**row, "after": None} for row in rows]
    return {
        "format": FORMAT,
        "version": VERSION,
        "pycompress": __version__,
        "run": run.path.resolve().name,
        "status": run.status,
        "error": run.error,
        "model": {key: run.model[key] for key in ("class", "parameters", "fingerprint") if key in run.model},
        "headline": _headline(run, rows),
        "before_after": rows,
        "disk_bytes": disk_bytes(run),
        "stages": [record.to_dict() for record in run.records],
        "curves": _curves(run),
        "latency": run.latency,
        "layers": run.layers,
        "peaks": _peaks(run),
        "recipe": run.recipe,
        "machine": run.machine,
        "missing": _missing(run),
        "warnings": _warnings(run),
    }


# ---- before and after -----------------------------------------------------------------------------------------


def _before_after(run: Run, first: StageRecord, last: StageRecord) -> list[dict[str, Any]]:
    rows = [
        _row("Parameters", "count", first.parameters, last.parameters),
        _row("Parameters that are not 0", "count", first.nonzero, last.nonzero),
        _row("Sparsity of the linear layers", "share", first.sparsity, last.sparsity),
        _row("Size in memory", "bytes", first.memory_bytes, last.memory_bytes),
        _row("Size on disk", "bytes", first.file_bytes, disk_bytes(run)),
    ]
    for batch, found in _latency(run, first, last).items():
        rows.append({**_row("Latency", "seconds", found["before"], found["after"]), "batch": int(batch), **found})
        rates = (int(batch) / found[side] if found[side] else None for side in ("before", "after"))
        rows.append({**_row("Throughput", "samples/s", *rates), "batch": int(batch)})
    for name in dict.fromkeys((*first.metrics, *last.metrics)):
        values = (_finite(record.metrics.get(name)) for record in (first, last))
        rows.append({**_row(name, "metric", *values)})
    return rows


def _row(what: str, unit: str, before: float | None, after: float | None) -> dict[str, Any]:
    return {"what": what, "unit": unit, "batch": None, "before": before, "after": after}


def disk_bytes(run: Run) -> int | None:
    """Of the final model's file; before it is there, of the last finished stage's."""
    if run.model_bytes is not None:
        return run.model_bytes
    return run.records[-1].file_bytes if run.records else None


def _latency(run: Run, first: StageRecord, last: StageRecord) -> dict[str, dict[str, Any]]:
    """By batch size: medians, and where the two were timed in turns the quartiles of their ratio."""
    found = {}
    for batch, timed in run.latency.items():
        found[batch] = {
            "before": timed["before"]["p50"], "after": timed["after"]["p50"], "speedup": timed["speedup"],
            "rounds": timed["rounds"],
        }  # fmt: skip
    for batch, before in first.latency.items():
        if batch in found or batch not in last.latency or last is first:
            continue
        after = last.latency[batch]
        ratio = before / after if after else None
        found[batch] = {"before": before, "after": after, "speedup": {"p25": None, "p50": ratio, "p75": None}}
    return dict(sorted(found.items(), key=lambda pair: int(pair[0])))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ---- in words -------------------------------------------------------------------------------------------------


def _headline(run: Run, rows: list[dict[str, Any]]) -> list[str]:
    """What was gained and what it cost, a phrase each; empty where there is no more than the baseline."""
    if len(run.records) < 2:
        return []
    by_what = {(row["what"], row["batch"]): row for row in rows if row["unit"] != "metric"}
    disk = by_what["Size on disk", None]
    found = [f"{words.smaller(disk['before'], disk['after'])} on disk"]
    timed = [row for row in rows if row["what"] == "Latency" and row["unit"] == "seconds"]
    if timed:
        best = timed[-1]  # the largest batch, and the others where they lose
        slower = [row for row in timed[:-1] if (row["speedup"]["p50"] or 1) < 0.97]
        found += [f"{words.faster(row['speedup']['p50'])} at batch {row['batch']}" for row in (best, *slower)]
    for row in rows:
        if row["unit"] == "metric":
            found.append(f"{row['what']} {words.metric(row['before'])} → {words.metric(row['after'])}")
            break
    return found


# ---- curves ---------------------------------------------------------------------------------------------------


def _curves(run: Run) -> list[dict[str, Any]]:
    """One entry for each stage that trained: {"stage", "name", "steps", "step", "loss", "lr", "sparsity", "terms"}."""
    names = {record.index: record.name for record in run.records}
    names |= {i: name for i, name in enumerate(_stage_names(run), 1) if i not in names}
    trained = {record.index: record.steps for record in run.records}
    found = []
    for stage in sorted({step.stage for step in run.history}):
        steps = [step for step in run.history if step.stage == stage]
        width = math.ceil(len(steps) / _CURVE_POINTS)
        buckets = [steps[i : i + width] for i in range(0, len(steps), width)]
        terms = list(dict.fromkeys(name for step in steps for name in step.terms))
        found.append({
            "stage": stage, "name": names.get(stage, ""), "steps": max(steps[-1].step, trained.get(stage, 0)),
            "step": [bucket[-1].step for bucket in buckets],
            **{key: [_mean([getattr(s, key) for s in b]) for b in buckets] for key in ("loss", "lr", "sparsity")},
            "terms": {name: [_mean([s.terms.get(name) for s in b]) for b in buckets] for name in terms},
        })  # fmt: skip
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _stage_names(run: Run) -> list[str]:
    stages = run.recipe.get("stages")
    return [str(next(iter(stage), "")) for stage in stages if isinstance(stage, dict)] if stages else []


# ---- what is missing, what is wrong ---------------------------------------------------------------------------


def _peaks(run: Run) -> dict[str, Any] | None:
    peaks = run.machine.get("peaks")
    return peaks if isinstance(peaks, dict) and any(_is_positive(value) for value in peaks.values()) else None


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _missing(run: Run) -> dict[str, str]:
    """By section of the page, a sentence each."""
    done = run.status == "finished"
    later = "" if done else " The run is not finished: it is measured at the end."
    found = {}
    if len(run.records) < 2:
        found["before_after"] = "No stage is finished yet, so there is nothing to compare with the baseline."
    if not any(record.latency for record in run.records) and not run.latency:
        found["latency"] = f"No latency was measured (measure.rounds is 0, or there was no sample batch).{later}"
    if not any(record.metrics for record in run.records):
        found["metrics"] = "No quality was measured: the run had no eval_fn."
    if not run.history:
        found["curves"] = "There are no training curves: no stage of this run has trained."
    if not run.layers:
        found["layers"] = f"The layers were not measured one by one (measure.layers).{later}"
    if _peaks(run) is None:
        found["roofline"] = "The peaks of this machine were not measured."
    elif not any(_has_time(layer) for layer in run.layers):
        found["roofline"] = "No layer was timed (measure.layers, measure.rounds)."
    return found


def _has_time(layer: dict[str, Any]) -> bool:
    return any(side and side["seconds"] for side in (layer["before"], layer["after"]))


def _warnings(run: Run) -> list[str]:
    found = []
    planned, done = len(_stage_names(run)), len(run.records) - 1
    if run.status != "finished":
        how = {"running": "is still running, or was killed", "interrupted": "was interrupted", "failed": "failed"}
        shown = "the last one" if done > 0 else "the baseline"
        reached = f"{max(done, 0)} of {planned} stages are finished, and the figures are those of {shown}"
        found.append(f"This run {how[run.status]}: {reached}.")
    if run.error:
        found.append(run.error)
    found += run.notes
    for record in run.records:
        if record.warning:
            found.append(f"Stage {record.index} ({record.name}): {record.warning}")
        bad = [name for name, value in record.metrics.items() if not math.isfinite(value)]
        if bad:
            found.append(f"Stage {record.index} ({record.name}): {', '.join(bad)} is not a finite number.")
    if run.unreadable:
        lines = "1 line" if run.unreadable == 1 else f"{run.unreadable} lines"
        found.append(f"{lines} of history.jsonl cannot be read, and the curves lack them.")
    restless = [b for b, t in run.latency.items() if any(_spread(t[k]) > _RESTLESS for k in ("before", "after"))]
    if restless:
        which = f"batch {restless[0]} was" if len(restless) == 1 else f"batches {', '.join(restless)} were"
        found.append(f"The machine was busy while {which} timed: the quartiles of the latency lie far apart.")
    forced = run.machine.get("isa", {}).get("forced") if isinstance(run.machine.get("isa"), dict) else None
    if forced:
        found.append(f"The kernels were held to {forced} by PYCOMPRESS_ISA.")
    return found


def _spread(quartiles: dict[str, float]) -> float:
    return quartiles["p75"] / quartiles["p25"]
