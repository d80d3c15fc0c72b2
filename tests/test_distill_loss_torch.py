"""The operator inside torch: the gradient's way back, opcheck, compile, autocast, checkpointing, threads."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pycompress import _C, _native, ops
from pycompress.nn import DistillationLoss
from tests.distill_check import ROUNDOFF, SMALLEST, Result, check, check_grad, every_engine, forced, run, truth
from tests.distill_oracle import DIVERGENCES, DTYPES, Case

OP = torch.ops.pycompress.distill_loss.default
BACKENDS = ("native", "reference")


def draw(t: int = 6, v: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(t, v).to(dtype).requires_grad_(), torch.randn(t, v).to(dtype), torch.randint(v, (t,))


def grad_of(loss: Tensor, x: Tensor, upstream: Tensor | None = None, **kwargs: Any) -> Tensor:
    return torch.autograd.grad(loss, x, upstream, **kwargs)[0]


# ---- the gradient's way back ----------------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_scales_the_gradient(engine: str, dtype: torch.dtype, reduction: str) -> None:
    for v in (10, 700):
        student, teacher, labels = draw(6, v, dtype)
        for factor in (1.0, 0.25, -3.0, 0.0, 300.0):
            case = Case(student.detach(), teacher, labels, 2.0, reduction=reduction, teacher_grad=True)
            upstream = torch.full((6,) if reduction == "none" else (), factor)
            result, known = run(engine, case.but(upstream=upstream)), truth(case.but(upstream=None))
            allowed = known.grad + 2.0**-20 * known.solution.grad_slack + SMALLEST[dtype]  # as it is stored
            check_grad("grad", result.grad, factor * known.solution.grad, abs(factor) * allowed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_does_not_underflow(backend: str) -> None:
    """A mean over many tokens, scaled as a GradScaler does: the division is undone before the rounding to float16."""
    t, v = 40_000, 3
    student, teacher, labels = draw(t, v, torch.float16)
    got = grad_of(
        ops.distill_loss(student, teacher, labels, backend=backend), student, torch.tensor(65536.0)
    ).double()  # fmt: skip
    exact = student.detach().double().requires_grad_()
    want = grad_of(ops.distill_loss(exact, teacher, labels, backend="reference"), exact, torch.tensor(65536.0).double())
    assert (got - want).abs().max() <= 2.0**-10 * want.abs().max()
    assert ((got == 0) == (want.abs() < 2.0**-25)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retained_graph_gives_the_gradient_again(backend: str, dtype: torch.dtype, reduction: str) -> None:
    """Whatever became of the first one: kept, added to, cleared in place."""
    student, teacher, labels = draw(5, 70, dtype)
    ones = torch.ones(5) if reduction == "none" else torch.tensor(1.0)
    loss = ops.distill_loss(student, teacher, labels, reduction=reduction, backend=backend)
    first = grad_of(loss, student, ones, retain_graph=True)
    expected = first.clone()
    half = grad_of(loss, student, ones * 0.5, retain_graph=True)
    torch.testing.assert_close(half, expected * 0.5, rtol=2 * ROUNDOFF[dtype], atol=2 * SMALLEST[dtype])
    first.zero_()
    loss.backward(ones, retain_graph=True)
    assert student.grad is not None
    assert torch.equal(student.grad, expected)
    loss.backward(ones, retain_graph=True)
    assert torch.equal(student.grad, (expected.double() * 2).to(dtype))
    student.grad.zero_()
    loss.backward(ones)
    assert torch.equal(student.grad, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_left_alone(backend: str) -> None:
    """Bit for bit, after any number of backward passes."""
    student, teacher, labels = draw()
    before = student.detach().clone(), teacher.clone(), labels.clone()
    versions = student._version, teacher._version, labels._version
    loss = ops.distill_loss(student, teacher.requires_grad_(), labels, teacher_grad=True, backend=backend)
    for _ in range(3):
        loss.backward(torch.tensor(2.5), retain_graph=True)
    for now, then in zip((student, teacher, labels), before, strict=True):
        assert torch.equal(now, then)
    assert (student._version, teacher._version, labels._version) == versions


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_a_layer_upstream(backend: str) -> None:
    head, x = nn.Linear(20, 30), torch.randn(3, 4, 20)
    teacher, labels = torch.randn(3, 4, 30), torch.randint(30, (3, 4))
    loss = ops.distill_loss(head(x), teacher, labels, temperature=2.0, backend=backend)
    ours = torch.autograd.grad(loss, (head.weight, head.bias))
    exact = nn.Linear(20, 30).double()
    exact.load_state_dict(head.state_dict())
    logits, target = exact(x.double()).flatten(0, 1), teacher.double().flatten(0, 1)
    hard = F.cross_entropy(logits, labels.flatten())
    soft = 4 * F.kl_div((logits / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="batchmean")
    want = torch.autograd.grad(0.5 * hard + 0.5 * soft, (exact.weight, exact.bias))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_only_where_wanted(backend: str) -> None:
    student, teacher, labels = draw()
    teacher.requires_grad_()
    loss = ops.distill_loss(student, teacher, labels, backend=backend)
    loss.backward()
    assert teacher.grad is None
    with torch.no_grad():
        assert not ops.distill_loss(student, teacher, labels, teacher_grad=True, backend=backend).requires_grad
    assert not ops.distill_loss(student.detach(), teacher, labels, backend=backend).requires_grad
    only_teacher = ops.distill_loss(student.detach(), teacher, labels, teacher_grad=True, backend=backend)
    only_teacher.backward()
    assert teacher.grad is not None
    parts = ops.distill_loss(student, teacher, labels, return_parts=True, backend=backend)
    assert (parts.loss.requires_grad, parts.hard.requires_grad, parts.soft.requires_grad) == (True, False, False)
    with torch.inference_mode():
        torch.testing.assert_close(ops.distill_loss(student, teacher, labels, backend=backend), loss.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_is_refused(backend: str) -> None:
    student, teacher, labels = draw()
    loss = ops.distill_loss(student, teacher, labels, backend=backend)
    with pytest.raises(RuntimeError, match="distill_loss: second-order gradients are not supported"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str) -> None:
    """Finite differences of the reference in float64."""
    student, teacher = torch.randn(2, 4, 7, dtype=torch.float64).unbind()
    labels, weight = torch.tensor([1, -100, 6, 0]), torch.rand(4, dtype=torch.float64)

    def loss(s: Tensor, t: Tensor) -> Any:
        return ops.distill_loss(
            s, t, labels, temperature=1.5, alpha=0.3, divergence=divergence, beta=0.2, label_smoothing=0.1,
            token_weight=weight, teacher_grad=True, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student.clone().requires_grad_(), teacher.clone().requires_grad_()))


# ---- operator, compile, autocast ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "reduction", "student_grad", "teacher_grad", "top_k"), [
    (torch.float32, "mean", True, False, False), (torch.bfloat16, "none", True, True, False),
    (torch.float16, "mean", True, False, True), (torch.float32, "sum", False, False, False),
])  # fmt: skip
def test_opcheck(
    dtype: torch.dtype, reduction: str, student_grad: bool, teacher_grad: bool, top_k: bool, backend: str
) -> None:
    student, teacher, labels = draw(6, 50, dtype)
    indices = logsumexp = weight = items = None
    if top_k:
        teacher, indices, logsumexp = ops.TopKLogits.from_logits(teacher, 5, 2.0)
        weight, items = torch.rand(6), torch.tensor(4.0, dtype=torch.float64)
    torch.library.opcheck(OP, (
        student.detach().requires_grad_(student_grad), teacher.requires_grad_(teacher_grad), labels, weight, items,
        indices, logsumexp, 2.0, 0.5, "forward_kl", 0.5, -100, 0.0, reduction, student_grad, teacher_grad, backend,
    ))  # fmt: skip


@pytest.mark.parametrize(("divergence", "reduction", "dtype"), [
    ("forward_kl", "mean", torch.float32), ("reverse_kl", "none", torch.bfloat16), ("jsd", "mean", torch.float16),
])  # fmt: skip
def test_compile(divergence: str, reduction: str, dtype: torch.dtype) -> None:
    """One graph without a break, with gradients, for changing shapes."""
    torch._dynamo.reset()
    module = DistillationLoss(2.0, divergence=divergence, reduction=reduction, teacher_grad=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for t in (5, 17, 33):
        student, teacher, labels = draw(t, 50, dtype)
        teacher.requires_grad_()
        results = []
        for call in (compiled, module):
            parts = call(student, teacher, labels, token_weight=torch.ones(t), return_parts=True)
            loss = (parts.loss * torch.linspace(0.5, 2, t)).sum() if reduction == "none" else 3 * parts.loss
            results.append([*parts, *torch.autograd.grad(loss, (student, teacher))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_compile_with_inductor() -> None:
    """A training step: a head, the loss, the gradients of the head."""
    torch._dynamo.reset()
    head, module = nn.Linear(20, 70), DistillationLoss(2.0)
    x, (_, teacher, labels) = torch.randn(5, 20), draw(5, 70)

    def step(num_items: int) -> Tensor:
        return module(head(x), teacher, labels, num_items=num_items)

    compiled = torch.compile(step, fullgraph=True)
    for items in (4, 5):
        got, want = compiled(items), step(items)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(y, head.parameters()) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_compile_top_k() -> None:
    torch._dynamo.reset()
    student, teacher, labels = draw()
    top = ops.TopKLogits.from_logits(teacher, 7)
    module = DistillationLoss(alpha=0.3)
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(student, top, labels)
    want = module(student, top, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad_of(got, student), grad_of(want, student))


def test_autocast() -> None:
    """The logits are taken as they come, and the loss is float32: nothing of it is done in half precision."""
    head, x = nn.Linear(20, 50), torch.randn(6, 20)
    student, teacher, labels = draw()
    plain = ops.distill_loss(student, teacher, labels)
    expected = grad_of(plain, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.distill_loss(student, teacher, labels)
        assert torch.equal(inside, plain)
        assert torch.equal(grad_of(inside, student), expected)
        logits = head(x)
        assert logits.dtype == torch.bfloat16
        loss = DistillationLoss(2.0)(logits, teacher, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    case = Case(logits.detach(), teacher, labels, 2.0)
    result = run("reference", case)
    torch.testing.assert_close(loss, result.loss)
    torch.testing.assert_close(head.bias.grad, result.grad.float().sum(0), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    student, teacher, labels = draw()
    expected = grad_of(ops.distill_loss(student, teacher, labels), student)

    def loss(logits: Tensor) -> Any:
        return ops.distill_loss(logits * 1, teacher, labels)

    checkpoint(loss, student, use_reentrant=reentrant).backward()
    assert torch.equal(student.grad, expected)


def test_saved_tensor_hooks() -> None:
    """What is kept for the backward may be moved away and back."""
    student, teacher, labels = draw()
    expected = grad_of(ops.distill_loss(student, teacher, labels), student)
    with torch.autograd.graph.save_on_cpu():
        loss = ops.distill_loss(student, teacher, labels)
    assert torch.equal(grad_of(loss, student), expected)


class Watching(TorchDispatchMode):
    """Sees every operator, and so keeps the call from taking the short way past torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_short_way_is_the_same(dtype: torch.dtype) -> None:
    student, teacher, labels = draw(6, 50, dtype)
    results = []
    for mode in (contextlib.nullcontext(), watching := Watching(), torch.profiler.profile()):
        with mode:
            parts = ops.distill_loss(student, teacher, labels, token_weight=torch.ones(6), return_parts=True)
            results.append([*parts, grad_of(parts.loss, student, torch.tensor(3.0))])
    assert OP in watching.seen
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# ---- threads, memory ------------------------------------------------------------------------------------------------


