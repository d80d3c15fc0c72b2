"""The charts of a report: they are drawn for runs of every shape, stand in one page, and cover nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pycompress.run_report import charts, layer_charts
from pycompress.run_report.collect import collect
from pycompress.run_report.drawing import COLOURS, SERIES, figure_of, place_labels, shorten, svg_of
from pycompress.run_report.read import read_run
from tests.run_folders import layer, make_run, records
from tests.run_pages import page_of
from tests.test_run_report import EVIL

pytest.importorskip("matplotlib")


def test_a_page_with_all_its_charts(tmp_path: Path) -> None:
    page, text, _ = page_of(make_run(tmp_path / "run"))
    assert page.svgs == 3 + 4 + 3 + 1
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == page.svgs
    assert "0 baseline, 1 prune, 2 distill, 3 sparsify" in page.text
    assert "accuracy and size after each stage: 0 baseline: file, MB 4.01, accuracy 0.981; 1 prune" in " ".join(labels)
    assert not set(re.findall("#0[0-9a-f]0[0-9a-f]0[0-9a-f]", text)) & set(COLOURS.values())  # all became variables
    assert all(f"var(--{name})" in text for name in ("ink", "muted", "grid", "before", "after", "one", "two"))


def test_text_of_a_chart_is_shown_and_never_run(tmp_path: Path) -> None:
    bad = {**layer(0, EVIL, 8, 8), "name": EVIL}
    _, text, _ = page_of(make_run(tmp_path / "run", layers=[bad]))
    assert len(re.findall(r"<script", text)) == 1
    assert "<img" not in text


def content_of(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return collect(read_run(make_run(tmp_path / "run", **changes)))


def test_a_name_that_looks_like_a_drawing_stays_as_it_is(tmp_path: Path) -> None:
    odd = 'id="x" url(#y) #010101'
    error, *_ = layer_charts.layer_charts(content_of(tmp_path, layers=[layer(0, odd, 8, 8)]))
    assert f">{odd}</text>" in error.svg


def test_very_many_kinds_of_layers_are_cut_to_the_worst(tmp_path: Path) -> None:
    names = [f"part{chr(97 + i // 26)}{chr(97 + i % 26)}.dense" for i in range(60)]
    many = [{**layer(i, name, 8, 8), "error": 0.001 * (i + 1)} for i, name in enumerate(names)]
    error, *_ = layer_charts.layer_charts(content_of(tmp_path, layers=many))
    assert "of 60 rows the 48 with the largest error" in error.caption
    assert [name in error.svg for name in (names[11], names[12], names[59])] == [False, True, True]


def test_many_layers_share_rows_with_a_dot_each(tmp_path: Path) -> None:
    error, _, time = layer_charts.layer_charts(content_of(tmp_path, blocks=50))
    assert "a row for layers alike" in error.caption
    assert "bert.encoder.layer.49.output.dense: 0.0200" in error.svg  # the tip of a dot
    assert time.svg.count("bert.encoder.layer.49.output.dense: ") == 2  # before and after


def test_charts_without_values_are_not_drawn(tmp_path: Path) -> None:
    bare = [layer(0, "a", 8, 8)]
    for key in ("before", "after"):
        bare[0][key] = {**bare[0][key], "seconds": None, "sparsity": None}
    bare[0]["error"] = None
    content = content_of(tmp_path, layers=bare, stages=records()[:1], status="running", latency={})
    assert layer_charts.layer_charts(content) == []
    assert layer_charts.roofline_chart(content) is None
    assert charts.trade_off_charts(content) == []
    assert layer_charts.roofline_chart({**content, "peaks": None}) is None


def test_a_roofline_without_some_peaks_is_drawn(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    for peaks in (
        {"fp32_gflops": 100.0},
        {"read_gbps": 20.0},
        {"read_gbps": "x", "int8_gops": True, "fp32_gflops": 9.0},
    ):
        chart = layer_charts.roofline_chart({**content, "peaks": peaks})
        assert chart is not None
        assert ("memory, 20 GB/s" in chart.svg) == (peaks.get("read_gbps") == 20.0)


def test_a_stage_that_never_moves_is_drawn(tmp_path: Path) -> None:
    """All stages at one point, a curve of one step, a loss that is 0."""
    content = content_of(tmp_path, stages=[records()[0], replace(records()[0], index=1)])
    assert len(charts.trade_off_charts(content)) == 3
    curve = {"stage": 1, "name": "prune", "steps": 1, "step": [1], "loss": [0.0], "lr": [None], "sparsity": [None]}
    content["curves"] = [{**curve, "terms": {"a": [None], "b": [1.0]}}]
    assert len(charts.training_charts(content)) == 3
    assert charts.training_charts({**content, "curves": []}) == []


def test_a_run_of_many_short_stages_has_room_for_their_names(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    one = {"steps": 10, "step": [5, 10], "loss": [2.0, 1.0], "lr": [0.1, 0.0], "sparsity": [0.0, 0.0], "terms": {}}
    content["curves"] = [{**one, "stage": i, "name": "a-long-name-of-a-stage"} for i in range(1, 31)]
    loss, _ = charts.training_charts(content)
    shown = re.findall(r"(?s)<text[^>]*>(\d+)</text>", loss.svg)
    assert {"1", "30"} & set(shown)


def test_labels_of_points_cover_nothing() -> None:
    points = [(0.0, 0.0), (0.0, 0.0), (0.5, 0.5), (0.52, 0.5), (1.0, 1.0), (0.9, 0.95)]
    with figure_of() as figure:
        axes = figure.subplots()
        axes.scatter(*zip(*points, strict=True))
        axes.margins(0.15)
        place_labels(axes, points, list("012345"), lines=[(points[2], points[4])], fontsize=9)
        figure.draw_without_rendering()
        texts = [text for text in axes.texts if text.get_text()]
        assert [text.get_text() for text in texts] == ["0, 1", "2, 3", "4", "5"]
        boxes = [text.get_window_extent() for text in texts]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        pixels = axes.transData.transform(points)
        assert not any(box.contains(x, y) for box in boxes for x, y in pixels)


def test_drawings_share_no_ids_and_are_the_same_each_time() -> None:
    def draw(key: str) -> str:
        with figure_of() as figure:
            figure.subplots().plot([1, 2], color=COLOURS[SERIES[0]])
            return svg_of(figure, key, "a line")

    assert draw("a") == draw("a")
    one, two = (set(re.findall(r' id="([^"]+)"', draw(key))) for key in "ab")
    assert one
    assert not one & two


def test_names_lose_their_middle() -> None:
    assert shorten("attention.self.query") == "attention.self.query"
    assert shorten("encoder.layers.10.self_attn.out_proj") == "e.l.10.self_attn.out_proj"
    assert shorten("a" * 20 + "b" * 20, 24) == "a" * 7 + "…" + "b" * 16
    assert layer_charts._names(["m.encoder.0.fc", "m.encoder.1.fc", "m.encoder.head"]) == ["0.fc", "1.fc", "head"]
    assert layer_charts._names(["fc", "fc.fc", ""]) == ["fc", "fc.fc", "(the model)"]
