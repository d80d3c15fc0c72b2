"""all-MiniLM-L6-v2, a sentence encoder, on the English sentences that come with Python: model and data for recipe.yaml.

There are no labels: the encoder learns from its own dense self what its hidden states are to be. All choices were made
by the validation sentences.
"""

from collections.abc import Iterator
from functools import cache

from torch import Tensor, nn

from pycompress.demo import english
from pycompress.demo.encoder import Batch, Encoder

SENTENCES, LENGTH = 32, 48  # a batch; tokens, which few sentences exceed


@cache
def encoder() -> Encoder:
    """The encoder as it is published, less the pooler, which sentence embeddings do not use, and without dropout,
    which is only in the way of fitting states exactly.
    """
    loaded = Encoder()
    loaded.model.pooler = None
    for module in loaded.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return loaded


def model() -> nn.Module:
    return encoder().model


def train_batches(epoch: int, quick: bool = False) -> Iterator[Batch]:
    """The training sentences once; shuffled by torch's generator, which is seeded by the epoch."""
    return english.batches(encoder(), english.parts(quick).train, SENTENCES, LENGTH)


@cache
def expected(part: str, quick: bool) -> Tensor:
    return encoder().embed(encoder().model, getattr(english.parts(quick), part))


def similarity(model: nn.Module, quick: bool = False) -> dict[str, float]:
    """Of the model's sentence embeddings to those of the encoder as it is published."""
    found = {}
    for part in ("test", "validation"):
        embeddings = encoder().embed(model, getattr(english.parts(quick), part))
        kept = english.kept(expected(part, quick), embeddings)
        found |= {f"{part} {name}": value for name, value in kept.items()}
    return found
