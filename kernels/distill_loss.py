"""Distillation loss in Triton: launcher, tuning, and the small kernels around the two that read the logits.

Formulas and edge cases: csrc/distill_loss/distill_loss.h; in short, for a token with weight w::

    loss = w / items * (alpha * cross_entropy + (1 - alpha) * tau^2 * D(p, q))

Bytes of memory that a call asks for, an element of 16-bit logits, with the gradient:

===============  =========================  ======================================================================
kernel           a row is                   bytes
===============  =========================  ======================================================================
rows_in_tile     one tile, in registers     2 + 2 read, 2 written: 6, the floor
rows_in_sweeps   any number of tiles        4 read for the sums, 4 more (jsd: 8) read and 2 written for the
                                            gradient: 10 (14); what L2 still holds of the row does not reach memory
===============  =========================  ======================================================================

A token that takes no part is written and not read. All else is small: labels and weights (8 + 4 bytes a token, twice
where items are counted), the values (12 bytes a program, read once more). A call is one launch, and two more where
items are counted and where values are summed; nothing waits for the device, and nothing is allocated in a kernel.
One program makes a row, or several short ones: a batch of fewer rows than the GPU has processors leaves some idle.

Different from the CPU: nothing is checked that would need a synchronisation. A label out of its range (other than
``ignore_index``), or a weight that is negative or not finite, makes that token NaN in loss and gradient; ``num_items``
that is not finite and positive makes all tokens NaN that take part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycompress.gpu import capability
from pycompress.ops.distill_loss_call import MIRRORED, Call, Outputs, divides_later, num_items_of
from pycompress.ops.rows import row_layout

from .common import OPTIONS, TYPE_NAMES, Shipped, on_device_of
from .common import shipped as configuration
from .distill_loss_rows import INF, narrowed
from .distill_loss_sweeps import rows_in_sweeps
from .distill_loss_tile import rows_in_tile
from .distill_loss_tuning import LARGEST_FORWARD_TILE, LARGEST_TILE, Sweeps, Tile, pick

# ---- small kernels --------------------------------------------------------------------------------------------

_PARTS = 128  # programs that count the items of many tokens; each row's program adds up what they found
_COUNT_BLOCK = 1024
_ONE_COUNTS = 8 * _COUNT_BLOCK  # up to so many tokens one program counts
_SUM_BLOCK = 2048
_SCALE_BLOCK = 4096


@triton.jit
def count_items(
    labels, weights, parts, tokens, each, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[i]: sum of the weights of the tokens that take part among the i-th ``each`` tokens."""
    begin = tl.program_id(0).to(tl.int64) * each
    end = tl.minimum(begin + each, tokens)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, each, BLOCK):
        token = begin + start + tl.arange(0, BLOCK)
        counts = token < end
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights + token, mask=counts, other=0).to(tl.float32)
            counts = counts & (weight > 0) & (weight < INF)
        if HAS_LABELS:
            counts = counts & (tl.load(labels + token, mask=counts, other=0).to(tl.int64) != ignore_index)
        total += tl.where(counts, weight, 0.0)
    tl.store(parts + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def sum_values(values, loss, hard, soft, count, BLOCK: tl.constexpr):
    """The three rows of values (3, count), each by a program of its own and in one order: the same in every run."""
    which = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + which.to(tl.int64) * count + at, mask=at < count, other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(loss, result)
    elif which == 1:
        tl.store(hard, result)
    else:
        tl.store(soft, result)


@triton.jit
def scale_rows(grad, factor, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """grad (rows, width) times factor (rows,), in place; rows whose factor is 1 are not moved."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    by = tl.load(factor + row, mask=row < rows, other=1.0).to(tl.float32)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    changes = (by != 1)[:, None] & (cols < width)
    at = grad + row[:, None] * width + cols
    scaled = tl.load(at, mask=changes, other=0).to(tl.float32) * by[:, None]
    tl.store(at, narrowed(scaled, grad.dtype.element_ty), mask=changes)


# ---- launches -------------------------------------------------------------------------------------------------


class _Items(NamedTuple):
    """What the mean divides by; see ``inverse_items``."""

    how: str | int
    memory: Tensor | None
    inverse: float


class _Tokens(NamedTuple):
    """Labels and weights as kernels take them."""

    labels: Tensor | None
    weights: Tensor | None


class _Run(NamedTuple):
    """One launch of the large kernels."""

    student: Tensor
    teacher: Tensor
    grad: Tensor | None
    grad_scale: Tensor | None  # where 1 / items goes, which is then left out of the gradient
    divergence: str
    beta: float
    hard: bool


def distill_loss(call: Call) -> Outputs:
    """Loss and gradients of a checked call that ``missing`` has no objection to."""
    per_token = call.reduction == "none"
    shape = call.student.shape[:-1] if per_token else ()
    device = call.student.device
    outs = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3)]
    grad_student = (
        torch.empty(call.student.shape, dtype=call.student.dtype, device=device) if call.student_grad else None
    )
    grad_teacher = (
        torch.empty(call.teacher.shape, dtype=call.teacher.dtype, device=device) if call.teacher_grad else None
    )
    scale = torch.empty((), dtype=torch.float32, device=device) if divides_later(call) else None
    if call.student.shape[:-1].numel() == 0:
        for tensor in (*outs, *(() if scale is None else (scale,))):
            tensor.zero_()
        return Outputs(outs[0], outs[1], outs[2], grad_student, grad_teacher, scale)
    with on_device_of(call.student):
        tokens = _tokens(call)
        items = _items(call, tokens)
        run = _Run(call.student, call.teacher, grad_student, scale, _divergence(call), call.beta, call.alpha > 0)
        if per_token:
            _launch(call, run, tokens, items, outs, per_token=True)
        else:
            _launch_summed(call, run, tokens, items, outs)
        if grad_teacher is not None and run.divergence == "none":
            grad_teacher.zero_()
        elif grad_teacher is not None:
            mirrored = MIRRORED[run.divergence]
            back = _Run(call.teacher, call.student, grad_teacher, scale, mirrored, 1 - call.beta, False)
            unused = torch.empty(3, call.student.shape[:-1].numel(), dtype=torch.float32, device=device)
            _launch(call, back, tokens, items, unused.unbind(), per_token=True)
    return Outputs(outs[0], outs[1], outs[2], grad_student, grad_teacher, scale)


def row_loss(call: Call, values: Tensor, grad: Tensor | None) -> None:
    """Of a checked call with reduction "none": loss, hard and soft into values (3, n), the gradient into grad, which
    may be the student's own memory."""
    if not call.student.shape[0]:
        return
    with on_device_of(call.student):
        run = _Run(call.student, call.teacher, grad, None, _divergence(call), call.beta, call.alpha > 0)
        _launch(call, run, _tokens(call), _Items("given", None, 1.0), values.unbind(), per_token=True)


def scale_in_place(grad: Tensor, factor: Tensor) -> Tensor:
    """grad (..., V), contiguous, times factor: 0-dim, or one a token. Where it is 1 nothing is moved."""
    if grad.numel() == 0:
        return grad
    each = factor.reshape(-1).contiguous()
    rows = each.numel()
    width = grad.numel() // rows
    block = min(_SCALE_BLOCK, max(16, triton.next_power_of_2(width)))
    together = min(_SCALE_BLOCK // block, triton.next_power_of_2(rows))
    with on_device_of(grad):
        grid = (triton.cdiv(rows, together) * triton.cdiv(width, block),)
        scale_rows[grid](grad, each, rows, width, ROWS=together, BLOCK=block, num_warps=8, **OPTIONS)
    return grad


def _divergence(call: Call) -> str:
    """jsd is 0 at both ends of beta."""
    nothing = call.alpha == 1 or (call.divergence == "jsd" and call.beta in (0, 1))
    return "none" if nothing else call.divergence


def _tokens(call: Call) -> _Tokens:
    labels, weights = call.labels, call.token_weight
    if weights is not None and not weights.is_floating_point():
        weights = weights.to(torch.float32)
    return _Tokens(
        None if labels is None else labels.reshape(-1).contiguous(),
        None if weights is None else weights.resolve_neg().reshape(-1).contiguous(),
    )


def _items(call: Call, tokens: _Tokens) -> _Items:
    if call.reduction != "mean":
        return _Items("given", None, 1.0)
    count = call.student.shape[:-1].numel()
    given = call.num_items
    if given is not None and given.device.type == "cpu":
        number = num_items_of(given)
        return _Items("given", None, 1 / number if number > 0 else math.nan)
    if given is not None:
        return _Items("number", given, 0.0)
    if tokens.labels is None and tokens.weights is None:
        return _Items("given", None, 1 / count)
    programs = 1 if count <= _ONE_COUNTS else _PARTS
    parts = torch.empty(programs, dtype=torch.float32, device=call.student.device)
    count_items[(programs,)](
        tokens.labels, tokens.weights, parts, count, triton.cdiv(count, programs), call.ignore_index,
        HAS_LABELS=tokens.labels is not None, HAS_WEIGHTS=tokens.weights is not None, BLOCK=_COUNT_BLOCK, num_warps=4,
        **OPTIONS,
    )  # fmt: skip
    return _Items(programs, parts, 0.0)


def _launch_summed(call: Call, run: _Run, tokens: _Tokens, items: _Items, outs: list[Tensor]) -> None:
    """Values by program first, then their sums."""
    count = call.student.shape[:-1].numel()
    tuning = _tuning(run)
    programs = triton.cdiv(count, tuning.rows) if isinstance(tuning, Tile) else count
    if programs == 1:
        _launch(call, run, tokens, items, outs, per_token=False)
        return
    values = torch.empty(3, programs, dtype=torch.float32, device=call.student.device)
    _launch(call, run, tokens, items, values.unbind(), per_token=False)
    sum_values[(3,)](values, *outs, programs, BLOCK=_SUM_BLOCK, num_warps=8, **OPTIONS)


def _tuning(run: _Run) -> Tile | Sweeps:
    itemsize = max(run.student.element_size(), run.teacher.element_size())
    return pick(run.student.shape[-1], itemsize, capability(run.student), run.divergence)


def _launch(
    call: Call, run: _Run, tokens: _Tokens, items: _Items, values: Sequence[Tensor], *, per_token: bool
) -> None:
    """values: loss, hard, soft, one a token or one a program."""
    student, (count, vocab, *s_strides) = row_layout(run.student.resolve_neg())
    teacher, (_, teacher_vocab, *t_strides) = row_layout(run.teacher.resolve_neg())
    tau, alpha = (
        (float(call.temperature) if run.divergence != "none" else 1.0),
        (float(call.alpha) if run.hard else 0.0),
    )
    common = min(vocab, teacher_vocab) if run.divergence != "none" else vocab
    split, smoothing = common < vocab, call.label_smoothing > 0
    squarings = {1.0: 0, 2.0: 1, 4.0: 2}.get(tau)
    tuning = _tuning(run)
    options: dict[str, Any] = dict(
        DIVERGENCE=run.divergence,
        HARD="none" if not run.hard else "own" if split or squarings is None else "power",
        SQUARINGS=squarings if run.hard and not split and squarings is not None else 0,
        SMOOTHING=run.hard and smoothing,
        HAS_LABELS=tokens.labels is not None,
        HAS_WEIGHTS=tokens.weights is not None,
        ITEMS=items.how,
        LATER=run.grad_scale is not None,
        GRAD=run.grad is not None,
        SPLIT=split,
        num_warps=tuning.num_warps,
        **OPTIONS,
    )
    arguments = (
        student, teacher, run.grad, *values, tokens.labels, tokens.weights, items.memory, run.grad_scale,
        count, vocab, common, call.student.shape[-1], *s_strides, *t_strides,
        math.log2(math.e) / tau, tau, alpha, 1.0 - call.alpha, float(run.beta), 1.0 - run.beta,
        float(call.label_smoothing), 1.0 - call.label_smoothing, items.inverse, call.ignore_index,
    )  # fmt: skip
    if isinstance(tuning, Tile):
        grid = (triton.cdiv(count, tuning.rows),)
        rows_in_tile[grid](*arguments, **options, PER_TOKEN=per_token, ROWS=tuning.rows, BLOCK=tuning.block)
    else:
        rows_in_sweeps[(count,)](
            *arguments, **options, K=tuning.stripes, N=tuning.threads, E=tuning.neighbours
        )  # fmt: skip


# ---- for ahead-of-time compilation --------------------------------------------------------------------------------

_SCALARS = ("scale", "tau", "alpha", "not_alpha", "beta", "not_beta", "smoothing", "not_smoothing", "inverse")
_OF_16 = ("vocab", "common", "s_row", "t_row", "s_outer", "t_outer")  # as they mostly are, 16-byte loads need it


def _types(student: str, teacher: str) -> dict[str, str]:
    integers = ("tokens", "classes", "s_inner", "t_inner", "ignore_index")
    types = dict.fromkeys(integers, "i32") | dict.fromkeys(_SCALARS, "fp32") | dict.fromkeys(_OF_16, "i32:16")
    types |= dict.fromkeys(("loss", "hard", "soft", "weights", "items", "grad_scale"), "*fp32:16")
    return types | {
        "student": f"*{student}:16",
        "teacher": f"*{teacher}:16",
        "grad": f"*{student}:16",
        "labels": "*i64:16",
    }


_HEAVIEST: dict[str, Any] = {
    "HARD": "own", "SQUARINGS": 0, "SMOOTHING": True, "HAS_LABELS": True, "HAS_WEIGHTS": True, "ITEMS": _PARTS,
    "LATER": False, "GRAD": True, "SPLIT": False,
}  # fmt: skip
_LIGHTEST = _HEAVIEST | {
    "HARD": "none", "SMOOTHING": False, "HAS_LABELS": False, "HAS_WEIGHTS": False, "ITEMS": "given", "GRAD": False,
}  # fmt: skip
_ABSENT = dict.fromkeys(("labels", "weights", "items", "grad", "grad_scale"))
# What takes other branches than the heaviest: without the hard term, without the soft one, vocabularies of two sizes.
_OTHER_BRANCHES = (
    ("light", _LIGHTEST | {"DIVERGENCE": "forward_kl", **_ABSENT}),
    ("hard", _HEAVIEST | {"HARD": "power", "SQUARINGS": 2, "ITEMS": "number", "LATER": True, "DIVERGENCE": "none"}),
    ("split", _HEAVIEST | {"DIVERGENCE": "forward_kl", "SPLIT": True}),
)


def _shipped_rows(
    student: torch.dtype, teacher: torch.dtype, vocab: int, what: str, options: dict[str, Any]
) -> Shipped:
    names = TYPE_NAMES[student], TYPE_NAMES[teacher]
    tuning = pick(vocab, max(student.itemsize, teacher.itemsize), 80, options["DIVERGENCE"])
    kind: dict[str, Any]
    if isinstance(tuning, Tile):
        kernel, size = rows_in_tile, f"{tuning.rows}x{tuning.block}"
        kind = {"ROWS": tuning.rows, "BLOCK": tuning.block, "PER_TOKEN": what == "light"}
    else:
        kernel, size = rows_in_sweeps, "sweeps"
        kind = {"K": tuning.stripes, "N": tuning.threads, "E": tuning.neighbours}
    constants = options | kind | {"s_col": 1, "t_col": 1}
    types = {name: type_ for name, type_ in _types(*names).items() if name not in constants}
    name = f"{kernel.fn.__name__}_{size}_{what}_{names[0]}_{names[1]}"
    return configuration(name, kernel, types, constants, num_warps=tuning.num_warps)


def shipped() -> Iterator[Shipped]:
    """Tiles of each size and the sweeps, with the options that take most registers, for each divergence and each width
    of logits, two widths in the largest; every branch of both; and the small kernels."""
    half, wide = torch.bfloat16, torch.float32
    sweeps = 10 * LARGEST_FORWARD_TILE
    for student, teacher in ((half, half), (wide, wide), (torch.float16, wide)):
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            largest = LARGEST_FORWARD_TILE if divergence == "forward_kl" else LARGEST_TILE
            small = (10, 1000, LARGEST_TILE) if student == teacher else ()
            for vocab in (*dict.fromkeys((*small, largest)), sweeps):
                options = _HEAVIEST | {"DIVERGENCE": divergence, "SPLIT": vocab < 1000}
                yield _shipped_rows(student, teacher, vocab, divergence, options)
    for vocab in (1000, sweeps):
        for what, options in _OTHER_BRANCHES:
            yield _shipped_rows(half, half, vocab, what, options)
    yield configuration(
        "count_items", count_items,
        dict.fromkeys(("weights", "parts"), "*fp32:16") | {"labels": "*i64:16"}
        | dict.fromkeys(("tokens", "each", "ignore_index"), "i32"),
        {"HAS_LABELS": True, "HAS_WEIGHTS": True, "BLOCK": _COUNT_BLOCK},
    )  # fmt: skip
    yield configuration(
        "sum_values", sum_values, dict.fromkeys(("values", "loss", "hard", "soft"), "*fp32:16") | {"count": "i32"},
        {"BLOCK": _SUM_BLOCK}, num_warps=8,
    )  # fmt: skip
    for grad in ("bf16", "fp32"):
        types = {"grad": f"*{grad}:16", "factor": "*fp32:16", "rows": "i32", "width": "i32:16"}
        yield configuration(f"scale_rows_{grad}", scale_rows, types, {"ROWS": 1, "BLOCK": _SCALE_BLOCK}, num_warps=8)
