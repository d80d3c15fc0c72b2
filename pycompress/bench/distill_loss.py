"""Distillation losses against everything else that computes one on this CPU: `pycompress bench distill_loss`.

Cases are T x V, tokens and classes, or T x H x V: LinearDistillationLoss with hidden states of width H. All
providers of a case get the same tensors in the same process, are checked against float64, and are then timed in
turns with loops that measure the machine.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pycompress.bench import distill_loss_summary as summary
from pycompress.bench.distill_loss_providers import MAIN, PROVIDERS, Options, Provider
from pycompress.bench.distill_loss_run import DTYPES, Case, run_all
from pycompress.bench.options import add_common, counts, names_of, start, wants_gpu
from pycompress.bench.rows import Row, write_csv

OPTIONS = {
    "main": MAIN,
    "tau1": Options(temperature=1.0),
    "tau3": Options(temperature=3.0),  # not a power of two: the hard term needs exponentials of its own
    "alpha0": Options(alpha=0.0),
    "reverse_kl": Options(divergence="reverse_kl"),
    "jsd": Options(divergence="jsd"),
}
# BERT's vocabulary, Llama 2's, Llama 3's; a classifier of ImageNet, one of digits.
CASES = (
    Case(512, 30522, dtypes=("fp32", "bf16", "fp16")),
    Case(256, 32000),
    Case(128, 128256),
    Case(4096, 1000),
    Case(65536, 10),
    *(Case(256, 32000, options=options) for name, options in OPTIONS.items() if name != "main"),
    Case(1024, 30522, hidden=384),
)
QUICK_CASES = (Case(128, 30522), Case(1024, 1000))

CELL_SECONDS, QUICK_SECONDS = 2.0, 0.5


def report(rows: Sequence[Row], out: Path) -> None:
    """Writes distill_loss.md and distill_loss.png beside the CSV, and prints the summary."""
    (out / "distill_loss.md").write_text(summary.tables(rows), encoding="utf-8")
    try:
        from pycompress.bench import distill_loss_plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no plot: matplotlib is not installed; pip install 'pycompress[bench]'", file=sys.stderr)
    else:
        if any(r.op == "distill_loss" for r in summary.measured(rows)):
            distill_loss_plot.plot(rows, out / "distill_loss.png")
    print(summary.text(rows))


def cases(text: str) -> list[Case]:
    """ "512x30522,1024x384x30522" -> a case of logits, and one of hidden states; ValueError for anything else."""
    found = []
    for part in text.lower().split(","):
        sizes = counts(part.replace("x", ","))
        if len(sizes) not in (2, 3):
            raise ValueError(f"{part!r}: expected TxV or TxHxV")
        found.append(Case(sizes[0], sizes[-1], sizes[1] if len(sizes) == 3 else None))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pycompress bench distill_loss",
        description="Distillation losses against everything else that computes one on this CPU.",
        epilog="A full run takes about 10 minutes, half of it torch.compile's. "
        f"Providers: {', '.join(p.name for p in PROVIDERS)}.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two cases, fp32, no memory; under a minute")
    add("--cases", type=cases, metavar="TxV,TxHxV,...", help="default: vocabularies of 10 to 128256")
    add("--dtypes", type=names_of(DTYPES), metavar="NAME,...", help="with --cases; default: fp32")
    add("--options", type=names_of(OPTIONS), metavar="NAME,...", help=f"with --cases; of {', '.join(OPTIONS)}")
    add("--memory", action=argparse.BooleanOptionalAction, help="peak extra memory; default: in a full run")
    add_common(parser, "distill_loss", CELL_SECONDS, QUICK_SECONDS)
    return parser


def _chosen(options: argparse.Namespace) -> list[Case]:
    if not options.cases:
        return list(QUICK_CASES if options.quick else CASES)
    dtypes = tuple(options.dtypes or ("fp32",))
    wanted = [OPTIONS[name] for name in options.options or ("main",)]
    return [replace(case, dtypes=dtypes, options=of_loss) for case in options.cases for of_loss in wanted]


def _describe(p: Provider) -> str:
    return f"{p.name:16} {'logits, linear' if p.loss else 'linear':16}"


def _wrong(options: argparse.Namespace) -> str:
    lonely = (options.dtypes or options.options) and not options.cases
    return "--dtypes and --options: expected --cases beside them" if lonely else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. `argv` without the program's name; None takes sys.argv."""
    argv = sys.argv[1:] if argv is None else argv
    if wants_gpu(argv):
        from pycompress.bench import gpu_distill_loss

        return gpu_distill_loss.main(argv)
    started = start(_parser(), argv, PROVIDERS, _describe, report, _wrong)
    if started is None:
        return 0
    options, providers = started

    full = not (options.quick or options.cases)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else CELL_SECONDS)
    with_memory = full if options.memory is None else options.memory
    rows: list[Row] = []
    try:
        rows.extend(run_all(providers, _chosen(options), options.threads, seconds, with_memory))
    finally:
        write_csv(options.out / "distill_loss.csv", rows)  # an interrupted run keeps what it measured
    if options.report:
        report(rows, options.out)
    return 0
