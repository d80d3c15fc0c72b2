"""The distillation loss on each GPU backend, against float64: the cases of the CPU's tests, and what GPUs do apart.

Without a GPU the kernels are emulated (CUDA) or interpreted (Triton), which is slow: few of the CPU's cases of a kind,
of every kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.distill_check import cases, check, each_token, truth
from tests.distill_gpu import check_all, run
from tests.distill_oracle import DIVERGENCES, DTYPES, REDUCTIONS, Case
from tests.gpu import Gpu
from tests.test_distill_loss import DRAWN, VIEWS, dealt, drawn_case, make, reduction_cases, strided_cases
from tests.test_distill_loss_numerics import BAD_ROWS, INF, MASKS, spoil

# What numpy says of infinities in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# Around the sizes where a kernel changes, odd ones, and rows of several tiles.
SHAPES = [(0, 8), (1, 1), (33, 2), (15, 31), (16, 64), (9, 65), (3, 1000), (2, 1024), (2, 4097), (1, 8193),
          (1, 20_000)]  # fmt: skip
TILES = ["as picked", "short tiles"]


@pytest.fixture(params=TILES)
def tiled(request: pytest.FixtureRequest, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The backend as it is, and where it has a choice with rows of several tiles that are not longer than a test's."""
    if request.param == "short tiles":
        if gpu.backend != "triton":
            pytest.skip("it has no such choice")
        from pycompress.kernels import distill_loss

        monkeypatch.setattr(distill_loss, "pick", lambda *_: distill_loss.Sweeps(2, 32, 2))
    return gpu


# ---- options, shapes, dtypes, strides -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(gpu: Gpu, shape: tuple[int, int]) -> None:
    """Options drawn at random, as for the CPU; every dtype, each with another divergence."""
    for i, dtype in enumerate(DTYPES):
        check_all(gpu, dealt(*shape, dtype)[i : i + 1])


