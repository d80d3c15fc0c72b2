"""Linear layers with a pruned weight against dense ones and torch.sparse: `pycompress bench sparse_linear`.

Shapes are K x N: the layer maps K inputs to N outputs. All providers of a case get the same tensors in the same
process, are checked against float64, and are then timed in turns. A full run has four parts: speed-up against
sparsity; one token and a weight that no cache holds; random layers, in which format="auto" should never be slower
than dense; and a whole model.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pycompress.bench import sparse_linear_summary as summary
from pycompress.bench.int8_matmul import shapes
from pycompress.bench.options import add_common, counts, names_of, start, wants_gpu
from pycompress.bench.rows import Row, write_csv
from pycompress.bench.sparse_linear_model import run_model
from pycompress.bench.sparse_linear_providers import (
    DTYPES,
    PATTERNS,
    PROVIDERS,
    UNSTRUCTURED,
    Provider,
    block,
    fixed_sparsity,
)
from pycompress.bench.sparse_linear_run import Cell, Shape, run_all, sweep
from pycompress.bench.sparse_linear_tables import tables

SHAPES: tuple[Shape, ...] = ((768, 768), (768, 3072), (3072, 768))
TOKENS = (1, 8, 128, 512)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# 512 MiB of fp32: more than the last-level cache of most servers, so M = 1 has to read it from memory.
BEYOND_CACHE: Shape = (8192, 16384)
BEYOND_SPARSITIES = (0.5, 0.8, 0.9)
RANDOM_LAYERS = 100
QUICK_SHAPES: tuple[Shape, ...] = ((768, 768),)
QUICK_TOKENS = (1, 128)
QUICK_SPARSITIES = (0.5, 0.8, 0.9)
QUICK_PATTERNS = (UNSTRUCTURED, "4x4")
QUICK_RANDOM_LAYERS = 5

CELL_SECONDS, QUICK_SECONDS, MODEL_SECONDS = 1.6, 0.5, 8.0
_SWEEP_SHARE = 0.2  # of the seconds of a case, for a case of the sweep: four calls take turns, not forty


def report(rows: Sequence[Row], out: Path) -> None:
    """Writes sparse_linear.md and sparse_linear.png beside the CSV, and prints the summary and the tables."""
    in_markdown = tables(rows)
    (out / "sparse_linear.md").write_text(in_markdown, encoding="utf-8")
    try:
        from pycompress.bench import sparse_linear_plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no plot: matplotlib is not installed; pip install 'pycompress[bench]'", file=sys.stderr)
    else:
        if sparse_linear_plot.can_plot(rows):
            sparse_linear_plot.plot(rows, out / "sparse_linear.png")
    print(summary.text(rows))
    print(f"\n{in_markdown}", end="")


def sparsities(text: str) -> list[float]:
    """ "0.5,0.9" -> [0.5, 0.9]; ValueError, which argparse reports, for anything but fractions from 0 to below 1."""
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value < 1 for value in values):
        raise ValueError(f"{text!r}: expected fractions from 0 to below 1")
    return values


def patterns(text: str) -> list[str]:
    """ "unstructured,4x4,2:4" -> the three; ValueError for anything that is no pattern."""
    values = text.split(",")
    for value in values:
        if fixed_sparsity(value) is None:
            block(value)
    return values


def random_layers(text: str) -> int:
    """ "100" -> 100; ValueError for a negative number."""
    count = int(text)
    if count < 0:
        raise ValueError(f"{text!r}: expected a whole number, not negative")
    return count


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(p.name for p in PROVIDERS)
    parser = argparse.ArgumentParser(
        prog="pycompress bench sparse_linear",
        description="Linear layers with a pruned weight against dense ones and torch.sparse, on this CPU.",
        epilog=f"A full run takes about 7 minutes. Providers: {names}.",
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--quick", action="store_true", help="one layer, M = 1, 128, two patterns, five random layers; under a minute")
    add("--shapes", type=shapes, metavar="KxN,...", help="default: BERT-base")
    add("--tokens", type=counts, metavar="M,...", help=f"default: {','.join(map(str, TOKENS))}")
    add("--sparsities", type=sparsities, metavar="S,...", help=f"default: {','.join(map(str, SPARSITIES))}")
    add("--patterns", type=patterns, metavar="P,...", help=f"default: {','.join(PATTERNS)}")
    add("--dtypes", type=names_of(DTYPES), metavar="NAME,...", help=f"default: {','.join(DTYPES)}")
    add("--random", type=random_layers, metavar="COUNT", help=f"random layers; default: {RANDOM_LAYERS} in a full run")
    add("--model", action=flag, help="MiniLM's latency and file; default: in a full run")
    add("--calibrate", action=flag, help="measure this machine anew for format=auto; default: in a full run")
    add_common(parser, "sparse_linear", CELL_SECONDS, QUICK_SECONDS)
    parser.set_defaults(threads=parser.get_default("threads")[-1:])
    return parser


def _grid(options: argparse.Namespace) -> list[Cell]:
    """Every shape with every sparsity, and the patterns that can have it."""
    dtypes = tuple(options.dtypes or DTYPES)
    wanted = tuple(options.patterns or (QUICK_PATTERNS if options.quick else PATTERNS))
    tokens = tuple(options.tokens or (QUICK_TOKENS if options.quick else TOKENS))
    found = []
    for shape in options.shapes or (QUICK_SHAPES if options.quick else SHAPES):
        for sparsity in options.sparsities or (QUICK_SPARSITIES if options.quick else SPARSITIES):
            fitting = tuple(p for p in wanted if fixed_sparsity(p) in (None, sparsity))
            if fitting:
                found.append(Cell(shape, tokens, sparsity, fitting, dtypes))
    return found


def _beyond_cache() -> list[Cell]:
    forms = ("dense", "bitmap")
    return [Cell(BEYOND_CACHE, (1,), s, (UNSTRUCTURED,), ("fp32",), forms) for s in BEYOND_SPARSITIES]


def _seconds(of_case: float) -> Callable[[Cell], float]:
    return lambda cell: of_case * (_SWEEP_SHARE if cell.covers == "sweep" else 1)


def _describe(p: Provider) -> str:
    return f"{p.name:24} {p.dtype:5} {','.join(p.patterns) or 'any':32}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. `argv` without the program's name; None takes sys.argv."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_gpu(argv):
        from pycompress.bench import gpu_sparse_linear

        return gpu_sparse_linear.main(argv)
    started = start(_parser(), argv, PROVIDERS, _describe, report)
    if started is None:
        return 0
    options, providers = started

    chosen = (options.shapes, options.tokens, options.sparsities, options.patterns, options.dtypes, options.providers)
    full = not (options.quick or any(chosen))
    seconds = options.seconds or (QUICK_SECONDS if options.quick else CELL_SECONDS)
    usual = RANDOM_LAYERS if full else QUICK_RANDOM_LAYERS if options.quick and not any(chosen) else 0
    cells = _grid(options) + (_beyond_cache() if full else [])
    cells += sweep(usual if options.random is None else options.random)
    calibrated = full if options.calibrate is None else options.calibrate
    rows: list[Row] = []
    try:
        rows.extend(run_all(providers, cells, options.threads, _seconds(seconds), calibrated))
        if full if options.model is None else options.model:
            rows.extend(run_model(options.threads[-1], options.seconds or MODEL_SECONDS))
    finally:
        write_csv(options.out / "sparse_linear.csv", rows)  # an interrupted run keeps what it measured
    if options.report:
        report(rows, options.out)
    return 0
