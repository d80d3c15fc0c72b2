"""Int8 linear layers on a GPU against cuBLAS in bfloat16, torch's int8 product, torch.compile and torchao.

`pycompress bench int8_matmul --device cuda`. Inputs are bfloat16, as models on GPUs have them.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.bench.gpu_meter import Meter
from pycompress.bench.gpu_run import Bound, GpuCase, GpuProvider, Work, command, parser
from pycompress.nn import Int8Linear

CELL_SECONDS = 0.2
SHAPES = ((768, 3072), (4096, 4096), (4096, 11008), (8192, 8192))  # K, N
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
QUICK_SHAPES, QUICK_TOKENS = ((4096, 4096),), (1, 16, 1024)
TOLERANCE = {"bf16": 1e-2, "int8": 4e-2, "int8-weight": 1.5e-2}


@dataclass(frozen=True)
class Data:
    """linear: bfloat16, K -> N. x: bfloat16 (M, K). All on the device."""

    linear: nn.Linear
    x: Tensor

    def work(self, dtype: str) -> Work:
        """The weight read once, x read and y written in bfloat16."""
        n, k = self.linear.weight.shape
        m = self.x.shape[0]
        moved = n * k * (2 if dtype == "bf16" else 1) + 2 * m * (k + n)
        kind = "int8_gops" if dtype == "int8" else "bf16_gflops"
        return Work(1e-9 * moved, 2e-9 * m * n * k, kind)


def make(m: int, k: int, n: int, device: torch.device) -> tuple[Data, list[Tensor]]:
    generator = torch.Generator().manual_seed(k * 1_000_003 + n)
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.normal_(generator=generator).div_(k**0.5)
        linear.bias.normal_(generator=generator)
    linear = linear.to(device, torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(m, k, generator=generator).to(device, torch.bfloat16)
    truth = x.double() @ linear.weight.double().t() + linear.bias.double()
    return Data(linear, x), [truth]


# ---- providers ----


def _bound(data: Data, dtype: str, module: Callable[[Tensor], Tensor]) -> Bound:
    run = partial(module, data.x)
    return Bound(run, lambda: [run()], data.work(dtype))


def _ours(backend: str, mode: str, dtype: str, data: Data) -> Bound:
    low, high = (v.item() for v in data.x.float().aminmax())
    input_range = (low, high) if mode == "static" else None
    return _bound(
        data, dtype, Int8Linear.from_float(data.linear, mode=mode, input_range=input_range, backend=backend)
    )


def _dense(compiled: bool, data: Data) -> Bound:
    return _bound(data, "bf16", torch.compile(data.linear, dynamic=False) if compiled else data.linear)


def _int_mm(data: Data) -> Bound:
    """Quantised beforehand, scaled afterwards: only the integer product is timed."""
    q, scale = ops.quantize_weight(data.linear.weight)
    qx, x_scale = ops.quantize_weight(data.x)
    run = partial(torch._int_mm, qx, q.t())
    return Bound(run, lambda: [run() * x_scale[:, None] * scale + data.linear.bias], data.work("int8"))


def _int_mm_layer(data: Data) -> Bound:
    """The whole layer as one writes it in torch, for torch.compile to fuse what goes before and after the product."""
    q, scale = ops.quantize_weight(data.linear.weight)
    q_t, bias = q.t(), data.linear.bias

    def layer(x: Tensor) -> Tensor:
        x_scale = x.abs().amax(1, keepdim=True).float() / 127
        qx = (x.float() / x_scale).round().to(torch.int8)
        return (torch._int_mm(qx, q_t) * (x_scale * scale) + bias).to(x.dtype)

    return _bound(data, "int8", torch.compile(layer, dynamic=False))


def _torchao(config: str, dtype: str, data: Data) -> Bound:
    logging.disable(logging.WARNING)  # its import announces every CUDA library that it cannot load
    try:
        from torchao import quantization
    finally:
        logging.disable(logging.NOTSET)
    holder = nn.Sequential(nn.Linear(1, 1, device="meta"))
    holder[0] = nn.Linear(data.linear.in_features, data.linear.out_features, device="meta")
    holder[0].weight, holder[0].bias = data.linear.weight, data.linear.bias
    quantization.quantize_(holder, getattr(quantization, config)())
    return _bound(data, dtype, torch.compile(holder[0], dynamic=False))


def _of_pycompress(backend: str) -> tuple[GpuProvider, ...]:
    def of(mode: str, dtype: str) -> GpuProvider:
        build = partial(_ours, backend, mode, dtype)
        return GpuProvider(f"pycompress-{backend}-{mode}", backend, build, dtype, requires=("pycompress",))

    return of("dynamic", "int8"), of("static", "int8"), of("weight_only", "int8-weight")


_COMPILED = ("torch", "triton")
PROVIDERS: tuple[GpuProvider, ...] = (
    *_of_pycompress("cuda"),
    *_of_pycompress("triton"),
    GpuProvider("torch-bf16", "cublas", partial(_dense, False)),
    GpuProvider("torch-bf16-compile", "inductor", partial(_dense, True), requires=_COMPILED),
    GpuProvider("torch-int_mm", "cublas", _int_mm, "int8", "product"),
    GpuProvider("torch-int_mm-compile", "inductor", _int_mm_layer, "int8", requires=_COMPILED),
    GpuProvider(
        "torchao-dynamic", "inductor", partial(_torchao, "Int8DynamicActivationInt8WeightConfig", "int8"), "int8",
        requires=("torchao", "triton"),
    ),
    GpuProvider(
        "torchao-weight_only", "inductor", partial(_torchao, "Int8WeightOnlyConfig", "int8-weight"), "int8-weight",
        requires=("torchao", "triton"),
    ),
)  # fmt: skip


def cases(shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[GpuCase]:
    return [
        GpuCase("int8_matmul", {"M": m, "K": k, "N": n}, partial(make, m, k, n), PROVIDERS, TOLERANCE)
        for k, n in shapes
        for m in tokens
    ]


def main(argv: Sequence[str] | None = None, meter: Meter | None = None) -> int:
    """Returns the exit status. meter: how to measure; None makes one for --device."""
    from pycompress.bench.int8_matmul import shapes
    from pycompress.bench.options import counts

    parsed_by = parser("int8_matmul --device cuda", __doc__ or "", CELL_SECONDS)
    parsed_by.add_argument("--shapes", type=shapes, metavar="KxN,...", help="default: up to 8192 x 8192")
    parsed_by.add_argument("--tokens", type=counts, metavar="M,...", help=f"default: {','.join(map(str, TOKENS))}")
    options = parsed_by.parse_args(argv)
    wanted = cases(
        options.shapes or (QUICK_SHAPES if options.quick else SHAPES),
        options.tokens or (QUICK_TOKENS if options.quick else TOKENS),
    )
    with torch.inference_mode():
        return command("int8_matmul", options, parsed_by, wanted, CELL_SECONDS, meter)
