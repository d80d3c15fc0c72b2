"""The loop over chunks of tokens: logits into a buffer that is used again, loss, gradient, and on to the next chunk.

What is allocated besides the gradients is the logits of one chunk, the student's and the teacher's. The gradient by the
student's logits takes their place; from there it goes at once to the hidden states, the weight and the bias. Tokens
that do not count (ignored, or of weight 0) are left out before the first product: they cost nothing, and what they
hold is never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pycompress import _native
from pycompress.ops import distill_loss_values
from pycompress.ops.linear_distill_loss_call import Call, Head, Options, Outputs, gradient_dtype, logits_call

# A chunk has so many bytes of logits, student's and teacher's together, but not fewer tokens than the second number.
# Two cores of a Zen 5 server, MKL, float32, H = 384, V = 30522: the four products of 1024 tokens take 738, 654, 637,
# 617 and 622 ms in chunks of 64, 96, 128, 192 and 1024. A chunk of 96 is 23.4 MB, half of the weight's gradient.
_CHUNK_BYTES = 24 * 10**6
_CHUNK_TOKENS = 96
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
        rows, factor = rows.to(self.dtype) * factor[:, None], factor.to(self.dtype)
        for block in head.blocks() if grad.dtype != self.dtype else [slice(0, head.classes)]:
            # In the accumulator's dtype before the product: torch has no product of bfloat16 that gives float32, and
            # rounding each chunk's product costs 2.5 times the error.
            part = grad[:, block].to(self.dtype).t()
            if self.weight is not None:
                self.weight[block].addmm_(part, rows, beta=beta)
            if self.bias is not None:
                self.bias[block].addmv_(part, factor, beta=beta)

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


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.device.type == "cpu" and dtype in _native.DTYPE_CODES:
        return _native.empty(like.shape, dtype)
    return torch.empty(like.shape, dtype=dtype, device=like.device)


class _Tokens(NamedTuple):
    """The tokens that count. at: which they are, None for all; weight, labels: theirs; items: the mean's divisor."""

    at: Tensor | None
    weight: Tensor
    labels: Tensor
    items: Tensor


def _tokens(call: Call, dtype: torch.dtype) -> _Tokens:
    like = logits_call(call)
    valid, weight, labels = distill_loss_values.tokens(like)
    items = distill_loss_values.items(like, valid, weight).to(dtype)
    if bool(valid.all()):
        return _Tokens(None, weight.to(dtype), labels, items)
    index = valid.nonzero()[:, 0]
    return _Tokens(index, weight[index].to(dtype), labels[index], items)


def run_chunks(call: Call, row_loss: RowLoss) -> Outputs:
    """Losses and gradients of a checked call.

    Raises:
        ValueError: a label, token_weight or num_items that is out of its range, before any work.
    """
    dtype = accumulator(call)
    tokens = _tokens(call, dtype)
    gradients = _Gradients(call, dtype)
    values = _loop(call, row_loss, tokens, gradients)  # its buffers are gone when the gradients get their final dtype
    return Outputs(*_reduced(call, values * tokens.weight, tokens), *gradients.finished(call))


def _loop(call: Call, row_loss: RowLoss, tokens: _Tokens, gradients: _Gradients) -> Tensor:
    """(3, tokens that count): loss, hard and soft of each. The gradients are added up."""
    options, classes, cap = call.options, call.student.weight.shape[0], call.student.softcap
    student = _Classifier(call.student, classes, call.matmul_dtype)
    teacher = None
    if options.alpha < 1:  # of the teacher's classes, those beyond the student's take no part
        teacher = _Classifier(call.teacher, min(classes, call.teacher.weight.shape[0]), call.matmul_dtype)
    wanted = call.hidden_grad or call.weight_grad or call.bias_grad
    apart = wanted and cap is not None  # the cap's derivative needs the logits beside the gradient
    count = len(tokens.weight)
    length = min(count, call.chunk_tokens or _chunk_length(student, teacher, apart))
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
        labels = tokens.labels[here] if options.alpha > 0 else None
        found, grad = values.new_empty(3, len(rows)), gradient[: len(rows)] if wanted else None
        row_loss(options, Chunk(s, t, labels, found, grad))
        values[:, here] = found
        if grad is not None:
            if cap is not None:
                _uncap(grad, s, cap, student.blocks())
            gradients.add(student, grad, rows, at, factor[here])
    return values


def _chunk_length(student: _Classifier, teacher: _Classifier | None, apart: bool) -> int:
    row = student.classes * student.dtype.itemsize * (2 if apart else 1)
    if teacher is not None:
        row += teacher.classes * teacher.dtype.itemsize
    return max(_CHUNK_TOKENS, _CHUNK_BYTES // row // 16 * 16)


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
