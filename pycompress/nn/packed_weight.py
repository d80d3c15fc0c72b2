"""The state of a module whose weight is kept packed for this machine: saved plain, rebuilt wherever it moves.

A checkpoint holds plain tensors: ``weight`` and the buffers and parameters that the module registers. In memory the
module keeps one copy of the weight, in the non-persistent buffer ``_weight``: packed (uint8, 1-D) for the native
kernels of this machine, or plain (int8). It is rebuilt from the plain form wherever the module moves, loads, is copied
or unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def keep_dtypes(module: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """After ``_apply``: integers, scales and the like stay what they were under .half(), .type() and so on.

    before: the buffers by name, as they were; on their new device they take the dtype that they had.
    """
    for name, old in before.items():
        new = module._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)


class PackedWeight(nn.Module):
    """Base of such modules. A subclass registers its buffers, then calls :meth:`_arrange`; it says in

    ``_weight_shape``   the plain shape;
    ``_pack, _unpack``  plain to packed and back;
    ``_kernel_name``    who runs with a packed weight here; raises ``ValueError`` for what is none;
    ``_wants_packed``   whether its backend and mode read the packed form, on the CPU.
    """

    _weight: Tensor

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _pack(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _unpack(self, packed: Tensor) -> Tensor:
        raise NotImplementedError

    def _kernel_name(self, packed: Tensor) -> str:
        raise NotImplementedError

    def _wants_packed(self) -> bool:
        raise NotImplementedError

    # ---- the weight -------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The plain int8 weight, unpacked anew at each access."""
        return self._plain_weight()

    def _plain_weight(self) -> Tensor:
        return self._unpack(self._weight) if self._weight.dtype == torch.uint8 else self._weight

    def memory_bytes(self) -> int:
        """Bytes of memory the module holds: weight as kept, scales, bias."""
        return sum(t.nbytes for t in (*self._buffers.values(), *self._parameters.values()) if t is not None)

    def _arrange(self) -> None:
        """Bring the weight into the form that its backend wants."""
        weight = self._weight
        if weight.device.type == "cpu" and self._wants_packed():
            if weight.dtype == torch.int8:
                self._weight = self._pack(weight)
        elif weight.dtype == torch.uint8:
            meta = weight.is_meta
            self._weight = weight.new_empty(self._weight_shape, dtype=torch.int8) if meta else self._unpack(weight)

    def _opens(self, weight: Tensor | None) -> bool:
        """Whether this is a weight: plain, or packed with a sound header."""
        if weight is None or weight.dtype != torch.uint8 or weight.is_meta:
            return weight is not None
        try:
            self._kernel_name(weight.cpu())
        except ValueError:
            return False
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        bias = self._parameters.get("bias")
        if bias is not None and bias.dtype == torch.float64:
            bias.data = bias.data.float()  # the kernels take none
        if self._opens(before["_weight"]) and not self._opens(self._weight):  # to_empty(): memory without the values
            self._weight = torch.zeros(self._weight_shape, dtype=torch.int8, device=self._weight.device)
        self._arrange()
        return self

    # ---- copies and files -------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "_weight": self._plain_weight()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._arrange()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self._plain_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = dict(state_dict)
        weight = rest.pop(prefix + "weight", None)
        errors = self._state_errors(rest, weight, prefix)
        if errors:  # nothing of this layer is loaded: a weight never meets another weight's scale
            error_msgs.extend(errors)
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if weight is None:
            if strict:
                missing_keys.append(prefix + "weight")
        elif assign or not self._weight.is_meta:
            self._weight = weight.detach().to(weight.device if assign else self._weight.device, copy=True)
            self._arrange()
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _state_errors(self, rest: Mapping[str, Any], weight: object, prefix: str) -> list[str]:
        shape, kind = self._weight_shape, type(self).__name__
        errors = []
        if weight is not None and not (
            isinstance(weight, Tensor) and weight.dtype == torch.int8 and tuple(weight.shape) == shape
        ):
            got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            remedy = ""
            if isinstance(weight, Tensor) and weight.is_floating_point():
                remedy = "; a float checkpoint is loaded into the float model first, then quantize_ converts it"
            errors.append(f"{kind}: {prefix}weight is {got}, expected torch.int8 {shape}{remedy}")
        if (weight is None) != (rest.get(prefix + "weight_scale") is None):
            there, lacking = ("weight_scale", "weight") if weight is None else ("weight", "weight_scale")
            errors.append(f"{kind}: {prefix}{there} comes without {prefix}{lacking}; they belong together")
        for name, own in (*self._buffers.items(), *self._parameters.items()):
            new = rest.get(prefix + name)
            if own is None or new is None or name == "_weight":
                continue
            if not isinstance(new, Tensor) or new.shape != own.shape:
                got = str(tuple(new.shape)) if isinstance(new, Tensor) else type(new).__name__
                errors.append(f"{kind}: {prefix}{name} is {got}, expected {tuple(own.shape)}")
            elif name != "bias" and new.dtype != own.dtype:
                errors.append(f"{kind}: {prefix}{name} is {new.dtype}, expected {own.dtype}")
        return errors
