"""Which model a run is of: a digest of every tensor, so that the first difference can be named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pycompress.tensor_file import tensor_bytes

_DIGITS = 16  # hexadecimal, of each digest: a file is compared with what it claims to be, not with a forger's


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, each tensor once, also those that a state_dict leaves out."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    found.update(model.named_buffers())
    return {name: tensor for name, tensor in found.items() if not nn.parameter.is_lazy(tensor)}


def tensor_digest(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:_DIGITS]


def text_digest(content: object) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def modules_digest(model: nn.Module) -> str:
    """Of the structure: the class and the name of every module."""
    return text_digest([f"{type(m).__module__}.{type(m).__qualname__} {name}" for name, m in model.named_modules()])


def model_identity(model: nn.Module) -> dict[str, Any]:
    """{class, parameters, fingerprint, modules, tensors}; JSON-able.

    parameters: their number. fingerprint: of the whole. modules: a digest of the structure, module by module.
    tensors: {name: digest}.
    """
    modules = modules_digest(model)
    tensors = {name: tensor_digest(tensor) for name, tensor in tensors_of(model).items()}
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p)),
        "fingerprint": text_digest([modules, tensors]),
        "modules": modules,
        "tensors": tensors,
    }


def first_difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Where two identities differ, in words; None where they are of one model."""
    if stored.get("fingerprint") == given["fingerprint"]:
        return None
    for key in ("class", "parameters"):
        if stored.get(key) != given[key]:
            return f"its {key} was {stored.get(key)!r} and is {given[key]!r}"
    old, new = stored.get("tensors") or {}, given["tensors"]
    for name in new:
        if name not in old:
            return f"it has {name!r}, which was not there"
        if old[name] != new[name]:
            return f"{name!r} has other values"
    gone = next((name for name in old if name not in new), None)
    return f"it lacks {gone!r}" if gone is not None else "its modules are others"
