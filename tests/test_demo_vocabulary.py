"""The vocabulary part of `pycompress demo distill`, on few tokens of real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pycompress.bench.memory import can_measure
from pycompress.demo import vocabulary


@pytest.fixture(scope="module")
def words() -> vocabulary.Words:
    return vocabulary.read(48)


def test_read(words: vocabulary.Words) -> None:
    assert words.student.shape == words.teacher.shape == (48, 384)
    assert words.weight.shape == (30522, 384)
    assert words.labels.shape == (48,)
    assert not set(words.labels.tolist()) & {0, 101, 102}  # padding, [CLS], [SEP]
    assert not torch.equal(words.student, words.teacher)


def test_both_ways_agree(words: vocabulary.Words) -> None:
    loss, gradient = vocabulary.differences(words)
    assert loss < 1e-5
    assert gradient < 1e-4


def test_training_learns(words: vocabulary.Words) -> None:
    before = words.weight.clone()
    losses = vocabulary.train(words, 3)
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(words.weight, before)


def test_measure(words: vocabulary.Words, tmp_path: Path) -> None:
    torch.save({name: part.detach() for name, part in vars(words).items()}, tmp_path / "words.pt")
    for name in ("torch", "pycompress"):
        found = vocabulary.measure(name, str(tmp_path / "words.pt"), 1, torch.get_num_threads())
        assert found["milliseconds"] is not None
        assert found["milliseconds"] > 0
        assert (found["peak_bytes"] is not None) == can_measure()
