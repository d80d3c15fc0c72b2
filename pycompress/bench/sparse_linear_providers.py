"""Who computes a layer with a pruned weight on a CPU: one row of PROVIDERS each, all built from the same fp32 layer.

build(layer, threads) -> Built       converts and packs the weight, once per layer and thread count
Built.bind(x) -> Bound               prepares the call for one fp32 input (M, K)
Bound.run()                          the timed call;  Bound.output() -> (M, N), for the check against float64
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pycompress.bench.provider import BaseProvider

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# Bounds on Row.error, against the pruned weight in float64. As in int8_matmul_providers.py.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 4e-2}
PEAKS = {"fp32": "fp32_gflops", "bf16": "bf16_gflops", "int8": "int8_gops"}
# Bytes of a weight.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}

UNSTRUCTURED = "unstructured"
PATTERNS = (UNSTRUCTURED, "4x4", "4x1", "1x4", "2:4")
# A bitmap takes as long for any. Auto measures close calls on each layer that it is made for, which takes a while.
_PATTERNS_OF = {"bitmap": (UNSTRUCTURED,), "index": PATTERNS, "auto": (UNSTRUCTURED, "4x4")}
_BITMAP_TOKENS = 32  # what it is made for, and some more


@dataclass(frozen=True)
class Layer:
    """weight: (N, K) fp32 with zeros where mask, (N, K) bool, is False. bias: (N,) fp32."""

    weight: Tensor
    mask: Tensor
    bias: Tensor

    def linear(self) -> nn.Linear:
        n, k = self.weight.shape
        linear = nn.Linear(k, n, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear.eval()


@dataclass(frozen=True)
class Bound:
    run: Callable[[], Tensor]

    def output(self) -> Tensor:
        return self.run()


@dataclass(frozen=True)
class Built:
    """module: from (M, K) in `dtype` to (M, N). weight_bytes: that one call reads; None where nobody says."""

    module: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    weight_bytes: int | None = None

    def bind(self, x: Tensor) -> Bound:
        return Bound(partial(self.module, x.to(self.dtype)))


@dataclass(frozen=True)
class Provider(BaseProvider):
    """One way to compute the layer.

    dtype: of the weight; x has it too, but fp32 beside an int8 weight. form: of the weight, as in the name.
    patterns: of masks that it is timed with. Empty: the mask makes no difference, so it is timed once.
    most: tokens up to which it is timed.
    """

    name: str
    backend: str
    dtype: str
    form: str
    build: Callable[[Layer, int], Built]
    patterns: tuple[str, ...]
    most: int = 1 << 62
    requires: tuple[str, ...] = ("torch",)


def _dense(dtype: str, layer: Layer, threads: int) -> Built:
    module = layer.linear().to(DTYPES[dtype])
    return Built(module, DTYPES[dtype], layer.weight.numel() * WEIGHT_BYTES[dtype])


def _dense_int8(layer: Layer, threads: int) -> Built:
    from pycompress.nn import Int8Linear

    return Built(Int8Linear.from_float(layer.linear(), backend="native"), weight_bytes=layer.weight.numel())


def _sparse(dtype: str, form: str, layer: Layer, threads: int) -> Built:
    from pycompress.nn import SparseLinear

    name = str(DTYPES[dtype]).removeprefix("torch.")
    linear = layer.linear().bfloat16() if dtype == "bf16" else layer.linear()  # the bias tells what x will be
    module = SparseLinear.from_dense(linear, layer.mask, dtype=name, format=form, backend="native")
    read = None
    if form == "bitmap":
        read = int(layer.mask.sum()) * WEIGHT_BYTES[dtype] + module.weight_bitmap.numel()
    return Built(module, torch.bfloat16 if dtype == "bf16" else torch.float32, read)


def _torch_sparse(layout: str, layer: Layer, threads: int) -> Built:
    """bias + csr @ x^T, which is (N, M): of all the ways that torch has the fastest, and its y is not transposed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its compressed tensors beta
        weight = layer.weight.to_sparse_csr() if layout == "csr" else layer.weight.to_sparse_bsr((4, 4))
    bias = layer.bias[:, None]
    read = sum(t.numel() * t.element_size() for t in (weight.values(), weight.crow_indices(), weight.col_indices()))
    return Built(lambda x: torch.addmm(bias, weight, x.t()).t(), weight_bytes=read)


def _ours(dtype: str, form: str) -> Provider:
    name, build = f"pycompress-{form}-{dtype}", partial(_sparse, dtype, form)
    most = _BITMAP_TOKENS if form == "bitmap" else 1 << 62
    return Provider(name, "native", dtype, form, build, _PATTERNS_OF[form], most, ("pycompress",))


PROVIDERS: tuple[Provider, ...] = (
    *(_ours(dtype, form) for dtype in DTYPES for form in ("bitmap", "index", "auto")),
    Provider("torch-dense-fp32", "eager", "fp32", "dense", partial(_dense, "fp32"), ()),
    Provider("torch-dense-bf16", "eager", "bf16", "dense", partial(_dense, "bf16"), ()),
    Provider("pycompress-dense-int8", "native", "int8", "dense", _dense_int8, (), requires=("pycompress",)),
    Provider("torch-csr-fp32", "mkl", "fp32", "csr", partial(_torch_sparse, "csr"), (UNSTRUCTURED,)),
    Provider("torch-bsr-fp32", "mkl", "fp32", "bsr", partial(_torch_sparse, "bsr"), ("4x4",)),
)


# ---- masks ----


def fixed_sparsity(pattern: str) -> float | None:
    """That of an N:M pattern, which has no other: 0.5 for "2:4". None for the rest."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    return None if found is None else 1 - int(found[1]) / int(found[2])


def random_mask(pattern: str, shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    """A bool mask of this shape (N, K); True is kept. Exactly round(sparsity * blocks) blocks are pruned, at random.

    Raises:
        ValueError: an unknown pattern, one that does not divide the shape, or another sparsity than N:M has.
    """
    n, k = shape
    if (fixed := fixed_sparsity(pattern)) is not None:
        kept, of = map(int, pattern.split(":"))
        if abs(fixed - sparsity) > 1e-9 or k % of:
            raise ValueError(f"{pattern} with sparsity {sparsity:g}, K={k}: expected {fixed:g} and a multiple of {of}")
        scores = torch.rand(n * k // of, of, generator=generator)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(kept).indices, True).view(n, k)
    rows, columns = block(pattern)
    if n % rows or k % columns:
        raise ValueError(f"pattern {pattern}: expected N, K in multiples of it, got {n} x {k}")
    blocks = n // rows * (k // columns)
    pruned = round(sparsity * blocks)
    scores = torch.rand(blocks, generator=generator)
    mask = torch.ones(blocks, dtype=torch.bool)
    if pruned:
        threshold = scores.kthvalue(pruned).values
        mask = scores > threshold
        ties = (scores == threshold).nonzero().flatten()  # float32 has 2^24 numbers to draw: some come twice
        mask[ties[: blocks - pruned - int(mask.sum())]] = True
    mask = mask.view(n // rows, k // columns)
    return mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1) if rows * columns > 1 else mask


def block(pattern: str) -> tuple[int, int]:
    """Outputs x inputs that are pruned together."""
    if pattern == UNSTRUCTURED:
        return 1, 1
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", pattern)
    if found is None:
        raise ValueError(f"pattern {pattern!r}: expected unstructured, RxC or N:M")
    return int(found[1]), int(found[2])
