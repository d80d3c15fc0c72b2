"""load_pretrained: a model from the folder that save_pretrained wrote."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from pycompress.checkpoint import transformers_model
from pycompress.model_file_load import load_into
from pycompress.model_file_reader import opened_folder

_OP = "load_pretrained"


def load_pretrained(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str | None = None
) -> nn.Module:
    """The model that was saved in `folder`, to the bit: structure, tensors, dtypes, what is tied, frozen, in training.

    Args:
        model: one of the saved one's class, built with the same sizes: with float layers, or on the meta device, which
            spares the memory for weights that are replaced. It is filled in place and returned. Without one a model of
            Hugging Face's transformers is built on the meta device, from the configuration in the folder: its class
            comes from the package transformers by name, no other code is ever run.
        device: where all tensors go. By default each goes where the one that it replaces is, to the CPU for meta ones.

    Raises:
        OSError, ModelFileError: a folder or file that is missing, damaged, of a newer version, or of another model, by
            the name of the layer or tensor that does not fit. The model is then what it was.
        TypeError, RuntimeError: `model` is no module; `device` is none.
    """
    place = None if device is None else torch.device(device)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model is a {type(model).__name__}; expected a torch.nn.Module, or None")
    with opened_folder(folder, "" if model is None else ". The model is unchanged") as contents:
        if model is not None:
            return load_into(contents, model, _OP, place)
        built = transformers_model.build(contents.header.get("transformers"), len(contents.likes()), folder)
        return load_into(contents, built, _OP, place)


def read_pretrained_header(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint says about itself, tensors left aside: "structure", "extra", "transformers" and the rest.

    Raises:
        OSError, ModelFileError: as load_pretrained.
    """
    with opened_folder(folder) as contents:
        return contents.header
