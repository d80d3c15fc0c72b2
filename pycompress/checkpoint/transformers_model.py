"""Models of Hugging Face's transformers: their configuration as JSON, and back to a model on the meta device.

    {"class": "BertForSequenceClassification", "config": {...}, "attention": "sdpa", "generation_config": {...} | null}

The class is looked up by its name in the package transformers, and nowhere else. What a configuration may hold that
leads out of it, code on the hub, weights of another model, a quantiser, is left out of what is written and of what is
read; the hub is out of reach while a model is built.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from pycompress import hf_support
from pycompress.model_description import ModelFileError

_ATTENTIONS = ("eager", "sdpa")  # those that run anywhere
_LEADS_OUT = ("auto_map", "quantization_config", "attn_implementation", "experts_implementation", "custom_pipelines")
_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]{0,100}")
_LARGEST_NUMBER = 2**31
# transformers makes Python lists and dicts of these numbers before it builds a module.
_LAYERS, _MOST_LAYERS = re.compile(r"(layers?|depths?|blocks?)$"), 1000
_LABELS, _MOST_LABELS = "num_labels", 2**17


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What to keep of a model from which build() makes it again; None where it is no model of transformers."""
    if "transformers.modeling_utils" not in sys.modules or _class_of(type(model).__name__) is not type(model):
        return None
    config: Any = model.config
    generation: Any = getattr(model, "generation_config", None)
    attention = getattr(config, "_attn_implementation", None)
    return {
        "class": type(model).__name__,
        "config": _inside(json.loads(config.to_json_string())),
        "attention": attention if attention in _ATTENTIONS else None,
        "generation_config": None if generation is None else json.loads(generation.to_json_string()),
    }


def config_files(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and texts of the files that transformers reads beside the weights; none for another model."""
    described = describe(model)
    if described is None:
        return
    # Without a dtype transformers would take that of the first float tensor, which may be a scale.
    dtype = str(model.dtype).removeprefix("torch.")
    config = {**described["config"], "architectures": [described["class"]], "dtype": dtype}
    if not hf_support.why_not():
        from pycompress.hf import quantization_config

        quantization = quantization_config(model)
        if quantization is not None:
            config["quantization_config"] = quantization
    yield "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n"
    if described["generation_config"] is not None:
        yield "generation_config.json", json.dumps(described["generation_config"], indent=2, sort_keys=True) + "\n"


def build(described: object, tensors: int, folder: str | os.PathLike[str]) -> nn.Module:
    """The model on the meta device. tensors: how many the checkpoint has, which bounds the size of what is built.

    Raises:
        ModelFileError: the checkpoint is of another sort of model, or its configuration is none.
    """
    folder = os.fspath(folder)
    if described is None:
        raise ModelFileError(
            f"{folder} holds no model of transformers that could be built from its configuration; build the model "
            "yourself and pass it: load_pretrained(folder, model)"
        )
    fields: dict[str, Any] = described if isinstance(described, dict) else {}
    name, config = fields.get("class"), fields.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ModelFileError(f"{folder} is damaged: its model of transformers is {str(described)[:100]}")
    if why_not := hf_support.why_not():
        raise ModelFileError(f"{folder} holds a {name} of transformers, and {why_not}")
    import transformers

    cls: Any = _class_of(name)
    if cls is None:
        raise ModelFileError(
            f"{folder} holds a {name[:100]!r}, which transformers {transformers.__version__} does not have; update "
            "transformers, or build the model yourself and pass it: load_pretrained(folder, model)"
        )
    _check_numbers(config, tensors, folder)
    attention, generation = fields.get("attention"), fields.get("generation_config")
    options = {"attn_implementation": attention} if attention in _ATTENTIONS else {}
    try:
        decoded = getattr(cls.config_class, "_decode_special_floats", dict)(_inside(config))
        with _building(tensors):
            model = cls._from_config(cls.config_class.from_dict(decoded), **options)
        if isinstance(generation, dict):
            model.generation_config = transformers.GenerationConfig.from_dict(generation)
    except Exception as error:  # whatever a configuration that says anything leads to
        text = f"{type(error).__name__}: {error}"[:300]
        raise ModelFileError(f"{folder}: its configuration builds no {name} ({text}); it is damaged") from error
    return model


def _class_of(name: str) -> type | None:
    """The model class of transformers that has this name."""
    import transformers

    cls = getattr(transformers, name, None) if _CLASS.fullmatch(name) else None
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def _inside(value: Any) -> Any:
    """A configuration without what leads out of the package."""
    if isinstance(value, dict):
        kept = {key: _inside(each) for key, each in value.items() if not _leads_out(key)}
        return {**kept, "use_pretrained_backbone": False} if "use_pretrained_backbone" in kept else kept
    return [_inside(each) for each in value] if isinstance(value, list) else value


def _leads_out(key: str) -> bool:
    return key.startswith("_") or key in _LEADS_OUT


def _check_numbers(value: object, tensors: int, folder: str, key: str = "", most: int = _LARGEST_NUMBER) -> None:
    """Raises ModelFileError where a number is larger than a checkpoint of so many tensors can have it."""
    if isinstance(value, dict):
        for name, each in value.items():
            is_layers, is_labels = _LAYERS.search(name) is not None, name == _LABELS
            at_most = _MOST_LAYERS + tensors if is_layers else _MOST_LABELS if is_labels else _LARGEST_NUMBER
            _check_numbers(each, tensors, folder, name, at_most)
    elif isinstance(value, list):
        for each in value:
            _check_numbers(each, tensors, folder, key, most)
    elif type(value) is int and abs(value) > most:
        raise ModelFileError(
            f"{folder} is damaged: its configuration has {key[:100]}={str(value)[:40]}; expected at most {most}"
        )


@contextmanager
def _building(tensors: int) -> Iterator[None]:
    """On the meta device, without the hub; no more parameters than the checkpoint may be of."""
    from huggingface_hub import constants

    thread, most, count = threading.get_ident(), 4 * tensors + 1000, 0

    def registered(module: nn.Module, name: str, parameter: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise ModelFileError(f"it has more than {most} parameters, and the checkpoint {tensors} tensors")

    since_5 = importlib.util.find_spec("transformers.initialization") is not None
    initialization = importlib.import_module("transformers.initialization") if since_5 else None
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    offline = constants.HF_HUB_OFFLINE
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(safe())
        stack.callback(nn.modules.module.register_module_parameter_registration_hook(registered).remove)
        stack.callback(setattr, constants, "HF_HUB_OFFLINE", offline)
        constants.HF_HUB_OFFLINE = True
        yield
