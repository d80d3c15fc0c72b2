"""What a PruningSchedule saves: its step, the masks at a bit a weight, the scores so far, weights behind masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycompress.nn import MaskedLinear

_VERSION = 1
_KEYS = ("version", "step", "masks", "sums", "latent")


class State(NamedTuple):
    step: int
    masks: dict[str, Tensor]  # bool (N, K)
    sums: dict[str, Tensor]  # float32 (N, K): taylor and movement scores so far
    latent: dict[str, Tensor]  # gradient="dense": the weights where they are pruned, in order


def save_state(state: State) -> dict[str, Any]:
    """Tensors, numbers and dicts alone, as torch.load(weights_only=True) takes them. Sums are copied."""
    return {
        "version": _VERSION,
        "step": state.step,
        "masks": {name: _packed(mask) for name, mask in state.masks.items()},
        "sums": {name: tensor.clone() for name, tensor in state.sums.items()},
        "latent": dict(state.latent),
    }


def load_state(saved: Any, layers: Mapping[str, MaskedLinear], sums_until: int, has_latent: bool, op: str) -> State:
    """Checks everything against the layers, and changes nothing. Raises ValueError naming what does not fit.

    sums_until: the step before which there are sums; has_latent: whether there are weights behind masks.
    """
    if not isinstance(saved, Mapping) or any(key not in saved for key in _KEYS):
        raise ValueError(f"{op}: the state is none that state_dict() gave; expected {', '.join(_KEYS)}")
    if saved["version"] != _VERSION:
        raise ValueError(f"{op}: the state has version {saved['version']!r}; expected {_VERSION}")
    step = saved["step"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{op}: the state's step is {step!r}; expected a number from 0 on")
    has_sums = step < sums_until
    for key, there in (("masks", True), ("sums", has_sums), ("latent", has_latent)):
        _check_names(saved[key], set(layers) if there else set(), key, op)
    masks, sums, latent = {}, {}, {}
    for name, layer in layers.items():
        like = layer.mask
        masks[name] = _unpacked(saved["masks"][name], like, name, op)
        if has_sums:
            sums[name] = _checked(saved["sums"][name], torch.float32, like.shape, f"sums of layer {name!r}", op)
        if has_latent:
            shape = torch.Size((int((~masks[name]).sum()),))
            what = f"latent weights of layer {name!r}"
            latent[name] = _checked(saved["latent"][name], layer.weight.dtype, shape, what, op)
    to = {name: layer.weight.device for name, layer in layers.items()}
    return State(
        step,
        masks,
        {name: tensor.to(to[name], copy=True) for name, tensor in sums.items()},
        {name: tensor.to(to[name], copy=True) for name, tensor in latent.items()},
    )


def _check_names(found: Any, expected: set[str], key: str, op: str) -> None:
    names = set(found) if isinstance(found, Mapping) else set()
    if names != expected or not isinstance(found, Mapping):
        off = ", ".join(map(repr, sorted(map(str, names ^ expected))[:3]))
        raise ValueError(
            f"{op}: the state's {key} are not of this schedule's layers ({off}); make it with the same options"
        )


def _checked(tensor: Any, dtype: torch.dtype, shape: torch.Size, what: str, op: str) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != shape:
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{op}: the state's {what} are {got}; expected {dtype} {tuple(shape)}")
    return tensor


def _packed(mask: Tensor) -> Tensor:
    """uint8 (ceil(N * K / 8),): bit i % 8 of byte i // 8 is weight i, row after row."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << _shifts(mask.device)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Any, like: Tensor, name: str, op: str) -> Tensor:
    count = like.numel()
    what = f"mask bits of layer {name!r}"
    checked = _checked(packed, torch.uint8, torch.Size((-(-count // 8),)), what, op).to(like.device)
    bits = (checked[:, None] >> _shifts(like.device)).flatten() & 1
    if bool(bits[count:].any()):
        raise ValueError(f"{op}: the state's {what} go on past the weight's end; the file is damaged")
    return bits[:count].bool().view(like.shape)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
