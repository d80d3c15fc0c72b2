"""Linear layers with 4-bit weights, by everything that computes one on this CPU: `pycompress bench int4_matmul`.

Shapes are K x N: the layer maps K inputs to N outputs. All providers of a case get the same tensors in the same
process, are checked against the float64 product of the weight before it was quantised, and are then timed in turns with
loops that measure the machine.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pycompress.bench import int4_matmul_summary as summary
from pycompress.bench.int4_matmul_providers import ELEMENT_BYTES, INT4_TOLERANCE, PROVIDERS
from pycompress.bench.int8_matmul import BEYOND_CACHE, shapes
from pycompress.bench.int8_matmul_providers import Provider
from pycompress.bench.int8_matmul_run import Benchmark, Shape, run_all
from pycompress.bench.options import add_common, counts, start
from pycompress.bench.rows import Row, timed, write_csv

SHAPES: tuple[Shape, ...] = ((384, 1536), (768, 768), (768, 3072), (4096, 4096), (4096, 11008))
TOKENS = (1, 4, 16, 128)
QUICK_SHAPES: tuple[Shape, ...] = ((768, 3072),)
QUICK_TOKENS = (1, 16)

CELL_SECONDS, QUICK_SECONDS = 2.5, 0.6
INT4 = Benchmark("int4_matmul", ELEMENT_BYTES, INT4_TOLERANCE, summary.progress_line)


def report(rows: Sequence[Row], out: Path) -> None:
    """Writes int4_matmul.md and int4_matmul.png beside the CSV, and prints the summary."""
    (out / "int4_matmul.md").write_text(summary.tables(rows), encoding="utf-8")
    try:
        from pycompress.bench import roofline
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no plot: matplotlib is not installed; pip install 'pycompress[bench]'", file=sys.stderr)
    else:
        if timed(rows):
            roofline.plot(rows, out / "int4_matmul.png", summary.PLOTTED, title="int4_matmul")
    print(summary.text(rows))


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(p.name for p in PROVIDERS)
    parser = argparse.ArgumentParser(
        prog="pycompress bench int4_matmul",
        description="A linear layer with 4-bit weights against everything else that computes one on this CPU.",
        epilog=f"A full run takes about 5 minutes. Providers: {names}.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one layer, M = 1, 16; some seconds")
    add("--shapes", type=shapes, metavar="KxN,...", help="default: MiniLM, BERT-base, a 4096-wide model")
    add("--tokens", type=counts, metavar="M,...", help=f"default: {','.join(map(str, TOKENS))}")
    add_common(parser, "int4_matmul", CELL_SECONDS, QUICK_SECONDS, cuda=False)
    return parser


def _describe(p: Provider) -> str:
    return f"{p.name:24} {p.dtype:12}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. `argv` without the program's name; None takes sys.argv."""
    argv = sys.argv[1:] if argv is None else argv
    started = start(_parser(), argv, PROVIDERS, _describe, report)
    if started is None:
        return 0
    options, providers = started

    tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    layers = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    cases: list[tuple[Shape, Sequence[int]]] = [(shape, tokens) for shape in layers]
    if not (options.quick or options.shapes or options.tokens):
        cases.append((BEYOND_CACHE, (1,)))
    seconds = options.seconds or (QUICK_SECONDS if options.quick else CELL_SECONDS)
    rows: list[Row] = []
    try:
        with torch.inference_mode():
            rows.extend(run_all(providers, cases, options.threads, seconds, INT4))
    finally:
        write_csv(options.out / "int4_matmul.csv", rows)  # an interrupted run keeps what it measured
    if options.report:
        report(rows, options.out)
    return 0
