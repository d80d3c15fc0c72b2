"""What the MiniLM examples share: the encoder, English sentences in three parts, in batches, and what is kept of the
embeddings.

The sentences are those that come with Python (sentences.py). Which part one belongs to is decided by its hash, so the
parts stay what they are when another Python brings a few sentences more or less.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pycompress.demo import measure, sentences
from pycompress.demo.encoder import Batch, Encoder

_NEIGHBOURS = 10
_WINDOW = 16  # batches whose sentences are sorted by length together: little padding, and still shuffled


class Parts(NamedTuple):
    train: list[str]  # 8 of 10 sentences
    validation: list[str]
    test: list[str]


@cache
def parts(quick: bool = False) -> Parts:
    """The sentences of the reference manual and of the standard library; with `quick` those of the manual alone."""
    found = Parts([], [], [])
    for text in dict.fromkeys(sentences.load() + ([] if quick else sentences.load_library())):
        tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
        found[max(0, tenth - 7)].append(text)
    return found


@cache
def encoder() -> Encoder:
    """all-MiniLM-L6-v2 as it is published, less the pooler, which sentence embeddings do not use, and without dropout,
    which is only in the way of fitting states exactly.
    """
    loaded = Encoder()
    loaded.model.pooler = None  # type: ignore[assignment]
    for module in loaded.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return loaded


def batches(encoder: Encoder, texts: Sequence[str], size: int, length: int) -> Iterator[Batch]:
    """The sentences once, in batches of `size` that are alike in length, cut to `length` tokens; a rest is left out.

    Shuffled by torch's generator of random numbers.
    """
    order = torch.randperm(len(texts)).tolist()
    found: list[list[int]] = []
    for start in range(0, len(order), size * _WINDOW):
        window = sorted(order[start : start + size * _WINDOW], key=lambda i: len(texts[i]))
        found += [window[at : at + size] for at in range(0, len(window) - size + 1, size)]
    for at in torch.randperm(len(found)).tolist():
        chosen = [texts[i] for i in found[at]]
        yield dict(encoder.tokenizer(chosen, padding=True, truncation=True, max_length=length, return_tensors="pt"))


@cache
def _expected(part: str, quick: bool) -> Tensor:
    return encoder().embed(encoder().model, getattr(parts(quick), part))


def similarity(model: nn.Module, quick: bool = False) -> dict[str, float]:
    """Of the model's embeddings of test and validation sentences to those of the encoder as it is published."""
    found: dict[str, float] = {}
    for part in ("test", "validation"):
        actual = encoder().embed(model, getattr(parts(quick), part))
        found |= {f"{part} {name}": value for name, value in kept(_expected(part, quick), actual).items()}
    return found


def kept(expected: Tensor, actual: Tensor) -> dict[str, float]:
    """expected, actual: embeddings (sentences, width) at unit length, before and after."""
    return {
        "cosine": (expected * actual).sum(1).double().mean().item(),
        "neighbours kept": measure.neighbours_kept(expected, actual, _NEIGHBOURS),
    }
