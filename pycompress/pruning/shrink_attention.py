"""``FewerHeadsAttention``: what nn.MultiheadAttention becomes when heads are taken out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FewerHeadsAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose heads together are narrower than its embedding.

    nn.MultiheadAttention cannot hold it: it takes the heads' size from embed_dim / num_heads and wants
    ``in_proj_weight`` to be (3 embed_dim, embed_dim). Here it is (3 width, embed_dim) with width = num_heads *
    head_dim, and ``out_proj`` goes from width to embed_dim. ``_qkv_same_embed_dim`` is False, which keeps
    nn.TransformerEncoderLayer from handing the weights to its fused kernel, which has the same wants.

    Made by shrink_. Arguments and results of forward are those of nn.MultiheadAttention; an attn_mask with a plane for
    each head keeps the planes of the original heads, and weights returned are those of the heads that are left.

    Args:
        old: the attention that loses heads; nothing is shared with it.
        query, key, value: (width, embed_dim), their biases (width,) or None.
        output: (embed_dim, width), its bias (embed_dim,) or None.
        kept: the heads of `old` that are left, in order.
    """

    def __init__(
        self, old: nn.MultiheadAttention, projections: Sequence[nn.Linear], output: nn.Linear, kept: Sequence[int]
    ) -> None:
        nn.Module.__init__(self)
        self.embed_dim, self.kdim, self.vdim = old.embed_dim, old.kdim, old.vdim
        self.head_dim, self.num_heads = old.head_dim, len(kept)
        self.dropout, self.batch_first, self.add_zero_attn = old.dropout, old.batch_first, False
        self._qkv_same_embed_dim = False
        # A mask with a plane for each head has those of every head there ever was.
        before: Sequence[int] = getattr(old, "kept_heads", range(old.num_heads))
        self.kept_heads = tuple(before[head] for head in kept)
        self.original_heads: int = getattr(old, "original_heads", old.num_heads)
        weight, bias = old.in_proj_weight, old.in_proj_bias
        self.in_proj_weight = nn.Parameter(torch.cat([p.weight for p in projections]), weight.requires_grad)
        if bias is not None:
            self.in_proj_bias = nn.Parameter(torch.cat([p.bias for p in projections]), bias.requires_grad)
        else:
            self.register_parameter("in_proj_bias", None)
        for key in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(key, None)
        self.bias_k = self.bias_v = None
        self.out_proj = type(old.out_proj)(len(kept) * self.head_dim, self.embed_dim, output.bias is not None, "meta")
        self.out_proj.weight, self.out_proj.bias = output.weight, output.bias
        self.train(old.training)

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
        if is_causal and attn_mask is None:
            raise RuntimeError("FewerHeadsAttention: is_causal is a hint about attn_mask, which is missing; pass it")
        is_batched = query.dim() == 3
        parts = self._project(query, key, value)
        if not is_batched:
            parts = [part.unsqueeze(0) for part in parts]
        elif not self.batch_first:
            parts = [part.transpose(0, 1) for part in parts]
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
        mask = self._mask(attn_mask, key_padding_mask, q.dtype, is_batched)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not is_batched:
            return y.squeeze(0), weights
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        rows = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        return [F.linear(x, weight, bias) for x, weight, bias in rows]

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype, is_batched: bool
    ) -> Tensor | None:
        """Both masks as one that is added to the scores (batch, heads, L, S); True or -inf where nothing is seen."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, dtype)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (-1, self.original_heads))[:, list(self.kept_heads)]
        if padding is not None:
            added = _additive(padding if is_batched else padding.unsqueeze(0), dtype)[:, None, None]
            mask = added if mask is None else mask + added
        return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
