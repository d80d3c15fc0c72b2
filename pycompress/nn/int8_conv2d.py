"""``Int8Conv2d``: ``nn.Conv2d`` with an int8 weight.

State. A checkpoint holds plain tensors: ``weight`` int8 (O, I / groups, kh, kw), ``weight_scale`` float32 (O,),
``bias``, and in static mode ``input_scale`` and ``input_zero_point``.
See packed_weight.py for what the module keeps in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn.float_linear import ACTIVATION_MODULES, float_bias
from pycompress.nn.packed_weight import PackedWeight
from pycompress.ops.eager import is_plain_eager
from pycompress.ops.int8_conv2d import check_conv_options, check_window, pair, pick_conv, run_int8_conv2d, sides
from pycompress.ops.int8_conv2d_native import conv_refused
from pycompress.ops.int8_conv2d_reference import ConvCall, Window
from pycompress.ops.int8_matmul_weight import static_qparams, static_tensors

_FROM = "Int8Conv2d.from_float"
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Int8Conv2d(PackedWeight):
    """``y = act(conv2d(x, weight) + bias)`` with an int8 weight, one scale an output channel.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as ``nn.Conv2d``
            takes them. The bias is a float parameter, which may be trained.
        mode: ``"dynamic"`` (activations quantised per image), ``"static"`` (per tensor, calibrated) or
            ``"weight_only"`` (activations stay float; the weight takes a quarter of the memory and the product no less
            time).
        activation: fused into the kernel: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        backend: ``"auto"``, ``"native"`` or ``"reference"``; a named one runs or raises.

    Input ``(N, C, H, W)`` or ``(C, H, W)``, float32, bfloat16 or float16; output of the same dtype and memory format.
    A new module holds a zero weight, to be filled by ``load_state_dict``; :meth:`from_float` makes one from a trained
    layer.
    """

    bias: nn.Parameter | None
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        mode: str = "dynamic",
        activation: str = "none",
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_conv_options(mode, activation, backend)
        if padding_mode not in _PADDING_MODES:
            raise ValueError(
                f"Int8Conv2d: padding_mode={padding_mode!r}, expected one of {', '.join(_PADDING_MODES)}"
            )
        if groups < 1 or in_channels % groups or out_channels % groups or min(in_channels, out_channels) < 0:
            raise ValueError(
                f"Int8Conv2d: in_channels={in_channels} and out_channels={out_channels} with groups={groups}, expected "
                "positive groups of which both are multiples"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = pair(kernel_size), pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.padding_mode = padding_mode
        self._sides = sides(padding, self.kernel_size, self.stride, self.dilation)
        check_window(self._window())
        self.mode, self.activation, self.backend = mode, activation, backend
        weight = torch.zeros(self._weight_shape, dtype=torch.int8, device=device)
        self.register_buffer("_weight", weight, persistent=False)
        self.register_buffer("weight_scale", torch.ones(out_channels, device=device, dtype=torch.float32))
        input_scale, zero_point = static_tensors((1.0, 0) if mode == "static" else None, device)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", zero_point)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels, device=device)) if bias else None)
        self._arrange()

    @classmethod
    def from_float(
        cls,
        conv: nn.Module,
        mode: str = "dynamic",
        activation: str | None = None,
        *,
        input_range: tuple[float, float] | None = None,
        backend: str = "auto",
    ) -> Int8Conv2d:
        """Quantise an ``nn.Conv2d``, which stays as it is.

        Args:
            conv: the trained layer; its device, training flag and the dtype of its bias carry over.
            activation: fused activation, none by default.
            input_range: least and greatest activation, needed by (and only by) static mode; ``calibrate`` finds it.

        Raises:
            ValueError: no ``nn.Conv2d`` or one with a forward of its own, an unknown option, a weight that holds NaN or
                Inf or is on the meta device, a missing or superfluous ``input_range``.
        """
        check_conv_options(mode, activation or "none", backend)
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"{_FROM}: expected an nn.Conv2d, got {type(conv).__name__}")
        kind = type(conv)
        own = [name for name in ("forward", "_conv_forward") if getattr(kind, name) is not getattr(nn.Conv2d, name)]
        if own:
            raise ValueError(f"{_FROM}: {kind.__name__} computes its own way ({', '.join(own)}); leave it in float")
        statics = static_tensors(static_qparams(mode, input_range, _FROM), None)
        quantized, scale = ops.quantize_conv_weight(conv.weight)
        bias = float_bias(conv)
        module = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, bias is not None, conv.padding_mode, mode=mode, activation=activation or "none",
            backend=backend, device="meta",
        )  # fmt: skip
        module._weight, module.weight_scale, module.bias = quantized, scale, bias
        module.input_scale, module.input_zero_point = (
            None if t is None else t.to(scale.device, copy=True) for t in statics
        )
        module._arrange()
        return module.train(conv.training)

    def to_float(self) -> nn.Module:
        """The ``nn.Conv2d`` with the dequantised weight, in the bias's dtype (float32 without one).

        A fused activation follows it, in an ``nn.Sequential``.
        """
        bias = self.bias
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, bias is not None, self.padding_mode,  # type: ignore[arg-type]
            device=self.weight_scale.device,
            dtype=torch.float32 if bias is None else bias.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(self.weight.float() * self.weight_scale[:, None, None, None])
            if bias is not None and conv.bias is not None:
                conv.bias.copy_(bias).requires_grad_(bias.requires_grad)
        if self.activation == "none":
            return conv.train(self.training)
        return nn.Sequential(conv, ACTIVATION_MODULES[self.activation]()).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        padding = self._sides
        if self.padding_mode != "zeros":
            top, bottom, left, right = padding
            x, padding = F.pad(x, (left, right, top, bottom), mode=self.padding_mode), (0, 0, 0, 0)
        single = x.dim() == 3
        plain = not torch.compiler.is_compiling() and is_plain_eager(x) and not self._bias_wants_gradient()
        # The dispatcher takes 12 us, a tenth of a small layer's time.
        run = run_int8_conv2d if plain else torch.ops.pycompress.int8_conv2d.default
        y = run(
            x[None] if single else x,
            self._weight,
            self.weight_scale,
            self.bias,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.mode,
            self.input_scale,
            self.input_zero_point,
            self.activation,
            self.backend,
        )
        return y[0] if single else y

    def _bias_wants_gradient(self) -> bool:
        return self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled()

    # ---- state ------------------------------------------------------------------------------------------------

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _pack(self, weight: Tensor) -> Tensor:
        return ops.pack_conv_weight(weight, self.groups)

    def _unpack(self, packed: Tensor) -> Tensor:
        return ops.unpack_conv_weight(packed)

    def _kernel_name(self, packed: Tensor) -> str:
        return ops.conv_kernel_name(packed)

    def _wants_packed(self) -> bool:
        if self.backend == "reference" or self.mode == "weight_only":
            return False
        return not conv_refused(self.in_channels // self.groups, self.kernel_size)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("backend", "mode") and "_weight" in self._buffers:
            self._arrange()

    def extra_repr(self) -> str:
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}",
            f"padding={self.padding}" if self.padding not in ((0, 0), "valid") else "",
            f"dilation={self.dilation}" if self.dilation != (1, 1) else "",
            f"groups={self.groups}" if self.groups != 1 else "",
            f"bias={self.bias is not None}",
            f"padding_mode={self.padding_mode}" if self.padding_mode != "zeros" else "",
            f"mode={self.mode}",
            f"activation={self.activation}" if self.activation != "none" else "",
            f"backend={self._runs()}",
        ]
        return ", ".join(part for part in parts if part)

    def _runs(self) -> str:
        try:
            name = pick_conv(self.backend, self._call()).name
        except ValueError:
            return f"{self.backend} (cannot run on {self._weight.device})"
        return f"native:{self._kernel_name(self._weight)}" if name == "native" else name

    def _call(self) -> ConvCall:
        x = self.weight_scale.new_empty(1).expand(1, self.in_channels, 1, 1)  # its values matter to nobody
        statics = self.input_scale, self.input_zero_point
        return ConvCall(
            x, self._weight, self.weight_scale, self.bias, self._window(), self.mode, *statics, self.activation
        )

    def _window(self) -> Window:
        return Window(self.kernel_size, self.stride, self._sides, self.dilation, self.groups)


# From where on int8 gains, measured on a Zen 5 server (two threads, batch 8, against the float layer in the same memory
# format): 32 groups of 8 channels 0.7 to 1.0 x, of 16 channels 1.2 to 1.4 x, depthwise at most 0.13 x; 27 products an
# output 0.5 to 0.9 x, 32 0.6 to 0.95 x, 64 1.4 to 1.9 x.
_FEWEST_CHANNELS, _FEWEST_PRODUCTS = 16, 64


def why_not(conv: nn.Conv2d) -> str:
    """Why this convolution is better left in float on the CPU, by its shape, or ""."""
    channels = conv.in_channels // conv.groups
    products = channels * conv.kernel_size[0] * conv.kernel_size[1]
    if conv.groups > 1 and channels < _FEWEST_CHANNELS:
        return (
            f"groups={conv.groups} leave each output {channels} channel{'s' * (channels != 1)}, too few to be faster "
            "in int8"
        )
    if products < _FEWEST_PRODUCTS:
        return f"an output sums only {products} products: quantising the image costs more than int8 saves"
    return ""
