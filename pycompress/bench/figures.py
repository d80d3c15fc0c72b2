"""The figures that a benchmark wants to reach, and the parts of tables, for every NAME_summary.py."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pycompress.bench.rows import Row
from pycompress.bench.timing import geomean

C = TypeVar("C")  # what tells the cases of a benchmark apart

# Of p80 over p20: beyond it the machine was busy with something else.
_RESTLESS = 1.5
HEAD = f"{'':46} {'reach':>6} {'geomean':>8} {'worst':>6}"


@dataclass(frozen=True)
class Figure(Generic[C]):
    """`value` of each case that `applies`; the one `judged`, "worst" or "geomean", must reach it.

    at_most: to reach is to stay below. forced_isa: of the rows that it is made of.
    """

    what: str
    reach: float
    judged: str
    applies: Callable[[C, Sequence[Row]], bool]
    value: Callable[[Sequence[Row]], float | None]
    forced_isa: str = ""
    at_most: bool = False

    def line(self, cases: Mapping[C, Sequence[Row]], label: Callable[[C], str]) -> str:
        """One line under HEAD."""
        values = [
            (value, label(case))
            for case, rows in cases.items()
            if self.applies(case, rows) and (value := self.value(rows)) is not None
        ]
        start = f"{self.what:46} {self.reach:6.2f}"
        if not values:
            return f"{start} {'-':>8} {'-':>6}  not measured"
        mean = geomean([max(v, 1e-9) for v, _ in values])
        worst, where = max(values) if self.at_most else min(values)
        found = mean if self.judged == "geomean" else worst
        reached = found <= self.reach if self.at_most else found >= self.reach
        verdict = f"{'reached' if reached else 'MISSED'} by the {self.judged}"
        return f"{start} {mean:8.2f} {worst:6.2f}  {verdict}; worst at {where}"


def us(row: Row) -> float:
    assert row.p50_us is not None
    return row.p50_us


def fastest(rows: Sequence[Row], prefix: str) -> Row | None:
    return min((r for r in rows if r.provider.startswith(prefix)), key=us, default=None)


def n_threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def restless(rows: Sequence[Row]) -> list[str]:
    """A line that says so where too many of these rows have quantiles far apart."""
    found = sum(1 for r in rows if r.p20_us and r.p80_us and r.p80_us > _RESTLESS * r.p20_us)
    busy = f"p80 > {_RESTLESS} x p20 in {found} of {len(rows)} cases: the machine is busy"
    return [busy] if 10 * found > len(rows) else []


def not_ok(rows: Sequence[Row], label: Callable[[Row], str]) -> list[str]:
    """A line for each provider that is absent, failed or was wrong; label says where, if anywhere."""
    return [f"{r.provider}{label(r)}: {r.status}" for r in rows if r.status != "ok"]


def heading(done: Sequence[Row], rows: Sequence[Row]) -> str:
    """The machine and the libraries. done: those of `rows` that hold a time."""
    first = done[0]
    versions = dict.fromkeys(f"{_library(r.provider)} {r.version}" for r in rows if r.version)
    cache = f", last-level cache {first.llc_mib:.0f} MiB" if first.llc_mib else ""
    return f"{first.device}{cache}; commit {first.commit}; {', '.join(versions)}."


def _library(provider: str) -> str:
    if provider.startswith("liger"):
        return "liger-kernel"
    return "torch" if provider.startswith("torch-") else provider.split("-")[0]


def bold(value: str, best: bool) -> str:
    return f"**{value}**" if best else value


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, aligned to the right."""
    rule = ["---:" for _ in head]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
