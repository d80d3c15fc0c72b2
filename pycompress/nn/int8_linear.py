"""``Int8Linear``: ``nn.Linear`` with an int8 weight.

State. A checkpoint holds plain tensors: ``weight`` int8 (N, K), ``weight_scale`` float32 (N,), ``bias``, and in static
mode ``input_scale`` and ``input_zero_point``. In memory the module keeps one copy of the weight, in the non-persistent
buffer ``_weight``: on the CPU packed for the native kernels of this machine, on other devices plain. It is rebuilt from
the plain form wherever the module moves, loads, is copied or unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn.fake_quant_linear import FakeQuantLinear
from pycompress.nn.float_linear import float_bias, float_weight, make_float
from pycompress.ops.eager import is_plain_eager
from pycompress.ops.int8_matmul import check_options, pick
from pycompress.ops.int8_matmul_eager import EagerPlan
from pycompress.ops.int8_matmul_reference import Call
from pycompress.ops.int8_matmul_weight import static_qparams, static_tensors

_FROM = "Int8Linear.from_float"


def _opens(weight: Tensor | None) -> bool:
    """Whether this is a weight: plain, or packed with a sound header."""
    if weight is None or weight.dtype != torch.uint8 or weight.is_meta:
        return weight is not None
    try:
        ops.kernel_name(weight.cpu())
    except ValueError:
        return False
    return True


class Int8Linear(nn.Module):
    """``y = act(x @ weight^T + bias)`` with an int8 weight, one scale an output row.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias (a float parameter, which may be trained).
        mode: ``"dynamic"`` (activations quantised per token), ``"static"`` (per tensor, calibrated) or
            ``"weight_only"`` (activations stay float).
        activation: fused into the kernel: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: ``"auto"``, ``"native"``, ``"cuda"``, ``"triton"`` or ``"reference"``; a named one runs or raises.

    Input ``(..., K)`` float32, bfloat16 or float16; output ``(..., N)`` of the same dtype. A new module holds a zero
    weight, to be filled by ``load_state_dict``; :meth:`from_float` makes one from a trained layer.
    """

    bias: nn.Parameter | None
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    _weight: Tensor
    _plan: EagerPlan | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: str = "dynamic",
        activation: str = "none",
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_options(mode, activation, backend)
        self.in_features, self.out_features = in_features, out_features
        self.mode, self.activation, self.backend = mode, activation, backend
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("_weight", weight, persistent=False)
        self.register_buffer("weight_scale", torch.ones(out_features, device=device, dtype=torch.float32))
        input_scale, zero_point = static_tensors((1.0, 0) if mode == "static" else None, device)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", zero_point)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, device=device)) if bias else None)
        self._arrange()

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        mode: str | None = None,
        activation: str | None = None,
        *,
        input_range: tuple[float, float] | None = None,
        backend: str = "auto",
    ) -> Int8Linear:
        """Quantise an ``nn.Linear`` (or transformers' ``Conv1D``), which stays as it is.

        Args:
            linear: the trained layer; its device, training flag and the dtype of its bias carry over. A MaskedLinear is
                taken with its mask, a FakeQuantLinear with its mode and range too.
            mode: ``"dynamic"`` by default; of a FakeQuantLinear the one that it was trained for.
            activation: fused activation, none by default.
            input_range: least and greatest activation, needed by (and only by) static mode; ``calibrate`` finds it.

        Raises:
            ValueError: an unknown option, a weight that holds NaN or Inf or is on the meta device, a missing or
                superfluous ``input_range``, or another mode than a FakeQuantLinear was trained for.
        """
        trained = linear.mode if isinstance(linear, FakeQuantLinear) else None
        mode = mode or trained or "dynamic"
        check_options(mode, activation or "none", backend)
        if trained not in (None, mode):
            raise ValueError(
                f"{_FROM}: mode={mode!r} but the layer was trained for mode={trained!r}; leave mode out, or quantise "
                "what its to_linear() returns"
            )
        if isinstance(linear, FakeQuantLinear) and input_range is None:
            statics = linear.input_scale, linear.input_zero_point
        else:
            statics = static_tensors(static_qparams(mode, input_range, _FROM), None)
        quantized, scale = ops.quantize_weight(float_weight(linear, _FROM))
        bias = float_bias(linear)

        n, k = quantized.shape
        module = cls(k, n, bias is not None, mode=mode, activation=activation or "none", backend=backend, device="meta")
        module._weight, module.weight_scale = quantized, scale
        module.bias = bias
        module.input_scale, module.input_zero_point = (
            None if t is None else t.to(scale.device, copy=True) for t in statics
        )
        module._arrange()
        return module.train(linear.training)

    def to_float(self) -> nn.Module:
        """The ``nn.Linear`` with the dequantised weight, in the bias's dtype (float32 without one).

        A fused activation follows it, in an ``nn.Sequential``.
        """
        weight = self._plain_weight().float() * self.weight_scale[:, None]
        return make_float(weight, self.bias, self.activation, self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and is_plain_eager(x):
            plan = self._plan
            if plan is None or not plan.is_for(self._buffers, self._parameters["bias"]):
                plan = self._renew_plan(x)
            y = None if plan is None else plan.run(x)
            if y is not None:
                return y
        return torch.ops.pycompress.int8_linear.default(
            x,
            self._weight,
            self.weight_scale,
            self.bias,
            self.mode,
            self.input_scale,
            self.input_zero_point,
            self.activation,
            self.backend,
        )

    def _renew_plan(self, x: Tensor) -> EagerPlan | None:
        check_options(self.mode, self.activation, self.backend)
        if self.backend in ("auto", "native"):
            bias = self._parameters["bias"]
            self._plan = EagerPlan.make(x, self._buffers, bias, self.mode, self.activation)
        return self._plan

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("mode", "activation", "backend"):
            self._plan = None  # made for the old one
        if name == "backend" and "_weight" in self._buffers:
            self._arrange()

    # ---- state ------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """int8 (N, K), unpacked anew at each access."""
        return self._plain_weight()

    def _plain_weight(self) -> Tensor:
        return ops.unpack_weight(self._weight) if self._weight.dtype == torch.uint8 else self._weight

    def memory_bytes(self) -> int:
        """Bytes of memory the module holds: weight as kept, scales, bias."""
        return sum(t.nbytes for t in (*self._buffers.values(), *self._parameters.values()) if t is not None)

    def _arrange(self) -> None:
        """Bring the weight into the form that its backend wants: packed on the CPU, plain elsewhere, and for a GPU
        backend that is emulated or interpreted on the CPU.
        """
        weight = self._weight
        if weight.device.type == "cpu" and self.backend not in ("cuda", "triton"):
            if weight.dtype == torch.int8:
                self._weight = ops.pack_weight(weight)
        elif weight.dtype == torch.uint8:
            shape = (self.out_features, self.in_features)
            self._weight = weight.new_empty(shape, dtype=torch.int8) if weight.is_meta else ops.unpack_weight(weight)
        self._plan = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)  # .half(), .type() and the like: integers and scales stay
        if self.bias is not None and self.bias.dtype == torch.float64:
            self.bias.data = self.bias.data.float()  # the kernels take none
        if _opens(before["_weight"]) and not _opens(self._weight):  # to_empty(): new memory, without the values
            shape = (self.out_features, self.in_features)
            self._weight = torch.zeros(shape, dtype=torch.int8, device=self._weight.device)
        self._arrange()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "_weight": self.weight}
        state["_plan"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._arrange()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
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
        shape = (self.out_features, self.in_features)
        errors = []
        if weight is not None and not (
            isinstance(weight, Tensor) and weight.dtype == torch.int8 and tuple(weight.shape) == shape
        ):
            got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            remedy = ""
            if isinstance(weight, Tensor) and weight.is_floating_point():
                remedy = "; a float checkpoint is loaded into the float model first, then quantize_ converts it"
            errors.append(f"Int8Linear: {prefix}weight is {got}, expected torch.int8 {shape}{remedy}")
        if (weight is None) != (rest.get(prefix + "weight_scale") is None):
            there, lacking = ("weight_scale", "weight") if weight is None else ("weight", "weight_scale")
            errors.append(f"Int8Linear: {prefix}{there} comes without {prefix}{lacking}; they belong together")
        for name in ("weight_scale", "bias", "input_scale", "input_zero_point"):
            own, new = getattr(self, name), rest.get(prefix + name)
            if own is None or new is None:
                continue
            if not isinstance(new, Tensor) or new.shape != own.shape:
                got = str(tuple(new.shape)) if isinstance(new, Tensor) else type(new).__name__
                errors.append(f"Int8Linear: {prefix}{name} is {got}, expected {tuple(own.shape)}")
            elif name != "bias" and new.dtype != own.dtype:
                errors.append(f"Int8Linear: {prefix}{name} is {new.dtype}, expected {own.dtype}")
        return errors

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={self.bias is not None}",
            f"mode={self.mode}",
        ]
        if self.activation != "none":
            parts.append(f"activation={self.activation}")
        parts.append(f"backend={self._runs()}")
        return ", ".join(parts)

    def _runs(self) -> str:
        """Who computes, on a GPU for one token and for many."""
        try:
            names = dict.fromkeys(pick(self.backend, self._call_of(tokens)).name for tokens in (1, 4096))
        except ValueError:
            return f"{self.backend} (cannot run on {self._weight.device})"
        return f"native:{ops.kernel_name(self._weight)}" if "native" in names else "/".join(names)

    def _call_of(self, tokens: int) -> Call:
        x = self.weight_scale.new_empty(1).expand(tokens, self.in_features)  # its values matter to nobody
        statics = self.input_scale, self.input_zero_point
        return Call(x, self._weight, self.weight_scale, self.bias, self.mode, *statics, self.activation)
