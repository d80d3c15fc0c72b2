"""Batches of the workflow: what one may be, the endless stream, and going on in the middle of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pycompress.workflow.batches import (
    EpochBatches,
    check_train_batches,
    first_batch,
    first_inputs,
    split,
    takes,
)
from pycompress.workflow.rng import keeping_all_rng, rng_state, seed_all, seed_of, set_rng_state


class WithLabels(nn.Module):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return input_ids


class WithOptions(nn.Module):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return input_ids


class Wrapper(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


X, Y = torch.ones(2, 3), torch.zeros(2)


# ---- one batch ------------------------------------------------------------------------------------------------


def test_labels_are_for_models_that_take_them() -> None:
    batch = {"input_ids": X, "labels": Y}
    assert split(batch, WithLabels()).inputs is batch
    for model in (WithOptions(), nn.Linear(3, 2)):
        feed = split(batch, model)
        assert list(feed.inputs) == ["input_ids"]
        assert feed.labels is Y
    assert split(batch, Wrapper()).inputs is batch
    assert list(batch) == ["input_ids", "labels"]
    assert split({"input_ids": X}, WithLabels()).labels is None


def test_options_are_taken_by_kwargs() -> None:
    assert takes(WithOptions(), "output_attentions", options=True)
    assert not takes(WithOptions(), "labels")
    assert takes(Wrapper(), "labels")
    assert not takes(nn.Linear(3, 2), "labels", options=True)


@pytest.mark.parametrize("inputs", [X, (X, X), {"x": X}])
def test_pairs_of_inputs_and_labels(inputs: Any) -> None:
    for batch in ((inputs, Y), [inputs, Y]):
        feed = split(batch, WithLabels())
        assert feed.inputs is inputs
        assert feed.labels is Y


def test_a_tensor_has_no_labels() -> None:
    assert split(X, WithLabels()) == (X, None)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ("text", "a batch is a str"),
        ([X], r"a list of 1 \(Tensor\) \(inputs alone: give the tensor itself\)"),
        ((X, X, Y), r"a tuple of 3 \(Tensor, Tensor, Tensor\) \(several inputs: \(\(input, input\), labels\)\)"),
        ((3, Y), r"a tuple of 2 \(int, Tensor\)"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_batch(batch: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"train_batches: a batch is.*{said}" if "batch is" not in said else said):
        split(batch, WithLabels())


# ---- what train_batches may be --------------------------------------------------------------------------------


def test_kinds_of_train_batches() -> None:
    for good in ([X], (X,), DataLoader(TensorDataset(X, Y)), lambda epoch: [X]):
        check_train_batches(good)
    with pytest.raises(TypeError, match=r"generator, which can be gone through only once.*function epoch -> iterable"):
        check_train_batches(x for x in [X])
    for bad, said in (
        (X, "is one Tensor"),
        ({"x": X}, "is one dict"),
        ("file", "is one str"),
        (3, "is a int"),
        (lambda: [X], "cannot be called with the number of the epoch"),
    ):
        with pytest.raises(TypeError, match=said):
            check_train_batches(bad)
    with pytest.raises(TypeError, match=r"train_batches\(0\).*is one Tensor"):
        first_batch(lambda epoch: X)


def test_first_inputs_are_without_labels_and_move_no_generator() -> None:
    loader = DataLoader(TensorDataset(torch.randn(10, 3), torch.arange(10)), batch_size=2, shuffle=True)
    before = rng_state()
    inputs = first_inputs(loader, 3)
    assert [x.shape for x in inputs] == [(2, 3)] * 3
    assert torch.equal(inputs[0], first_batch(loader)[0])
    assert torch.equal(rng_state()[0]["torch"], before[0]["torch"])
    assert list(first_inputs([{"input_ids": X, "labels": Y}])[0]) == ["input_ids"]
    with pytest.raises(ValueError, match="train_batches is empty"):
        first_inputs([])


# ---- the stream -----------------------------------------------------------------------------------------------


class Noisy(Dataset[tuple[Tensor, float, float]]):
    """Draws from all three generators for each sample."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, float, float]:
        return torch.rand(2) + index, float(np.random.rand()), random.random()  # noqa: NPY002


def loader() -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=3, shuffle=True, collate_fn=lambda items: torch.stack([i[0] for i in items]))


