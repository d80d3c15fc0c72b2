"""What the providers of every benchmark have in common: a library that may be absent, and the rows they give."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata, util
from typing import TypeVar

import torch

from pycompress import _native, peaks
from pycompress.bench.rows import Row, commit, device_name


class BaseProvider:
    """Base of a benchmark's own dataclass, which has these fields among others.

    requires: the modules it needs, the one that gives its version first.
    """

    name: str
    backend: str
    requires: tuple[str, ...]

    @property
    def missing(self) -> str:
        """Names of the modules that are not installed; empty when the provider can run."""
        return ", ".join(m for m in self.requires if util.find_spec(m) is None)

    @property
    def version(self) -> str:
        return "" if self.missing else metadata.version(self.requires[0])

    @property
    def isa(self) -> str:
        """Known for pycompress and torch; the other runtimes choose for themselves and do not say."""
        if self.name.startswith("pycompress"):
            return _native.selected_isa()
        return torch.backends.cpu.get_cpu_capability().lower() if self.name.startswith("torch") else ""


P = TypeVar("P", bound=BaseProvider)


def choose(providers: Sequence[P], names: Sequence[str]) -> list[P]:
    """Those whose name begins with one of `names`, or all; ValueError for a name that fits none."""
    for name in names:
        if not any(p.name.startswith(name) for p in providers):
            known = ", ".join(p.name for p in providers)
            raise ValueError(f"unknown provider {name!r}; choose among: {known}")
    return [p for p in providers if not names or p.name.startswith(tuple(names))]


@dataclass(frozen=True)
class Machine:
    """What is the same in every row of one run."""

    device: str
    llc_mib: float
    commit: str

    @classmethod
    def here(cls) -> "Machine":
        return cls.of(device_name(), peaks.last_level_cache_bytes() / 2**20)

    @classmethod
    def of(cls, device: str, llc_mib: float) -> "Machine":
        return cls(device, llc_mib, commit())

    def row(self, op: str, provider: BaseProvider, dtype: str, covers: str, **fields: object) -> Row:
        row = Row(
            op,
            provider.name,
            provider.backend,
            "" if provider.missing else provider.isa,
            dtype,
            covers,
            version=provider.version,
            device=self.device,
            llc_mib=self.llc_mib,
            commit=self.commit,
            forced_isa=os.environ.get("PYCOMPRESS_ISA", ""),
        )
        return replace(row, **fields)  # type: ignore[arg-type]


def failure(error: Exception) -> str:
    """The status of a row whose provider raised."""
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
