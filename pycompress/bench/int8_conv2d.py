"""Int8 convolution against everything else that computes one on this CPU: `pycompress bench int8_conv2d`.

The layers of ResNet-18 and ResNet-50, from fp32 input to fp32 output. All providers of a case get the same tensors in
the same process, are checked against float64, and are then timed in turns with loops that measure the machine. In a row
M is the number of outputs of a channel, K the products an output sums, N the channels; `options` names the layer.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from pycompress import peaks
from pycompress.bench import int8_conv2d_summary as summary
from pycompress.bench.int8_conv2d_providers import PROVIDERS, Layer, Provider
from pycompress.bench.int8_matmul_providers import Bound
from pycompress.bench.int8_matmul_run import PEAK_SECONDS, relative_error
from pycompress.bench.options import add_common, counts, start
from pycompress.bench.provider import Machine, failure
from pycompress.bench.rows import Row, write_csv
from pycompress.bench.timing import Runner, time_round_robin

# Bounds on Row.error; torch's static int8 rounds the output to 8 bits too, which gives 0.06.
TOLERANCE = {"fp32": 1e-5, "int8": 8e-2}
CELL_SECONDS, QUICK_SECONDS = 1.5, 0.5


@dataclass(frozen=True)
class Shape:
    """A square layer: `size` rows and columns in; padding keeps them, but for the stride."""

    channels: int
    out: int
    kernel: int
    stride: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} to {self.out}, {self.kernel}x{self.kernel}/{self.stride}"

    def conv(self) -> nn.Conv2d:
        return nn.Conv2d(self.channels, self.out, self.kernel, self.stride, self.kernel // 2).eval()


def _bottlenecks() -> Iterator[Shape]:
    """The layers of ResNet-50, stage by stage, each shape once."""
    channels, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        yield Shape(channels, width, 1, 1, size)
        yield Shape(width, width, 3, stride, size)
        yield Shape(channels, 4 * width, 1, stride, size)  # the shortcut; of the first stage also the way out
        size, channels = size // stride, 4 * width
        if stride > 1:
            yield Shape(width, channels, 1, 1, size)
            yield Shape(width, width, 3, 1, size)
        yield Shape(channels, width, 1, 1, size)


STEM = Shape(3, 64, 7, 2, 224)
RESNET50 = (STEM, *_bottlenecks())
RESNET18 = (
    *(Shape(64 << i, 128 << i, kernel, 2, 56 >> i) for i in range(3) for kernel in (3, 1)),
    *(Shape(64 << i, 64 << i, 3, 1, 56 >> i) for i in range(4)),
)
SHAPES = tuple(dict.fromkeys(RESNET50 + RESNET18))
QUICK = (Shape(64, 64, 3, 1, 56), Shape(256, 64, 1, 1, 56), Shape(512, 512, 3, 1, 7))
BATCHES = (1, 8)


def _exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return nn.functional.conv2d(x.double(), conv.weight.double(), bias, conv.stride, conv.padding)


def _times(bound: dict[Provider, Bound], gop: float, threads: int, seconds: float) -> dict[Provider, dict[str, object]]:
    """Times the providers of one case in turns with the peaks of the machine. Returns fields of rows."""
    runners = {p.name: Runner(b.run, p.pool) for p, b in bound.items()}
    probe = partial(peaks.measure, threads=threads, seconds=PEAK_SECONDS, read=False)
    timing = time_round_robin(runners, seconds=seconds, probe=probe)
    found: dict[Provider, dict[str, object]] = {}
    for provider in bound:
        stats = timing.stats[provider.name]
        limits = [limit for probed in timing.probes if (limit := getattr(probed, provider.peak)) is not None]
        peak = median(limits) if limits else None
        found[provider] = {
            "p20_us": stats.p20 * 1e6,
            "p50_us": stats.p50 * 1e6,
            "p80_us": stats.p80 * 1e6,
            "samples": stats.samples,
            "gop_s": gop / stats.p50,
            "peak": peak,
            "peak_kind": provider.peak,
            "fraction": gop / stats.p50 / peak if peak else None,
        }
    return found


def run_case(
    machine: Machine, providers: Sequence[Provider], shape: Shape, batch: int, threads: int, seconds: float
) -> list[Row]:
    """A provider that fails or is wrong gets a row that says so and no time."""
    torch.manual_seed(0)
    conv, x = shape.conv(), torch.randn(batch, shape.channels, shape.size, shape.size)
    low, high = x.aminmax()
    layer, y64 = Layer(conv, (low.item(), high.item())), _exact(conv, x)
    outputs, terms = y64[:, 0].numel(), conv.weight[0].numel()
    status, errors, bound = dict[Provider, str](), dict[Provider, float](), dict[Provider, Bound]()
    for provider in providers:
        try:
            call = provider.build(layer, threads)(x)
            errors[provider] = relative_error(call.output(), y64)
        except Exception as raised:  # whatever a foreign runtime raises is its result, and is reported as such
            status[provider] = failure(raised)
            continue
        if errors[provider] <= TOLERANCE[provider.dtype]:  # False for NaN
            bound[provider] = call
        status[provider] = "ok" if provider in bound else "wrong"
    times = _times(bound, 2e-9 * outputs * terms * shape.out, threads, seconds) if bound else {}
    sizes = {"threads": threads, "M": outputs, "K": terms, "N": shape.out, "options": f"batch {batch}, {shape.name}"}
    return [
        machine.row(
            "int8_conv2d", p, p.dtype, "layer", error=errors.get(p), status=status[p], **sizes, **times.get(p, {})
        )
        for p in providers
    ]


def run_all(
    providers: Sequence[Provider],
    shapes: Sequence[Shape],
    batches: Sequence[int],
    threads: Sequence[int],
    seconds: float,
) -> Iterator[Row]:
    """Absent providers get one row each."""
    machine, previous = Machine.here(), torch.get_num_threads()
    for p in providers:
        if p.missing:
            yield machine.row("int8_conv2d", p, p.dtype, "layer", status=f"not installed: {p.missing}")
    present = [p for p in providers if not p.missing]
    try:
        for count in threads:
            torch.set_num_threads(count)
            for batch in batches:
                for shape in shapes:
                    rows = run_case(machine, present, shape, batch, count, seconds)
                    print(summary.progress_line(rows), file=sys.stderr, flush=True)
                    yield from rows
    finally:
        torch.set_num_threads(previous)


def report(rows: Sequence[Row], out: Path) -> None:
    """Writes int8_conv2d.md beside the CSV, and prints the summary."""
    (out / "int8_conv2d.md").write_text(summary.tables(rows), encoding="utf-8")
    print(summary.text(rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pycompress bench int8_conv2d",
        description="Int8 convolutions of ResNet-18 and ResNet-50 against everything else on this CPU.",
        epilog=f"A full run takes about 6 minutes. Providers: {', '.join(p.name for p in PROVIDERS)}.",
    )
    parser.add_argument("--quick", action="store_true", help="three layers; under a minute")
    parser.add_argument("--batch", type=counts, metavar="N,...", help="default: 1,8")
    add_common(parser, "int8_conv2d", CELL_SECONDS, QUICK_SECONDS, cuda=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. `argv` without the program's name; None takes sys.argv."""
    argv = sys.argv[1:] if argv is None else argv
    started = start(_parser(), argv, PROVIDERS, lambda p: f"{p.name:32} {p.dtype:8}", report)
    if started is None:
        return 0
    options, providers = started
    seconds = options.seconds or (QUICK_SECONDS if options.quick else CELL_SECONDS)
    shapes, batches = QUICK if options.quick else SHAPES, options.batch or BATCHES
    rows: list[Row] = []
    try:
        with torch.inference_mode():
            rows.extend(run_all(providers, shapes, batches, options.threads, seconds))
    finally:
        write_csv(options.out / "int8_conv2d.csv", rows)  # an interrupted run keeps what it measured
    if options.report:
        report(rows, options.out)
    return 0
