"""``LowRankLinear``: a linear layer as the product of two smaller ones.

``y = (x @ down^T) @ up^T + bias`` with ``down`` (r, K) and ``up`` (N, r): r (K + N) weights instead of K N.

Both parts are plain ``nn.Linear`` modules, so whatever swaps, prunes or trains linear layers takes them too. Those of a
weight W come from the singular values of W S, where S S^T is the second moment of the layer's inputs (ASVD, Yuan et al.
2023; SVD-LLM, Wang et al. 2024), or the identity, which makes it the plain SVD. Among all weights of rank r theirs has
the least squared error of the output: the sum of the squares of the singular values left out (Eckart and Young 1936).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycompress.nn.float_linear import float_weight
from pycompress.nn.masked_linear import MaskedLinear

# Directions with a smaller share of the inputs' mean variance count as if they had that much: calibration says nothing
# about an input that it never saw, and S has to have an inverse.
_LEAST_VARIANCE = 1e-4
# Below this share of the squared singular values lies what rounding in float64 leaves of a weight of lower rank.
_ROUNDING = 1e-14


def largest_rank(in_features: int, out_features: int) -> int:
    """The largest rank at which the two factors hold fewer weights than the layer; 0 where none does."""
    return (in_features * out_features - 1) // (in_features + out_features)


@dataclass(frozen=True)
class Spectrum:
    """W S = U diag(values) V^T, in float64: the factors of every rank at once.

    left: U (N, R); right: V^T S^-1 (R, K); root: S (K, K) or None for the identity.
    """

    weight: Tensor  # (N, K)
    left: Tensor
    values: Tensor  # (R,), largest first
    right: Tensor
    root: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, second_moment: Tensor | None = None) -> Spectrum:
        """weight: (N, K) floats, finite. second_moment: (K, K) float64, the sum or mean of x x^T over the inputs."""
        weight = weight.detach().double()
        if second_moment is None:
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            return cls(weight, left, values, right, None)
        variances, directions = torch.linalg.eigh(second_moment.to(weight))
        floor = _LEAST_VARIANCE * float(variances.mean())
        scales = variances.clamp(min=floor).sqrt() if floor > 0 else torch.ones_like(variances)
        root = directions * scales @ directions.T
        left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
        return cls(weight, left, values, right @ (directions / scales @ directions.T), root)

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the squared singular values; at least 1."""
        squares = self.values.square()
        kept = squares.cumsum(0)
        wanted = kept[-1] * (energy - _ROUNDING)
        return min(int((kept < wanted).sum()) + 1, len(squares))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(down (r, K), up (N, r)) in float64.

        The singular values go into both by their square roots: the values between the two layers then span as far as
        up's columns, which is what a scale per token and per row in int8 wants.
        """
        half = self.values[:rank].sqrt()
        return half[:, None] * self.right[:rank], self.left[:, :rank] * half

    def error(self, layer: LowRankLinear) -> float:
        """||(W - up down) S|| / ||W S||, of the layer's factors as they are, rounded to their dtype."""
        down, up = layer.down.weight.detach().double(), layer.up.weight.detach().double()
        gap = self.weight - up @ down
        whole = float(torch.linalg.vector_norm(self.values))
        lost = float(torch.linalg.matrix_norm(gap if self.root is None else gap @ self.root))
        return lost / whole if whole else 0.0


class LowRankLinear(nn.Sequential):
    """``y = up(down(x))``: ``down`` is ``nn.Linear(K, r, bias=False)``, ``up`` is ``nn.Linear(r, N, bias)``.

    Args:
        in_features, out_features: K and N.
        rank: r, at least 1.
        bias: whether ``up`` has a bias.

    ``quantize_``, ``prune_`` and ``sparsify_`` replace the two parts like any other linear layer. Input ``(..., K)``,
    output ``(..., N)``.

    Raises:
        ValueError: a rank below 1.
    """

    down: nn.Linear  # or what a swap has put in its place
    up: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_rank(rank, "LowRankLinear")
        down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        up = nn.Linear(rank, out_features, bias, device=device, dtype=dtype)
        super().__init__(OrderedDict(down=down, up=up))

    @classmethod
    def from_linear(cls, linear: nn.Module, rank: int, *, second_moment: Tensor | None = None) -> LowRankLinear:
        """The layer of this rank that is nearest to `linear`, in new parameters of its dtype, device and mode.

        Args:
            linear: an ``nn.Linear`` or transformers' ``Conv1D``.
            rank: from 1 to min(K, N); r (K + N) < K N makes it smaller.
            second_moment: (K, K), the sum of x x^T over sample inputs x, for the least error of the output on them;
                by default the least error of the weight.

        Raises:
            ValueError: not a linear layer, a rank out of its range, a weight that is not finite, or a second moment of
                another shape.
        """
        caller = "LowRankLinear.from_linear"
        if isinstance(linear, MaskedLinear):
            raise ValueError(f"{caller}: a MaskedLinear would lose its zeros; factorize first and prune the factors")
        weight = float_weight(linear, caller).detach()
        _check_rank(rank, caller, min(weight.shape))
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{caller}: the weight holds NaN or Inf")
        k = weight.shape[1]
        if second_moment is not None and second_moment.shape != (k, k):
            raise ValueError(
                f"{caller}: second_moment has shape {tuple(second_moment.shape)}; the weight has K={k}, so expected "
                f"({k}, {k})"
            )
        return cls._cut(linear, Spectrum.of(weight, second_moment), rank)

    @classmethod
    def _cut(cls, linear: nn.Module, spectrum: Spectrum, rank: int) -> LowRankLinear:
        """What takes the place of `linear`: the first `rank` terms of its spectrum, and a copy of its bias."""
        n, k = spectrum.weight.shape
        old = linear._parameters["weight"]
        bias = linear._parameters.get("bias")
        assert old is not None
        layer = cls(k, n, rank, bias is not None, device="meta")
        for part, values in zip((layer.down, layer.up), spectrum.factors(rank), strict=True):
            part.weight = nn.Parameter(values.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
        if bias is not None:
            layer.up.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(linear.training)

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    def to_linear(self) -> nn.Linear:
        """The ``nn.Linear`` whose weight is the product, computed in float32 or more.

        Raises:
            ValueError: the parts are no longer float layers; make each of them float again first.
        """
        down, up = self.down, self.up
        wrong = next((part for part in (down, up) if type(part) is not nn.Linear), None)
        if wrong is not None:
            raise ValueError(
                f"LowRankLinear.to_linear: a part is a {type(wrong).__name__}; make it an nn.Linear again first"
            )
        first, second, bias = down.weight, up.weight, up.bias
        wide = torch.promote_types(first.dtype, torch.float32)
        product = second.detach().to(wide) @ first.detach().to(wide)
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(product.to(first.dtype), requires_grad=first.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _check_rank(rank: int, caller: str, highest: int | None = None) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if not whole or rank < 1 or (highest is not None and rank > highest):
        reach = "an integer from 1 on" if highest is None else f"an integer from 1 to min(K, N) = {highest}"
        raise ValueError(f"{caller}: rank={rank!r}; expected {reach}")
