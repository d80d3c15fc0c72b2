"""Int8 linear layer against everything else that computes one on this CPU: `pycompress bench int8_matmul`.

Shapes are K x N: the layer maps K inputs to N outputs. All providers of a case get the same tensors in the
same process, are checked against float64, and are then timed in turns with loops that measure the machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pycompress import _native
from pycompress.bench import int8_matmul_summary as summary
from pycompress.bench.int8_matmul_providers import PROVIDERS, Provider
from pycompress.bench.int8_matmul_run import Shape, run_all
from pycompress.bench.options import add_common, counts, start, wants_gpu
from pycompress.bench.rows import Row, read_csv, timed, write_csv

BERT_BASE: tuple[Shape, ...] = ((768, 768), (768, 3072), (3072, 768))
MINILM: tuple[Shape, ...] = ((384, 384), (384, 1536), (1536, 384))
WIDE: tuple[Shape, ...] = ((4096, 4096), (4096, 11008))
SHAPES = MINILM + BERT_BASE + WIDE
TOKENS = (1, 4, 16, 64, 128, 512, 1024)
# 128 MiB of int8: more than the last-level cache of most servers, so M = 1 has to read it from memory.
BEYOND_CACHE: Shape = (8192, 16384)
QUICK_SHAPES: tuple[Shape, ...] = ((384, 384), (768, 3072))
QUICK_TOKENS = (1, 16, 128)

CELL_SECONDS, QUICK_SECONDS, AVX2_SECONDS = 2.5, 0.6, 1.0

# The same instruction set for us, for torch's own kernels, for MKL and for oneDNN.
AVX2 = {
    "PYCOMPRESS_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
AVX2_PROVIDERS = ("pycompress-dynamic", "torch-fp32")


def run_avx2(cases: Sequence[tuple[Shape, Sequence[int]]], threads: Sequence[int]) -> list[Row]:
    """The same in a process that has no more than AVX2: libraries choose instruction sets when loaded."""
    large = {shape: [m for m in tokens if m >= 64] for shape, tokens in cases}
    shapes = [f"{k}x{n}" for (k, n), tokens in large.items() if tokens]
    if not shapes:
        return []
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "--shapes": ",".join(shapes),
            "--tokens": ",".join(str(m) for m in sorted({m for tokens in large.values() for m in tokens})),
            "--threads": ",".join(map(str, threads)),
            "--providers": ",".join(AVX2_PROVIDERS),
            "--seconds": str(AVX2_SECONDS),
            "--out": folder,
        }
        arguments = [word for pair in options.items() for word in pair] + ["--no-avx2", "--no-report"]
        # Python puts the working directory in front of its path, where a source tree would hide the package.
        code = "import sys; from pycompress.bench.int8_matmul import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, env=os.environ | AVX2, cwd=folder, check=True)
        return read_csv(Path(folder) / "int8_matmul.csv")


def report(rows: Sequence[Row], out: Path) -> None:
    """Writes int8_matmul.md and int8_matmul.png beside the CSV, and prints the summary."""
    (out / "int8_matmul.md").write_text(summary.tables(rows), encoding="utf-8")
    try:
        from pycompress.bench import roofline
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no plot: matplotlib is not installed; pip install 'pycompress[bench]'", file=sys.stderr)
    else:
        if timed(rows):
            roofline.plot(rows, out / "int8_matmul.png", summary.PLOTTED, title="int8_matmul")
    print(summary.text(rows))


def shapes(text: str) -> list[Shape]:
    """ "768x3072,384x384" -> [(768, 3072), (384, 384)]; ValueError as above."""
    pairs = [counts(part.replace("x", ",")) for part in text.lower().split(",")]
    return [(k, n) for k, n in pairs]


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(p.name for p in PROVIDERS)
    parser = argparse.ArgumentParser(
        prog="pycompress bench int8_matmul",
        description="An int8 linear layer against everything else that computes one on this CPU.",
        epilog=f"A full run takes about 12 minutes. Providers: {names}.",
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--quick", action="store_true", help="two layers, M = 1, 16, 128; under a minute")
    add("--shapes", type=shapes, metavar="KxN,...", help="default: MiniLM, BERT-base, a 4096-wide model")
    add("--tokens", type=counts, metavar="M,...", help=f"default: {','.join(map(str, TOKENS))}")
    add("--avx2", action=flag, help="also M >= 64 held to AVX2, in a second process; default: in a full run")
    add_common(parser, "int8_matmul", CELL_SECONDS, QUICK_SECONDS)
    return parser


def _describe(p: Provider) -> str:
    return f"{p.name:32} {p.dtype:12} {p.covers:8}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. `argv` without the program's name; None takes sys.argv."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_gpu(argv):
        from pycompress.bench import gpu_int8_matmul

        return gpu_int8_matmul.main(argv)
    started = start(_parser(), argv, PROVIDERS, _describe, report)
    if started is None:
        return 0
    options, providers = started

    full = not (options.quick or options.shapes or options.tokens)
    tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    layers = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    cases: list[tuple[Shape, Sequence[int]]] = [(shape, tokens) for shape in layers]
    if full:
        cases.append((BEYOND_CACHE, (1,)))
    with_avx2 = (full and "avx2" in _native.available_isas()) if options.avx2 is None else options.avx2
    seconds = options.seconds or (QUICK_SECONDS if options.quick else CELL_SECONDS)
    rows: list[Row] = []
    try:
        with torch.inference_mode():
            rows.extend(run_all(providers, cases, options.threads, seconds))
        if with_avx2:
            rows.extend(run_avx2(cases, options.threads))
    finally:
        write_csv(options.out / "int8_matmul.csv", rows)  # an interrupted run keeps what it measured
    if options.report:
        report(rows, options.out)
    return 0
