"""The tables of docs/gpu.md, from what was compiled and counted here.

    make cpp-test                                          # counts bytes, in the emulator
    env -u TRITON_INTERPRET python -m tests.triton_compile --out build/triton.json
    python -m tests.gpu_tables                             # compiles the CUDA kernels, rewrites docs/gpu.md

Sources: the log of `make cpp-test`, where the tests print lines "counted key=value ..."; nvcc, by
tests/cuda_compile.py; the JSON of tests/triton_compile.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import cuda_compile
from tests.cuda_compile import ROOT, TARGETS, Compiled

PAGE = ROOT / "docs" / "gpu.md"
COUNTED = ROOT / "build" / "cpp-test" / "Testing" / "Temporary" / "LastTest.log"
TRITON = ROOT / "build" / "triton.json"
# Rows of a loss for the estimate: bytes are proportional to them, and the emulated ones are few.
ESTIMATED_ROWS = 4096


@dataclass(frozen=True)
class Gpu:
    """As its maker states: bytes a second, and operations a second of the dense product by type."""

    name: str
    memory: float
    operations: dict[str, float]


GPUS = (
    Gpu("A100", 2.0e12, {"int8": 624e12, "bf16": 312e12}),
    Gpu("H100 SXM", 3.35e12, {"int8": 1979e12, "bf16": 989e12}),
)


# ---- what was counted ----


@dataclass(frozen=True)
class Count:
    """One launch. case: as printed, which is the same for all launches of a call."""

    op: str
    kernel: str
    case: str
    asked: int
    moved: int
    floor: int
    shared: int
    threads: int
    conflicts: int | None


@dataclass(frozen=True)
class Call:
    """The launches of one call together."""

    op: str
    case: str
    launches: tuple[Count, ...]

    @property
    def moved(self) -> int:
        return sum(launch.moved for launch in self.launches)

    @property
    def asked(self) -> int:
        return sum(launch.asked for launch in self.launches)

    @property
    def floor(self) -> int:
        return self.launches[0].floor

    @property
    def conflicts(self) -> int | None:
        found = [launch.conflicts for launch in self.launches if launch.conflicts is not None]
        return sum(found) if found else None

    @property
    def sizes(self) -> dict[str, int]:
        """Of "M=16,K=4096,N=4096,bf16": {"M": 16, "K": 4096, "N": 4096}."""
        return {key: int(value) for key, value in re.findall(r"\b([A-Z])=(\d+)\b", self.case)}


def read_counts(text: str) -> list[Call]:
    """From lines "counted op=... kernel=... case=... bytes=... sectors=... floor=..."; others are passed over."""
    calls: dict[tuple[str, str], list[Count]] = {}
    for line in dict.fromkeys(re.findall(r"^.*?\bcounted (op=.*)$", text, re.MULTILINE)):
        found = dict(word.split("=", 1) for word in line.split() if "=" in word)
        conflicts = found.get("conflicts")
        count = Count(
            found["op"], found["kernel"].split("<")[0], found["case"], int(found["bytes"]), int(found["sectors"]),
            int(found["floor"]), int(found.get("shared", 0)), int(found.get("threads", 0)),
            None if conflicts is None else int(conflicts),
        )  # fmt: skip
        calls.setdefault((count.op, count.case), []).append(count)
    return [Call(op, case, tuple(launches)) for (op, case), launches in calls.items()]


def work(call: Call) -> tuple[float, float, str]:
    """(bytes moved, operations, type of the product) of the case of the estimate."""
    sizes = call.sizes
    if "T" in sizes:
        return call.moved * ESTIMATED_ROWS / sizes["T"], 0.0, "bf16"
    kept = re.search(r"kept=([\d.]+)", call.case)
    operations = 2.0 * sizes["M"] * sizes["N"] * sizes["K"] * (float(kept[1]) if kept else 1)
    kind = "int8" if any(word in call.case for word in ("dynamic", "static", "int8", "s8")) else "bf16"
    return call.moved, operations, kind


# ---- tables ----


def grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def compiled_table(kernels: Sequence[Compiled], calls: Sequence[Call]) -> str:
    """A line a kernel, whatever its template's arguments: of registers, the fewest and the most."""
    shared: dict[tuple[str, str], set[int]] = {}
    for call in calls:
        for launch in call.launches:
            shared.setdefault((launch.op, launch.kernel), set()).add(launch.shared)
    body = []
    for op, name in dict.fromkeys((k.source.split("/")[1], k.name.split("<")[0]) for k in kernels):
        group = [k for k in kernels if (k.source.split("/")[1], k.name.split("<")[0]) == (op, name)]
        registers = [span(k.registers for k in group if k.target == target) for target in TARGETS]
        line = [f"{op}: `{name}`", str(len({k.name for k in group})), span(k.threads or 0 for k in group), *registers]
        spills = sum(k.spills + k.stack for k in group)
        body.append([*line, str(spills), span(shared[op, name]) if (op, name) in shared else "-"])
    targets = [f"sm_{target}" for target in TARGETS]
    return grid(["kernel", "instances", "threads ≤", *targets, "spills", "shared memory of the counted cases"], body)


