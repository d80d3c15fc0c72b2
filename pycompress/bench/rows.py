"""One benchmark result is one row: a fact that stands without its neighbours.

The CSV is the only thing measured; tables, plots and summaries are made from it.
"""

import csv
import subprocess
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pycompress import info
from pycompress.version import __version__


@dataclass(frozen=True)
class Row:
    """What was timed, how long it took, and what the machine could have done meanwhile.

    op, provider, backend   which implementation: "int8_matmul", "torch-quantize_dynamic-x86", "x86"
    isa                     the instruction set it is known to use; empty where the provider does not say
    dtype                   int8 (weights and activations), int8-weight, fp32, bf16
    covers                  "layer", or "product": the integer product without quantising, scales and bias;
                            of a loss "forward" (nobody wants a gradient) or "forward+backward"; of sparse_linear
                            also "sweep" (one of the random layers), "model" (a whole one) and "file" (its layers)
    M, N, K, threads        the case; None for a provider that is absent. Of a loss: M tokens, N classes,
                            K the width of the hidden states, None where it is given logits; of a model M tokens
    sparsity                fraction of zeros in the weight, which a dense layer multiplies by all the same
    p20_us, p50_us, p80_us  quantiles of one call over `samples` calls
    gop_s, gb_s             2·M·N·K, and bytes of weight, x and y, per second of the median call; of a loss given
                            logits, the exponentials and the bytes that its floor counts (distill_loss_run.py); of a
                            sparse layer the operations that are no multiplications by zero
    peak, peak_kind         the machine's limit, measured between the bursts: GOP/s, or GB/s for read_gbps
                            or "fastest": of dense and of every form of the weight, in the same case of the sweep
    fraction                of that peak; above 1 for read_gbps when the weight stays in cache
    error                   ‖y - y64‖ / ‖y64‖ against float64, before timing; of a loss and of its gradients the worst
    exact_sums              yes or no where the integers were compared one by one
    status                  ok | wrong | failed: why | not installed: what
    version                 of the provider's library
    forced_isa              PYCOMPRESS_ISA of the process that timed it
    device, llc_mib         name of the CPU, size of its last-level cache
    commit                  of the checkout, with "+" when it had changes; else the version of pycompress
    options                 of a loss: what it computes; of a sparse layer the pattern of its zeros
    extra_mb                1e6 bytes of memory that one call needed at most besides its inputs, where measured
    state_mb                1e6 bytes of the file that torch.save makes of the state, where measured
    """

    op: str
    provider: str
    backend: str
    isa: str
    dtype: str
    covers: str
    M: int | None = None
    N: int | None = None
    K: int | None = None
    sparsity: float = 0.0
    threads: int | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int | None = None
    gop_s: float | None = None
    gb_s: float | None = None
    peak: float | None = None
    peak_kind: str = ""
    fraction: float | None = None
    error: float | None = None
    exact_sums: str = ""
    status: str = "ok"
    version: str = ""
    device: str = ""
    llc_mib: float | None = None
    commit: str = ""
    forced_isa: str = ""
    options: str = ""
    extra_mb: float | None = None
    state_mb: float | None = None

    @property
    def case(self) -> tuple[int, int, int, int]:
        """(threads, M, K, N); only timed rows have one."""
        assert self.threads is not None
        assert self.M is not None
        assert self.K is not None
        assert self.N is not None
        return self.threads, self.M, self.K, self.N


# Columns younger than the first result files; a file without them holds rows where they are empty.
_LATER = {"options", "extra_mb", "state_mb"}


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    names = [f.name for f in fields(Row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_format(getattr(row, name)) for name in names] for row in rows)


def read_csv(path: Path) -> list[Row]:
    """Raises ValueError naming the columns that are missing or unknown."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        expected, found = {f.name for f in fields(Row)}, set(reader.fieldnames or ())
        if found | _LATER != expected:
            raise ValueError(
                f"{path}: columns do not match this version: missing {sorted(expected - found - _LATER)}, "
                f"unknown {sorted(found - expected)}; measure again, or use the version that wrote it"
            )
        hints = typing.get_type_hints(Row)
        return [Row(**{name: _parse(text, hints[name]) for name, text in record.items()}) for record in reader]


def _format(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _parse(text: str, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return None if text == "" else _parse(text, typing.get_args(hint)[0])
    return hint(text)


def timed(rows: Sequence[Row], covers: str = "layer") -> list[Row]:
    """The rows that hold a time, of providers that compute the whole layer (or "product")."""
    return [r for r in rows if r.status == "ok" and r.p50_us is not None and r.covers == covers]


def device_name() -> str:
    return info.cpu_name()


def commit() -> str:
    """See Row.commit."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie in a .venv inside a checkout: only a tracked file speaks for its commit.
    if git("ls-files", "--error-unmatch", here.name) and (head := git("rev-parse", "--short", "HEAD")):
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return f"v{__version__}"
