"""Linear layers with a pruned weight on a GPU against dense ones, torch's 2:4 and its block-sparse product.

`pycompress bench sparse_linear --device cuda`. Inputs are bfloat16, weights bfloat16 or int8.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pycompress.bench.gpu_meter import Meter
from pycompress.bench.gpu_run import Bound, GpuCase, GpuProvider, Work, command, parser
from pycompress.bench.sparse_linear_providers import UNSTRUCTURED, block, fixed_sparsity, random_mask
from pycompress.nn import Int8Linear, SparseLinear

CELL_SECONDS = 0.2
SHAPES = ((4096, 4096), (4096, 11008))  # K, N
TOKENS = (1, 4, 16, 128, 1024, 4096)
GRID = (  # pattern, sparsity
    (UNSTRUCTURED, 0.5), (UNSTRUCTURED, 0.8), (UNSTRUCTURED, 0.9), ("2:4", 0.5), ("16x16", 0.8), ("64x64", 0.8),
    ("64x64", 0.9),
)  # fmt: skip
QUICK_SHAPES, QUICK_TOKENS = ((4096, 4096),), (1, 1024)
TOLERANCE = {"bf16": 1e-2, "int8": 4e-2}
_BITMAP_TOKENS = 32  # what the bitmap is made for, and some more


@dataclass(frozen=True)
class Data:
    """linear: bfloat16, zeros where mask (N, K) is False. x: bfloat16 (M, K). All on the device."""

    linear: nn.Linear
    mask: Tensor
    x: Tensor
    pattern: str

    def work(self, dtype: str, form: str) -> Work:
        """The kept weights and where they are, read once, or the dense weight; x read and y written in bfloat16.

        Where they are: a bit a weight, two bits a kept weight of 2:4, nothing that counts of blocks. Operations are
        those of kept weights, at the rate of the dense product: a 2:4 product may be up to twice as fast.
        """
        n, k = self.mask.shape
        m, size = self.x.shape[0], 2 if dtype == "bf16" else 1
        kept = n * k if form == "dense" else int(self.mask.sum())
        where = {UNSTRUCTURED: n * k / 8, "2:4": kept / 4}.get(self.pattern, 0.0) if form != "dense" else 0.0
        kind = "int8_gops" if dtype == "int8" else "bf16_gflops"
        return Work(1e-9 * (kept * size + where + 2 * m * (k + n)), 2e-9 * m * kept, kind)


def make(m: int, k: int, n: int, pattern: str, sparsity: float, device: torch.device) -> tuple[Data, list[Tensor]]:
    generator = torch.Generator().manual_seed(k * 1_000_003 + n)
    mask = random_mask(pattern, (n, k), sparsity, generator)
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.normal_(generator=generator).div_(k**0.5).mul_(mask)
        linear.bias.normal_(generator=generator)
    linear = linear.to(device, torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(m, k, generator=generator).to(device, torch.bfloat16)
    truth = x.double() @ linear.weight.double().t() + linear.bias.double()
    return Data(linear, mask.to(device), x, pattern), [truth]


# ---- providers ----


def _bound(data: Data, dtype: str, form: str, module: Callable[[Tensor], Tensor]) -> Bound:
    run = partial(module, data.x)
    return Bound(run, lambda: [run()], data.work(dtype, form))


def _ours(backend: str, form: str, dtype: str, data: Data) -> Bound:
    weights = {"bf16": "bfloat16", "int8": "int8"}[dtype]
    module = SparseLinear.from_dense(data.linear, data.mask, dtype=weights, format=form, backend=backend)
    return _bound(data, dtype, form, module)


def _int8_dense(data: Data) -> Bound:
    return _bound(data, "int8", "dense", Int8Linear.from_float(data.linear))


def _semi_structured(data: Data) -> Bound:
    from torch.sparse import to_sparse_semi_structured

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        weight = to_sparse_semi_structured(data.linear.weight)
    return _bound(data, "bf16", "2:4", lambda x: nn.functional.linear(x, weight, data.linear.bias))


def _bsr(data: Data) -> Bound:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its compressed tensors beta
        weight = data.linear.weight.to_sparse_bsr(block(data.pattern))
    return _bound(data, "bf16", "bsr", lambda x: nn.functional.linear(x, weight, data.linear.bias))


def _of_pycompress(form: str, dtype: str) -> tuple[GpuProvider, ...]:
    return tuple(
        GpuProvider(
            f"pycompress-{backend}-{form}-{dtype}", backend, partial(_ours, backend, form, dtype), dtype,
            requires=("pycompress",),
        )
        for backend in ("cuda", "triton")
    )  # fmt: skip


DTYPES = ("bf16", "int8")
BITMAP = tuple(p for dtype in DTYPES for p in _of_pycompress("bitmap", dtype))
INDEX = tuple(p for dtype in DTYPES for p in _of_pycompress("index", dtype))
AUTO = tuple(
    GpuProvider(
        f"pycompress-auto-{dtype}", "auto", partial(_ours, "auto", "auto", dtype), dtype, requires=("pycompress",)
    )
    for dtype in DTYPES
)
DENSE = (
    GpuProvider("torch-dense-bf16", "cublas", lambda data: _bound(data, "bf16", "dense", data.linear)),
    GpuProvider("pycompress-dense-int8", "auto", _int8_dense, "int8", requires=("pycompress",)),
)
SEMI_STRUCTURED = GpuProvider("torch-semi_structured-bf16", "cusparselt", _semi_structured)
BSR = GpuProvider("torch-bsr-bf16", "triton", _bsr, requires=("torch", "triton"))


def providers(pattern: str, m: int) -> tuple[GpuProvider, ...]:
    """Those that take part in a case."""
    found = AUTO + DENSE
    if m <= _BITMAP_TOKENS:
        found = BITMAP + found
    if pattern == "2:4":
        return (*INDEX, *found, SEMI_STRUCTURED)
    return found if pattern == UNSTRUCTURED else (*INDEX, *found, BSR)


def cases(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], grid: Sequence[tuple[str, float]]
) -> list[GpuCase]:
    def of(k: int, n: int, m: int, pattern: str, sparsity: float) -> GpuCase:
        fields = {"M": m, "K": k, "N": n, "sparsity": sparsity, "options": pattern}
        make_it = partial(make, m, k, n, pattern, sparsity)
        return GpuCase("sparse_linear", fields, make_it, providers(pattern, m), TOLERANCE)

    return [of(k, n, m, pattern, sparsity) for k, n in shapes for pattern, sparsity in grid for m in tokens]


def _grid(patterns: Sequence[str] | None, sparsities: Sequence[float] | None) -> list[tuple[str, float]]:
    if not patterns and not sparsities:
        return list(GRID)
    found = []
    for pattern in patterns or dict.fromkeys(pattern for pattern, _ in GRID):
        fixed = fixed_sparsity(pattern)
        found += [(pattern, fixed)] if fixed is not None else [(pattern, s) for s in sparsities or (0.8,)]
    return found


def main(argv: Sequence[str] | None = None, meter: Meter | None = None) -> int:
    """Returns the exit status. meter: how to measure; None makes one for --device."""
    from pycompress.bench.int8_matmul import shapes
    from pycompress.bench.options import counts
    from pycompress.bench.sparse_linear import patterns, sparsities

    parsed_by = parser("sparse_linear --device cuda", __doc__ or "", CELL_SECONDS)
    add = parsed_by.add_argument
    add("--shapes", type=shapes, metavar="KxN,...", help="default: 4096-wide layers")
    add("--tokens", type=counts, metavar="M,...", help=f"default: {','.join(map(str, TOKENS))}")
    add("--patterns", type=patterns, metavar="P,...", help="default: unstructured, 2:4, blocks of 16 and 64")
    add("--sparsities", type=sparsities, metavar="S,...", help="of patterns that have a choice")
    options = parsed_by.parse_args(argv)
    wanted = cases(
        options.shapes or (QUICK_SHAPES if options.quick else SHAPES),
        options.tokens or (QUICK_TOKENS if options.quick else TOKENS),
        _grid(options.patterns, options.sparsities),
    )
    with torch.inference_mode():
        return command("sparse_linear", options, parsed_by, wanted, CELL_SECONDS, meter)
