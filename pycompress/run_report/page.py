"""report.html: one page that holds everything it shows, made from the content of report.json."""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import files
from typing import Any

from pycompress.run_report import words
from pycompress.run_report.charts import Chart, trade_off_charts, training_charts
from pycompress.run_report.layer_charts import layer_charts, roofline_chart

SECTIONS = {
    "warnings": "Warnings",
    "before-after": "Before and after",
    "stages": "Stages",
    "trade-off": "Trade-off",
    "training": "Training",
    "layers": "Layers",
    "roofline": "Roofline",
    "recipe": "Recipe",
    "machine": "Machine",
}
_LAYER_COLUMNS = {  # and whether it holds words
    "layer": True, "outputs × inputs": True, "error": False, "sparsity": False, "bytes before": False,
    "bytes after": False, "time before": False, "time after": False, "speed-up": False, "GOP/s after": False,
    "op/byte after": False, "kind": True, "folded in": True, "note": True,
}  # fmt: skip
_NO_CHARTS = "Charts need matplotlib: pip install 'pycompress[report]', then pycompress report again."


def page_of(content: dict[str, Any]) -> str:
    """content: what `collect` returned."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_file("template.html"))
    can_draw = importlib.util.find_spec("matplotlib") is not None
    drawn = _charts(content) if can_draw else {"trade_off": [], "training": [], "layer_charts": [], "roofline": None}
    headline = ", ".join(content["headline"])
    return template.render(
        content=content,
        title=f"{str(content['model'].get('class') or 'Model').rpartition('.')[2]} in {content['run']}",
        headline=f"{headline[:1].upper()}{headline[1:]}." if headline else "Nothing to compare yet.",
        tiles=_tiles(content),
        sections=SECTIONS.items(),
        note=_note(content),
        before_after=[_before_after(row) for row in content["before_after"]],
        **_stages(content),
        layer_columns=_LAYER_COLUMNS.items(),
        layers=_layers(content["layers"]),
        recipe=_yaml(content["recipe"]),
        machine=_machine(content["machine"]),
        no_charts="" if can_draw else _NO_CHARTS,
        # Both are ours; neither holds a "</", so nothing in them ends its element.
        style=Markup(_file("style.css")),
        script=Markup(_file("sort.js")),
        **drawn,
    )


def _file(name: str) -> str:
    return files("pycompress.run_report").joinpath(name).read_text("utf-8")


def _charts(content: dict[str, Any]) -> dict[str, list[Chart] | Chart | None]:
    return {
        "trade_off": trade_off_charts(content),
        "training": training_charts(content),
        "layer_charts": layer_charts(content),
        "roofline": roofline_chart(content),
    }


# ---- the head and the tables ----------------------------------------------------------------------------------


def _tiles(content: dict[str, Any]) -> list[dict[str, str]]:
    """The few numbers that one looks for first."""
    if len(content["stages"]) < 2:
        return []
    rows = [_before_after(row) for row in content["before_after"]]
    found = [_tile(row) for row in rows if row["what"] == "Size on disk"]
    timed = [row for row in rows if row["unit"] == "seconds"]
    found += [_tile(row) for row in timed[-1:] + timed[-2:-1]]
    found += [_tile(row) for row in rows if row["what"].startswith("Sparsity")]
    metrics = [row for row in rows if row["unit"] == "metric"][:2]
    found += [{"value": row["after"], "what": row["what"], "detail": f"before: {row['before']}"} for row in metrics]
    return found


def _tile(row: dict[str, str]) -> dict[str, str]:
    value, _, rest = row["change"].partition(" ")
    if row["unit"] == "share":
        value, rest = row["after"], "zeros"
    elif "×" not in value:
        value, rest = row["change"], ""
    what = f"{rest} {_inside(row['what'])}".strip()
    return {"value": value, "what": what, "detail": f"{row['before']} → {row['after']}"}


def _inside(what: str) -> str:
    """A row's name within a phrase."""
    known = {"Size on disk": "on disk", "Sparsity of the linear layers": "in the linear layers"}
    return known.get(what, what.replace("Latency, batch", "at batch"))


def _before_after(row: dict[str, Any]) -> dict[str, str]:
    unit, before, after = row["unit"], row["before"], row["after"]
    text = {
        "count": words.count, "share": words.percent, "bytes": words.size, "seconds": words.duration,
        "samples/s": lambda rate: words.MISSING if rate is None else f"{words.short_count(rate)}/s",
        "metric": words.metric,
    }[unit]  # fmt: skip
    change, detail = "", ""
    if unit == "count":
        change = words.fewer(before, after)
    elif unit == "bytes":
        change = words.smaller(before, after)
    elif unit == "seconds" and after is not None:
        spread = row["speedup"]
        change = words.faster(spread["p50"])
        if spread["p25"] is not None:
            detail = f"quartiles {spread['p25']:.2f} to {spread['p75']:.2f}, {row['rounds']} rounds"
    elif unit == "metric" and None not in (before, after):
        change = f"{after - before:+.4g}" if after != before else "the same"
    what = row["what"] if row["batch"] is None else f"{row['what']}, batch {row['batch']}"
    shown = {"before": text(before), "after": text(after)}
    return {"what": what, "unit": unit, **shown, "change": change, "detail": detail}


