"""4-bit linear layer in torch: the specification that every kernel is tested against. Any device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pycompress.ops.int4_matmul_weight import dequantize_weight_int4, unpack_weight_int4
from pycompress.ops.int8_matmul_reference import apply_activation


@dataclass(frozen=True)
class Call:
    """Checked arguments of one call. ``x`` is ``(..., in_features)``.

    weight: uint8, plain ``(N, ceil(K / 2))`` with its scales and zero points ``(N, G)``, or packed ``(bytes,)``, with
    both inside. group_size: as :func:`pycompress.ops.int4_matmul_weight.group_size_of` gave it.
    """

    x: Tensor
    weight: Tensor
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    bias: Tensor | None
    in_features: int
    out_features: int
    format: str
    group_size: int
    activation: str

    @property
    def packed(self) -> bool:
        """Whether the weight is packed for the native kernels."""
        return self.weight.dim() == 1

    def float_weight(self) -> Tensor:
        """float32 (N, K)."""
        weight, scale, zero_point = self.weight, self.weight_scale, self.weight_zero_point
        if self.packed:
            weight, scale, zero_point = unpack_weight_int4(weight)
        assert scale is not None, "checked before"
        return dequantize_weight_int4(
            weight, scale, zero_point, in_features=self.in_features, format=self.format, group_size=self.group_size
        )


def reference_int4_linear(call: Call) -> Tensor:
    """The formula in torch: the weight in float32, product and epilogue in fp32. Any device."""
    x, n, k = call.x, call.out_features, call.in_features
    y = x.reshape(x.shape[:-1].numel(), k).float() @ call.float_weight().t()
    if call.bias is not None:
        y = y + call.bias.float()
    return apply_activation(y, call.activation).to(x.dtype).reshape(*x.shape[:-1], n)
