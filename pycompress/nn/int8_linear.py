"""``Int8Linear``: ``nn.Linear`` with an int8 weight.

State. A checkpoint holds plain tensors: ``weight`` int8 (N, K), ``weight_scale`` float32 (N,), ``bias``, and in static
mode ``input_scale`` and ``input_zero_point``. See packed_weight.py for what the module keeps in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn.fake_quant_linear import FakeQuantLinear
from pycompress.nn.float_linear import float_bias, float_weight, make_float
from pycompress.nn.packed_weight import PackedWeight
from pycompress.ops.eager import is_plain_eager
from pycompress.ops.int8_matmul import check_options, pick
from pycompress.ops.int8_matmul_eager import EagerPlan
from pycompress.ops.int8_matmul_reference import Call
from pycompress.ops.int8_matmul_weight import static_qparams, static_tensors

_FROM = "Int8Linear.from_float"


class Int8Linear(PackedWeight):
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
    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def _pack(self, weight: Tensor) -> Tensor:
        return ops.pack_weight(weight)

    def _unpack(self, packed: Tensor) -> Tensor:
        return ops.unpack_weight(packed)

    def _kernel_name(self, packed: Tensor) -> str:
        return ops.kernel_name(packed)

    def _wants_packed(self) -> bool:
        return self.backend not in ("cuda", "triton")  # which are emulated or interpreted on the CPU

    def _arrange(self) -> None:
        super()._arrange()
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_plan": None}

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
        return f"native:{self._kernel_name(self._weight)}" if "native" in names else "/".join(names)

    def _call_of(self, tokens: int) -> Call:
        x = self.weight_scale.new_empty(1).expand(tokens, self.in_features)  # its values matter to nobody
        statics = self.input_scale, self.input_zero_point
        return Call(x, self._weight, self.weight_scale, self.bias, self.mode, *statics, self.activation)
