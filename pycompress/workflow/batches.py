"""Training batches: what one may be, and an endless stream of them that can be gone on with.

A batch is one of

    Mapping                 model(**batch); "labels" is left out if the model's forward takes no such argument
    Tensor                  model(x), no labels
    (inputs, labels)        inputs a Tensor: model(inputs), a tuple: model(*inputs), or a Mapping: model(**inputs)

on the model's device. `train_batches` is a re-iterable of them (a list, a DataLoader) or a function epoch -> iterable,
which is called with 0, 1, 2... An iterator that can be gone through only once is refused.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress.calibration import check_batches
from pycompress.workflow.rng import keeping_all_rng, seed_all, seed_of

TrainBatches = Iterable[Any] | Callable[[int], Iterable[Any]]
_OP = "train_batches"
_KINDS = (
    "a mapping (model(**batch)), a tensor (model(x)), or a pair (inputs, labels) whose inputs are a tensor, a tuple or "
    "a mapping"
)


class Feed(NamedTuple):
    """What a model is called with, as `calibrate`'s batches, and the labels."""

    inputs: Any
    labels: Any = None


def takes(model: nn.Module, argument: str, *, options: bool = False) -> bool:
    """Whether the model's forward takes `argument` by its name.

    One that takes any name, **kwargs, does so where that is all it takes: such a forward hands on to another. Beside
    named arguments, **kwargs are options, as Hugging Face's output_attentions; they count if `options`.
    """
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward written in C
        return True
    if any(p.name == argument and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        return True
    kinds = {p.kind for p in parameters}
    stars = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    return inspect.Parameter.VAR_KEYWORD in kinds and (options or kinds <= stars)


def split(batch: Any, model: nn.Module) -> Feed:
    """The inputs and the labels of a batch. Raises TypeError for what is no batch."""
    return split_batch(batch, isinstance(batch, Mapping) and takes(model, "labels"))


def split_batch(batch: Any, keep_labels: bool) -> Feed:
    """`split`, where it is known whether the inputs keep their "labels"."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        if keep_labels or "labels" not in batch:
            return Feed(batch, labels)
        return Feed({key: value for key, value in batch.items() if key != "labels"}, labels)
    if isinstance(batch, Tensor):
        return Feed(batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], (Tensor, Mapping, tuple)):
        return Feed(batch[0], batch[1])
    raise TypeError(f"{_OP}: a batch is {_described(batch)}; expected {_KINDS}")


def _described(batch: Any) -> str:
    kind = type(batch).__name__
    if not isinstance(batch, (tuple, list)):
        return f"a {kind}"
    parts = ", ".join(type(part).__name__ for part in batch[:4]) + (", ..." if len(batch) > 4 else "")
    hint = ""
    if len(batch) == 1:
        hint = " (inputs alone: give the tensor itself)"
    elif len(batch) > 2:
        hint = " (several inputs: ((input, input), labels))"
    return f"a {kind} of {len(batch)} ({parts}){hint}"


def check_train_batches(train_batches: Any) -> None:
    """Raises TypeError where it is neither re-iterable nor a function epoch -> iterable."""
    if isinstance(train_batches, Iterator):
        raise TypeError(
            f"{_OP} is a {type(train_batches).__name__}, which can be gone through only once, and every epoch and a "
            "resumed run begin anew; pass a list, a DataLoader, or a function epoch -> iterable"
        )
    if isinstance(train_batches, Iterable) or not callable(train_batches):
        check_batches(train_batches, _OP)
        return
    try:
        inspect.signature(train_batches).bind(0)
    except TypeError as error:
        raise TypeError(
            f"{_OP} is a function that cannot be called with the number of the epoch ({error}); expected a function "
            "epoch -> iterable of batches"
        ) from error
    except ValueError:  # it has no signature
        pass


def epoch_of(train_batches: TrainBatches, epoch: int) -> Iterable[Any]:
    """The batches of one epoch. Raises TypeError where the function returned no iterable of batches."""
    if isinstance(train_batches, Iterable):
        return train_batches
    batches = train_batches(epoch)
    check_batches(batches, f"{_OP}({epoch})")
    return batches


def first_batch(train_batches: TrainBatches) -> Any:
    """The first batch, to try a model with; no generator of random numbers moves. Raises ValueError where none is."""
    return _first(train_batches, 1)[0]


def first_inputs(train_batches: TrainBatches, count: int = 16) -> list[Any]:
    """What models take of the first batches, without labels, as `calibrate` takes them."""
    return [split_batch(batch, keep_labels=False).inputs for batch in _first(train_batches, count)]


def _first(train_batches: TrainBatches, count: int) -> list[Any]:
    check_train_batches(train_batches)
    with keeping_all_rng():
        found = list(itertools.islice(epoch_of(train_batches, 0), count))
    if not found:
        raise ValueError(f"{_OP} is empty; expected at least one batch")
    return found


class EpochBatches:
    """Batches without end, epoch after epoch, and the place in them.

    Before each epoch the generators of torch, numpy and Python, and those that a DataLoader holds itself, are seeded
    from (seed, stage, epoch), so that a shuffling DataLoader gives the same batches each time; a DistributedSampler is
    told the epoch. What a dataset draws from generators of its own is its own affair.

    The place is (epoch, batch), batch counting those that were given. Put there with :meth:`go_to`, the stream seeds
    that epoch, passes over as many batches, and goes on; the generators' state of that moment is to be put back after
    :meth:`open`, for what else draws from them.

    Raises TypeError for `train_batches` of the wrong kind (here), ValueError for an epoch without a batch (`next`).
    """

    def __init__(self, train_batches: TrainBatches, seed: int, stage: int = 0) -> None:
        check_train_batches(train_batches)
        self._batches, self._seed, self._stage = train_batches, seed, stage
        self.epoch, self.batch = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._length = 0
        self._promised: int | None = None  # what len() of an epoch said, where epochs were counted by it

    def length(self) -> int:
        """Batches an epoch: by len(), else one pass over epoch 0 is counted."""
        if not self._length:
            self._length = self._counted()
        return self._length

    def _counted(self) -> int:
        with keeping_all_rng():
            batches = self._seeded(0)
            try:
                count = len(batches) if isinstance(batches, Sized) else None
            except TypeError:  # a DataLoader over an IterableDataset has __len__, and raises
                count = None
            if count is None:
                count = sum(1 for _ in batches)
            else:
                self._promised = count
        if not count:
            raise ValueError(f"{_OP} is empty; expected at least one batch an epoch")
        return count

    def go_to(self, epoch: int, batch: int) -> None:
        """Have the stream go on behind the first `batch` batches of `epoch`."""
        self.epoch, self.batch, self._iterator = epoch, batch, None

    def open(self) -> None:
        """Begin the epoch, and pass over what was given before. Raises ValueError where there are fewer batches."""
        iterator = iter(self._seeded(self.epoch))
        skipped = sum(1 for _ in itertools.islice(iterator, self.batch))
        if skipped < self.batch:
            raise ValueError(
                f"{_OP} gave {skipped} batches in epoch {self.epoch}, where {self.batch} were given when the "
                "checkpoint was written; resume with the same data, or start anew"
            )
        self._iterator = iterator

    def next(self) -> Any:
        """The next batch. Raises ValueError where an epoch has none, or fewer than its len() said."""
        if self._iterator is None:
            self.open()
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._end_epoch()
            return self.next()
        self.batch += 1
        return batch

    def _end_epoch(self) -> None:
        if not self.batch:
            again = " Does it return the same iterator again?" if not isinstance(self._batches, Iterable) else ""
            raise ValueError(f"{_OP} gave no batch in epoch {self.epoch}; expected at least one.{again}")
        if self._promised is not None and self.batch < self._promised:
            raise ValueError(
                f"{_OP} ended after {self.batch} of the {self._promised} batches that its len() says, by which the "
                "recipe's `epochs` were counted; mend its len(), or give `steps`"
            )
        self.epoch, self.batch, self._iterator = self.epoch + 1, 0, None

    def _seeded(self, epoch: int) -> Iterable[Any]:
        seed = seed_of(self._seed, self._stage, epoch)
        seed_all(seed)
        batches = epoch_of(self._batches, epoch)
        sampler = getattr(batches, "sampler", None)
        for holder in (batches, sampler, getattr(batches, "batch_sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            set_epoch = getattr(holder, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        return batches
