"""The machine's peaks: sane numbers on every instruction set. Nothing here asks how fast the machine is."""

from __future__ import annotations

import math

import pytest
import torch

from pycompress import _native, peaks


@pytest.mark.parametrize("threads", [1, 2])
def test_measure(isa: str, threads: int) -> None:
    measured = peaks.measure(threads, seconds=0.01, read=False)
    assert (measured.isa, measured.threads, measured.read_gbps) == (isa, threads, None)
    for rate in (measured.int8_gops, measured.fp32_gflops, measured.exp_g):
        assert math.isfinite(rate)
        assert 0.01 < rate < 1e6
    has_bf16 = isa == "avx512vnni" and "avx512bf16" in _native.cpu_features()
    assert (measured.bf16_gflops is not None) == has_bf16


def test_read_bandwidth(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "last_level_cache_bytes", lambda: 0)  # the smallest buffer: only the numbers matter here
    measured = peaks.measure(seconds=0.01)
    assert measured.threads == torch.get_num_threads()
    assert measured.read_gbps is not None
    assert 0.01 < measured.read_gbps < 1e5


def test_last_level_cache() -> None:
    assert 1 << 18 <= peaks.last_level_cache_bytes() <= 1 << 32


@pytest.mark.parametrize(
    ("threads", "seconds"), [(0, 0.01), (-1, 0.01), (1, 0.0), (1, -1.0), (1, float("nan")), (1, 61.0)]
)
def test_errors(threads: int, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^peaks: .*expected"):
        peaks.measure(threads, seconds)


def test_unknown_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCOMPRESS_ISA", "sse9")
    with pytest.raises(ValueError, match="PYCOMPRESS_ISA=sse9: unknown instruction set"):
        peaks.measure(1, 0.01)
