"""Names of tensors in the checkpoints of a Hugging Face class, where they are not those of the model.

transformers 5 renames and merges tensors on loading and does the reverse on saving: the experts of a mixture are one
3-D parameter in the model and a tensor each in a checkpoint. Other engines read checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from pycompress.compressed_tensors.config import CompressedTensorsError
from pycompress.tensor_file import Pending

Tensors = dict[str, Pending]
_MOST_TRANSIENT = 1 << 26  # bytes


def _loading(model: nn.Module) -> Any:
    """transformers' module of conversions; None for a model that is none of its own."""
    models = sys.modules.get("transformers.modeling_utils")
    if models is None or not isinstance(model, models.PreTrainedModel):
        return None
    return sys.modules.get("transformers.core_model_loading")


def checkpoint_tensors(model: nn.Module, tensors: Tensors) -> Tensors:
    """The tensors of `model` as a checkpoint of its class names and cuts them."""
    loading = _loading(model)
    if loading is None:
        return tensors
    empty = {name: torch.empty(item.shape, dtype=item.dtype, device="meta") for name, item in tensors.items()}
    if set(loading.revert_weight_conversion(model, empty)) == set(tensors):
        return tensors
    made = {name: item.make() for name, item in tensors.items()}
    return {name: Pending.of(tensor) for name, tensor in loading.revert_weight_conversion(model, made).items()}


def model_tensors(model: nn.Module, tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a checkpoint as `model` names and merges them; and for each layer of theirs the checkpoint's name.

    Raises:
        CompressedTensorsError: transformers cannot merge them.
    """
    loading = _loading(model)
    if loading is None:
        return tensors, {}
    from transformers.conversion_mapping import get_model_conversion_mapping

    steps = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    merges = [step for step in steps if isinstance(step, loading.WeightConverter)]
    renames = [step for step in steps if not isinstance(step, loading.WeightConverter)]
    by_pattern = {pattern: step for step in merges for pattern in step.source_patterns}
    found: Tensors = {}
    layers: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for name in sorted(tensors, key=loading.dot_natural_key):
        new, pattern = loading.rename_source_key(name, renames, merges)
        if pattern is None:
            found[new] = tensors[name]
            layers[new.rpartition(".")[0]] = name.rpartition(".")[0]
        else:
            step = merged.setdefault(new, deepcopy(by_pattern[pattern]))
            step.add_tensor(new, name, pattern, tensors[name].make())
    for name, step in merged.items():
        found.update(_merged(model, name, step))
    return found, layers


def _merged(model: nn.Module, name: str, step: Any) -> Mapping[str, Pending]:
    try:
        made = step.convert(name, model=model, config=model.config)
    except Exception as error:
        raise CompressedTensorsError(f"{name} cannot be merged of its parts by transformers: {error}") from error
    return {key: Pending.of(value[0] if isinstance(value, list) else value) for key, value in made.items()}


def compute_transient_(model: nn.Module, tensors: Tensors) -> None:
    """Give a model on the meta device what no checkpoint holds: position ids, frequencies of rotary embeddings.

    Raises:
        CompressedTensorsError: they would be larger than a model of these tensors has them.
    """
    found = [
        (module, key, buffer)
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if key in module._non_persistent_buffers_set and buffer is not None and buffer.is_meta
    ]
    size, most = sum(buffer.nbytes for *_, buffer in found), _MOST_TRANSIENT + sum(t.nbytes for t in tensors.values())
    if size > most:
        raise CompressedTensorsError(f"its configuration wants {size} bytes of buffers; at most {most} are made")
    for module, key, buffer in found:
        module._buffers[key] = torch.zeros_like(buffer, device="cpu")
    cast(Any, model).initialize_weights()  # parameters are on the meta device, and stay there
