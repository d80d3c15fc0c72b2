"""What the Triton kernels share: device functions, where to launch, and how a kernel is named for a compiler.

The device functions run compiled and under ``TRITON_INTERPRET=1``, which knows no libdevice and no inline assembly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pycompress.gpu import interpreting

INTERPRETED = tl.constexpr(interpreting())

# ---- device functions -----------------------------------------------------------------------------------------


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)) in fp32, by a power that cannot overflow."""
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0, e, 1.0) / (1.0 + e)


@triton.jit
def gelu(v):
    """v * Phi(v), by the error function."""
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def gelu_tanh(v):
    """gelu as ``0.5 v (1 + tanh(u)) = v sigmoid(2 u)``, ``u = sqrt(2 / pi) (v + 0.044715 v^3)``."""
    # From 30 on the sigmoid is 0 or 1 in fp32; the cube of larger values would overflow.
    c = tl.minimum(tl.maximum(v, -30.0), 30.0)
    return v * sigmoid(1.5957691216057308 * c * (1.0 + 0.044715 * c * c))


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """ACTIVATION (a name of ``ops.ACTIVATIONS``) of fp32 values; NaN stays NaN."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "gelu":
        v = gelu(v)
    elif ACTIVATION == "gelu_tanh":
        v = gelu_tanh(v)
    elif ACTIVATION == "silu":
        v = v * sigmoid(v)
    return v


@triton.jit
def round_to_int(v):
    """int32 nearest to fp32 v, ties to even, for ``|v| <= 2^22``.

    Added to 1.5 * 2^23, whose last bit counts ones, v is rounded by the addition itself. v must not be a bare product:
    a compiler that fuses it with the addition rounds once instead of twice.
    """
    return (v + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def magnitude_bits(v):
    """int32 bits of |v|, fp32: ordered as |v| is, then infinity, then every NaN. A maximum of them loses no NaN."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def float_dot(a, b, sums):
    """``a @ b + sums`` in fp32 of a floating and b of the same type or int8, which bf16 and fp16 hold exactly. fp32 is
    not rounded to tf32.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter takes bf16 for its bits, here and from int8
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    return tl.dot(a, b.to(a.dtype), sums, input_precision="ieee")


@triton.jit
def store_outputs(
    sums, m, n, y, x_scale, weight_scale, bias, M, N,
    ACTIVATION: tl.constexpr, HAS_X_SCALE: tl.constexpr, HAS_WEIGHT_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Stores ``act(sums * weight_scale * x_scale + bias)`` at rows m and columns n of y (M, N)."""
    in_m, in_n = m < M, n < N
    v = sums.to(tl.float32)
    if HAS_WEIGHT_SCALE:
        v = v * tl.load(weight_scale + n, mask=in_n, other=0.0)[None, :]
    if HAS_X_SCALE:
        v = v * tl.load(x_scale + m, mask=in_m, other=0.0)[:, None]
    if HAS_BIAS:
        v += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    v = activate(v, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], v, mask=in_m[:, None] & in_n[None, :])


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m, n) of the pid-th tile, GROUP rows of tiles at a time, so that neighbours in time share weights in L2.

    GROUP = 2, 3 x 3 tiles:      0 2 4
                                 1 3 5
                                 6 7 8
    """
    first = pid // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % rows, inside // rows


# ---- launches -------------------------------------------------------------------------------------------------

# Options of every launch. Triton's default for the fusion of products with additions is going to change, and it warns
# of it where nothing is said. Where two roundings are wanted, a kernel puts something between product and addition.
OPTIONS = {"enable_fp_fusion": True}


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's device current, so that kernels go to its current stream. Nothing for a CPU tensor (interpreted)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---- configurations, for ahead-of-time compilation --------------------------------------------------------------

ARCHES = (80, 90, 100)
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8"}


@dataclass(frozen=True)
class Shipped:
    """One configuration that a launcher may choose, as ``triton.compile`` takes it.

    name: unique in the file, e.g. ``int8_matmul_128x256x128_dynamic_bf16``. wants: by architecture, a regular
    expression of the instruction that its PTX must hold; None where any will do. arches: those it is chosen for.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int], list[list[Any]]]
    num_warps: int
    num_stages: int
    wants: Mapping[int, str] | None = None
    arches: tuple[int, ...] = field(default=ARCHES)


def shipped(
    name: str,
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    wants: Mapping[int, str] | None = None,
    arches: tuple[int, ...] = ARCHES,
) -> Shipped:
    """A configuration from the types of the arguments, ``"*bf16:16"`` for a pointer to bf16 that is a multiple of 16
    bytes, ``"i32:16"`` for an integer that is a multiple of 16, and the values of the others (constexpr parameters,
    integers that are 1, and pointers that are None).

    Raises:
        ValueError: a parameter of ``fn`` is in neither or in both.
    """
    signature: dict[str, str] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(_parameters(fn)):
        if (parameter in types) == (parameter in constants):
            raise ValueError(f"{name}: parameter {parameter!r} must be in exactly one of types and constants")
        kind, _, multiple = types.get(parameter, "constexpr").partition(":")
        signature[parameter] = kind
        if multiple:
            attrs[(position,)] = [["tt.divisibility", int(multiple)]]
    unknown = [key for key in (*types, *constants) if key not in signature]
    if unknown:
        raise ValueError(f"{name}: the kernel has no parameter {unknown[0]!r}")
    return Shipped(name, fn, signature, dict(constants), attrs, num_warps, num_stages, wants, arches)


def _parameters(fn: Any) -> Iterator[str]:
    """Names of a jit function's parameters; an interpreted one knows them only in Python's way."""
    return iter(inspect.signature(fn.fn).parameters)
