"""The loss of a training step.

    without distillation    task
    with it                 alpha * task + (1 - alpha) * tau^2 * D(teacher, student)
                            + hidden.weight * hidden + attention.weight * attention

task: `loss_fn(output, batch)`, or the loss that the model made, or cross-entropy of its logits with the labels,
flattened to (tokens, classes), without those that are -100. With alpha=0 it is not computed.

Which tokens take part. In task and D those with a label other than -100; without labels D takes those of the attention
mask, and without a mask all. In the hidden and the attention term those of the mask. A term is a mean over its tokens.

The kernels. Where the task loss is cross-entropy, one call of DistillationLoss gives both it and D. The teacher runs in
eval mode without gradients, under the same autocast.

Parts of a batch. A step over several batches weights each term of each batch by the batch's share of the term's
tokens, so that they add up to the loss of all of it at once. A loss that the model or loss_fn makes is taken for a mean
over the labels that are not -100, of floats over all numbers, and without labels over the samples; see shares.py for
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress.calibration import evaluating
from pycompress.nn import DistillationLoss
from pycompress.pruning.scores import keeping_rng
from pycompress.recipe.sections import Distillation
from pycompress.workflow import shares, task_loss
from pycompress.workflow.batches import split_batch, takes
from pycompress.workflow.features import AttentionTerm, HiddenTerm, Taps
from pycompress.workflow.objective_checks import check_logits, check_task, check_teacher
from pycompress.workflow.outputs import MaskFinder, call, logits_of, loss_of
from pycompress.workflow.task_loss import FUNCTION, IGNORE, NONE, OWN, PLAIN, SHIFTED, LossFn

Terms = dict[str, Tensor]
Reduce = Callable[[list[float]], list[float]]


class Share(NamedTuple):
    """What of a step is one of its batches: the tokens of its logits and of the step's, weights of the other terms."""

    tokens: float
    tokens_of_step: float
    task: float
    hidden: Sequence[float]
    attention: Sequence[float]


