"""``Int4Linear``: ``nn.Linear`` with a weight of 4 bits an element, kept in groups that share a scale.

State. A checkpoint holds plain tensors: ``weight`` uint8 (N, ceil(K / 2)), two elements a byte, even k in the low
nibbles; ``weight_scale`` float32 (N, G), G = ceil(K / group_size); ``weight_zero_point`` uint8 (N, G) unless symmetric;
and ``bias``. In memory the module keeps one copy of them: on the CPU packed for the native kernels of this machine, all
in the non-persistent buffer ``_weight``; on other devices plain, in ``_weight``, ``_weight_scale`` and
``_weight_zero_point``. It is rebuilt from the plain form wherever the module moves, loads, is copied or unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.nn.float_linear import float_bias, float_weight, make_float
from pycompress.nn.packed_weight import keep_dtypes
from pycompress.ops.eager import is_plain_eager
from pycompress.ops.int4_matmul import check_options, pick
from pycompress.ops.int4_matmul_eager import EagerPlan
from pycompress.ops.int4_matmul_reference import Call
from pycompress.ops.int4_matmul_weight import (
    group_count,
    group_size_of,
    int4_kernel_name,
    pack_nibbles,
    pack_weight_int4,
    packed_info,
    quantize_weight_int4,
    unpack_weight_int4,
)

_FROM = "Int4Linear.from_float"
_PARTS = ("weight", "weight_scale", "weight_zero_point")

# Plain weight, scales, zero points: what a checkpoint holds.
Parts = tuple[Tensor, Tensor, "Tensor | None"]


class Int4Linear(nn.Module):
    """``y = act(x @ w^T + bias)`` with a 4-bit weight; x stays float, sums are fp32.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias (a float parameter, which may be trained).
        format: ``"int4"`` (16 even steps) or ``"nf4"`` (16 values spaced for normally distributed weights).
        group_size: neighbours in a row that share a scale; -1 for a whole row. Smaller is more exact and larger in
            memory: 4 + 32 / group_size bits a weight, zero points another 8 / group_size. Packed, a group is filled up
            to a multiple of 8: groups of 1 take more than float32.
        symmetric: int4 only: False keeps a zero point a group.
        activation: fused into the kernel: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``; a named one runs or raises.

    Input ``(..., K)`` float32, bfloat16 or float16; output ``(..., N)`` of the same dtype. A new module holds a zero
    weight, to be filled by ``load_state_dict``; :meth:`from_float` makes one from a trained layer.
    """

    bias: nn.Parameter | None
    _weight: Tensor
    _weight_scale: Tensor | None
    _weight_zero_point: Tensor | None
    _plan: EagerPlan | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "int4",
        group_size: int = 128,
        symmetric: bool = True,
        activation: str = "none",
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_options(format, symmetric, activation, backend)
        self.in_features, self.out_features = in_features, out_features
        self.format, self.symmetric = format, symmetric
        self.group_size = group_size_of("Int4Linear", group_size, in_features)
        self.activation, self.backend = activation, backend
        for name in _PARTS:
            self.register_buffer("_" + name, None, persistent=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, device=device)) if bias else None)
        self._set_parts(self._zeros(device))

    def _zeros(self, device: torch.device | str | None) -> Parts:
        """The parts of a zero weight."""
        shape = self.out_features, group_count(self.in_features, self.group_size)
        zero = 7 if self.format == "nf4" else 8 if self.symmetric else 0
        q = torch.full((self.out_features, self.in_features), zero, dtype=torch.uint8, device=device)
        zero_point = None if self.symmetric else torch.zeros(shape, dtype=torch.uint8, device=device)
        return pack_nibbles(q), torch.ones(shape, dtype=torch.float32, device=device), zero_point

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        format: str = "int4",
        activation: str | None = None,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        backend: str = "auto",
    ) -> Int4Linear:
        """Quantise an ``nn.Linear`` (or transformers' ``Conv1D``), which stays as it is.

        Args:
            linear: the trained layer; its device, training flag and the dtype of its bias carry over. A MaskedLinear is
                taken with its mask: what is pruned stays 0.
            format, group_size, symmetric, backend: as above.
            activation: fused activation, none by default.

        Raises:
            ValueError: an unknown option, or a weight that holds NaN or Inf or is on the meta device.
        """
        check_options(format, symmetric, activation or "none", backend)
        weight = float_weight(linear, _FROM)
        parts = quantize_weight_int4(weight, format, group_size, symmetric)
        bias, (n, k) = float_bias(linear), weight.shape
        module = cls(
            k,
            n,
            bias is not None,
            format=format,
            group_size=group_size,
            symmetric=symmetric,
            activation=activation or "none",
            backend=backend,
            device="meta",
        )
        module.bias = bias
        module._set_parts(parts)
        return module.train(linear.training)

    def to_float(self) -> nn.Module:
        """The ``nn.Linear`` with the dequantised weight, in the bias's dtype (float32 without one).

        A fused activation follows it, in an ``nn.Sequential``.
        """
        weight = self._call_of(self._plain_x(0)).float_weight()
        return make_float(weight, self.bias, self.activation, self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and is_plain_eager(x):
            plan = self._plan
            if plan is None or not plan.is_for(self._buffers, self._parameters["bias"]):
                plan = self._renew_plan(x)
            y = None if plan is None else plan.run(x)
            if y is not None:
                return y
        return torch.ops.pycompress.int4_linear.default(
            x,
            self._weight,
            self._weight_scale,
            self._weight_zero_point,
            self.bias,
            self.in_features,
            self.out_features,
            self.format,
            self.group_size,
            self.activation,
            self.backend,
        )

    def _renew_plan(self, x: Tensor) -> EagerPlan | None:
        check_options(self.format, self.symmetric, self.activation, self.backend)
        if self.backend in ("auto", "native"):
            self._plan = EagerPlan.make(self._call_of(x))
        return self._plan

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("activation", "backend"):
            self._plan = None  # made for the old one
        if name == "backend" and self._buffers.get("_weight") is not None:
            self._arrange()

    # ---- state ------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """uint8 (N, ceil(K / 2)), unpacked anew at each access, as the scales and the zero points are."""
        return self._parts()[0]

    @property
    def weight_scale(self) -> Tensor:
        """float32 (N, G)."""
        return self._parts()[1]

    @property
    def weight_zero_point(self) -> Tensor | None:
        """uint8 (N, G), or None where symmetric."""
        return self._parts()[2]

    def _parts(self) -> Parts:
        if self._weight.dim() == 1:
            return unpack_weight_int4(self._weight)
        assert self._weight_scale is not None
        return self._weight, self._weight_scale, self._weight_zero_point

    def _set_parts(self, parts: Parts) -> None:
        self._weight, self._weight_scale, self._weight_zero_point = parts
        self._arrange()

    def memory_bytes(self) -> int:
        """Bytes of memory the module holds: weight as kept, scales, zero points, bias."""
        return sum(t.nbytes for t in (*self._buffers.values(), *self._parameters.values()) if t is not None)

    def _arrange(self) -> None:
        """Bring the weight into the form that its backend wants: packed on the CPU, plain elsewhere, and for a GPU
        backend that is interpreted on the CPU.
        """
        wants_packed = self._weight.device.type == "cpu" and self.backend != "triton"
        if wants_packed and self._weight.dim() == 2:
            weight, scale, zero_point = self._parts()
            options = {"in_features": self.in_features, "format": self.format, "group_size": self.group_size}
            self._weight = pack_weight_int4(weight, scale, zero_point, **options)  # type: ignore[arg-type]
            self._weight_scale = self._weight_zero_point = None
        elif not wants_packed and self._weight.dim() == 1:
            parts = self._zeros("meta") if self._weight.is_meta else unpack_weight_int4(self._weight)
            self._weight, self._weight_scale, self._weight_zero_point = parts
        self._plan = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        if self.bias is not None and self.bias.dtype == torch.float64:
            self.bias.data = self.bias.data.float()  # the kernels take none
        if self._lost(before["_weight"]):  # to_empty(): new memory, without the values
            self._set_parts(self._zeros(self._weight.device))
        self._arrange()
        return self

    def _lost(self, before: Tensor | None) -> bool:
        """Whether the weight was of values, or none that anybody knew, and its bytes are now nobody's."""
        if self._weight.is_meta or before is None:
            return False
        return before.is_meta or (_opens(before) and not _opens(self._weight))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        plain = dict(zip(("_weight", "_weight_scale", "_weight_zero_point"), self._parts(), strict=True))
        state["_buffers"] = {**self._buffers, **plain}
        state["_plan"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._arrange()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, part in zip(_PARTS, self._parts(), strict=True):
            if part is not None:
                destination[prefix + name] = part
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
        names = _PARTS[:2] if self.symmetric else _PARTS
        parts = {name: rest.pop(prefix + name, None) for name in names}
        errors = self._state_errors(parts, rest.get(prefix + "bias"), prefix)
        if errors:  # nothing of this layer is loaded: a weight never meets another weight's scale
            error_msgs.extend(errors)
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if parts["weight"] is None:
            if strict:
                missing_keys.extend(prefix + name for name in names)
        elif assign or not self._weight.is_meta:
            device = None if assign else self._weight.device
            copied = [t.detach().to(device or t.device, copy=True).contiguous() for t in parts.values()]
            self._set_parts((copied[0], copied[1], None if self.symmetric else copied[2]))
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _state_errors(self, parts: Mapping[str, object], bias: object, prefix: str) -> list[str]:
        given = [name for name, part in parts.items() if part is not None]
        errors = [
            f"Int4Linear: {prefix}{', '.join(given)} without {prefix}{name}; they belong together"
            for name in parts
            if given and name not in given
        ]
        groups = (self.out_features, group_count(self.in_features, self.group_size))
        expected = {
            "weight": (torch.uint8, (self.out_features, (self.in_features + 1) // 2)),
            "weight_scale": (torch.float32, groups),
            "weight_zero_point": (torch.uint8, groups),
        }
        for name in given:
            part, (dtype, shape) = parts[name], expected[name]
            if isinstance(part, Tensor) and part.dtype == dtype and tuple(part.shape) == shape:
                if name == "weight_zero_point" and not part.is_meta and part.numel() and part.max() > 15:
                    errors.append(f"Int4Linear: {prefix}{name} holds {int(part.max())}, expected 0 to 15")
                continue
            got = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            errors.append(f"Int4Linear: {prefix}{name} is {got}, expected {dtype} {shape}{_remedy(name, part)}")
        own = self.bias
        if own is not None and bias is not None and not (isinstance(bias, Tensor) and bias.shape == own.shape):
            got = str(tuple(bias.shape)) if isinstance(bias, Tensor) else type(bias).__name__
            errors.append(f"Int4Linear: {prefix}bias is {got}, expected {tuple(own.shape)}")
        return errors

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={self.bias is not None}",
            f"format={self.format}",
            f"group_size={self.group_size}",
        ]
        if not self.symmetric:
            parts.append("symmetric=False")
        if self.activation != "none":
            parts.append(f"activation={self.activation}")
        parts.append(f"backend={self._runs()}")
        return ", ".join(parts)

    def _runs(self) -> str:
        """Who computes."""
        try:
            name = pick(self.backend, self._call_of(self._plain_x(1))).name
        except ValueError:
            return f"{self.backend} (cannot run on {self._weight.device})"
        return f"native:{int4_kernel_name(self._weight)}" if name == "native" else name

    def _plain_x(self, tokens: int) -> Tensor:
        return torch.empty(1, device=self._weight.device).expand(tokens, self.in_features)  # values matter to nobody

    def _call_of(self, x: Tensor) -> Call:
        return Call(
            x,
            self._weight,
            self._weight_scale,
            self._weight_zero_point,
            self.bias,
            self.in_features,
            self.out_features,
            self.format,
            self.group_size,
            self.activation,
        )


def _opens(weight: Tensor) -> bool:
    """Whether this is a weight: plain, or packed with a sound header."""
    if weight.dim() != 1 or weight.is_meta:
        return True
    try:
        packed_info(weight.cpu())
    except ValueError:
        return False
    return True


def _remedy(name: str, part: object) -> str:
    if name == "weight" and isinstance(part, Tensor) and part.is_floating_point():
        return "; a float checkpoint is loaded into the float model first, then quantize_ converts it"
    if name != "weight" and isinstance(part, Tensor) and part.dim() == 2:
        return "; the file's group size is another than the layer's"
    return ""
