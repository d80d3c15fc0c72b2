"""Options that every `pycompress bench NAME` takes."""

import argparse
import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from pycompress.bench.provider import P, choose
from pycompress.bench.rows import Row, read_csv


def counts(text: str) -> list[int]:
    """ "1,16" -> [1, 16]; ValueError, which argparse reports, for anything but positive whole numbers."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(f"{text!r}: expected positive whole numbers")
    return values


def names_of(known: Container[str]) -> Callable[[str], list[str]]:
    """For add_argument(type=...): "a,b" -> ["a", "b"]; an error for a name that is not known."""

    def names(text: str) -> list[str]:
        values = text.split(",")
        for value in values:
            if value not in known:
                raise ValueError(f"unknown {value!r}")
        return values

    return names


def wants_gpu(argv: Sequence[str]) -> bool:
    """Whether --device names a GPU, for which a benchmark has other providers, cases and options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    return str(parser.parse_known_args(argv)[0].device).startswith("cuda")


def describe_all(known: Sequence[P], describe: Callable[[P], str]) -> None:
    """What --list prints. describe: the columns between a provider's name and its version."""
    for p in known:
        print(f"{describe(p)} {f'not installed: {p.missing}' if p.missing else p.version}")


def add_common(
    parser: argparse.ArgumentParser, name: str, seconds: float, quick_seconds: float, *, cuda: bool = True
) -> None:
    """Adds --device, --threads, --providers, --seconds, --report, --out, --from (as `source`) and --list.

    cuda: whether the benchmark has a part for GPUs, which reads options of its own.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    where = "cuda has options of its own: --device cuda --help" if cuda else "this benchmark has none for a GPU"
    add("--device", choices=("cpu",), default="cpu", help=where)
    add("--threads", type=counts, metavar="N,...", default=sorted({1, min(2, cores)}), help="default: 1,2")
    add("--providers", type=lambda text: text.split(","), default=[], help="names or their beginnings")
    add("--seconds", type=float, help=f"of timing per case; default: {seconds:g}, quick {quick_seconds:g}")
    add("--report", action=flag, default=True, help="tables, plot and summary besides the CSV")
    add("--out", type=Path, default=Path("bench-out"), help=f"folder for {name}.csv, .md and .png")
    add("--from", dest="source", type=Path, metavar="CSV", help="measure nothing, report from this file")
    add("--list", action="store_true", help="list the providers and the versions installed")


def start(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    known: Sequence[P],
    describe: Callable[[P], str],
    report: Callable[[list[Row], Path], object],
    wrong: Callable[[argparse.Namespace], str] = lambda options: "",
) -> tuple[argparse.Namespace, list[P]] | None:
    """What every benchmark does first: options, and the providers that they name; None where --list or --from is all.

    describe: the columns of --list between a provider's name and its version. wrong: what is wrong with the options,
    "" if nothing.
    """
    options = parser.parse_args(argv)
    try:
        providers = choose(known, options.providers)
        source = read_csv(options.source) if options.source else []
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if complaint := wrong(options):
        parser.error(complaint)
    if options.list:
        describe_all(known, describe)
        return None
    options.out.mkdir(parents=True, exist_ok=True)
    if options.source:
        report(source, options.out)
        return None
    return options, providers