def _stages(content: dict[str, Any]) -> dict[str, Any]:
    records = content["stages"]
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    batches = sorted({batch for record in records for batch in record["latency"]}, key=int)
    columns = ["stage", "took", "steps", "parameters not 0", "sparsity", "in memory", "on disk"]
    columns += [f"latency, batch {batch}" for batch in batches] + metrics
    rows = []
    for record in records:
        cells = [
            words.duration(record["seconds"]) if record["index"] else words.MISSING,
            words.count(record["steps"]) if record["steps"] else words.MISSING,
            words.short_count(record["nonzero"]), words.percent(record["sparsity"]),
            words.size(record["memory_bytes"]), words.size(record["file_bytes"]),
            *(words.duration(record["latency"].get(batch)) for batch in batches),
            *(words.metric(record["metrics"][m]) if m in record["metrics"] else words.MISSING for m in metrics),
        ]  # fmt: skip
        rows.append({
            "name": f"{record['index']} {record['name']}", "cells": cells, "summary": record["summary"],
            "options": _options(record["options"]),
        })  # fmt: skip
    return {"stages": rows, "stage_columns": columns, "stage_legend": ", ".join(row["name"] for row in rows)}


def _note(content: dict[str, Any]) -> str:
    """What to know of the table of stages: how it was timed, and where the final file is not the last stage's."""
    records, disk = content["stages"], content["disk_bytes"]
    found = []
    if any(record["latency"] for record in records[1:]):
        found.append("Each stage was timed beside the baseline at a moment of its own: what was gained is said above.")
    if records and disk != records[-1]["file_bytes"]:
        found.append(f"The final file holds the same model in {words.size(disk)}, without loss.")
    return " ".join(found)


def _options(options: dict[str, Any]) -> str:
    """sparsity=0.9, train.steps=300."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flat.items())


# ---- the layers -----------------------------------------------------------------------------------------------


def _layers(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    most = {"error": max((layer["error"] or 0.0 for layer in layers), default=0.0)}
    return [{"name": layer["name"] or "(the model)", "cells": _layer(layer, most["error"])} for layer in layers]


def _layer(layer: dict[str, Any], most: float) -> list[dict[str, Any]]:
    before, after = ({} if layer[key] is None else layer[key] for key in ("before", "after"))
    taken = [side.get("seconds") for side in (before, after)]
    speedup = taken[0] / taken[1] if all(taken) else None
    flops, seconds, intensity = (after.get(key) for key in ("flops", "seconds", "intensity"))
    rate = flops / seconds / 1e9 if flops and seconds else None
    return [
        _words(" × ".join(map(str, layer["shape"]))),
        _cell(words.error(layer["error"]), layer["error"], layer["error"] / most if layer["error"] and most else 0),
        _cell(words.percent(after.get("sparsity")), after.get("sparsity"), after.get("sparsity") or 0),
        _cell(words.size(before.get("bytes")), before.get("bytes")),
        _cell(words.size(after.get("bytes")), after.get("bytes")),
        _cell(words.duration(taken[0]), taken[0]),
        _cell(words.duration(taken[1]), taken[1]),
        _cell(words.MISSING if speedup is None else words.times(speedup), speedup),
        _cell(words.MISSING if rate is None else words.three(rate), rate),
        _cell(words.MISSING if intensity is None else words.three(intensity), intensity),
        _words(_kind(before) if before == after else f"{_kind(before)} → {_kind(after)}"),
        _words(layer["activation"]),
        _words(layer["note"]),
    ]


def _kind(side: dict[str, Any]) -> str:
    return f"{side['kind']} ({side['form']})" if side.get("form") else side.get("kind") or words.MISSING


def _cell(text: str, value: float | None, share: float = 0.0) -> dict[str, Any]:
    return {"text": text, "value": value, "bar": round(100 * share, 1), "words": False}


def _words(text: str) -> dict[str, Any]:
    return {"text": text, "value": None, "bar": 0, "words": True}


# ---- recipe and machine ---------------------------------------------------------------------------------------


def _yaml(recipe: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100) if recipe else ""


_PEAKS = {
    "int8_gops": "int8 GOP/s", "bf16_gflops": "bf16 GFLOP/s", "fp32_gflops": "fp32 GFLOP/s", "read_gbps": "GB/s read",
}  # fmt: skip


def _machine(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """info.collect()'s answer in lines; whatever else is there is left to report.json."""

    def part(name: str, of: dict[str, Any] = machine) -> dict[str, Any]:
        found = of.get(name)
        return found if isinstance(found, dict) else {}

    versions, cpu, isa, threads, peaks = map(part, ("versions", "cpu", "isa", "threads", "peaks"))
    found = [(name, str(version)) for name, version in versions.items()]
    if cpu:
        cores = f", {cpu['logical_cores']} logical cores" if cpu.get("logical_cores") else ""
        found.append(("CPU", f"{cpu.get('name')}{cores}, {cpu.get('architecture')}"))
        found.append(("CPU features", " ".join(map(str, _list(cpu.get("features")))) or "not listed"))
    if isa:
        found.append(("instruction set", f"{isa.get('selected')}{' (forced)' if isa.get('forced') else ''}"))
    if threads:
        found.append(("threads", f"{threads.get('torch')} of {threads.get('cores_usable')} usable cores"))
    for device in _list(part("gpu").get("devices")):
        found.append(("GPU", str(device.get("name", device)) if isinstance(device, dict) else str(device)))
    rates = [f"{peaks[key]:.0f} {unit}" for key, unit in _PEAKS.items() if isinstance(peaks.get(key), (int, float))]
    return found + ([("measured peaks", ", ".join(rates))] if rates else [])


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
