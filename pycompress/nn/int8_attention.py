"""``Int8MultiheadAttention``: nn.MultiheadAttention whose projections are int8 or 4-bit layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.nn.projected_attention import PROJECTIONS, ProjectedAttention, arguments_of, projections_of
from pycompress.nn.quantized_linear import LINEAR_MODES, quantized, without_weights
from pycompress.ops import BACKENDS

_FROM = "Int8MultiheadAttention.from_float"


class Int8MultiheadAttention(ProjectedAttention):
    """``nn.MultiheadAttention`` with quantised projections; the attention between them stays float.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first: as of
            nn.MultiheadAttention.
        mode: of the projections: ``"dynamic"``, ``"static"``, ``"weight_only"`` (:class:`Int8Linear`), ``"int4"`` or
            ``"nf4"`` (:class:`Int4Linear`, with `group_size` and `symmetric`).
        packed: one layer ``in_proj`` for query, key and value, which self-attention wants, or three: ``q_proj``,
            ``k_proj``, ``v_proj``. By default packed where the three have one width.
        backend: of the projections.

    Arguments and results of forward are those of nn.MultiheadAttention, unless its fused kernel for nested tensors is
    meant. ``in_proj`` computes as well where query, key and value differ, but then all its rows each time.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        mode: str = "dynamic",
        packed: bool | None = None,
        group_size: int = 128,
        symmetric: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, add_zero_attn, kdim, vdim, batch_first)
        _check_mode(mode, backend)
        self.mode, self.backend = mode, backend
        packed = _checked_packed(packed, embed_dim, self.kdim, self.vdim)
        if packed:
            widths = {"in_proj": (embed_dim, 3 * embed_dim)}
        else:
            inputs = embed_dim, self.kdim, self.vdim
            widths = {key: (width, embed_dim) for key, width in zip(PROJECTIONS, inputs, strict=True)}
        widths["out_proj"] = embed_dim, embed_dim
        options: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric, "backend": backend}
        for key, (k, n) in widths.items():
            self.add_module(key, without_weights(k, n, bias, mode, device=device, **options))
        if add_bias_kv:
            self.bias_k, self.bias_v = (nn.Parameter(torch.zeros(1, 1, embed_dim, device=device)) for _ in range(2))

    @classmethod
    def from_float(
        cls,
        attention: nn.MultiheadAttention,
        mode: str = "dynamic",
        *,
        packed: bool | None = None,
        input_range: Mapping[str, tuple[float, float]] | None = None,
        group_size: int = 128,
        symmetric: bool = True,
        backend: str = "auto",
    ) -> Int8MultiheadAttention:
        """Quantise the projections of an ``nn.MultiheadAttention``, which stays as it is.

        Args:
            input_range: for static mode, and only for it: the least and greatest input of ``q_proj``, ``k_proj``,
                ``v_proj`` and ``out_proj``; ``calibrate`` finds them.

        Raises:
            ValueError: an unknown option, a weight that holds NaN or Inf, a missing or superfluous range.
        """
        if not isinstance(attention, nn.MultiheadAttention) or attention.out_proj.in_features != attention.embed_dim:
            raise ValueError(f"{_FROM}: expected an nn.MultiheadAttention, got {type(attention).__name__}")
        _check_mode(mode, backend)
        a = attention
        packed = _checked_packed(packed, a.embed_dim, a.kdim, a.vdim)
        ranges = _ranges(mode, input_range, packed)
        module = cls.__new__(cls)
        ProjectedAttention.__init__(module, *arguments_of(attention))
        module.mode, module.backend = mode, backend
        options: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric, "backend": backend}
        for key, linear in projections_of(attention, packed=packed).items():
            module.add_module(key, quantized(linear, mode, input_range=ranges.get(key), **options))
        module.bias_k, module.bias_v = _copied(a.bias_k), _copied(a.bias_v)
        return module.train(attention.training)

    def to_float(self) -> nn.MultiheadAttention:
        """The ``nn.MultiheadAttention`` with the dequantised weights, in the dtype of the biases."""
        layers = {key: child.to_float() for key, child in self.named_children()}  # type: ignore[operator]
        output = layers["out_proj"]
        module = nn.MultiheadAttention(
            *(self.embed_dim, self.num_heads, self.dropout, output.bias is not None, self.bias_k is not None),
            *(self.add_zero_attn, self.kdim, self.vdim, self.batch_first, output.weight.device, output.weight.dtype),
        )
        inputs = [layers["in_proj"]] if self.packed else [layers[key] for key in PROJECTIONS]
        with torch.no_grad():
            if module.in_proj_weight is not None:
                module.in_proj_weight.copy_(torch.cat([layer.weight for layer in inputs]))
            else:
                for key, layer in zip(PROJECTIONS, inputs, strict=True):
                    getattr(module, f"{key}_weight").copy_(layer.weight)
            if module.in_proj_bias is not None:
                module.in_proj_bias.copy_(torch.cat([layer.bias for layer in inputs]))
        module.out_proj.weight, module.out_proj.bias = output.weight, output.bias
        module.bias_k, module.bias_v = _copied(self.bias_k), _copied(self.bias_v)
        return module.train(self.training)

    def memory_bytes(self) -> int:
        """Bytes of memory that the module holds: its projections, bias_k and bias_v."""
        own = sum(p.nbytes for p in self._parameters.values() if p is not None)
        return own + sum(child.memory_bytes() for child in self.children())  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"


def _check_mode(mode: str, backend: str) -> None:
    for what, value, known in (("mode", mode, LINEAR_MODES), ("backend", backend, BACKENDS)):
        if value not in known:
            raise ValueError(f"Int8MultiheadAttention: unknown {what} {value!r}; expected one of {', '.join(known)}")


def _checked_packed(packed: bool | None, embed_dim: int, kdim: int, vdim: int) -> bool:
    alike = kdim == vdim == embed_dim
    if packed and not alike:
        raise ValueError(
            f"Int8MultiheadAttention: packed=True with embed_dim={embed_dim}, kdim={kdim}, vdim={vdim}; one layer for "
            "all three wants one width: leave packed out"
        )
    return alike if packed is None else packed


def _ranges(
    mode: str, given: Mapping[str, tuple[float, float]] | None, packed: bool
) -> Mapping[str, tuple[float, float]]:
    """By child; that of in_proj covers all that it reads."""
    names = (*PROJECTIONS, "out_proj")
    if mode != "static":
        if given is not None:
            raise ValueError(f"{_FROM}: input_range is for mode='static'; mode={mode!r} would ignore it")
        return {}
    missing = [name for name in names if name not in (given or {})]
    if given is None or missing:
        raise ValueError(
            f"{_FROM}: mode='static' needs the input range of {', '.join(missing)}; pass input_range={{name: (least, "
            "greatest)}, as calibrate finds it"
        )
    if not packed:
        return given
    ends = list(zip(*(given[key] for key in PROJECTIONS), strict=True))
    return {"in_proj": (min(ends[0]), max(ends[1])), "out_proj": given["out_proj"]}


def _copied(parameter: Tensor | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
