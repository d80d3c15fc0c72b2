"""The kinds of convolutions and embeddings: rows of the table of ``structure_kinds.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pycompress.nn import Int8Conv2d, Int8Embedding, Int8EmbeddingBag
from pycompress.structure_kind import (
    FLAG,
    SIZE,
    TEXT,
    Field,
    Kind,
    Options,
    fill_packed,
    is_size,
    maker,
    sizes_why_not,
    state_of,
)

# ---- convolutions ---------------------------------------------------------------------------------------------------


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_size, value))


def _pair(key: str) -> Field:
    return Field(_is_pair, "two sizes", lambda module: list(getattr(module, key)))


_PADDING = Field(
    lambda value: _is_pair(value) or value in ("same", "valid"),
    "two sizes, same or valid",
    lambda module: module.padding if isinstance(module.padding, str) else list(module.padding),
)
_HAS_BIAS = FLAG._replace(read=lambda module: module.bias is not None)
_CONV_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_CONV: dict[str, Field] = {
    "in_channels": SIZE,
    "out_channels": SIZE,
    "kernel_size": _pair("kernel_size"),
    "stride": _pair("stride"),
    "padding": _PADDING,
    "dilation": _pair("dilation"),
    "groups": SIZE,
    "bias": _HAS_BIAS,
    "padding_mode": TEXT,
}


def _conv_why_not(options: Options, old: nn.Module) -> str:
    # A bias may be new: that of a norm which was folded into the convolution.
    return sizes_why_not(options, old, (nn.Conv2d, Int8Conv2d), _CONV_SIZES)


# ---- embeddings -----------------------------------------------------------------------------------------------------

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_EMBEDDING: dict[str, Field] = {
    "num_embeddings": SIZE,
    "embedding_dim": SIZE,
    "padding_idx": SIZE._replace(optional=True),
    "dtype": Field(
        lambda value: isinstance(value, str) and value in _DTYPES,
        f"one of {', '.join(_DTYPES)}",
        lambda module: str(module.dtype).removeprefix("torch."),
    ),
    "backend": TEXT,
}


def _embedding_why_not(*classes: type[nn.Module]) -> Callable[[Options, nn.Module], str]:
    return lambda options, old: sizes_why_not(options, old, classes, ("num_embeddings", "embedding_dim"))


def _embedding_maker(cls: type[nn.Module], arguments: tuple[str, ...]) -> Callable[[Options, nn.Module], nn.Module]:
    make = maker(cls, arguments)
    return lambda options, old: make({**options, "dtype": _DTYPES[options["dtype"]]}, old)


_BAG = {"mode": TEXT, "include_last_offset": FLAG}

LAYER_KINDS = (
    Kind(
        Int8Conv2d,
        {**_CONV, "mode": TEXT, "activation": TEXT, "backend": TEXT},
        _conv_why_not,
        maker(Int8Conv2d, (*_CONV, "mode", "activation", "backend")),
        tensors=state_of,
        fill=fill_packed,
    ),
    Kind(
        Int8Embedding,
        _EMBEDDING,
        _embedding_why_not(nn.Embedding, Int8Embedding),
        _embedding_maker(Int8Embedding, tuple(_EMBEDDING)),
        tensors=state_of,
        fill=fill_packed,
    ),
    Kind(
        Int8EmbeddingBag,
        {**_EMBEDDING, **_BAG},
        _embedding_why_not(nn.EmbeddingBag, Int8EmbeddingBag),
        _embedding_maker(Int8EmbeddingBag, (*_EMBEDDING, *_BAG)),
        tensors=state_of,
        fill=fill_packed,
    ),
)
