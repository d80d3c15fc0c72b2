"""What a training step costs with FakeQuantLinear, against nn.Linear and fake quantisation written in torch.

    python benchmarks/fake_quant_linear.py [--threads N] [--mode dynamic|static|weight_only] [--csv FILE]

One row a shape, pass (forward; step = forward and backward, gradients of x, weight and bias) and provider: median and
quartile-like quantiles in milliseconds, and the time relative to nn.Linear in the same rounds. The weight is quantised
anew in every call, as in training. "torch" is the usual composition in float: round x and the weight to what their
integers stand for, straight-through by detach, F.linear.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycompress.bench.timing import Runner, time_round_robin
from pycompress.nn import FakeQuantLinear
from pycompress.ops import MODES, affine_qparams

SHAPES = [(m, k, k) for k in (256, 768) for m in (1024, 8192)]
RANGE = (-4.0, 4.0)
FIELDS = ("pass", "provider", "M", "N", "K", "mode", "threads", "p20_ms", "p50_ms", "p80_ms", "to_linear")


def straight_through(rounded: Tensor, value: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def in_torch(layer: nn.Linear, mode: str) -> Callable[[Tensor], Tensor]:
    scale, zero_point = affine_qparams(*RANGE)

    def forward(x: Tensor) -> Tensor:
        w_scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = straight_through((layer.weight / w_scale).round().clamp(-127, 127) * w_scale, layer.weight)
        if mode == "dynamic":
            x_scale = x.detach().abs().amax(1, keepdim=True) / 127
            x = straight_through((x / x_scale).round() * x_scale, x)
        elif mode == "static":
            x = x.clamp(-zero_point * scale, (255 - zero_point) * scale)
            x = straight_through((x / scale).round() * scale, x)
        return F.linear(x, weight, layer.bias)

    return forward


def providers(k: int, n: int, mode: str) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """By name the layer that owns the parameters, and its forward."""
    found: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {}
    plain, composed = nn.Linear(k, n), nn.Linear(k, n)
    found["linear"], found["torch"] = (plain, plain), (composed, in_torch(composed, mode))
    for name, backend in (("fake_quant", "auto"), ("fake_quant reference", "reference")):
        input_range = RANGE if mode == "static" else None
        layer = FakeQuantLinear.from_float(nn.Linear(k, n), mode, input_range=input_range, backend=backend)
        found[name] = layer, layer
    return found


def runners(m: int, k: int, n: int, mode: str, step: bool) -> dict[str, Runner]:
    x, grad = torch.randn(m, k, requires_grad=True), torch.randn(m, n)

    def runner(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Runner:
        inputs = [x, *layer.parameters()]

        def run() -> None:
            y = forward(x)
            if step:
                torch.autograd.grad(y, inputs, grad)

        return Runner(run, "torch")

    return {name: runner(*provider) for name, provider in providers(k, n, mode).items()}


def measure(mode: str, rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for m, n, k in SHAPES:
        for step in (False, True):
            timing = time_round_robin(runners(m, k, n, mode, step), rounds=rounds, probe=lambda: None)
            linear = timing.stats["linear"].p50
            for name, stats in timing.stats.items():
                p20, p50, p80 = (f"{1e3 * p:.3f}" for p in (stats.p20, stats.p50, stats.p80))
                what = "step" if step else "forward"
                values = (what, name, m, n, k, mode, torch.get_num_threads(), p20, p50, p80)
                rows.append(dict(zip(FIELDS, (*values, f"{stats.p50 / linear:.2f}"), strict=True)))
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="dynamic", choices=MODES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="a file to write the rows to")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = measure(options.mode, options.rounds)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {options.threads} threads")
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in FIELDS]
    for cells in (dict(zip(FIELDS, FIELDS, strict=True)), *rows):
        print("  ".join(str(cells[name]).ljust(width) for name, width in zip(FIELDS, widths, strict=True)).rstrip())
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