@pytest.mark.parametrize("shape", [(2, 1), (2, 129), (1, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles(tiled: Gpu, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Every divergence in every dtype."""
    check_all(tiled, dealt(*shape, dtype)[3:])


@cases
def few_vocabulary_cases(vs: int, vt: int, divergence: str) -> Iterator[Case]:
    for alpha in (0.0, 0.5):
        case = make(2, max(vs, vt), divergence=divergence, alpha=alpha, temperature=1.5, teacher_grad=alpha > 0)
        labels = torch.tensor([vs - 1, vs // 2])
        yield case.but(student=case.student[:, :vs], teacher=case.teacher[:, :vt], labels=labels)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocabularies", [(50, 64), (3, 300), (200, 140)], ids=str)
def test_vocabularies_differ(tiled: Gpu, vocabularies: tuple[int, int], divergence: str) -> None:
    check_all(tiled, few_vocabulary_cases(*vocabularies, divergence))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("labelled", ["labels", "none", "ignored"])
@pytest.mark.parametrize("weighted", [True, False])
def test_reductions(gpu: Gpu, reduction: str, labelled: str, weighted: bool) -> None:
    for known in reduction_cases(reduction, labelled, weighted)[::2]:
        result = run(gpu, known.case)
        assert result.loss.shape == ((20,) if reduction == "none" else ())
        check(known, result)


@pytest.mark.parametrize("pair", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_dtypes_may_differ(gpu: Gpu, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Labels and weights may be of other dtypes too."""
    for v, labels_in, weights_in in ((50, torch.int32, torch.half), (500, torch.uint8, torch.float64)):
        case = make(7, v, teacher_grad=True, temperature=2.0, token_weight=torch.rand(7).to(weights_in), ignore_index=3)
        labels = torch.randint(min(v, 256), (7,)).to(labels_in)
        case = case.but(student=case.student.to(pair[0]), teacher=case.teacher.to(pair[1]), labels=labels)
        check(case, run(gpu, case))


@pytest.mark.parametrize("view", VIEWS)
def test_strides(gpu: Gpu, view: str) -> None:
    """The student's, and the teacher's; those of both in test_strides_in_tiles."""
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        known = strided_cases(view, dtype)[i]
        before = known.case.student.clone(), known.case.teacher.clone()
        check(known, run(gpu, known.case))
        assert torch.equal(known.case.student, before[0])
        assert torch.equal(known.case.teacher, before[1])


@pytest.mark.parametrize("view", ["transposed", "column step", "offset"])
def test_strides_in_tiles(tiled: Gpu, view: str) -> None:
    case = Case(VIEWS[view](150)[:3], VIEWS[view](150)[:3], torch.tensor([0, 149, 70]), 2.0, teacher_grad=True)
    check(case, run(tiled, case))


@pytest.mark.parametrize("weighted", [True, False])
def test_many_tokens(gpu: Gpu, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one program counts."""
    tokens = 9000
    if gpu == Gpu("triton", "cpu"):  # where so many tokens take 10 seconds
        from pycompress.kernels import distill_loss

        monkeypatch.setattr(distill_loss, "_ONE_COUNTS", tokens := 500)
        tokens += 1
    case = make(tokens, 3, token_weight=torch.rand(tokens) if weighted else None, alpha=1.0)
    check(case, run(gpu, case))


def test_results_repeat(gpu: Gpu) -> None:
    """Bit for bit: no sum depends on what runs first."""
    case = make(40, 90, teacher_grad=True, token_weight=torch.rand(40))
    first, second = run(gpu, case), run(gpu, case)
    for a, b in zip(first.__dict__.values(), second.__dict__.values(), strict=True):
        assert torch.equal(a, b)


def test_parts_of_a_batch_add_up(gpu: Gpu) -> None:
    whole = make(20, 40, divergence="jsd", token_weight=torch.rand(20))
    assert whole.labels is not None
    assert whole.token_weight is not None
    total, parts = run(gpu, whole), []
    items = float(whole.token_weight[whole.labels != -100].double().sum())
    for rows in (slice(0, 7), slice(7, 20)):
        part = whole.but(student=whole.student[rows], teacher=whole.teacher[rows], labels=whole.labels[rows])
        parts.append(run(gpu, part.but(num_items=items, token_weight=whole.token_weight[rows])))
    torch.testing.assert_close(torch.stack([p.loss for p in parts]).sum(), total.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([p.grad for p in parts]), total.grad, rtol=1e-6, atol=1e-9)


# ---- hard numbers ---------------------------------------------------------------------------------------------------


@cases
def few_masked_cases(masks: str, divergence: str) -> Iterator[Case]:
    for v, part, alpha in ((5, 0.5, 0.5), (140, 0.02, 0.0), (140, 1.0, 0.5)):
        t = 2
        a, b = torch.rand(2, t, v) < part
        keep = torch.randint(v, (t,))
        a[torch.arange(t), keep] = b[torch.arange(t), keep] = False
        student, teacher = MASKS[masks](a, b)
        case = make(t, v, DTYPES[v % 3], divergence=divergence, alpha=alpha, teacher_grad=part > 0.5, temperature=2.0)
        yield each_token(case.but(
            student=case.student.masked_fill(student, -INF), teacher=case.teacher.masked_fill(teacher, -INF),
            label_smoothing=0.1 if alpha == 0.5 else 0.0,
        ))  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masks", MASKS)
def test_masked_classes(tiled: Gpu, masks: str, divergence: str) -> None:
    """Infinite where mathematics says so, with a finite gradient; never NaN."""
    for known in few_masked_cases(masks, divergence):
        result = run(tiled, known.case)
        assert not result.loss.isnan().any()
        assert result.grad.isfinite().all()
        check(known, result)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_mass_decides_what_is_infinite(tiled: Gpu, divergence: str) -> None:
    """A class that only one side masks counts where the other has a normal float32 there, as on the CPU."""
    for far, infinite in ((-87.0, True), (-87.5, False), (-1e4, False)):
        plain, masked = torch.zeros(2, 3, 150)
        plain[:, 3], masked[:, 3] = far * 2, -INF
        plain[1, :140] -= 300  # what is seen first is far below what comes
        case = Case(plain, masked, None, 2.0, 0.0, divergence, teacher_grad=True)
        case = each_token(case if divergence == "reverse_kl" else case.but(student=masked, teacher=plain))
        result = run(tiled, case)
        check(case, result)
        assert (result.loss[::2] == INF).all() == (infinite and divergence != "jsd")


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_bad_row_gives_nan_there_only(tiled: Gpu, where: str, bad: str) -> None:
    first = list(BAD_ROWS).index(bad)
    for divergence, alpha in ((DIVERGENCES[first % 3], 0.5), (DIVERGENCES[(first + 1) % 3], 0.0)):
        case = make(3, 140, divergence=divergence, alpha=alpha, labels=torch.zeros(3).long())
        case = each_token(case)
        clean = run(tiled, case)
        dirty = case.but(**{where: spoil(getattr(case, where), 1, bad)})
        result = run(tiled, dirty)
        check(dirty, result)
        assert result.loss[1].isnan()
        assert result.grad[1].isnan().all()
        for got, want in ((result.loss, clean.loss), (result.grad, clean.grad)):
            assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("how", ["label", "weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_values_in_an_ignored_row(tiled: Gpu, reduction: str, how: str) -> None:
    """An ignored token, and one with weight 0, gives 0 whatever its logits hold; the others never see it."""
    case = make(5, 140, reduction=reduction, labels=torch.arange(5))
    assert case.labels is not None
    if how == "label":
        case.labels[1] = case.labels[3] = -100
    else:
        weight = torch.rand(5) + 0.5
        weight[1] = weight[3] = 0
        case = case.but(token_weight=weight)
    case = each_token(case) if reduction == "none" else case
    clean = run(tiled, case)
    spoiled = {"student": spoil(case.student, 1, "nan"), "teacher": spoil(case.teacher, 3, "masked throughout")}
    result = run(tiled, case.but(**spoiled))
    assert (result.grad[1::2] == 0).all()
    assert torch.equal(result.grad, clean.grad)
    assert torch.equal(result.loss, clean.loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ignored(tiled: Gpu, dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        student = torch.full((3, 140), torch.nan, dtype=dtype)
        case = Case(student, student, torch.full((3,), -100), reduction=reduction, teacher_grad=True)
        case = case.but(upstream=torch.ones(3) if reduction == "none" else None)
        for each in (case, case.but(num_items=0), case.but(num_items=5)) if reduction == "mean" else (case,):
            result = run(tiled, each)
            assert result.teacher_grad is not None
            for value in (result.loss, result.hard, result.soft, result.grad, result.teacher_grad):
                assert (value == 0).all()


@pytest.mark.parametrize(("label", "weight", "alpha"), [
    (140, 1.0, 0.5), (-1, 1.0, 0.0), (0, -1.0, 0.5), (0, torch.nan, 0.0), (0, INF, 1.0),
])  # fmt: skip
def test_values_out_of_range_are_nan(tiled: Gpu, label: int, weight: float, alpha: float) -> None:
    """Where the CPU raises: in that token's values and gradient, and the other gradients are as without it."""
    case = each_token(make(3, 140, DTYPES[int(2 * alpha)], alpha=alpha, labels=torch.arange(3)))
    bad = case.but(labels=torch.tensor([0, 1, label]), token_weight=torch.tensor([1.0, 1.0, weight]))
    clean, result = run(tiled, case), run(tiled, bad)
    assert result.loss[2].isnan()
    assert result.grad[2].isnan().all()
    assert torch.equal(result.loss[:2], clean.loss[:2])
    assert torch.equal(result.grad[:2], clean.grad[:2])
    result = run(tiled, bad.but(reduction="mean", upstream=None, teacher_grad=True))
    assert result.teacher_grad is not None
    assert result.loss.isnan()
    for grad in (result.grad, result.teacher_grad):
        assert grad[:2].isfinite().all()
    assert result.grad[2].isnan().all()
    assert alpha == 1 or result.teacher_grad[2].isnan().all()


@pytest.mark.parametrize("items", [0.0, -1.0, INF, torch.nan, 7.0])
def test_number_of_items_on_the_device(gpu: Gpu, items: float) -> None:
    """It is read there, and makes NaN of the tokens that take part where it is no positive number."""
    if gpu.device == "cpu":
        pytest.skip("without a GPU a number is always on the CPU")
    for dtype in (torch.float32, torch.float16):
        case = make(4, 30, dtype, labels=torch.tensor([1, -100, 2, 3]), num_items=torch.tensor(items))
        result = run(gpu, case)
        assert (result.grad[1] == 0).all()
        if items == 7:
            check(case, result)
        else:
            assert result.loss.isnan()
            assert result.grad[[0, 2, 3]].isnan().all()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits(tiled: Gpu, divergence: str, temperature: float) -> None:
    for dtype, v in zip(DTYPES, (1, 65, 140), strict=True):
        two = 2e4 * torch.randint(0, 2, (2, 1, v)) - 1e4
        student, teacher = torch.cat([2e4 * torch.rand(2, 1, v) - 1e4, two], 1).to(dtype)
        case = Case(student, teacher, torch.randint(v, (2,)), temperature, 0.5, divergence, label_smoothing=0.1)
        result = run(tiled, case := each_token(case.but(teacher_grad=v == 65)))
        assert result.loss.isfinite().all()
        check(case, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits(tiled: Gpu, dtype: torch.dtype) -> None:
    """The divergence of equal distributions is exactly 0, and so is its gradient."""
    for divergence in DIVERGENCES:
        for v, temperature in ((2, 0.05), (64, 1.0), (200, 20.0)):
            logits = (5 * torch.randn(2, v)).to(dtype)
            logits[1, ::2] = -INF
            result = run(tiled, each_token(Case(logits, logits.clone(), None, temperature, 0.0, divergence)))
            if divergence != "jsd":  # its mixture is rounded
                assert (result.loss == 0).all()
                assert (result.grad == 0).all()
            assert (result.loss.abs() < 1e-5 * temperature**2).all()


def test_ends_of_the_options(gpu: Gpu) -> None:
    for v in (10, 140):
        for beta in (0.0, 1.0, 1e-30, 1e-3, 1 - 2.0**-40):
            case = make(5, v, divergence="jsd", beta=beta, alpha=0.0, teacher_grad=True)
            result = run(gpu, case)
            check(case, result)
            assert beta not in (0, 1) or (result.loss == 0 and (result.grad == 0).all())
        for smoothing in (1e-7, 1.0):
            check(case := make(5, v, alpha=1.0, label_smoothing=smoothing), run(gpu, case))
        for temperature in (1e-3, 100.0):
            check(case := each_token(make(5, v, alpha=0.0, temperature=temperature)), run(gpu, case))


# ---- drawn problems -------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.integers(0, 9), v=st.integers(1, 90), **DRAWN)
def test_drawn(tiled: Gpu, **problem: Any) -> None:
    case = drawn_case(**problem)
    check(truth(case), run(tiled, case))