def taken(stream: EpochBatches, count: int) -> list[Tensor]:
    return [stream.next() for _ in range(count)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_shuffling_loader_repeats_and_epochs_differ() -> None:
    first = taken(EpochBatches(loader(), seed=5, stage=2), 8)
    torch.rand(7)
    assert same(first, taken(EpochBatches(loader(), seed=5, stage=2), 8))
    assert not same(first[:4], first[4:])
    assert not same(first, taken(EpochBatches(loader(), seed=6, stage=2), 8))
    assert not same(first, taken(EpochBatches(loader(), seed=5, stage=3), 8))


def test_a_loaders_own_generator_is_seeded_too() -> None:
    def with_generator() -> DataLoader[Any]:
        own = torch.Generator().manual_seed(1)
        return DataLoader(TensorDataset(torch.arange(12)), batch_size=3, shuffle=True, generator=own)

    stream = EpochBatches(with_generator(), seed=0)
    whole = [batch[0] for batch in taken(stream, 8)]  # type: ignore[misc]
    again = EpochBatches(with_generator(), seed=0)
    again.go_to(1, 1)
    assert same(whole[5:], [batch[0] for batch in taken(again, 3)])  # type: ignore[misc]


def test_a_sampler_is_told_the_epoch() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class Batches(list[Tensor]):
        sampler = Sampler()

    stream = EpochBatches(Batches([X]), seed=0)
    taken(stream, 3)
    assert Batches.sampler.epochs == [0, 1, 2]


@pytest.mark.parametrize("given", [0, 1, 3, 4, 5, 8])
def test_going_on_in_the_middle(given: int) -> None:
    """Between batches others draw, as dropout does: the state of that moment is put back."""
    stream = EpochBatches(loader(), seed=1)
    whole, states = [], {}
    for count in range(10):
        states[count] = (stream.epoch, stream.batch, rng_state())
        whole.append(stream.next())
        torch.rand(3)
    epoch, batch, rng = states[given]
    again = EpochBatches(loader(), seed=1)
    again.go_to(epoch, batch)
    if given:
        again.open()
        set_rng_state(*rng)
    resumed = []
    for _ in range(given, 10):
        resumed.append(again.next())
        torch.rand(3)
    assert same(resumed, whole[given:])


def test_a_function_gets_the_epoch() -> None:
    stream = EpochBatches(lambda epoch: iter([torch.tensor(epoch), torch.tensor(-epoch)]), seed=0)
    assert [int(x) for x in taken(stream, 5)] == [0, 0, 1, -1, 2]
    assert (stream.epoch, stream.batch) == (2, 1)


def test_lengths() -> None:
    class Streamed(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.arange(7.0))

    assert EpochBatches([X] * 3, 0).length() == 3
    assert EpochBatches(loader(), 0).length() == 4
    assert EpochBatches(lambda epoch: iter([X] * 5), 0).length() == 5
    before = rng_state()[0]["torch"]
    assert EpochBatches(DataLoader(Streamed(), batch_size=2), 0).length() == 4
    assert torch.equal(before, rng_state()[0]["torch"])


def test_empty_and_short_epochs() -> None:
    with pytest.raises(ValueError, match="train_batches is empty"):
        EpochBatches([], 0).length()
    with pytest.raises(ValueError, match="gave no batch in epoch 0"):
        EpochBatches([], 0).next()

    once = iter([X, X])
    stream = EpochBatches(lambda epoch: once, 0)
    taken(stream, 2)
    with pytest.raises(ValueError, match=r"no batch in epoch 1.*the same iterator again\?"):
        stream.next()

    class Liar:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[Tensor]:
            return itertools.repeat(X, 3)

    stream = EpochBatches(Liar(), 0)
    assert len(taken(stream, 7)) == 7  # counted in steps, its length is nobody's concern
    stream = EpochBatches(Liar(), 0)
    assert stream.length() == 4
    with pytest.raises(ValueError, match=r"ended after 3 of the 4 batches that its len\(\) says"):
        taken(stream, 4)

    stream = EpochBatches([X, X], 0)
    stream.go_to(0, 3)
    with pytest.raises(ValueError, match="gave 2 batches in epoch 0, where 3 were given"):
        stream.open()


# ---- random numbers -------------------------------------------------------------------------------------------


def draws() -> tuple[float, ...]:
    return float(torch.rand(())), float(np.random.rand()), random.random(), float(np.random.randn()), random.gauss(0, 1)  # noqa: NPY002


def test_generators_are_saved_and_put_back() -> None:
    seed_all(3)
    draws()  # an odd number of gaussians: half a pair is kept
    state = rng_state()
    expected = [draws() for _ in range(3)]
    set_rng_state(*state)
    assert [draws() for _ in range(3)] == expected
    set_rng_state(*state)
    with keeping_all_rng():
        draws()
    assert draws() == expected[0]


def test_damaged_states_change_nothing() -> None:
    seed_all(4)
    state = rng_state()
    expected = draws()
    for tensors, meta in (
        ({**state[0], "torch": state[0]["torch"][:-1]}, state[1]),
        ({**state[0], "numpy": state[0]["numpy"][:-1]}, state[1]),
        ({**state[0], "python": state[0]["python"] * 0 - 1}, state[1]),
        ({}, state[1]),
        (state[0], {}),
        (state[0], {**state[1], "python": [3, 10**6, None]}),
    ):
        set_rng_state(*state)
        with pytest.raises(ValueError, match="damaged"):
            set_rng_state(tensors, meta)
        assert draws() == expected


def test_every_part_of_a_seed_counts() -> None:
    seeds = {seed_of(*parts) for parts in itertools.product(range(3), repeat=3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2) == seed_of(1, 2)
