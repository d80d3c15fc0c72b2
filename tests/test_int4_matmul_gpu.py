"""The operator on Triton against float64, and its tiles; without a GPU, interpreted on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import gpu as gpus
from pycompress import ops
from pycompress.nn import Int4Linear
from pycompress.ops.int4_matmul import pick
from pycompress.ops.int4_matmul_reference import Call
from tests import int4_oracle, oracle
from tests.int4_oracle import KIND_IDS, KINDS, Parts
from tests.test_int4_matmul import DTYPES, make
from tests.test_int8_matmul import VIEWS

pytest.importorskip("triton")

# The large ones, which take seconds to interpret, by others that split K too.
SHAPES = [(1, 70, 520), (3, 5, 1025), *(shape for shape in oracle.SHAPES if max(shape) < 1000)]


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run: on the GPU where there is one, else interpreted on the CPU."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    reason = gpus.triton_missing(torch.empty(0, device=found))
    if reason is not None:
        pytest.skip(reason)
    return found


def run(
    device: str, x: Tensor, parts: Parts, bias: Tensor | None, format: str = "int4", group_size: int = 32,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """The operator on the device, with operands and result on the CPU."""
    if x.device.type != device and x.numel():  # a copy with the same strides
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        x = x.as_strided((extent,), (1,)).to(device).as_strided(x.shape, x.stride())
    on = [None if t is None else t.to(device) for t in (*parts, bias)]
    y = ops.int4_linear(
        x.to(device), *on, format=format, group_size=group_size, activation=activation, backend="triton"
    )  # fmt: skip
    assert y.device.type == device
    assert y.dtype == x.dtype
    return y.cpu()


def check(
    device: str, x: Tensor, parts: Parts, bias: Tensor | None, format: str = "int4", group_size: int = 32,
    activation: str = "none",
) -> None:  # fmt: skip
    y = run(device, x, parts, bias, format, group_size, activation)
    expected, magnitude = int4_oracle.int4_linear(x, parts, bias, format, group_size, activation)
    # NF4's values in two parts of bf16 are exact to 2^-16, which the interpreter, that cuts them off, halves.
    magnitude = magnitude * (8 if format == "nf4" and x.dtype == torch.bfloat16 else 1)
    oracle.assert_close(y, expected, magnitude, x.dtype, terms=x.shape[-1])


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype, format: str, symmetric: bool
) -> None:
    m, n, k = shape
    bias = torch.randn(n).to(dtype) if symmetric else None
    check(device, torch.randn(m, k).to(dtype), make(n, k, format, 128, symmetric), bias, format, 128)


@pytest.mark.parametrize("group_size", [1, 7, 16, 24, 32, 48, 64, 128, 300, -1])
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_group_sizes(device: str, format: str, symmetric: bool, group_size: int) -> None:
    """Groups of whole steps, and groups that no step fills, which are scaled weight by weight."""
    for k, dtype in ((1, torch.float32), (130, torch.float16), (193, torch.float32), (257, torch.bfloat16)):
        parts, bias = make(19, k, format, group_size, symmetric), torch.randn(19)
        check(device, torch.randn(3, k).to(dtype), parts, bias, format, group_size)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(device: str, dtype: torch.dtype, activation: str) -> None:
    """K = 0 leaves act(bias): the whole range of the activation, tails included."""
    values = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([0.0, -0.0, 1e-30, 90.0, -90.0, 1e4, -1e4])])
    y = run(device, torch.zeros(2, 0, dtype=dtype), make(len(values), 0), values, activation=activation)
    bias = values.double().numpy()[None].repeat(2, 0)
    oracle.assert_close(y, oracle.activate(bias, activation), np.abs(bias), dtype)


@pytest.mark.parametrize("m", [2, 17, 65])
@pytest.mark.parametrize("n", [1, 63, 65, 129])
def test_every_tail(device: str, m: int, n: int) -> None:
    for format, symmetric in KINDS[1:]:
        check(device, torch.randn(m, 48), make(n, 48, format, 32, symmetric), torch.randn(n), format, 32, "relu")


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_every_value_at_every_place(device: str, format: str, symmetric: bool) -> None:
    """x is the identity, so that y is the weight itself: exactly, in float32."""
    q = (torch.arange(33)[:, None] * 3 + torch.arange(64)) % 16
    scale, zero_point = 2.0 ** torch.randint(-3, 4, (33, 4)), None
    if not symmetric:
        zero_point = (torch.arange(33 * 4).reshape(33, 4) % 16).to(torch.uint8)
    parts = (q[:, 0::2] | q[:, 1::2] << 4).to(torch.uint8), scale, zero_point
    y = run(device, torch.eye(64), parts, None, format, 16)
    np.testing.assert_array_equal(y.t().numpy(), int4_oracle.weight(parts, 64, format, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "bad"), [(1, float("nan")), (9, -float("inf")), (20, float("inf"))], ids=str)
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_bad_row_is_not_finite_and_no_other(
    device: str, m: int, dtype: torch.dtype, bad: float, format: str, symmetric: bool
) -> None:
    x, parts = torch.randn(m, 99).to(dtype), make(70, 99, format, 32, symmetric)
    clean = run(device, x, parts, None, format)
    x[m // 2, 98] = bad
    y = run(device, x, parts, None, format)
    assert not y[m // 2].isfinite().any()
    keep = [i for i in range(m) if i != m // 2]
    torch.testing.assert_close(y[keep], clean[keep], rtol=0, atol=0)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(device: str, view: str) -> None:
    x, parts, bias = VIEWS[view](70), make(33, 70), torch.randn(33)
    y = run(device, x, parts, bias)
    torch.testing.assert_close(y, run(device, x.contiguous(), parts, bias), rtol=0, atol=0)
    assert y.shape == (*x.shape[:-1], 33)


def test_views_of_the_weight(device: str) -> None:
    """Misaligned, and not contiguous."""
    x, parts, bias = torch.randn(5, 48), make(24, 48), torch.randn(24)
    expected = run(device, x, parts, bias)
    storage = torch.zeros(24 * 24 + 1, dtype=torch.uint8, device=device)
    shifted = storage[1:].view(24, 24).copy_(parts[0])
    transposed = parts[0].t().contiguous().to(device).t()
    for view in (shifted, transposed):
        assert torch.equal(run(device, x, (view, *parts[1:]), bias), expected)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 70), n=st.integers(0, 130), k=st.integers(0, 300), seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES), bias_dtype=st.sampled_from((None, *DTYPES)), kind=st.sampled_from(KINDS),
    group_size=st.one_of(st.just(-1), st.integers(1, 310)), activation=st.sampled_from(ops.ACTIVATIONS),
    magnitude=st.integers(-3, 3), row_gap=st.integers(0, 9), column_step=st.integers(1, 3),
)  # fmt: skip
def test_drawn(
    device: str, m: int, n: int, k: int, seed: int, dtype: torch.dtype, bias_dtype: torch.dtype | None,
    kind: tuple[str, bool], group_size: int, activation: str, magnitude: int, row_gap: int, column_step: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    format, symmetric = kind
    parts = make(n, k, format, group_size, symmetric)
    x = (torch.randn(m, k * column_step + row_gap) * 10.0**magnitude).to(dtype)[:, : k * column_step : column_step]
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    check(device, x, parts, bias, format, group_size, activation)


# ---- the table and the tiles --------------------------------------------------------------------------------------


def test_a_packed_weight_is_not_for_triton(device: str) -> None:
    packed = ops.pack_weight_int4(*make(20, 40), in_features=40, group_size=32)
    with pytest.raises(ValueError, match="backend='triton' cannot run this: the weight is packed for the CPU; unpack"):
        ops.int4_linear(torch.randn(2, 40), packed, group_size=32, backend="triton")


def test_who_takes_a_call_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale, _ = make(20, 40)
    x, weight, scale = torch.empty(3, 40, device="meta"), weight.to("meta"), scale.to("meta")
    call = Call(x, weight, scale, None, None, 40, 20, "int4", 32, "none")
    assert pick("auto", call).name == "reference"
    monkeypatch.setattr(gpus, "triton_missing", lambda x: None)  # as on a GPU
    assert pick("auto", call).name == "triton"


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("kind", ["int4", "nf4", "float"])
def test_tiles_fit_the_groups(kind: str, arch: int) -> None:
    """Every step lies inside one group, splits begin at steps, and none is empty; whatever the shape."""
    from pycompress.kernels.int4_matmul_tuning import LEAST_BLOCK_K, pick, step_of

    for group_size in (16, 32, 48, 64, 96, 128, 1000, 1 << 20):
        for k in (1, 16, 127, 128, 4096, 11008, 100_000):
            step = step_of(group_size, k)
            for m in (1, 16, 17, 64, 512, 8192):
                for n in (1, 128, 4096, 100_000):
                    tiling = pick(m, n, k, arch, kind, step)
                    assert step < LEAST_BLOCK_K or group_size >= k or group_size % tiling.block_k == 0
                    share = tiling.k_per_split(k)
                    assert share % tiling.block_k == 0
                    assert (tiling.splits - 1) * share < k <= tiling.splits * share


# Groups of 128 and of 200 = K take the same tiles: each of them once whole and once split.
@pytest.mark.parametrize(("group_size", "splits"), [(16, 1), (16, 3), (128, 3), (200, 1)])
@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_every_tile_computes(device: str, format: str, symmetric: bool, group_size: int, splits: int) -> None:
    from pycompress.kernels.int4_matmul import launch
    from pycompress.kernels.int4_matmul_tuning import TILINGS, ladder, step_of
    from pycompress.kernels.int8_matmul_tuning import whole_splits

    m, n, k = 20, 70, 200
    for kind in {format, "float"} & set(TILINGS):
        dtype = torch.float32 if kind == "float" else torch.float16
        parts, x = make(n, k, format, group_size, symmetric), torch.randn(m, k).to(dtype)
        for tiling in ladder(kind, step_of(group_size, k)):
            on = [None if t is None else t.to(device) for t in parts]
            y = torch.empty(m, n, dtype=dtype, device=device)
            call = Call(x.to(device), *on, None, k, n, format, group_size, "gelu")  # type: ignore[arg-type]
            launch(call, whole_splits(tiling, splits, k), y)
            expected, magnitude = int4_oracle.int4_linear(x, parts, None, format, group_size, "gelu")
            oracle.assert_close(y.cpu(), expected, magnitude, dtype, terms=k)


# ---- torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_opcheck(device: str, format: str, symmetric: bool) -> None:
    parts = [None if t is None else t.to(device) for t in make(20, 41, format, 32, symmetric)]
    x, bias = torch.randn(3, 41, device=device), torch.randn(20, device=device)
    args = (x.requires_grad_(), *parts, bias.requires_grad_(), 41, 20, format, 32, "gelu", "triton")
    torch.library.opcheck(torch.ops.pycompress.int4_linear.default, args)


@pytest.mark.parametrize(("format", "symmetric"), KINDS, ids=KIND_IDS)
def test_module(device: str, format: str, symmetric: bool) -> None:
    """There the module holds the plain parts; a checkpoint is the same as the CPU's."""
    on_cpu = Int4Linear.from_float(torch.nn.Linear(41, 20), format, group_size=16, symmetric=symmetric)
    module = copy.deepcopy(on_cpu).to(device)
    module.backend = "triton"
    x = torch.randn(3, 41)
    with torch.no_grad():
        torch.testing.assert_close(module(x.to(device)).cpu(), on_cpu(x), rtol=1e-4, atol=1e-5)
    assert module._weight.shape == (20, 21)
    assert module.extra_repr().endswith("backend=triton")
    state: dict[str, Any] = module.state_dict()
    for name, tensor in on_cpu.state_dict().items():
        assert torch.equal(state[name].cpu(), tensor)
    module.backend = "auto"
    assert module.to("cpu").extra_repr() == on_cpu.extra_repr()
    module.load_state_dict(state)
