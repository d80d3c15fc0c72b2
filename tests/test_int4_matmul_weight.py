"""4-bit weights: quantising by groups, packing for the kernels, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import _C, ops
from tests import int4_oracle
from tests.int4_oracle import KIND_IDS, KINDS
from tests.test_int4_matmul import GROUP_SIZES, PARTS, W, check, make, pack

# ---- packing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (17, 31), (64, 64), (65, 129), (200, 7)], ids=str)
def test_pack_round_trip(isa: str, shape: tuple[int, int], format: str, symmetric: bool) -> None:
    for group_size in GROUP_SIZES:
        parts = make(*shape, format, group_size, symmetric)
        again = ops.unpack_weight_int4(pack(parts, shape[1], format, group_size))
        for a, b in zip(again, parts, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def test_foreign_layout_still_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight packed for another instruction set (in an exported program, say) gives the same result here."""
    x, parts, bias = torch.randn(20, 90), make(70, 90, symmetric=False), torch.randn(70)
    packed = pack(parts, 90)
    for other in _C.available_isas():
        monkeypatch.setenv("PYCOMPRESS_ISA", other)
        check(ops.int4_linear(x, packed, bias=bias, group_size=32), x, parts, bias)


@pytest.mark.parametrize("byte", range(64))
def test_corrupt_header_is_refused(byte: int) -> None:
    packed = pack(make(20, 30), 30)
    packed[byte] += 1
    with pytest.raises(ValueError, match=r"pack it again"):
        ops.int4_linear(torch.randn(2, 30), packed, group_size=32)
    with pytest.raises(ValueError, match=r"pack it again"):
        ops.unpack_weight_int4(packed)


@pytest.mark.parametrize("size", [0, 10, 64, 300])
def test_truncated_packed_weight_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"pack it again"):
        ops.int4_linear(torch.randn(2, 30), pack(make(20, 30), 30)[:size].clone(), group_size=32)


def test_misaligned_packed_weight_is_copied() -> None:
    x, packed = torch.randn(3, 30), pack(make(20, 30), 30)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].copy_(packed)
    assert torch.equal(ops.int4_linear(x, shifted, group_size=32), ops.int4_linear(x, packed, group_size=32))


# ---- quantising weights -----------------------------------------------------------------------------------------


def in_groups(w: np.ndarray, size: int) -> list[np.ndarray]:
    return [w[:, at : at + size] for at in range(0, w.shape[1], size)]


@pytest.mark.parametrize("size", [1, 7, 32, 45])
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_quantize_formula(format: str, symmetric: bool, size: int) -> None:
    w = torch.randn(40, 45, dtype=torch.float64) + 0.3
    w[3], w[4], w[5] = 0, w[4].abs(), -w[5].abs()
    packed, scale, zero_point = ops.quantize_weight_int4(w, format, size, symmetric)
    assert packed.dtype == torch.uint8
    assert packed.shape == (40, 23)
    assert (packed[:, 22] >> 4 == 0).all()  # the odd K ends in a nibble of 0
    f32 = np.float32
    for g, part in enumerate(in_groups(w.float().numpy(), size)):
        q = int4_oracle.nibbles(packed, 45)[:, g * size : g * size + size]
        low, high = part.min(1, initial=0), part.max(1, initial=0)
        largest, tiny = np.abs(part).max(1), np.finfo(f32).tiny
        if format == "nf4":
            s = np.maximum(largest, tiny)
            steps = np.abs((part / s[:, None])[..., None].astype(np.float64) - int4_oracle.NF4)
            expected = steps.argmin(2)  # the first of equals is the lower one
        elif symmetric:
            s = np.maximum(largest / f32(7.5), tiny)
            expected = np.clip(np.rint(part / s[:, None]), -8, 7) + 8
        else:
            s = np.maximum(((high.astype(np.float64) - low) / 15).astype(f32), tiny)
            zero = np.clip(np.rint(-low / s), 0, 15)
            assert zero_point is not None
            np.testing.assert_array_equal(zero_point[:, g].numpy(), zero)
            expected = np.clip(np.rint(part / s[:, None]) + zero[:, None], 0, 15)
        np.testing.assert_array_equal(scale[:, g].numpy(), s)
        np.testing.assert_array_equal(q, expected)
    assert (zero_point is None) == symmetric


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_dequantize(format: str, symmetric: bool, group_size: int) -> None:
    """As float64 does, within the error of half a step, and exactly 0 where the weight is 0."""
    w = torch.randn(30, 45)
    w[torch.rand(30, 45) < 0.3] = 0
    w[3] = 0
    parts = ops.quantize_weight_int4(w, format, group_size, symmetric)
    back = ops.dequantize_weight_int4(*parts, in_features=45, format=format, group_size=group_size)
    np.testing.assert_allclose(back, int4_oracle.weight(parts, 45, format, group_size), rtol=1e-6)
    assert (back[w == 0] == 0).all()
    widest = {"nf4": 0.152, "int4": 0.5}[format]  # half of the widest gap; of a clipped end
    scale = parts[1].repeat_interleave(group_size if group_size > 0 else 45, 1)[:, :45]
    assert ((back - w).abs() <= scale * (widest + 1e-5)).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 3e38], ids=str)
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_quantize_extremes(format: str, symmetric: bool, value: float) -> None:
    """No scale is 0 or infinite, nothing becomes NaN."""
    w = torch.full((2, 8), value)
    w[1, ::2] *= -1
    parts = ops.quantize_weight_int4(w, format, 8, symmetric)
    assert (parts[1] > 0).all()
    assert parts[1].isfinite().all()
    back = ops.dequantize_weight_int4(*parts, in_features=8, format=format, group_size=8)
    assert ((back - w).abs() <= 0.5001 * parts[1]).all()
    assert value != 0 or (back == 0).all()


