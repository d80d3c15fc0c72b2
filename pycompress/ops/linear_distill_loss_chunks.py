"""The loop over chunks of tokens: logits into a buffer that is used again, loss, gradient, and on to the next chunk.

What is allocated besides the gradients is the logits of one chunk, the student's and the teacher's. The gradient by the
student's logits takes their place; from there it goes at once to the hidden states, the weight and the bias. Tokens
that do not count (ignored, or of weight 0) are left out before the first product: they cost nothing, and what they
hold is never seen.

On a GPU nothing waits for the device, which leaving tokens out would: there the tokens that do not count are computed
with the others, with a weight of 0 and hidden states of 0 in what is summed over tokens. Labels, weights and num_items
are not checked there but make NaN of tokens, as in ``pycompress/kernels/distill_loss.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pycompress import _native
from pycompress.ops import distill_loss_call, distill_loss_values
from pycompress.ops.linear_distill_loss_call import Call, Head, Options, Outputs, gradient_dtype, logits_call

# A chunk has so many bytes of logits, student's and teacher's together, but not fewer tokens than the second number.
# Two cores of a Zen 5 server, MKL, float32, H = 384, V = 30522: the four products of 1024 tokens take 738, 654, 637,
# 617 and 622 ms in chunks of 64, 96, 128, 192 and 1024. A chunk of 96 is 23.4 MB, half of the weight's gradient.
_CHUNK_BYTES = 24 * 10**6
_CHUNK_TOKENS = 96
# The same on a GPU, not measured: 1024 rows of logits fill each of its products and its processors several times.
_GPU_CHUNK_BYTES = 256 * 10**6
_GPU_CHUNK_TOKENS = 1024
# Weights that are multiplied at a time, in bytes of float32. They stay in the cache between packing and product: a
# step of 1024 tokens takes 625 ms with blocks of 4096 classes, 661 without blocks. 1024 classes are as fast (632), but
# are 4 times as many parallel regions, whose threads wait for each other where other processes want the same cores.
_BLOCK_BYTES = 4 * 384 * 4096


class Chunk(NamedTuple):
    """What a backend turns into losses. student: (n, V); teacher: (n, min(V, the teacher's)), or the student's own
    logits for alpha = 1, where nothing reads them; labels: (n,), or None for alpha = 0.

    values: (3, n), where loss, hard and soft go. grad: where the gradient of each loss by the student's logits goes,
    perhaps the student's own memory; or None.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    values: Tensor
    grad: Tensor | None


def _block_length(head: Head, dtype: torch.dtype) -> int:
    """Classes in a block. Half where blocks are converted on the way: the copies are memory besides."""
    converted = head.weight.dtype != dtype or dtype.itemsize < 4
    return max(256, _BLOCK_BYTES // (4 * max(head.weight.shape[1], 1)) // (2 if converted else 1))


RowLoss = Callable[[Options, Chunk], None]


def compute_dtype(head: Head, matmul_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a head's products and logits: the head's, unless this CPU has no fast product of it."""
    dtype = matmul_dtype or head.weight.dtype
    if head.weight.device.type == "cpu":
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.float32
        if dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return torch.float32  # torch's own float16 product takes 100 times as long as converting
    return dtype


def accumulator(call: Call) -> torch.dtype:
    """The dtype of losses and sums: float32, or float64 where a head is."""
    dtypes = {compute_dtype(head, call.matmul_dtype) for head in (call.student, call.teacher)}
    return torch.float64 if torch.float64 in dtypes else torch.float32


class _Classifier:
    """A head whose logits are computed for some rows at a time, into a buffer of its own."""

    def __init__(self, head: Head, classes: int, matmul_dtype: torch.dtype | None) -> None:
        hidden = head.hidden
        self.rows = hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])
        self.head, self.classes, self.dtype = head, classes, compute_dtype(head, matmul_dtype)
        self.block = _block_length(head, self.dtype) if hidden.device.type == "cpu" else classes
        self.buffer = hidden.new_empty(0, dtype=self.dtype)

    def reserve(self, tokens: int) -> None:
        self.buffer = self.buffer.new_empty(tokens, self.classes)

    def blocks(self) -> list[slice]:
        return [slice(v, min(v + self.block, self.classes)) for v in range(0, self.classes, self.block)]

    def weight(self, block: slice) -> Tensor:
        return self.head.weight[block].to(self.dtype)

    def logits(self, rows: Tensor) -> Tensor:
        """(n, classes) of rows (n, H): the first n rows of the buffer."""
        out, rows = self.buffer[: rows.shape[0]], rows.to(self.dtype)
        _, _, bias, scale, cap = self.head
        for block in self.blocks():
            part = out[:, block]
            if bias is None:
                torch.mm(rows, self.weight(block).t(), out=part)
            else:
                torch.addmm(bias[block].to(self.dtype), rows, self.weight(block).t(), out=part)
            if scale != 1:
                part.mul_(scale)
            if cap is not None:
                part.div_(cap).tanh_().mul_(cap)
        return out


class _Gradients:
    """The sums by hidden states, weight and bias, in the accumulator's dtype."""

    def __init__(self, call: Call, dtype: torch.dtype) -> None:
        hidden, weight, bias = call.student.hidden, call.student.weight, call.student.bias
        self.dtype = dtype
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if call.hidden_grad:
            rows = (hidden.shape[:-1].numel(), hidden.shape[-1])
            self.hidden = torch.zeros(rows, dtype=gradient_dtype(hidden.dtype), device=hidden.device)
        if call.weight_grad:
            self.weight = _empty(weight, dtype)
        if call.bias_grad and bias is not None:
            self.bias = _empty(bias, dtype)
        self.fresh = True  # weight and bias hold nothing yet

    def add(self, head: _Classifier, grad: Tensor, rows: Tensor, at: slice | Tensor, factor: Tensor) -> None:
        """grad: (n, V) by head's logits; rows: (n, H), those ``at`` of all; factor: (n,), multiplies grad's rows."""
        beta = 0 if self.fresh else 1  # with 0, what torch.empty left is not read
        self.fresh = False
        if self.hidden is not None:
            self.hidden[at] = (self._by_rows(head, grad) * factor[:, None]).to(self.hidden.dtype)
        if self.weight is None and self.bias is None:
            return
        if _sums_wide(grad, self.dtype):
            self._add_wide(grad, (rows.to(self.dtype) * factor[:, None]).to(grad.dtype), factor.to(grad.dtype), beta)
            return
        rows, factor = rows.to(self.dtype) * factor[:, None], factor.to(self.dtype)
        for block in head.blocks() if grad.dtype != self.dtype else [slice(0, head.classes)]:
            # In the accumulator's dtype before the product: on the CPU torch has no product of bfloat16 that gives
            # float32, and rounding each chunk's product costs 2.5 times the error.
            part = grad[:, block].to(self.dtype).t()
            if self.weight is not None:
                self.weight[block].addmm_(part, rows, beta=beta)
            if self.bias is not None:
                self.bias[block].addmv_(part, factor, beta=beta)

    def _add_wide(self, grad: Tensor, rows: Tensor, factor: Tensor, beta: int) -> None:
        """The same by products of bfloat16 that are summed in float32; rows: multiplied by their factors."""
        for to, by in ((self.weight, rows), (None if self.bias is None else self.bias[:, None], factor[:, None])):
            if to is not None:
                torch.ops.aten.addmm.dtype_out(to, grad.t(), by, self.dtype, beta=beta, out=to)

    def _by_rows(self, head: _Classifier, grad: Tensor) -> Tensor:
        """grad @ weight, (n, H)."""
        weight = head.head.weight
        if weight.dtype == grad.dtype:
            return grad @ weight
        out = torch.zeros(grad.shape[0], weight.shape[1], dtype=self.dtype, device=grad.device)
        for block in head.blocks():
            if grad.dtype == self.dtype:
                out.addmm_(grad[:, block], head.weight(block))
            else:
                out.add_(grad[:, block] @ head.weight(block))
        return out

    def finished(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias, _, _ = call.student
        grads = []
        for grad, of in ((self.hidden, hidden), (self.weight, weight), (self.bias, bias)):
            like = hidden if of is None else of
            dtype = gradient_dtype(like.dtype)
            if grad is None:
                grads.append(torch.empty(0, dtype=dtype, device=like.device))
                continue
            if self.fresh and of is not hidden:
                grad.zero_()
            grads.append(grad.to(dtype).reshape(like.shape))
        return grads[0], grads[1], grads[2]


def _sums_wide(grad: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch multiplies grad by another of its dtype into sums of ``dtype``: bfloat16 on a GPU. Not float16,
    whose range the divided hidden states may leave."""
    return grad.is_cuda and grad.dtype is torch.bfloat16 and dtype is torch.float32 and _HAS_WIDE_PRODUCT


_HAS_WIDE_PRODUCT = hasattr(torch.ops.aten.addmm, "dtype_out")


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.device.type == "cpu" and dtype in _native.DTYPE_CODES:
        return _native.empty(like.shape, dtype)
    return torch.empty(like.shape, dtype=dtype, device=like.device)


class _Tokens(NamedTuple):
    """The tokens that are computed. at: which they are, None for all; weight, labels: theirs; items: the divisor.

    valid: on a GPU, which of them count; None for all. Of the others the weight is 0 and the label ``ignore_index``.
    """

    at: Tensor | None
    weight: Tensor
    labels: Tensor | None
    items: Tensor
    valid: Tensor | None = None


def _tokens(call: Call, dtype: torch.dtype) -> _Tokens:
    like = logits_call(call)
    valid, weight, labels = distill_loss_values.tokens(like)
    items = distill_loss_values.items(like, valid, weight).to(dtype)
    if bool(valid.all()):
        return _Tokens(None, weight.to(dtype), labels, items)
    index = valid.nonzero()[:, 0]
    return _Tokens(index, weight[index].to(dtype), labels[index], items)


def _tokens_on_gpu(call: Call, dtype: torch.dtype) -> _Tokens:
    """All tokens, without waiting for the device. The weights have the mean's division in them: items is 1."""
    hidden, ignored = call.student.hidden, call.options.ignore_index
    count, labels, valid = hidden.shape[:-1].numel(), call.labels, None
    weight = torch.ones(count, dtype=dtype, device=hidden.device)
    if labels is not None:
        labels = labels.reshape(count)
        valid = labels != ignored
    if call.token_weight is not None:
        weight = call.token_weight.reshape(count).to(dtype)
        valid = weight != 0 if valid is None else valid & (weight != 0)
        # Without labels, as a mask: some class that is not ignore_index (of a single class nothing is to be learned).
        some = torch.full_like(weight, min(int(ignored == 0), call.student.weight.shape[0] - 1), dtype=torch.int64)
        labels = torch.where(valid, some if labels is None else labels.to(torch.int64), ignored)
    good = (weight > 0) & (weight < math.inf)
    inverse = _inverse_items(call, weight if valid is None else weight.where(valid & good, 0.0))
    weight = weight.where(good, math.nan) * inverse
    if valid is not None:
        weight = weight.where(valid, 0.0)
    return _Tokens(None, weight, labels, weight.new_ones(()), valid)


def _inverse_items(call: Call, counted: Tensor) -> float | Tensor:
    """1 / what the mean divides by, NaN where that is not finite and positive. counted: weights of the tokens that do
    count, 0 for the others."""
    if call.options.reduction != "mean":
        return 1.0
    if call.num_items is not None and call.num_items.device.type == "cpu":
        number = distill_loss_call.num_items_of(call.num_items)
        return 1 / number if number > 0 else math.nan
    items = counted.sum() if call.num_items is None else call.num_items.reshape(()).to(counted.dtype)
    return torch.where((items > 0) & (items < math.inf), 1 / items, math.nan)


def run_chunks(call: Call, row_loss: RowLoss, *, on_gpu: bool = False) -> Outputs:
    """Losses and gradients of a checked call. on_gpu: nothing waits for the device.

    Raises:
        ValueError: a label, token_weight or num_items that is out of its range, before any work; on a GPU only a
            num_items that is on the CPU.
    """
    dtype = accumulator(call)
    tokens = (_tokens_on_gpu if on_gpu else _tokens)(call, dtype)
    gradients = _Gradients(call, dtype)
    smallest = (_GPU_CHUNK_TOKENS, _GPU_CHUNK_BYTES) if on_gpu else (_CHUNK_TOKENS, _CHUNK_BYTES)
    # The loop's buffers are gone when the gradients get their final dtype.
    values = _loop(call, row_loss, tokens, gradients, *smallest)
    return Outputs(*_reduced(call, values * tokens.weight, tokens), *gradients.finished(call))


def _loop(
    call: Call, row_loss: RowLoss, tokens: _Tokens, gradients: _Gradients, chunk_tokens: int, chunk_bytes: int
) -> Tensor:
    """(3, tokens that are computed): loss, hard and soft of each. The gradients are added up. A chunk that the call
    leaves open has so many bytes, but not fewer tokens than that."""
    options, classes, cap = call.options, call.student.weight.shape[0], call.student.softcap
    student = _Classifier(call.student, classes, call.matmul_dtype)
    teacher = None
    if options.alpha < 1:  # of the teacher's classes, those beyond the student's take no part
        teacher = _Classifier(call.teacher, min(classes, call.teacher.weight.shape[0]), call.matmul_dtype)
    wanted = call.hidden_grad or call.weight_grad or call.bias_grad
    apart = wanted and cap is not None  # the cap's derivative needs the logits beside the gradient
    count = len(tokens.weight)
    length = min(
        count, call.chunk_tokens or max(chunk_tokens, chunk_bytes // _row_bytes(student, teacher, apart) // 16 * 16)
    )
    student.reserve(length)
    if teacher is not None:
        teacher.reserve(length)
    gradient = torch.empty_like(student.buffer) if apart else student.buffer
    factor = tokens.weight / tokens.items * call.student.scale
    if call.token_grad is not None:
        factor = factor * (call.token_grad if tokens.at is None else call.token_grad[tokens.at])

    values = tokens.weight.new_empty(3, count)
    for start in range(0, count, max(length, 1)):
        here = slice(start, min(start + length, count))
        at = here if tokens.at is None else tokens.at[here]
        rows = student.rows[at]
        s = student.logits(rows)
        t = s if teacher is None else teacher.logits(teacher.rows[at])
        # Labels that are a mask alone are of no use where the tokens that do not count have been left out.
        labels = tokens.labels if options.alpha > 0 or tokens.valid is not None else None
        labels = None if labels is None else labels[here]
        found, grad = values.new_empty(3, len(rows)), gradient[: len(rows)] if wanted else None
        row_loss(options, Chunk(s, t, labels, found, grad))
        values[:, here] = found
        if grad is not None:
            if cap is not None:
                _uncap(grad, s, cap, student.blocks())
            if tokens.valid is not None:
                rows = rows.masked_fill(~tokens.valid[here, None], 0)  # may be NaN, which 0 times would keep
            gradients.add(student, grad, rows, at, factor[here])
    return values


def _row_bytes(student: _Classifier, teacher: _Classifier | None, apart: bool) -> int:
    """Of a token's logits."""
    row = student.classes * student.dtype.itemsize * (2 if apart else 1)
    return row if teacher is None else row + teacher.classes * teacher.dtype.itemsize


def _uncap(grad: Tensor, logits: Tensor, cap: float, blocks: list[slice]) -> None:
    """The gradient by capped logits becomes that by the logits before; ``logits`` (capped) are used up."""
    for block in blocks:
        part = grad[:, block]
        part.addcmul_(part, logits[:, block].div_(cap).square_(), value=-1)


def _reduced(call: Call, values: Tensor, tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """values: (3, tokens that count), weighted."""
    if call.options.reduction != "none":
        total = values.sum(dim=1, dtype=torch.float64)
        loss, hard, soft = (total / tokens.items if values.shape[1] else total).to(values.dtype)
        return loss.clone(), hard.clone(), soft.clone()
    lead = call.student.hidden.shape[:-1]
    if tokens.at is not None:
        values = values.new_zeros(3, lead.numel()).index_copy_(1, tokens.at, values)
    loss, hard, soft = values
    return loss.clone().reshape(lead), hard.clone().reshape(lead), soft.clone().reshape(lead)
