"""The report of a run: what it says, that it stands alone, and what becomes of runs that are unfinished or damaged."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pycompress.run_report import words, write_report
from pycompress.run_report.collect import collect
from pycompress.run_report.read import read_run
from tests.run_folders import LATENCY, MACHINE, history, layer, layers, make_run, records, state
from tests.run_pages import page_of


@pytest.fixture(autouse=True)
def _no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if matplotlib were missing: drawing takes seconds; test_run_report_charts.py does it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))


# ---- a finished run -------------------------------------------------------------------------------------------


def test_the_page_says_what_the_run_did(tmp_path: Path) -> None:
    page, _, content = page_of(make_run(tmp_path / "run"))
    assert content["headline"] == [
        "22.9× smaller on disk", "3.40× faster at batch 512", "1.12× slower at batch 1", "accuracy 0.981 → 0.9786",
    ]  # fmt: skip
    for said in (
        "Classifier in run", "22.9× smaller on disk, 3.40× faster at batch 512, 1.12× slower at batch 1",
        "4.01 MB", "175 kB", "9.52× smaller", "90.1\u202f%", "61.2 ms", "18.0 ms", "quartiles 3.30 to 3.54, 15 rounds",
        "8.37 k/s", "28.4 k/s", "-0.0024", "41.2 s", "train.steps=300",
        "prune_ sparsity=0.9 pattern=4x4: 12 layers", "The final file holds the same model in 175 kB",
        "pattern: 4x4", "1450 int8 GOP/s", "avx512vnni", "SparseLinear",
        "bert.encoder.layer.1.intermediate.dense", "gelu",
    ):  # fmt: skip
        assert said in page.text, said
    assert content["missing"] == {}
    assert content["warnings"] == []


def test_report_json_has_the_numbers_as_they_were_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    _, _, content = page_of(run)
    rows = {(row["what"], row["batch"]): (row["before"], row["after"]) for row in content["before_after"]}
    first, last = records()[0], records()[-1]
    assert rows["Parameters", None] == (first.parameters, last.parameters)
    assert rows["Parameters that are not 0", None] == (first.nonzero, last.nonzero)
    assert rows["Sparsity of the linear layers", None] == (0.0, 0.901)
    assert rows["Size in memory", None] == (4_000_000, 420_000)
    assert rows["Size on disk", None] == (4_010_000, 175_000)  # the final file, not the stage's
    assert rows["Latency", 512] == (0.0612, 0.018)
    assert rows["Throughput", 512] == (512 / 0.0612, 512 / 0.018)
    assert rows["loss", None] == (0.0712, 0.0811)
    assert content["layers"] == layers(2)
    assert content["latency"] == LATENCY
    assert content["stages"] == [record.to_dict() for record in records()]
    assert content["recipe"] == state().recipe


def test_the_curves_are_the_history(tmp_path: Path) -> None:
    _, _, content = page_of(make_run(tmp_path / "run"))
    one, two = content["curves"]
    assert (one["stage"], one["name"], one["steps"]) == (1, "prune", 300)
    assert (two["stage"], two["name"], two["steps"]) == (2, "distill", 200)
    lines = [line for line in history() if line["stage"] == 2]
    assert two["step"] == [line["step"] for line in lines]
    assert two["loss"] == [line["loss"] for line in lines]
    assert two["terms"]["kl"] == [line["terms"]["kl"] for line in lines]


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = [{"stage": 1, "name": "prune", "step": i, "loss": float(i), "lr": 1.0} for i in range(1, 1001)]
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    _, _, content = page_of(run)
    (curve,) = content["curves"]
    assert curve["step"][:2] == [3, 6]
    assert curve["loss"][:2] == [2.0, 5.0]
    assert curve["step"][-1] == 1000


def test_the_report_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = write_report(run, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert (path.parent / "report.json").is_file()
    assert not (run / "report.html").exists()
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text() == path.read_text()  # the same run, the same page


def test_a_file_is_no_place_for_the_report(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match="is a file; expected a folder"):
        write_report(make_run(tmp_path / "run"), file)


def test_without_matplotlib_the_page_says_what_to_install(tmp_path: Path) -> None:
    page, _, _ = page_of(make_run(tmp_path / "run"))
    assert page.svgs == 0
    assert page.text.count("pip install 'pycompress[report]'") == 4


# ---- names that mean harm -------------------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)> $x^{ {{ 7*7 }} &amp; \x00\x1b\u202e\ud800 \"'"


def test_text_is_shown_and_never_run(tmp_path: Path) -> None:
    found = records()
    found[0] = dataclasses.replace(found[0], metrics={EVIL: 1.0})
    options = {EVIL: EVIL, "x": {EVIL: [1]}}
    found[-1] = dataclasses.replace(found[-1], metrics={EVIL: 0.5}, summary=EVIL, options=options)
    bad = {**layer(0, EVIL, 8, 8), "note": EVIL, "activation": EVIL}
    bad["after"] = {**bad["after"], "kind": EVIL, "form": EVIL}
    machine = {**MACHINE, "versions": {EVIL: EVIL}, "cpu": {"name": EVIL, "features": [EVIL]}}
    run = make_run(
        tmp_path / "run", stages=found, layers=[bad, *layers(1)], machine=machine, error=EVIL, status="failed",
        model={"class": EVIL}, recipe={"stages": [{EVIL: {EVIL: EVIL}}]}, notes=[EVIL],
    )  # fmt: skip
    line = {"stage": 1, "name": EVIL, "step": 1, "loss": 1.0, "terms": {EVIL: 1.0, "b": 2.0}, "lr": 0.1}
    (run / "history.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    page, text, _ = page_of(run)
    assert len(re.findall(r"<script", text)) == 1  # the page's own
    assert "<img" not in text
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    for control in "\x00\x1b\u202e":
        assert control not in text


# ---- runs of other shapes -------------------------------------------------------------------------------------


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    bare = [dataclasses.replace(record, metrics={}, latency={}) for record in records()]
    run = make_run(tmp_path / "run", stages=bare, layers=[], latency={}, machine={})
    (run / "history.jsonl").unlink()
    page, _, content = page_of(run)
    assert set(content["missing"]) == {"latency", "metrics", "curves", "layers", "roofline"}
    for said in content["missing"].values():
        assert said in page.text
    assert "22.9× smaller on disk." in page.text
    assert page.svgs == 0


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_says_how_far_it_came(tmp_path: Path, status: str) -> None:
    error = "the loss is NaN at step 31" if status == "failed" else None
    run = make_run(
        tmp_path / "run", model_bytes=None, status=status, stages=records()[:3], layers=[], latency={}, error=error
    )
    page, _, content = page_of(run)
    assert any("2 of 3 stages are finished" in warning for warning in content["warnings"])
    assert status in page.text
    assert error is None or error in page.text
    rows = {(row["what"], row["batch"]): row for row in content["before_after"]}
    assert rows["Size on disk", None]["after"] == 530_000  # of the last stage's file
    assert rows["Latency", 512]["after"] == 0.0613
    assert rows["Latency", 512]["speedup"] == {"p25": None, "p50": 0.0612 / 0.0613, "p75": None}
    assert "The run is not finished" in content["missing"]["layers"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_without_a_finished_stage_has_a_page(tmp_path: Path, count: int) -> None:
    found = {"status": "running", "stages": records()[:count], "layers": [], "latency": {}}
    run = make_run(tmp_path / "run", model_bytes=None, **found)
    page, _, content = page_of(run)
    assert "Nothing to compare yet." in page.text
    assert content["headline"] == []
    assert "No stage is finished yet" in page.text
    assert [row["after"] for row in content["before_after"]] == [None] * len(content["before_after"])
    assert "the same" not in page.text
    assert "figures are those of the baseline" in page.text


def test_warnings_of_stages_and_numbers_are_told(tmp_path: Path) -> None:
    found = records()
    found[1] = dataclasses.replace(found[1], summary="warning: nothing was pruned", metrics={"accuracy": math.nan})
    spread = {"p25": 0.01, "p50": 0.018, "p75": 0.04}
    latency = {**LATENCY, "512": {**LATENCY["512"], "after": spread}}
    machine = {**MACHINE, "isa": {"forced": "avx2", "selected": "avx2"}}
    run = make_run(tmp_path / "run", stages=found, latency=latency, machine=machine, notes=["a note"])
    page, _, content = page_of(run)
    expected = (
        "Stage 1 (prune): nothing was pruned", "Stage 1 (prune): accuracy is not a finite number",
        "The machine was busy while batch 512 was timed", "held to avx2 by PYCOMPRESS_ISA", "a note",
    )  # fmt: skip
    for said in expected:
        assert said in page.text
    assert len(content["warnings"]) == len(expected)


def test_half_a_line_of_history_is_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "history.jsonl"
    again = {**history()[-1], "loss": 7.0}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(again) + "\n" + '{"stage": "x", "step": 1}\n' + '{"stage": 2, "st')
    page, _, content = page_of(run)
    assert content["curves"][1]["loss"][-1] == 7.0  # taken again after an interruption: the last counts
    assert len(content["curves"][1]["loss"]) == len([line for line in history() if line["stage"] == 2])
    assert "2 lines of history.jsonl cannot be read" in page.text


def test_layers_with_holes_in_them(tmp_path: Path) -> None:
    gone = {**layer(0, "gone", 8, 8), "after": None, "error": None, "note": "only in the baseline"}
    new = {**layer(1, "new", 8, 8), "before": None, "error": None, "note": "only in the compressed model"}
    unseen = {**layer(2, "unseen", 8, 8), "error": None, "note": "never called"}
    unseen["before"] = {**unseen["before"], "seconds": None, "intensity": None}
    unseen["after"] = {**unseen["after"], "seconds": None, "intensity": None}
    page, _, _ = page_of(make_run(tmp_path / "run", layers=[gone, new, unseen]))
    for said in ("only in the baseline", "only in the compressed model", "never called", "SparseLinear"):
        assert said in page.text


def test_many_layers_have_each_a_row_in_the_table(tmp_path: Path) -> None:
    _, text, _ = page_of(make_run(tmp_path / "run", blocks=50))
    assert text.count('<th scope="row">bert.encoder.layer.') == 300


# ---- damaged runs ---------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], None]) -> str:
    content = json.loads(state().to_json())
    change(content)
    return json.dumps(content)


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ('{"format": "pycompress.run", "version"', "not JSON"),
        ("[" * 100_000, "not JSON|nested"),
        ('{"a":' * 900 + "1" + "}" * 900, "no 'pycompress.run' file|nested"),
        ("[1, 2]", "no 'pycompress.run' file"),
        ('{"format": "pycompress.calibration"}', "no 'pycompress.run' file"),
        (changed(put("version", value=99)), "upgrade pycompress"),
        (changed(put("status", value="done")), "status is 'done'"),
        (changed(put("stages", value={})), "'stages' is a dict"),
        (changed(put("stages", 1, "metrics", value={"accuracy": "high"})), "stages?|float"),
        (changed(put("stages", 1, "latency", value={"big": 0.1})), "'big'; expected a batch size"),
        (changed(put("stages", 1, "latency", value={"8": "slow"})), "'slow'; expected a number"),
        (changed(put("latency", "512", "after", value=[])), r"latency\['512'\].after is \[\]; expected an object"),
        (changed(put("latency", "512", "after", "p50", value=-1)), "expected positive p25, p50 and p75"),
        (changed(put("layers", 3, "error", value="big")), r"layers\[3\].error is 'big'; expected a number"),
        (changed(put("layers", 3, "shape", value=["a"])), r"layers\[3\].shape is \['a'\]; expected whole numbers"),
        (changed(put("layers", 3, "after", "bytes", value=True)), "after.bytes is True; expected a number"),
        (changed(put("layers", 3, value=7)), r"layers\[3\] is 7; expected an object"),
        (changed(put("layers", 3, "name", value=[])), "name is .*; expected text"),
        (changed(put("notes", value=[3])), r"notes\[0\] is 3; expected text"),
    ],
)
def test_a_damaged_run_is_refused_and_nothing_written(tmp_path: Path, text: str, said: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    (run / "run.json").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        write_report(run)
    assert str(run / "run.json") in str(caught.value)
    assert (run / "report.html").read_text() == "old"
    assert not (run / "report.json").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        write_report(run)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*run\.json; expected the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "nowhere")
    make_run(tmp_path / "seed-1")
    make_run(tmp_path / "seed-0")
    with pytest.raises(FileNotFoundError, match=r"runs are in .*seed-0, .*seed-1$"):
        write_report(tmp_path)


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = (run / "run.json").read_text().replace('"error": 0.012,', '"error": NaN,').replace('"seconds": 43', "&")
    (run / "run.json").write_text(text.replace('"int8_gops": 1450.0', '"int8_gops": Infinity'))
    _, _, content = page_of(run)
    assert content["layers"][1]["error"] is None
    assert content["peaks"]["int8_gops"] is None


@pytest.mark.parametrize("machine", [{}, {"peaks": 3, "versions": "x", "cpu": [], "gpu": {"devices": "no"}, "isa": 1}])
def test_a_machine_of_any_shape_is_shown_as_far_as_it_is_known(tmp_path: Path, machine: dict[str, Any]) -> None:
    _, _, content = page_of(make_run(tmp_path / "run", machine=machine))
    assert content["peaks"] is None
    assert content["missing"]["roofline"] == "The peaks of this machine were not measured."


# ---- words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (words.size(0), "0 B"), (words.size(999), "999 B"), (words.size(999_600), "1.00 MB"),
        (words.size(90_400_000), "90.4 MB"), (words.size(None), "–"),
        (words.duration(8.31e-6), "8.31 µs"), (words.duration(0.0612), "61.2 ms"), (words.duration(1.5), "1.50 s"),
        (words.duration(125), "2 min 05 s"), (words.duration(3900), "1 h 05 min"), (words.duration(3599), "1 h 00 min"),
        (words.duration(2e-9), "2 ns"), (words.duration(0.0), "0 s"),
        (words.three(0.00123), "0.00123"), (words.three(1000), "1000"), (words.three(0), "0"),
        (words.percent(0.0), "0\u202f%"), (words.percent(1.0), "100\u202f%"), (words.percent(0.9), "90\u202f%"),
        (words.percent(0.99995), "99.995\u202f%"), (words.percent(0.0001), "0.01\u202f%"), (words.percent(None), "–"),
        (words.smaller(4.0, 1.0), "4.00× smaller"), (words.smaller(1.0, 1.2), "1.20× larger"),
        (words.smaller(1.0, 1.0), "the same"), (words.smaller(None, 1.0), "–"), (words.fewer(10, 0), "none left"),
        (words.fewer(0, 10), "–"), (words.faster(3.4), "3.40× faster"), (words.faster(0.5), "2.00× slower"),
        (words.faster(1.01), "as fast"), (words.faster(None), "–"), (words.faster(23.41), "23.4× faster"),
        (words.short_count(1.6188), "1.62"), (words.short_count(120), "120"), (words.short_count(22_565_373), "22.6 M"),
        (words.count(1234567), "1\u2009234\u2009567"), (words.error(1.24e-7), "1.2e-07"), (words.error(0.0), "0"),
        (words.metric(0.98123), "0.9812"), (words.metric(None), "–"), (words.metric(1e9), "1.0000e+09"),
    ],
)  # fmt: skip
def test_numbers_as_a_person_reads_them(found: str, expected: str) -> None:
    assert found == expected


def test_collect_reads_the_same_from_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.chdir(run)
    assert collect(read_run("."))["run"] == "run"