def test_python_threads() -> None:
    """Callers at once, each with a team of two."""
    problems = [Case(torch.randn(t, v), torch.randn(t, v), torch.randint(v, (t,))) for t, v in
                ((1, 40_000), (33, 10), (7, 1000), (200, 64))]  # fmt: skip
    known, wrong = [truth(case) for case in problems], []

    def call(i: int) -> None:
        torch.set_num_threads(2)
        for _ in range(15):
            try:
                student = problems[i].student.detach().requires_grad_()
                parts = ops.distill_loss(student, problems[i].teacher, problems[i].labels, return_parts=True)
                parts.loss.backward()
                check(known[i], Result(*parts, student.grad, None))
            except AssertionError as error:
                wrong.append(error)

    before = torch.get_num_threads()
    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(problems))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(before)
    assert wrong == []


def test_freed_gradient_is_used_again() -> None:
    """Memory for a large gradient is kept for the next one, once nobody holds it, and two blocks at most."""
    rows = _C.POOL_SMALLEST // (4 * 1000) + 1
    held = [_native.empty((rows, 1000), torch.float32) for _ in range(4)]
    assert len({x.data_ptr() for x in held}) == 4
    view, address = held[0][5:7], held[0].data_ptr()
    held[0].fill_(7.0)
    del held[0]
    assert _native.empty((rows, 1000), torch.float32).data_ptr() != address
    assert (view == 7).all()
    block = rows * 4000
    held.clear()
    assert 2 * block <= _C.pool_kept_bytes() < 3 * block
    del view
    addresses = set()
    for _ in range(4):
        student, teacher, labels = draw(rows, 1000)
        with forced(_native.available_isas()[0]) as backend:
            grad = grad_of(ops.distill_loss(student, teacher, labels, backend=backend), student)
        addresses.add(grad.data_ptr())
        del grad
    assert len(addresses) <= 2


def test_batched_gradients() -> None:
    """A batch of gradients at once, as ``torch.autograd.functional.jacobian(vectorize=True)`` asks for it."""
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    losses = ops.distill_loss(student, teacher, torch.arange(4), reduction="none")
    assert isinstance(losses, torch.Tensor)
    (batch,) = torch.autograd.grad(losses, student, torch.eye(4), is_grads_batched=True, retain_graph=True)
    (together,) = torch.autograd.grad(losses.sum(), student)
    torch.testing.assert_close(batch.sum(0), together)
    assert not batch[0, 1:].any()


@pytest.mark.parametrize("weight", [1e-7, 1.0, 1e5])
def test_float16_gradient_does_not_depend_on_the_size_of_weights(weight: float) -> None:
    student, teacher = torch.randn(4, 100).half().requires_grad_(), torch.randn(4, 100)
    labels = torch.arange(4)
    expected = ops.distill_loss(student, teacher, labels)
    loss = ops.distill_loss(student, teacher, labels, token_weight=torch.full((4,), weight))
    assert isinstance(loss, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0)
