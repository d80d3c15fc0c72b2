"""nn.MultiheadAttention with its projections as layers of their own, so that they can be observed or replaced."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class ProjectedAttention(nn.Module):
    """What nn.MultiheadAttention computes, by layers: ``in_proj`` where packed, else ``q_proj``, ``k_proj`` and
    ``v_proj``; and ``out_proj``.

    ``in_proj`` (3 embed_dim outputs) is one product where query, key and value are one tensor. Where they are not, its
    product with each of them is cut to the rows that are wanted: right, but slower than three layers.

    ``bias_k`` and ``bias_v`` are parameters as in nn.MultiheadAttention. ``in_proj_weight`` and ``in_proj_bias`` are
    None and ``_qkv_same_embed_dim`` is False: nn.TransformerEncoderLayer asks for them, and then goes without its fused
    kernel, which would read float weights.
    """

    in_proj: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"{name}: embed_dim={embed_dim} and num_heads={num_heads}; expected positive numbers, the first a "
                "multiple of the second"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.add_zero_attn, self.batch_first = dropout, add_zero_attn, batch_first
        self._qkv_same_embed_dim = False
        for key in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
            self.register_parameter(key, None)

    @property
    def packed(self) -> bool:
        return "in_proj" in self._modules

    @classmethod
    def opened(cls, attention: nn.MultiheadAttention) -> ProjectedAttention:
        """The float attention with its weights, which stay one memory, in four nn.Linear."""
        module = cls(*arguments_of(attention))
        for key, linear in projections_of(attention, packed=False).items():
            module.add_module(key, linear)
        for key in ("bias_k", "bias_v"):
            module.register_parameter(key, getattr(attention, key))
        return module.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results as of nn.MultiheadAttention."""
        if is_causal and attn_mask is None:
            raise RuntimeError(
                f"{type(self).__name__}: is_causal is a hint about attn_mask, which is missing; pass it, as made by "
                "nn.Transformer.generate_square_subsequent_mask"
            )
        batched = self._check_shapes(query, key, value, key_padding_mask, attn_mask)
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = (self._heads(part, batched) for part in self._project(query, key, value))
        if causal:  # as torch: the mask is taken at its word
            attn_mask = None
        mask = self._mask(attn_mask, key_padding_mask, q.dtype, batched)
        k, v, mask = self._extended(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        if not batched:
            attended = attended.squeeze(0).transpose(0, 1)
        else:
            attended = attended.transpose(1, 2) if self.batch_first else attended.permute(2, 0, 1, 3)
        return self.out_proj(attended.flatten(-2)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not self.packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        of_query = self.in_proj(query)
        of_key = of_query if key is query else self.in_proj(key)
        of_value = of_key if value is key else self.in_proj(value)
        e = self.embed_dim
        return of_query[..., :e], of_key[..., e : 2 * e], of_value[..., 2 * e :]

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """(batch, heads, tokens, head_dim) of what a projection returns; a batch of one where there is none."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """With the tokens that add_bias_kv and add_zero_attn append to key and value, seen by every query."""
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self._token(self.bias_k, len(k))), 2)
            v = torch.cat((v, self._token(self.bias_v, len(v))), 2)
            more += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            more += 1
        return k, v, mask if mask is None or not more else F.pad(mask, (0, more))

    def _token(self, values: Tensor, batch: int) -> Tensor:
        return values.view(1, self.num_heads, 1, self.head_dim).expand(batch, -1, -1, -1)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype, batched: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the scores (batch, heads, L, S)."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype)
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask[None, None]
        if padding is not None:
            added = _additive(padding if batched else padding.unsqueeze(0), dtype)[:, None, None]
            mask = added if mask is None else mask + added
        return mask

    def _check_shapes(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Whether there is a batch. Raises ValueError where the operands do not fit one another."""
        name = type(self).__name__
        dims = query.dim()
        if query.is_nested or dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            got = ", ".join(f"{x.dim()}-D{' nested' if x.is_nested else ''}" for x in (query, key, value))
            raise ValueError(f"{name}: query, key, value are {got}; expected all 3-D, or all 2-D without a batch")
        batched, token = dims == 3, 1 if dims == 3 and self.batch_first else 0
        for what, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != width:
                raise ValueError(f"{name}: {what} has {x.shape[-1]} features; expected {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"{name}: key is {tuple(key.shape)} but value is {tuple(value.shape)}")
        batch = query.shape[1 - token] if batched else 1
        if batched and key.shape[1 - token] != batch:
            raise ValueError(f"{name}: query has a batch of {batch} but key one of {key.shape[1 - token]}")
        length, source = query.shape[token], key.shape[token]
        expected = (batch, source) if batched else (source,)
        if padding is not None and tuple(padding.shape) != expected:
            raise ValueError(f"{name}: key_padding_mask is {tuple(padding.shape)}; expected {expected}")
        planes = (length, source), (batch * self.num_heads, length, source)
        if attn_mask is not None and tuple(attn_mask.shape) not in planes:
            raise ValueError(f"{name}: attn_mask is {tuple(attn_mask.shape)}; expected {planes[0]} or {planes[1]}")
        for what, mask in (("key_padding_mask", padding), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(f"{name}: {what} is {mask.dtype}; expected torch.bool or a floating type")
        return batched

    def extra_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        parts += [f"{key}={getattr(self, key)}" for key in ("kdim", "vdim") if getattr(self, key) != self.embed_dim]
        parts += [f"{key}={value}" for key in ("dropout", "add_zero_attn") if (value := getattr(self, key))]
        return ", ".join([*parts, f"batch_first={self.batch_first}"])


def arguments_of(attention: nn.MultiheadAttention) -> tuple[int, int, float, bool, int, int, bool]:
    """The constructor arguments that ProjectedAttention shares with nn.MultiheadAttention."""
    a = attention
    return a.embed_dim, a.num_heads, a.dropout, a.add_zero_attn, a.kdim, a.vdim, a.batch_first


def projections_of(attention: nn.MultiheadAttention, *, packed: bool) -> dict[str, nn.Linear]:
    """Its projections as nn.Linear over the same memory, by name: in_proj or its three parts, and out_proj."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    output = _linear(attention.out_proj.weight, attention.out_proj.bias)
    if packed:
        return {"in_proj": _linear(weight, bias), "out_proj": output}
    weights = [getattr(attention, f"{key}_weight") for key in PROJECTIONS] if weight is None else weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    parts = {key: _linear(w, b) for key, w, b in zip(PROJECTIONS, weights, biases, strict=True)}
    return {**parts, "out_proj": output}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
