"""What only a real GPU can show: streams, graphs, a second device, and that no call waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from pycompress import gpu as gpu_backends
from pycompress.nn import DistillationLoss, Int8Linear, LinearDistillationLoss, SparseLinear
from tests.gpu import Gpu

on_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; `make gpu-check` runs this")

DTYPE = torch.bfloat16
# Long enough that a kernel on a stream that does not wait would read the inputs before they are there.
BUSY_CYCLES = 50_000_000

# A name, inputs() that are new each time, and call(*inputs).
Operation = tuple[str, Callable[[], tuple[Tensor, ...]], Callable[..., Tensor]]


def two_of_four(n: int, k: int, device: str) -> Tensor:
    places = torch.rand(n, k // 4, 4, device=device).topk(2).indices
    return torch.zeros(n, k // 4, 4, dtype=torch.bool, device=device).scatter_(2, places, True).view(n, k)


def blocks(n: int, k: int, device: str) -> Tensor:
    kept = torch.rand(n // 32, k // 32, device=device) < 0.5
    return kept.repeat_interleave(32, 0).repeat_interleave(32, 1)


def layers(backend: str, device: str) -> dict[str, nn.Module]:
    """Each kernel by a module that chooses it."""
    linear = nn.Linear(256, 192, device=device, dtype=DTYPE)
    found: dict[str, nn.Module] = {}
    for mode in ("dynamic", "static", "weight_only"):
        input_range = (-4.0, 4.0) if mode == "static" else None
        found[mode] = Int8Linear.from_float(linear, mode=mode, input_range=input_range, backend=backend)
    grouped = two_of_four if backend == "cuda" else blocks  # whose index form the backend has
    masks = {"bitmap": torch.rand(192, 256, device=device) < 0.3, "index": grouped(192, 256, device)}
    for form, mask in masks.items():
        for dtype in ("bfloat16", "int8"):
            layer = SparseLinear.from_dense(linear, mask, dtype=dtype, format=form, backend=backend)
            found[f"{form}-{dtype}"] = layer
    return found


def operations(backend: str, device: str, *, small: bool = False) -> Iterator[Operation]:
    """Of the loss the gradient. small: sizes that can be emulated."""
    for name, layer in layers(backend, device).items():
        for m in (3, 20 if small else 200):
            if name == "weight_only" and backend == "cuda" and m > 16:  # Triton's
                continue

            def of_layer(x: Tensor, layer: nn.Module = layer) -> Tensor:
                with torch.no_grad():
                    result: Tensor = layer(x)
                return result

            yield f"{name} M={m}", lambda m=m: (torch.randn(m, 256, device=device, dtype=DTYPE),), of_layer

    for vocabulary in (100, 1000) if small else (100, 4000, 40000):
        loss_fn = DistillationLoss(temperature=2.0, backend=backend)

        def inputs(vocabulary: int = vocabulary) -> tuple[Tensor, ...]:
            s, t = (torch.randn(32, vocabulary, device=device, dtype=DTYPE) for _ in range(2))
            return s, t, torch.randint(vocabulary, (32,), device=device)

        def of_loss(s: Tensor, t: Tensor, labels: Tensor, loss_fn: nn.Module = loss_fn) -> Tensor:
            s = s.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_fn(s, t, labels), s)
            return gradient

        yield f"loss V={vocabulary}", inputs, of_loss


def close(found: Tensor, expected: Tensor) -> None:
    assert (found.float() - expected.float()).norm() <= 1e-3 * expected.float().norm()


def test_the_operations_themselves(gpu: Gpu) -> None:
    """On a GPU or emulated: they run, and from the same inputs give the same twice."""
    for name, inputs, call in operations(gpu.backend, gpu.device, small=gpu.device == "cpu"):
        given = inputs()
        found = call(*given)
        assert found.isfinite().all(), name
        assert torch.equal(found, call(*given)), name


@on_device
def test_the_result_on_a_side_stream_is_right(gpu: Gpu) -> None:
    """The inputs are made late on that stream: who launched on another would read what was there before."""
    for name, inputs, call in operations(gpu.backend, gpu.device):
        given = inputs()
        expected = call(*given)
        late = tuple(torch.zeros_like(x) for x in given)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(BUSY_CYCLES)
            for to, x in zip(late, given, strict=True):
                to.copy_(x)
            found = call(*late)
        stream.synchronize()
        assert torch.equal(found, expected), name


@on_device
def test_no_call_waits_for_the_device(gpu: Gpu) -> None:
    for name, inputs, call in operations(gpu.backend, gpu.device):
        given = inputs()
        call(*given)  # compiles, and derives what a module keeps
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(BUSY_CYCLES)
            done = torch.cuda.Event()
            call(*given)
            done.record()
            assert not done.query(), f"{name} came back after the device had finished"
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()


@on_device
def test_graphs_capture_and_replay(gpu: Gpu) -> None:
    for name, inputs, call in operations(gpu.backend, gpu.device):
        given = inputs()
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            call(*given)
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call(*given)
        for _ in range(2):  # with other values, twice: what a kernel leaves in its workspace must not matter
            fresh = inputs()
            for to, x in zip(given, fresh, strict=True):
                to.copy_(x)
            graph.replay()
            torch.cuda.synchronize()
            close(found, call(*fresh))
        assert name


@on_device
def test_a_second_device(gpu: Gpu) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):  # not the current one
        for name, inputs, call in operations(gpu.backend, "cuda:1"):
            given = inputs()
            found = call(*given)
            assert found.device == torch.device("cuda:1"), name
            assert torch.cuda.current_device() == 0
            assert found.isfinite().all(), name


@on_device
def test_devices_are_not_mixed(gpu: Gpu) -> None:
    layer = Int8Linear.from_float(nn.Linear(64, 64, device="cuda"), backend=gpu.backend)
    with pytest.raises(ValueError, match=r"device|cpu"):
        layer(torch.randn(2, 64))
    loss_fn = DistillationLoss(backend=gpu.backend)
    with pytest.raises(ValueError, match=r"device|cpu"):
        loss_fn(torch.randn(2, 10, device="cuda"), torch.randn(2, 10), torch.zeros(2, dtype=torch.int64, device="cuda"))


@on_device
def test_auto_takes_a_gpu_kernel() -> None:
    """Nothing changes in a model but its device; the backend that was built runs, else Triton's."""
    x = torch.randn(5, 64, device="cuda", dtype=DTYPE)
    if gpu_backends.cuda_missing(x) and gpu_backends.triton_missing(x):
        pytest.skip("neither CUDA module nor Triton")
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).to(DTYPE).eval()
    layer = Int8Linear.from_float(model[0])
    expected = layer(x.cpu())
    close(layer.cuda()(x).cpu(), expected)


@on_device
def test_a_module_moves_there_and_back() -> None:
    linear = nn.Linear(256, 64)
    mask = two_of_four(64, 256, "cpu")
    for layer in (Int8Linear.from_float(linear), SparseLinear.from_dense(linear, mask)):
        x = torch.randn(7, 256)
        with torch.no_grad():
            before = layer(x)
            there = layer.cuda()(x.cuda())
            after = layer.cpu()(x)
        assert torch.equal(before, after)
        assert (there.cpu() - before).norm() <= 1e-3 * before.norm()


@on_device
def test_hidden_states_to_the_loss(gpu: Gpu) -> None:
    h, w = torch.randn(40, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    labels = torch.randint(500, (40,), device="cuda")
    found = LinearDistillationLoss(backend=gpu.backend)(h, w, h.flip(0), w, labels)
    expected = LinearDistillationLoss(backend="reference")(h, w, h.flip(0), w, labels)
    assert abs(found.item() - expected.item()) <= 1e-4 * abs(expected.item())