class Objective(nn.Module):
    """`objective(batch)` -> (loss, its terms before their weights, detached).

    Its parameters are the learned projections of the hidden term. Made by :meth:`make`; the models are not part of it.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, loss_fn: LossFn | None, alpha: float) -> None:
        super().__init__()
        self._models = (student, teacher)  # in a tuple: their parameters are not the objective's
        self._loss_fn, self._alpha = loss_fn, alpha
        self._task = NONE
        self._shift = False  # labels belong to the logits of the token before
        self._tokens = shares.ALL  # which rows of the logits take part
        self._logit_loss: DistillationLoss | None = None
        self._hard = self._soft = False  # the terms that it gives
        self._keep_labels = self._teacher_labels = False
        self._mask_of = MaskFinder(student)
        self._ask: dict[str, bool] = {}
        self.hidden: HiddenTerm | None = None
        self.attention: AttentionTerm | None = None

    @classmethod
    def make(
        cls,
        distillation: Distillation | None,
        student: nn.Module,
        teacher: nn.Module | None,
        loss_fn: LossFn | None,
        sample_batch: Any,
        *,
        seed: int = 0,
    ) -> Objective:
        """The objective of a stage, once a batch went through both models and everything fits.

        distillation: None trains on the task's loss alone, and `teacher` is not looked at. seed: of the projections.
        Models, their modes and torch's generators of random numbers are afterwards what they were. Raises TypeError or
        ValueError for everything that cannot work.
        """
        if distillation is None:
            teacher = None
        else:
            check_teacher(student, teacher)
        objective = cls(student, teacher, loss_fn, 1.0 if distillation is None else distillation.alpha)
        with ExitStack() as stack:
            stack.enter_context(keeping_rng(student))
            for model in (student, teacher):
                if model is not None:
                    stack.enter_context(evaluating(model))
            torch.default_generator.manual_seed(seed)
            objective._fit(distillation, sample_batch)
        return objective

    @property
    def student(self) -> nn.Module:
        return self._models[0]

    def run_student_by(self, wrapper: nn.Module) -> None:
        """From now on through what wraps it, as DistributedDataParallel does; the bare model will do too."""
        self._models = (wrapper, self._models[1])

    @property
    def asked(self) -> frozenset[str]:
        """The outputs that models return for its terms only."""
        return frozenset(key.removeprefix("output_") for key in self._ask)

    @property
    def teacher(self) -> nn.Module | None:
        return self._models[1]

    @property
    def distils(self) -> bool:
        """Whether the loss depends on the teacher."""
        return self._soft or self.hidden is not None or self.attention is not None

    def extra_repr(self) -> str:
        return f"task={self._task}, alpha={self._alpha:g}"

    # ---- fitting it to the models -----------------------------------------------------------------------------

    def _fit(self, distillation: Distillation | None, batch: Any) -> None:
        student = self.student
        takes_labels = isinstance(batch, Mapping) and takes(student, "labels")
        feed = split_batch(batch, takes_labels)
        output = _tried(student, feed.inputs, "model" if distillation is None else "student")
        logits = logits_of(output)
        kind = NONE
        if self._loss_fn is not None:
            kind = FUNCTION
        elif loss_of(output) is not None:
            kind = task_loss.recognise(student, feed, output)
        elif feed.labels is not None and logits is not None:
            kind = PLAIN
        self._shift = kind == SHIFTED
        if self._alpha:
            check_task(kind, distillation, feed, output)
            self._task = kind
        built_on = takes_labels and feed.labels is not None and task_loss.needs_labels(student, feed, output)
        self._keep_labels = takes_labels and (built_on or self._task in (OWN, FUNCTION))
        self._hard = self._task in (PLAIN, SHIFTED)
        if self._hard:
            self._tokens, self._logit_loss = shares.LABELS, DistillationLoss(1.0, 1.0)
        if distillation is not None and self.teacher is not None:
            self._teacher_labels = built_on and takes(self.teacher, "labels")
            self._fit_teacher(distillation, self.teacher, batch, logits)
        loss, _ = self(batch)
        if not loss.is_floating_point():
            raise ValueError(f"train: the loss is {loss.dtype}; expected a tensor of floats")

    def _fit_teacher(self, d: Distillation, teacher: nn.Module, batch: Any, logits: Tensor | None) -> None:
        inputs, labels = split_batch(batch, self._teacher_labels)
        mask = self._mask_of(inputs)
        told = _tried(teacher, inputs, "teacher")
        self._soft = d.loss != "none" and d.alpha < 1
        if self._soft:
            check_logits(d, logits, logits_of(told))
            assert logits is not None
            if not self._hard:
                self._tokens = shares.choose_tokens(labels, mask, logits)
            alpha = self._alpha if self._hard else 0.0
            self._logit_loss = DistillationLoss(d.tau, alpha, divergence=d.loss, beta=d.beta)
        if d.hidden is not None:
            self.hidden = HiddenTerm(d.hidden, self.student, teacher)
            self._ask |= self.hidden.ask
        if d.attention is not None:
            self.attention = AttentionTerm(d.attention, self.student, teacher)
            self._ask |= self.attention.ask
        if self.hidden is None and self.attention is None:
            return
        with self.listening():
            told, told_states = self._call_teacher(batch, None)
            output, states = self._call(self.student, inputs, 0)
            if self.hidden is not None:
                self.hidden.fit(states or output, told_states or told, inputs, mask)
            if self.attention is not None:
                self.attention.fit(output, told, mask)

    # ---- a step -----------------------------------------------------------------------------------------------

    def forward(self, batch: Any, share: Share | None = None) -> tuple[Tensor, Terms]:
        """The loss, 0-dim, and its terms.

        share: of a step over several batches, as :meth:`share_out` gives it; the values are then this batch's part.
        """
        loss, terms, _ = self.run(batch, share)
        return loss, terms

    def run(self, batch: Any, share: Share | None = None) -> tuple[Tensor, Terms, Any]:
        """As :meth:`forward`, with the student's output besides."""
        if self._unheard():
            with self.listening():
                return self.run(batch, share)
        inputs, labels = split_batch(batch, self._keep_labels)
        told = told_states = None
        if self.distils:  # before the student's activations take up memory
            told, told_states = self._call_teacher(batch, inputs)
        output, states = self._call(self.student, inputs, 0)
        terms: Terms = {}
        loss: Tensor | None = None
        if self._task in (OWN, FUNCTION) and (share is None or share.task):
            task = self._model_loss(output, batch)
            if share is not None:
                task = task * share.task
            terms["task"] = task.detach()
            loss = task if self._alpha == 1 else self._alpha * task
        if self._logit_loss is not None:
            loss = _add(loss, self._logit_terms(output, told, inputs, labels, share, terms))
        if self.hidden is not None:
            weights = None if share is None else share.hidden
            term = self.hidden(states or output, told_states or told, self._mask_of(inputs), weights)
            terms["hidden"] = term.detach()
            loss = _add(loss, term if self.hidden.weight == 1 else self.hidden.weight * term)
        if self.attention is not None:
            weights = None if share is None else share.attention
            term = self.attention(output, told, self._mask_of(inputs), weights)
            terms["attention"] = term.detach()
            loss = _add(loss, term if self.attention.weight == 1 else self.attention.weight * term)
        return torch.zeros(()) if loss is None else loss, terms, output

    def _logit_terms(
        self, output: Any, told: Any, inputs: Any, labels: Any, share: Share | None, terms: Terms
    ) -> Tensor:
        assert self._logit_loss is not None
        logits = logits_of(output)
        assert logits is not None
        teacher = logits_of(told) if self._soft else logits.detach()  # with alpha=1 nobody looks at it
        if self._tokens == shares.LABELS:
            if self._shift:
                labels = task_loss.shifted(labels)
        elif self._tokens == shares.MASK:
            labels = torch.where(self._mask_of(inputs) != 0, 0, IGNORE)  # type: ignore[arg-type]
        else:
            labels = None
        items = None
        if share is not None:
            items = share.tokens_of_step
            if self._tokens == shares.ALL:  # tokens are then counted in the inputs: the same, or as many times more
                items *= logits.shape[:-1].numel() / max(share.tokens, 1)
        parts = self._logit_loss(logits, teacher, labels, num_items=items, return_parts=True)
        if self._hard:
            terms["task"] = parts.hard
        if self._soft:
            terms["soft"] = parts.soft
        if self._hard and self._soft:  # weighted inside
            return parts.loss
        weight = self._alpha if self._hard else 1 - self._alpha
        return parts.loss if weight == 1 else weight * parts.loss

    def _model_loss(self, output: Any, batch: Any) -> Tensor:
        if self._loss_fn is not None:
            return task_loss.check_scalar(self._loss_fn(output, batch), "loss_fn(output, batch)")
        return task_loss.check_scalar(loss_of(output), "the model's loss")

    def _call(self, model: nn.Module, inputs: Any, side: int) -> tuple[Any, Any]:
        """The output, and what the modules that are listened to returned."""
        output = call(model, inputs, self._ask)
        taps = self.hidden.taps if self.hidden is not None else None
        return output, None if taps is None else taps[side].take()

    def _call_teacher(self, batch: Any, inputs: Any) -> tuple[Any, Any]:
        teacher = self._models[1]
        assert teacher is not None
        if inputs is None or self._teacher_labels != self._keep_labels:
            inputs = split_batch(batch, self._teacher_labels).inputs
        with torch.no_grad():  # not inference_mode: the cosine's backward needs the teacher's states
            return self._call(teacher, inputs, 1)

    # ---- steps over several batches ---------------------------------------------------------------------------

    def share_out(self, batches: Sequence[Any], mean_over_processes: Reduce | None = None) -> list[Share]:
        """The share that each of a step's batches has in it.

        mean_over_processes: of a vector, where a step is spread over processes whose gradients are averaged. All of
            them call this at the same time.
        """
        counts = [self._counts(batch) for batch in batches]
        rows = [[c.tokens, c.task, *c.hidden, *c.attention] for c in counts]
        totals = [sum(column) for column in zip(*rows, strict=True)]
        if mean_over_processes is not None:
            totals = mean_over_processes(totals)
        smallest = 1.0 if mean_over_processes is None else 1e-9  # a mean of whole numbers may be less than 1
        found = []
        for row, count in zip(rows, counts, strict=True):
            weights = [part / max(total, smallest) for part, total in zip(row, totals, strict=True)]
            hidden, attention = weights[2 : 2 + len(count.hidden)], weights[2 + len(count.hidden) :]
            found.append(Share(count.tokens, totals[0], weights[1], hidden, attention))
        return found

    def _counts(self, batch: Any) -> shares.Counts:
        inputs, labels = split_batch(batch, self._keep_labels)
        mask = self._mask_of(inputs)
        return shares.Counts(
            shares.tokens(self._tokens, task_loss.shifted(labels) if self._shift else labels, inputs, mask),
            shares.labelled(labels, inputs),
            [] if self.hidden is None else self.hidden.counts(inputs, mask),
            [] if self.attention is None else self.attention.counts(inputs, mask),
        )

    # ---- modules that are listened to -------------------------------------------------------------------------

    def _unheard(self) -> bool:
        return self.hidden is not None and self.hidden.taps is not None and not self.hidden.taps[0].entered

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on the modules of hidden.layers stay where they are; without, each call puts them there anew."""
        taps: tuple[Taps, ...] = (self.hidden.taps or ()) if self.hidden is not None else ()
        fast_path = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            for tap in taps:
                stack.enter_context(tap)
            if taps:  # torch's fused encoder layers would go past the hooks
                torch.backends.mha.set_fastpath_enabled(False)
                stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
            yield


def _add(loss: Tensor | None, term: Tensor) -> Tensor:
    return term if loss is None else loss + term


def _tried(model: nn.Module, inputs: Any, side: str) -> Any:
    """The output for a sample batch. Raises ValueError, chained, where the model does not take it."""
    try:
        return call(model, inputs, {})
    except Exception as error:
        got = f"mapping of {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(
            f"train: the {side}, a {type(model).__name__}, fails with a batch of train_batches ({got}): "
            f"{type(error).__name__}: {error}"
        ) from error
