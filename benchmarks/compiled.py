"""MiniLM eager, under torch.compile and as an AOTInductor package, in float32 and compressed: one call's time.

What torch.compile gains around int8 layers: the operators between them fuse, the layers themselves stay calls of
pycompress's kernels. Prints a table, and writes compiled.csv into --out (default bench-out).
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import pycompress
from pycompress.demo.encoder import Encoder
from pycompress.demo.prune_encoder import copied

SHAPES = ((1, 16), (1, 128), (8, 128))
MODES = ("dynamic", "weight_only")
Run = Callable[[Tensor, Tensor], Tensor]


class Hidden(nn.Module):
    """The model as one exports it: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def batch(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + tokens)
    ids = torch.randint(1000, 30_000, (rows, tokens), generator=generator)
    return ids, torch.ones_like(ids)


def runs(model: nn.Module, mode: str, folder: Path) -> dict[str, Run]:
    """The model eager, compiled and packaged, for any batch and length."""
    if mode != "float32":
        model = copied(model)
        pycompress.quantize_(model, mode)
    hidden = Hidden(model).eval()
    rows, tokens = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("tokens", min=2, max=256)
    shapes = ({0: rows, 1: tokens}, {0: rows, 1: tokens})
    program = torch.export.export(hidden, batch(2, 16), dynamic_shapes=shapes)
    package = folder / f"{mode}.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    compiled = torch.compile(hidden, fullgraph=True, dynamic=True)
    compiled(*batch(2, 16))
    return {"eager": hidden, "torch.compile": compiled, "AOTInductor": torch._inductor.aoti_load_package(str(package))}


def milliseconds(every: dict[tuple[str, str], Run], inputs: tuple[Tensor, Tensor], rounds: int) -> dict:
    """Medians of single calls; all take turns, in another order each round."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in every}
    for round_ in range(rounds + 2):
        for key in random.sample(list(every), len(every)):
            start = time.perf_counter()
            every[key](*inputs)
            if round_ >= 2:
                times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(found) for key, found in times.items()}


def errors(every: dict[tuple[str, str], Run], inputs: tuple[Tensor, Tensor]) -> dict:
    """Relative distances from the same mode in eager, and from float32."""
    results = {key: run(*inputs) for key, run in every.items()}

    def apart(one: tuple[str, str], other: tuple[str, str]) -> str:
        return f"{float((results[one] - results[other]).norm() / results[other].norm()):.1e}"

    return {key: (apart(key, (key[0], "eager")), apart(key, ("float32", "eager"))) for key in results}


def measured(every: dict[tuple[str, str], Run], rounds: int) -> list[dict[str, object]]:
    table = []
    for rows, tokens in SHAPES:
        inputs = batch(rows, tokens)
        wrong, times = errors(every, inputs), milliseconds(every, inputs, rounds)
        for (mode, how), time_ in times.items():
            table.append(
                {
                    "batch": rows,
                    "tokens": tokens,
                    "mode": mode,
                    "run": how,
                    "ms": round(time_, 3),
                    "times_eager": round(times[mode, "eager"] / time_, 3),
                    "times_float_eager": round(times["float32", "eager"] / time_, 3),
                    "from_eager": wrong[mode, how][0],
                    "from_float": wrong[mode, how][1],
                }
            )
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--modes", default=",".join(MODES), help="besides float32: dynamic, weight_only, int4, nf4")
    options = parser.parse_args(argv)
    model = Encoder().model
    every: dict[tuple[str, str], Run] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for mode in ("float32", *options.modes.split(",")):
            print(f"compiling {mode} ...", file=sys.stderr)
            every.update({(mode, how): run for how, run in runs(model, mode, Path(folder)).items()})
        table = measured(every, options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "compiled.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    print(" ".join(f"{key:>18}" for key in table[0]))
    for row in table:
        print(" ".join(f"{value!s:>18}" for value in row.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
