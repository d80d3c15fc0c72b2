"""The step checkpoint: everything that a training stage needs to go on with the next step as if nothing had happened.

One safetensors file. Metadata: {"pycompress": JSON of `meta`, "crc32": of all tensors in the order of their names}.
Tensors: "model.<name>" for every parameter and buffer of the model, "trainer.<name>" for what the trainer gave.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.tensor_file import TensorFile, tensor_bytes, write_tensors
from pycompress.workflow.fingerprint import tensors_of

FORMAT, VERSION = "pycompress.checkpoint", 1
_MODEL, _TRAINER = "model.", "trainer."


def save_checkpoint(path: Path, model: nn.Module, trainer: Mapping[str, Tensor], meta: Mapping[str, Any]) -> int:
    """Write it whole or not at all, and return its bytes. Raises OSError as the system says."""
    tensors = {_MODEL + name: tensor for name, tensor in tensors_of(model).items()}
    tensors.update((_TRAINER + name, tensor) for name, tensor in trainer.items())
    content = json.dumps({"format": FORMAT, "version": VERSION, **meta}, allow_nan=False)
    return write_tensors(path, tensors, {"pycompress": content, "crc32": str(_crc(tensors))})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(model tensors, trainer tensors, meta). Raises ValueError for a damaged file, or one of another version."""
    try:
        with TensorFile(path) as file:
            # Cloned into torch's own memory: how it is aligned may decide the last bit of a sum.
            tensors = {name: file.read(name).clone() for name in file.entries}
            meta = json.loads(file.metadata["pycompress"])
            crc = int(file.metadata["crc32"])
    except KeyError as error:
        raise ValueError(f"{path} is no {FORMAT!r} file: it lacks {error}") from error
    except (OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path} is no {FORMAT!r} file")
    if meta.get("version") != VERSION:
        raise ValueError(f"{path} has version {meta.get('version')!r}; expected {VERSION}")
    if crc != _crc(tensors):
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    of_model = {name[len(_MODEL) :]: t for name, t in tensors.items() if name.startswith(_MODEL)}
    of_trainer = {name[len(_TRAINER) :]: t for name, t in tensors.items() if name.startswith(_TRAINER)}
    return of_model, of_trainer, meta


@torch.no_grad()
def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the values into a model of the same structure, bit for bit. Raises ValueError, and changes nothing, else."""
    own = tensors_of(model)
    if off := sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"the checkpoint is of another model: {off[0]!r} is in only one of them")
    for name, tensor in own.items():
        saved = tensors[name]
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            raise ValueError(
                f"the checkpoint is of another model: {name!r} is {saved.dtype} {tuple(saved.shape)}, "
                f"expected {tensor.dtype} {tuple(tensor.shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _crc(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor_bytes(tensor), crc)
    return crc
