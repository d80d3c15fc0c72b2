"""The operator on the GPU backends against float64; without a GPU, emulated and interpreted on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import gpu as gpus
from pycompress import ops
from tests import oracle
from tests.gpu import Gpu
from tests.test_int8_matmul import DTYPES, VIEWS, make

SCALE, ZERO_POINT = 0.02, 97


def run(
    gpu: Gpu, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, mode: str, activation: str = "none",
    input_scale: float = SCALE, zero_point: int = ZERO_POINT,
) -> Tensor:  # fmt: skip
    """The operator on gpu, with operands and result on the CPU."""
    to = gpu.device
    static = {}
    if mode == "static":
        static = {
            "input_scale": torch.tensor(input_scale, device=to),
            "input_zero_point": torch.tensor(zero_point, dtype=torch.int32, device=to),
        }
    if x.device.type != to:  # a copy with the same strides
        x = x.as_strided((_extent(x),), (1,)).to(to).as_strided(x.shape, x.stride())
    y = ops.int8_linear(
        x, weight.to(to), scale.to(to), None if bias is None else bias.to(to), mode=mode, activation=activation,
        backend=gpu.backend, **static,
    )  # fmt: skip
    assert y.device.type == to
    assert y.dtype == x.dtype
    return y.cpu()


def refused(gpu: Gpu, x: Tensor, mode: str) -> bool:
    """Whether x has too many tokens for the backend: the CUDA kernels multiply floats for a few only."""
    return gpu.backend == "cuda" and mode == "weight_only" and x.shape[:-1].numel() > gpus.cuda_module().INT8_MAX_TOKENS


def _extent(x: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def check(
    gpu: Gpu, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, mode: str, activation: str = "none"
) -> None:
    if refused(gpu, x, mode):
        with pytest.raises(
            ValueError, match="backend='cuda' cannot run this: mode='weight_only' has a CUDA kernel for"
        ):
            run(gpu, x, weight, scale, bias, mode, activation)
        return
    y = run(gpu, x, weight, scale, bias, mode, activation)
    expected, magnitude = oracle.int8_linear(x, weight, scale, bias, mode, activation, SCALE, ZERO_POINT)
    oracle.assert_close(y, expected, magnitude, x.dtype, terms=x.shape[-1] if mode == "weight_only" else 0)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
def test_matches_float64(gpu: Gpu, shape: tuple[int, int, int], dtype: torch.dtype, mode: str) -> None:
    x, weight, scale, bias = make(*shape, dtype)
    check(gpu, x, weight, scale, None if mode == "static" else bias.to(dtype), mode)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(gpu: Gpu, dtype: torch.dtype, activation: str) -> None:
    """K = 0 leaves act(bias): the whole range of the activation, tails included."""
    values = torch.cat(
        [torch.linspace(-30, 30, 601), torch.tensor([0.0, -0.0, 1e-30, 90.0, -90.0, 1e4, -1e4, -3e38, -1e30])]
    )
    if dtype == torch.float16 or activation in ("none", "relu"):
        values = values[values.abs() < 1e9]
    weight, scale = torch.zeros(len(values), 0, dtype=torch.int8), torch.ones(len(values))
    y = run(gpu, torch.zeros(2, 0, dtype=dtype), weight, scale, values, "dynamic", activation)
    bias = values.double().numpy()[None].repeat(2, 0)
    oracle.assert_close(y, oracle.activate(bias, activation), np.abs(bias), dtype)


@pytest.mark.parametrize("m", [2, 8, 16, 17, 64, 65, 129])
@pytest.mark.parametrize("n", [1, 63, 65])
def test_every_tail(gpu: Gpu, m: int, n: int) -> None:
    x, weight, scale, bias = make(m, n, 48)
    check(gpu, x, weight, scale, bias, "dynamic", "relu")
    check(gpu, x.bfloat16(), weight, scale, bias, "weight_only")


@pytest.mark.parametrize(("k", "signs"), [(1, "random"), (127, "opposite"), (2048, "random"), (65296, "same")])
def test_integer_sums_are_exact(gpu: Gpu, k: int, signs: str) -> None:
    """x_scale and weight_scale are 1, so that y is the integer sum, at its extremes: where int32 wraps."""
    q = torch.full((3, k), 127.0)
    weight = torch.full((18, k), -127 if signs == "opposite" else 127, dtype=torch.int8)
    if signs == "random":
        q = torch.randint(-127, 128, (3, k)).float()
        q[:, 0] = 127
        weight = torch.randint(-128, 128, (18, k), dtype=torch.int8)
    expected = (q.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T).astype(np.float32)
    y = run(gpu, q, weight, torch.ones(18), None, "dynamic")
    np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parametrize(
    ("k", "zero_point"), [(3, 0), (3, 255), (600, 0), (600, 1), (600, 128), (600, 255), (66000, 255)]
)
def test_static_sums_are_exact(gpu: Gpu, k: int, zero_point: int) -> None:
    """Both ends of the grid, and values far beyond it, with each zero point."""
    x = torch.stack([torch.full((k,), 1e30), torch.full((k,), -1e30), torch.randint(-300, 300, (k,)).float()])
    weight = torch.randint(-128, 128, (20, k), dtype=torch.int8)
    weight[0], weight[1] = 127, -128
    q = np.clip(x.numpy().astype(np.float64) + zero_point, 0, 255).astype(np.int64) - zero_point
    expected = (q @ weight.numpy().astype(np.int64).T).astype(np.float32)
    y = run(gpu, x, weight, torch.ones(20), None, "static", input_scale=1.0, zero_point=zero_point)
    np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "bad"), [(9, float("nan")), (9, -float("inf")), (20, float("inf"))], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_bad_row_gives_nan_there_only(gpu: Gpu, m: int, dtype: torch.dtype, bad: float, mode: str) -> None:
    x, weight, scale, bias = make(m, 70, 100, dtype)
    clean = run(gpu, x, weight, scale, bias, mode)
    x[4, 99] = bad
    y = run(gpu, x, weight, scale, bias, mode)
    assert y[4].isnan().all()
    keep = [i for i in range(m) if i != 4]
    torch.testing.assert_close(y[keep], clean[keep], rtol=0, atol=0)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_bad_row_through_the_activation(gpu: Gpu, activation: str) -> None:
    x, weight, scale, bias = make(3, 20, 40)
    x[1, 7] = float("nan")
    y = run(gpu, x, weight, scale, bias, "dynamic", activation)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_zero_tiny_and_huge_rows(gpu: Gpu) -> None:
    x, weight, scale, bias = make(5, 40, 50)
    x[0], x[1], x[2] = 0, 1e-45, 1e-38
    assert torch.equal(run(gpu, x, weight, scale, bias, "dynamic")[0], bias)
    check(gpu, x, weight, scale, bias, "dynamic")
    weight = torch.full((2, 4), 127, dtype=torch.int8)
    y = run(gpu, torch.full((1, 4), 3e38), weight, torch.full((2,), 0.1 / 127), None, "dynamic")
    torch.testing.assert_close(y, torch.full((1, 2), 3e38 * 0.4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [4, 100])
def test_quantises_as_documented(gpu: Gpu, rows: int) -> None:
    """Every activation is rounded as the formula says, ties included: the weight is the identity."""
    x = torch.cat([torch.randn(rows, 64), (torch.randint(-254, 255, (rows, 64)) / 2.0).clamp(-127, 127)])
    x[rows:, 0] = 127
    y = run(gpu, x, torch.eye(64, dtype=torch.int8), torch.ones(64), None, "dynamic")
    q, x_scale = oracle.quantize_rows(x)
    np.testing.assert_array_equal(y.numpy(), q.astype(np.float32) * x_scale)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(gpu: Gpu, view: str, mode: str) -> None:
    x = VIEWS[view](70)
    if refused(gpu, x, mode):
        x = x[: x.dim() - 2]  # three levels of rows stay three
    _, weight, scale, bias = make(1, 33, 70)
    y = run(gpu, x, weight, scale, bias, mode)
    torch.testing.assert_close(y, run(gpu, x.contiguous(), weight, scale, bias, mode), rtol=0, atol=0)
    assert y.shape == (*x.shape[:-1], 33)


def test_views_of_the_weight(gpu: Gpu) -> None:
    """Misaligned, and not contiguous: the slower paths."""
    x, weight, scale, bias = make(5, 24, 48)
    expected = run(gpu, x, weight, scale, bias, "dynamic")
    storage = torch.zeros(24 * 48 + 1, dtype=torch.int8, device=gpu.device)
    shifted = storage[1:].view(24, 48).copy_(weight)
    transposed = weight.t().contiguous().to(gpu.device).t()
    for view in (shifted, transposed):
        assert torch.equal(run(gpu, x, view, scale, bias, "dynamic"), expected)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 70), n=st.integers(0, 130), k=st.integers(0, 300), seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES), bias_dtype=st.sampled_from((None, *DTYPES)), mode=st.sampled_from(ops.MODES),
    activation=st.sampled_from(ops.ACTIVATIONS), magnitude=st.integers(-3, 3), row_gap=st.integers(0, 9),
    column_step=st.integers(1, 3),
)  # fmt: skip
def test_drawn(
    gpu: Gpu, m: int, n: int, k: int, seed: int, dtype: torch.dtype, bias_dtype: torch.dtype | None, mode: str,
    activation: str, magnitude: int, row_gap: int, column_step: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    _, weight, scale, bias = make(0, n, k)
    x = (torch.randn(m, k * column_step + row_gap) * 10.0**magnitude).to(dtype)[:, : k * column_step : column_step]
    check(gpu, x, weight, scale, None if bias_dtype is None else bias.to(bias_dtype), mode, activation)


# ---- torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ops.MODES)
def test_opcheck(gpu: Gpu, mode: str) -> None:
    x, weight, scale, bias = (t.to(gpu.device) for t in make(3, 20, 40))
    static: tuple[Tensor | None, Tensor | None] = (None, None)
    if mode == "static":
        static = (torch.tensor(0.02, device=gpu.device), torch.tensor(97, dtype=torch.int32, device=gpu.device))
    args = (x.requires_grad_(), weight, scale, bias.requires_grad_(), mode, *static, "gelu", gpu.backend)
    torch.library.opcheck(torch.ops.pycompress.int8_linear.default, args)


def test_leading_dimensions(gpu: Gpu) -> None:
    _, weight, scale, bias = make(1, 20, 40)
    for shape in [(40,), (0, 40), (2, 3, 40), (2, 0, 40), (2, 3, 4, 40)]:
        x = torch.randn(shape)
        y = run(gpu, x, weight, scale, bias, "dynamic")
        assert y.shape == (*shape[:-1], 20)
        rows = run(gpu, x.reshape(-1, 40), weight, scale, bias, "dynamic")
        torch.testing.assert_close(y, rows.reshape(y.shape), rtol=0, atol=0)


# ---- what only a device shows ---------------------------------------------------------------------------------


def on_gpu(gpu: Gpu) -> tuple[Tensor, ...]:
    if gpu.device != "cuda":
        pytest.skip("streams and graphs are a GPU's")
    return tuple(t.cuda() for t in make(70, 96, 200, torch.bfloat16))


def test_current_stream(gpu: Gpu) -> None:
    x, weight, scale, bias = on_gpu(gpu)
    expected = ops.int8_linear(x, weight, scale, bias, backend=gpu.backend)
    later = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later.copy_(x)  # another stream would not wait for it
        y = ops.int8_linear(later, weight, scale, bias, backend=gpu.backend)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [1, 70])
def test_graph_capture(gpu: Gpu, tokens: int) -> None:
    x, weight, scale, bias = on_gpu(gpu)
    x = x[:tokens].clone()
    expected = ops.int8_linear(x, weight, scale, bias, backend=gpu.backend)
    torch.cuda.synchronize()
    graph, into = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = ops.int8_linear(into, weight, scale, bias, backend=gpu.backend)
    into.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)


def test_second_device(gpu: Gpu) -> None:
    x, weight, scale, bias = on_gpu(gpu)
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    there = [t.to("cuda:1") for t in (x, weight, scale, bias)]
    y = ops.int8_linear(*there, backend=gpu.backend)
    assert y.device == there[0].device
    assert torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), ops.int8_linear(x, weight, scale, bias, backend=gpu.backend).cpu())
