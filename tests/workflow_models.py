"""Small models and batches for the tests of the workflow."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 7


def net(seed: int = 0, *, width: int = 16, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, classes))


def ids(batch: int, tokens: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + tokens)
    return torch.randint(vocabulary, (batch, tokens), generator=generator)


def token_batch(batch: int, tokens: int, *, labels: bool = True, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Sequences of every length, padded; the padding and a token in five have no label."""
    given = ids(batch, tokens, vocabulary)
    lengths = torch.arange(batch) % (tokens - 1) + 2
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    found = {"input_ids": given, "attention_mask": mask}
    if labels:
        found["labels"] = torch.where((mask != 0) & (given != 3), given.roll(1, 1), -100)
    return found


class Encoder(nn.Module):
    """Attention layers that return what Hugging Face's do, without that library."""

    def __init__(
        self,
        seed: int = 0,
        *,
        layers: int = 2,
        heads: int = 2,
        width: int = 16,
        logits: bool = True,
        sdpa: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.sdpa, self.dropout = heads, sdpa, dropout
        self.asked: set[str] = set()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(width, VOCABULARY) if logits else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> SimpleNamespace:
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        self.asked = {name for name, wanted in asked.items() if wanted}
        x = self.embed(input_ids)
        states, maps = [x], []
        for block in self.blocks:
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in block(x).chunk(3, -1))
            scores = q @ k.transpose(-1, -2)
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[:, None, None] == 0, -torch.inf)
            attention = functional.dropout(scores.softmax(-1), self.dropout, self.training)
            x = x + (attention @ v).transpose(1, 2).flatten(2)
            states.append(x)
            maps.append(attention)
        self.pooler(x[:, 0])
        found: dict[str, Any] = {"last_hidden_state": x}
        if self.head is not None:
            found = {"logits": self.head(x)}
        if output_hidden_states:
            found["hidden_states"] = tuple(states)
        if output_attentions:
            found["attentions"] = None if self.sdpa else tuple(maps)
        return SimpleNamespace(**found)


class Lm(nn.Module):
    """A model that makes its loss itself; `losses` counts how often."""

    def __init__(self, head: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind, self.losses = head, 0
        self.encoder = Encoder(seed)

    def parameters_used(self) -> list[nn.Parameter]:
        def used() -> Iterator[nn.Parameter]:
            for name, parameter in self.encoder.named_parameters():
                if not name.startswith(("unused", "pooler")):
                    yield parameter

        return list(used())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.encoder(input_ids, attention_mask).logits
        if labels is None:
            return Output(logits=logits)
        self.losses += 1
        if self.kind == "regression":
            return Output(loss=functional.mse_loss(logits, labels), logits=logits)
        scores = logits
        if self.kind == "shifted":
            scores, labels = logits[:, :-1], labels[:, 1:]
        options: dict[str, Any] = {}
        if self.kind == "smoothed":
            options["label_smoothing"] = 0.1
        if self.kind == "weighted":
            options["weight"] = torch.arange(1.0, VOCABULARY + 1)
        loss = functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), **options)
        return Output(loss=loss, logits=logits)


class Output(dict[str, Tensor]):
    """As Hugging Face's ModelOutput: a mapping whose items are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None