def test_codebook_is_that_of_bitsandbytes() -> None:
    np.testing.assert_array_equal(
        ops.dequantize_weight_int4(
            torch.arange(16).reshape(16, 1).to(torch.uint8), torch.ones(16, 1), in_features=1, format="nf4"
        )[:, 0].numpy(),
        int4_oracle.NF4,
    )


def test_nf4_ties_go_to_the_lower_index() -> None:
    """-1, 1 and the middles between neighbours, that are representable: there is at least that of 0.7229.. and 1."""
    middles = (int4_oracle.NF4[:-1].astype(np.float64) + int4_oracle.NF4[1:]) / 2
    exact = np.flatnonzero(middles.astype(np.float32).astype(np.float64) == middles)
    assert len(exact) >= 1
    w = torch.cat([torch.ones(len(exact), 1), torch.tensor(middles[exact], dtype=torch.float32)[:, None]], 1)
    packed, _, _ = ops.quantize_weight_int4(w, "nf4", 2)
    np.testing.assert_array_equal(int4_oracle.nibbles(packed, 2)[:, 1], exact)


def test_half_precision_weights_are_taken() -> None:
    w = torch.randn(5, 64)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        a, b = ops.quantize_weight_int4(w.to(dtype)), ops.quantize_weight_int4(w.to(dtype).float())
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 9), k=st.integers(0, 70), size=st.one_of(st.just(-1), st.integers(1, 80)),
    kind=st.sampled_from(KINDS), magnitude=st.integers(-44, 38), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(n=1, k=2, size=10**12, kind=("int4", True), magnitude=0, seed=0)
def test_quantising_again_changes_nothing(
    n: int, k: int, size: int, kind: tuple[str, bool], magnitude: int, seed: int
) -> None:
    """What is on the grid stays there: the codes of a dequantised weight are those it came from."""
    torch.manual_seed(seed)
    format, symmetric = kind
    w = torch.randn(n, k).clamp(-3, 3) * 10.0**magnitude if magnitude < 38 else torch.rand(n, k) * 3e38
    options: dict[str, Any] = {"format": format, "group_size": size}
    parts = ops.quantize_weight_int4(w, symmetric=symmetric, **options)
    back = ops.dequantize_weight_int4(*parts, in_features=k, **options)
    assert back.isfinite().all()
    step = parts[1].repeat_interleave(min(k, size) if size > 0 else max(k, 1), 1)[:, :k]
    assert ((back.double() - w).abs() <= 0.5001 * step.double()).all()


# ---- errors -----------------------------------------------------------------------------------------------------

WEIGHT_ERRORS: dict[str, tuple[Tensor, dict[str, Any], str]] = {
    "Inf": (torch.tensor([[1.0], [2.0], [float("inf")]]), {}, "row 2 of the weight holds NaN or Inf"),
    "NaN": (torch.tensor([[1.0, 1.0], [2.0, float("nan")]]), {"format": "nf4"}, "row 1 of the weight holds NaN"),
    "meta": (torch.empty(2, 2, device="meta"), {}, "meta device"),
    "integer": (torch.zeros(2, 2, dtype=torch.int8), {}, "expected a floating"),
    "vector": (torch.zeros(2), {}, "expected a floating"),
    "group size": (torch.zeros(2, 2), {"group_size": -2}, "group_size=-2, expected 1 or more, or -1"),
    "float group size": (torch.zeros(2, 2), {"group_size": 2.0}, "group_size=2.0"),
    "format": (torch.zeros(2, 2), {"format": "fp4"}, "format='fp4', expected one of int4, nf4"),
    "nf4 zero point": (torch.zeros(2, 2), {"format": "nf4", "symmetric": False}, "symmetric=False with format='nf4'"),
}


@pytest.mark.parametrize("case", WEIGHT_ERRORS)
def test_weight_errors(case: str) -> None:
    weight, options, message = WEIGHT_ERRORS[case]
    with pytest.raises(ValueError, match=message) as raised:
        ops.quantize_weight_int4(weight, **options)
    assert "quantize_weight_int4" in str(raised.value)


def test_packing_errors() -> None:
    with pytest.raises(ValueError, match="pack_weight_int4: weight_scale is"):
        ops.pack_weight_int4(*PARTS, in_features=96)
    with pytest.raises(ValueError, match="unpack_weight_int4: expected 1-D uint8"):
        ops.unpack_weight_int4(W)
    with pytest.raises(ValueError, match="dequantize_weight_int4: K=90 but weight has 48 bytes a row"):
        ops.dequantize_weight_int4(*PARTS, in_features=90, group_size=32)