def triton_table(rows: Sequence[dict]) -> str:
    body = []
    arches = sorted({row["arch"] for row in rows})
    for module, name in dict.fromkeys((row["module"], _family(row["name"])) for row in rows):
        group = [row for row in rows if (row["module"], _family(row["name"])) == (module, name)]
        line = [f"{module.removesuffix('_shipped')}: `{name}`", str(len({row["name"] for row in group}))]
        for arch in arches:
            found = [row for row in group if row["arch"] == arch]
            line.append(span(row["registers"] for row in found) if found else "-")
            line.append(span(row["shared"] for row in found) if found else "-")
        body.append([*line, str(sum(row["stack"] for row in group)), _instructions(group)])
    columns = [column for arch in arches for column in (f"sm_{arch}", "shared")]
    return grid(["kernel", "configurations", *columns, "spills", "products by"], body)


# What follows in a configuration's name tells types and options apart, not kernels or tiles.
_OPTION = re.compile(
    r"_(dynamic|static|f(loat|p)(32|16)|bf(loat)?16|i8|int8|split|odd|ragged|forward|reverse|jsd)\b"
)


def _family(name: str) -> str:
    """ "int8_matmul_16x64x128_dynamic_i8_split" -> "int8_matmul_16x64x128"."""
    name = name.replace("_", " _")  # so that words end where underscores are
    found = _OPTION.search(name)
    return name[: found.start() if found else None].replace(" ", "")


def _instructions(group: Sequence[dict]) -> str:
    words = {"wgmma": "wgmma", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    found = {words[i.split(".")[0]] for row in group for i in row["instructions"] if i.split(".")[0] in words}
    return ", ".join(sorted(found)) or "-"


def counted_table(calls: Sequence[Call]) -> str:
    body = []
    for call in calls:
        kernels = ", ".join(f"`{launch.kernel}`" for launch in call.launches)
        conflicts = "-" if call.conflicts is None else str(call.conflicts)
        ratios = f"{call.asked / call.floor:.3f}", f"{call.moved / call.floor:.3f}"
        body.append([f"{call.op} {_shown(call.case)}", kernels, f"{call.floor / 1e6:.3f}", *ratios, conflicts])
    head = ["case", "kernels", "floor, MB", "asked / floor", "moved / floor", "bank conflicts"]
    return grid(head, body)


def _shown(case: str) -> str:
    """ "M=1,K=64,bf16,kept=0.4928" -> "M=1, K=64, bf16, 49 % kept"."""
    case = re.sub(r"kept=([\d.]+)", lambda found: f"{float(found[1]) * 100:.0f} % kept", case)
    return case.replace(",", ", ").replace("_", " ")


def estimate_table(calls: Sequence[Call]) -> str:
    """The least time by the stated rates: of memory, or of the product, whichever takes longer."""
    body = []
    for call in calls:
        moved, operations, kind = work(call)
        case = re.sub(r"\bT=\d+", f"T={ESTIMATED_ROWS}", call.case)
        line = [f"{call.op} {_shown(case)}", f"{moved / 1e6:.1f}", f"{operations / 1e9:.2f}" if operations else "-"]
        for gpu in GPUS:
            seconds = {"memory": moved / gpu.memory, "products": operations / gpu.operations[kind]}
            limit = max(seconds, key=lambda name: seconds[name])
            line.append(f"{seconds[limit] * 1e6:.1f} ({limit})")
        body.append(line)
    return grid(["case", "MB", "GOP", *(f"{gpu.name}, µs" for gpu in GPUS)], body)


def replaced(page: str, name: str, table: str) -> str:
    """The page with this table between its marks.

    Raises:
        ValueError: the page has no such marks.
    """
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if page.count(first) != 1 or page.count(last) != 1:
        raise ValueError(f"{PAGE.name}: expected {first!r} and {last!r} once each")
    before, rest = page.split(first)
    return f"{before}{first}\n{table}\n{last}{rest.split(last)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counted", type=Path, default=COUNTED, help="a log with lines that begin with counted")
    parser.add_argument("--triton", type=Path, default=TRITON, help="JSON of tests.triton_compile")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    page = options.page.read_text(encoding="utf-8")
    calls: list[Call] = []
    if options.counted.is_file():
        calls = read_counts(options.counted.read_text(errors="replace"))
    if calls:
        page = replaced(page, "counted", counted_table(calls))
        page = replaced(page, "estimated", estimate_table(calls))
    else:
        print(f"no counts in {options.counted}; run make cpp-test", file=sys.stderr)
    if options.triton.is_file():
        page = replaced(page, "triton", triton_table(json.loads(options.triton.read_text())))
    else:
        print(f"no {options.triton}; run tests.triton_compile", file=sys.stderr)
    try:
        page = replaced(page, "compiled", compiled_table(cuda_compile.compiled(), calls))
    except cuda_compile.NoCompilerError as error:
        print(f"the CUDA table stays: {error}", file=sys.stderr)
    options.page.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
