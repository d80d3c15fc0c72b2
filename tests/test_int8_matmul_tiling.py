"""Who takes a call of int8_linear on a GPU, and the tiles of the Triton kernels: each computes, whatever pick says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import gpu as gpus
from pycompress import ops
from pycompress.nn import Int8Linear
from pycompress.ops import int8_matmul
from pycompress.ops.int8_matmul_reference import Call
from tests import oracle
from tests.test_int8_matmul import make

pytest.importorskip("triton")

# ---- the table --------------------------------------------------------------------------------------------------


@dataclass
class FakeModule:
    DEVICE_TYPE: str = "cuda"
    INT8_MAX_TOKENS: int = 64


def call_on_gpu(tokens: int, mode: str = "dynamic", weight: Tensor | None = None) -> Call:
    """As a CUDA tensor's call, so far as the table asks: of its device, shapes and dtypes."""
    x = torch.empty(1, device="meta").expand(tokens, 16)
    plain = torch.empty(8, 16, dtype=torch.int8, device="meta")
    return Call(x, plain if weight is None else weight, torch.empty(8, device="meta"), None, mode, None, None, "none")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what a machine has; calls on the meta device are then taken for calls on its GPU."""

    def machine(capability: int, *, cuda: bool = True, triton: bool = True) -> None:
        monkeypatch.setattr(gpus, "_cuda", FakeModule())
        monkeypatch.setattr(gpus, "cuda_missing", lambda x: None if cuda else "built without CUDA")
        monkeypatch.setattr(gpus, "triton_missing", lambda x: None if triton else "Triton is not installed")
        monkeypatch.setattr(gpus, "capability", lambda x: capability)

    return machine


@pytest.mark.parametrize(
    ("capability", "cuda", "triton", "tokens", "expected"),
    [
        (80, True, True, 1, "cuda"),
        (80, True, True, 4096, "cuda"),
        (90, True, True, 1, "cuda"),
        (90, True, True, 64, "cuda"),
        (90, True, True, 65, "triton"),
        (100, True, True, 4096, "triton"),
        (90, True, False, 4096, "cuda"),
        (90, False, True, 1, "triton"),
        (90, False, False, 1, "reference"),
    ],
)
def test_auto_on_a_gpu(pretend: Any, capability: int, cuda: bool, triton: bool, tokens: int, expected: str) -> None:
    pretend(capability, cuda=cuda, triton=triton)
    assert int8_matmul.pick("auto", call_on_gpu(tokens)).name == expected


def test_named_backends_run_or_raise(pretend: Any) -> None:
    pretend(90)
    assert int8_matmul.pick("cuda", call_on_gpu(4096)).name == "cuda"
    packed = ops.pack_weight(torch.zeros(8, 16, dtype=torch.int8)).to("meta")
    assert int8_matmul.pick("auto", call_on_gpu(1, weight=packed)).name == "reference"
    for backend in ("cuda", "triton"):
        with pytest.raises(ValueError, match="packed for the CPU; unpack_weight gives"):
            int8_matmul.pick(backend, call_on_gpu(1, weight=packed))
    pretend(90, cuda=False, triton=False)
    for backend, reason in (("cuda", "built without CUDA"), ("triton", "Triton is not installed")):
        with pytest.raises(ValueError, match=f"int8_linear: backend='{backend}' cannot run this: {reason}"):
            int8_matmul.pick(backend, call_on_gpu(1))


def test_cuda_on_the_cpu_says_where_it_runs() -> None:
    x, weight, scale, _ = make(2, 8, 16)
    with pytest.raises(ValueError, match="backend='cuda' cannot run this: x is on cpu, the CUDA kernels run on NVIDIA"):
        ops.int8_linear(x, weight, scale, backend="cuda")


def test_module_says_who_computes(pretend: Any) -> None:
    module = Int8Linear.from_float(nn.Linear(16, 8)).to("meta")
    pretend(90)
    assert module.extra_repr().endswith("backend=cuda/triton")
    pretend(80)
    assert module.extra_repr().endswith("backend=cuda")
    pretend(90, cuda=False)
    assert module.extra_repr().endswith("backend=triton")
    module.backend = "cuda"
    assert module.extra_repr().endswith("backend=cuda (cannot run on meta)")


# ---- tiles ------------------------------------------------------------------------------------------------------

SHAPES = [(m, n, k) for m in (1, 16, 17, 300, 5000) for n in (1, 1000, 11008) for k in (0, 1, 100, 4096, 65281, 10**6)]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("kind", ["int8", "half", "float"])
def test_splits_cover_k_and_stay_exact(kind: str, arch: int) -> None:
    from pycompress.kernels.int8_matmul_tuning import MAX_CHUNK_K, candidates, ladder, pick

    for m, n, k in SHAPES:
        for narrow in (False, True):
            tiles = {(t.block_m, t.block_n, t.block_k) for t in ladder(kind, narrow)}
            for tiling in (pick(m, n, k, arch, kind, narrow), *candidates(m, n, k, arch, kind, narrow)):
                step = tiling.k_per_split(k)
                assert (tiling.block_m, tiling.block_n, tiling.block_k) in tiles  # what is compiled ahead of time
                assert (tiling.splits - 1) * step < max(k, 1) <= max(tiling.splits * step, 1)
                assert step % tiling.block_k == 0
                assert kind != "int8" or step <= MAX_CHUNK_K
                assert tiling.block_m <= 64 or tiling.splits == 1


def test_few_rows_split_k_and_many_do_not() -> None:
    from pycompress.kernels.int8_matmul_tuning import pick

    assert pick(1, 4096, 4096, 90, "int8", False).splits > 1
    assert pick(4096, 4096, 4096, 90, "int8", False).splits == 1
    assert pick(4096, 4096, 4096, 90, "int8", False).block_m == 128


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [63, 272])
def test_every_tiling_computes(monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype, k: int) -> None:
    """Those that pick takes for sizes too slow to interpret, too: whole and split, k ending inside a step."""
    from dataclasses import replace

    from pycompress.kernels import int8_matmul as kernels
    from pycompress.kernels.int8_matmul_tuning import ladder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    static = (torch.tensor(0.02), torch.tensor(97, dtype=torch.int32)) if mode == "static" else (None, None)
    kind = "int8" if mode != "weight_only" else "float" if dtype == torch.float32 else "half"
    tilings = ladder(kind, narrow=k % 16 != 0)
    for tiling in [*tilings, *(replace(t, splits=2) for t in tilings if t.block_m <= 64 and k > 2 * t.block_k)]:
        monkeypatch.setattr(kernels, "pick", lambda *shape, tiling=tiling: tiling)
        x, weight, scale, bias = make(tiling.block_m + 5, tiling.block_n + 9, k, dtype)
        arguments = [None if t is None else t.to(device) for t in (x, weight, scale, bias, *static)]
        call = Call(*arguments[:4], mode, *arguments[4:], "relu")  # type: ignore[arg-type]
        expected, magnitude = oracle.int8_linear(x, weight, scale, bias, mode, "relu", 0.02, 97)
        oracle.assert_close(
            kernels.int8_linear(call).cpu(), expected, magnitude, dtype, terms=k if mode == "weight_only" else 0
        )
