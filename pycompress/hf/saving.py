"""``save_pretrained`` of compressed models: config.json says what each layer is.

transformers writes ``model.config.quantization_config`` into config.json. A model may be compressed at any time, in any
way and in part, so what stands there is worked out when the model is saved, by a step before ``save_pretrained``.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from pycompress.hf.config import METHOD, PyCompressConfig
from pycompress.structure import describe
from pycompress.structure_kinds import kind_of

_ATTRIBUTE = "quantization_config"


def quantization_config(model: nn.Module) -> dict[str, Any] | None:
    """What config.json keeps of a compressed model, as JSON takes it; None where nothing of it is compressed."""
    structure = describe(model)
    if not structure["layers"]:
        return None
    lengths = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and kind.tensors is not None and kind.unknown_length:
            tensors = kind.tensors(module)
            lengths.update({f"{name}.{key}": tensors[key].numel() for key in kind.unknown_length & set(tensors)})
    return PyCompressConfig(structure=structure, lengths=lengths).to_dict()


def whole_state(model: nn.Module, state: dict[str, Any] | None) -> dict[str, Any] | None:
    """`state` with what the state_dict of some layers leaves out, as a MaskedLinear's its mask; None as it is given."""
    for name, module in model.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is not None and kind.tensors is not None:
            own, prefix = kind.tensors(module), f"{name}." if name else ""
            if own.keys() != module.state_dict().keys():
                state = model.state_dict() if state is None else dict(state)
                state.update((prefix + key, tensor) for key, tensor in own.items())
    return state


def load(folder: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """The model that was saved in `folder`, of the class that it had.

    The class is the one of transformers that config.json names; kwargs: as from_pretrained takes them.

    Raises:
        OSError, ValueError: no such folder, or a config.json that names no class of transformers.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = next(iter(config.architectures or ()), None)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"pycompress.hf.load: config.json names the class {name!r}, which is none of transformers; load it with "
            "its own class's from_pretrained"
        )
    cls: Any = found
    return cls.from_pretrained(folder, local_files_only=True, **kwargs)


def _saving(save_pretrained: Any) -> Any:
    @functools.wraps(save_pretrained)
    def wrapped(self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        found, before = quantization_config(self), getattr(self.config, _ATTRIBUTE, None)
        ours = isinstance(before, PyCompressConfig)
        if found is None and not ours:
            return save_pretrained(self, save_directory, *args, **kwargs)
        if before is not None and not ours:
            raise ValueError(
                f"save_pretrained: layers of the model are compressed by pycompress and others by {_method(before)}, "
                "and config.json can name one of them; nothing was written"
            )
        if found is not None:
            setattr(self.config, _ATTRIBUTE, PyCompressConfig(**found))
            # The names of the model's own state_dict, as the structure has them, not those of the float checkpoint.
            kwargs.setdefault("save_original_format", False)
            if len(args) > 1:  # is_main_process, state_dict, ...
                args = (args[0], whole_state(self, args[1]), *args[2:])
            else:
                kwargs["state_dict"] = whole_state(self, kwargs.get("state_dict"))
        else:
            delattr(self.config, _ATTRIBUTE)
        try:
            return save_pretrained(self, save_directory, *args, **kwargs)
        finally:
            if before is not None:
                setattr(self.config, _ATTRIBUTE, before)
            else:
                delattr(self.config, _ATTRIBUTE)

    wrapped._pycompress = True  # type: ignore[attr-defined]
    return wrapped


def _method(config: object) -> object:
    if isinstance(config, QuantizationConfigMixin):
        return config.quant_method
    return config.get("quant_method", METHOD) if isinstance(config, dict) else config


if not hasattr(PreTrainedModel.save_pretrained, "_pycompress"):
    PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)
