"""all-MiniLM-L6-v2, a sentence encoder, on the English sentences that come with Python: model and data for recipe.yaml.

There are no labels: the encoder learns from its own dense self what its hidden states are to be. All choices were made
by the validation sentences.
"""

from collections.abc import Iterator

from torch import nn

from pycompress.demo import english
from pycompress.demo.encoder import Batch

SENTENCES, LENGTH = 32, 48  # a batch; tokens, which few sentences exceed


def model() -> nn.Module:
    return english.encoder().model


def train_batches(epoch: int, quick: bool = False) -> Iterator[Batch]:
    """The training sentences once; shuffled by torch's generator, which is seeded by the epoch."""
    return english.batches(english.encoder(), english.parts(quick).train, SENTENCES, LENGTH)


def similarity(model: nn.Module, quick: bool = False) -> dict[str, float]:
    """Of the model's sentence embeddings to those of the encoder as it is published."""
    return english.similarity(model, quick)
