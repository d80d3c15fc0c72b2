"""Options that every `pycompress bench NAME` takes."""

import argparse
import os
from collections.abc import Callable, Container
from pathlib import Path


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


def add_common(parser: argparse.ArgumentParser, name: str, seconds: float, quick_seconds: float) -> None:
    """Adds --threads, --providers, --seconds, --report, --out, --from (as `source`) and --list."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--threads", type=counts, metavar="N,...", default=sorted({1, min(2, cores)}), help="default: 1,2")
    add("--providers", type=lambda text: text.split(","), default=[], help="names or their beginnings")
    add("--seconds", type=float, help=f"of timing per case; default: {seconds:g}, quick {quick_seconds:g}")
    add("--report", action=flag, default=True, help="tables, plot and summary besides the CSV")
    add("--out", type=Path, default=Path("bench-out"), help=f"folder for {name}.csv, .md and .png")
    add("--from", dest="source", type=Path, metavar="CSV", help="measure nothing, report from this file")
    add("--list", action="store_true", help="list the providers and the versions installed")
