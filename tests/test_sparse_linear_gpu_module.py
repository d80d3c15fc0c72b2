"""``SparseLinear`` on a GPU backend, and the cost model of a GPU: state, copies, forms, choice, what is said of them.

Without a GPU the module lives on the CPU and names its backend. Nothing is timed: where something would be measured, a
clock stands in.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import cost_gpu, cost_model, cost_target, ops, sparsify_
from pycompress import gpu as gpu_backends
from pycompress.cost_core import ANY_M, CostModel
from pycompress.cost_gpu import (
    RATES,
    GpuShape,
    estimated_fits,
)
from pycompress.cost_target import CpuTarget, target_of, target_on
from pycompress.nn import SparseLinear
from tests.cost_fakes import flat
from tests.gpu import Gpu
from tests.sparse_oracle import block_mask
from tests.test_int8_linear import assert_same, saved
from tests.test_sparse_linear_gpu import structured, two_of_four
from tests.test_sparse_linear_module import FixedModel, bias_of, loaded, tensors

K, N = 50, 40
CHOICE = (4, 0, 16, 1, ANY_M, 2)
DTYPES = tuple(ops.SPARSE_DTYPES)


def sixteen_bit(gpu: Gpu, dtype: str) -> str:
    """What has an index form there: mma.sp knows no float32."""
    return "bfloat16" if gpu.backend == "cuda" and dtype == "float32" else dtype


def pruned(gpu: Gpu, n: int = N, k: int = K, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(k, n, bias)
    linear.weight.data *= structured(gpu, n, k)
    return linear.to(gpu.device)


def make(gpu: Gpu, dtype: str = "bfloat16", bias: bool = True, **options: Any) -> SparseLinear:
    if options.get("format", "auto") == "auto":
        options.setdefault("cost_model", FixedModel(*CHOICE))
    return SparseLinear.from_dense(pruned(gpu, bias=bias), dtype=dtype, backend=gpu.backend, **options)


def like(module: SparseLinear, **options: Any) -> SparseLinear:
    options = {"dtype": module.dtype, "format": module.format, "backend": module.backend} | options
    return SparseLinear(module.in_features, module.out_features, module.bias is not None, **options)


def inputs(gpu: Gpu, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(m, K).to(gpu.device, dtype) for m in (1, 5, 20)]


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_computes_the_layer(gpu: Gpu, dtype: str) -> None:
    module = make(gpu, sixteen_bit(gpu, dtype), activation="gelu")
    assert module.choice == CHOICE
    assert module.forms() == ("bitmap", "index", "dense")
    assert module._row_start is not None
    assert module._row_start.device.type == gpu.device
    dense = module.to_float()
    for x in inputs(gpu):
        expected = dense(x.to(bias_of(module).dtype))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(module(x), expected, rtol=0.02, atol=0.05)
    index = "cuda:2:4" if gpu.backend == "cuda" else "triton:block16"
    end = f"{gpu.backend}:int8" if dtype == "int8" else "torch"
    assert module.extra_repr().endswith(f"backend={gpu.backend}:bitmap+{index}+{end}")
    assert "format=auto(bitmap to 4, index to 16, dense)" in module.extra_repr()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "move": lambda m: copy.deepcopy(m).to("meta").to_empty(device=m.weight_bitmap.device),
    "half and back": lambda m: copy.deepcopy(m).half().float(),
    "a new module": lambda m: like(m).to(m.weight_bitmap.device),
    "a saved file": lambda m: like(m).to(m.weight_bitmap.device),
    "by the CPU": lambda m: copy.deepcopy(m).cpu().to(m.weight_bitmap.device),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(gpu: Gpu, how: str) -> None:
    for dtype in ("bfloat16", "int8"):
        for format in ("bitmap", "index", "dense"):
            module = make(gpu, dtype, format=format)
            assert_plain(module)
            x = inputs(gpu)[1]
            with torch.no_grad():
                expected = module(x)
                other = COPIES[how](module)
                state = saved(module.state_dict()) if how == "a saved file" else module.state_dict()
                if how in ("move", "half and back", "a new module", "a saved file"):
                    loaded(other, state)
                assert_same(tensors(module), tensors(other))
                assert torch.equal(other(x), expected)
                assert (other.forms(), other.extra_repr()) == (module.forms(), module.extra_repr())


def assert_plain(module: SparseLinear) -> None:
    """A checkpoint of a module on a GPU loads on the CPU, and the other way round."""
    state = module.state_dict()
    assert set(state) <= {"weight_bitmap", "weight_values", "weight_scale", "bias"}
    there = loaded(SparseLinear(K, N, dtype=module.dtype, format="bitmap"), state)
    assert torch.equal(there.to_dense(), module.to_dense().cpu())


CHANGES = {
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.randn_like(m.bias))),
    "values": lambda m: setattr(m, "weight_values", m.weight_values.flip(0).contiguous()),
    "values in place": lambda m: m.weight_values.copy_(m.weight_values.flip(0)),
    "activation": lambda m: setattr(m, "activation", "silu"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("format", ["bitmap", "index", "dense"])
def test_changes_are_never_missed(gpu: Gpu, format: str, change: str) -> None:
    module, x = make(gpu, format=format), inputs(gpu)[1]
    with torch.no_grad():
        before = module(x)
        CHANGES[change](module)
        y = module(x)
        fresh = like(module, backend="reference", activation=module.activation).to(gpu.device)
        torch.testing.assert_close(y, loaded(fresh, module.state_dict())(x), rtol=0.01, atol=0.01)
        assert not torch.equal(y, before)
        assert torch.equal(module(x), y)


def test_other_values_for_a_call(gpu: Gpu) -> None:
    module, x = make(gpu, format="index"), inputs(gpu)[1]
    values = torch.randn_like(module.weight_values)
    expected = loaded(like(module).to(gpu.device), {**module.state_dict(), "weight_values": values})(x)
    y = torch.func.functional_call(module, {"weight_values": values}, (x,))
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_gradients(gpu: Gpu) -> None:
    module, x = make(gpu, format="index", activation="gelu"), inputs(gpu)[1].requires_grad_()
    dense, given = module.to_float(), x.detach().clone().requires_grad_()
    module(x).square().sum().backward()
    dense(given).square().sum().backward()
    torch.testing.assert_close(x.grad, given.grad, rtol=0.02, atol=0.02)
    torch.testing.assert_close(bias_of(module).grad, dense[0].bias.grad, rtol=0.02, atol=0.02)


def test_a_mask_without_structure_has_no_index(gpu: Gpu) -> None:
    """As on the CPU: bitmap where the index form was asked for, dense where auto chose it."""
    linear = nn.Linear(K, N)
    linear.weight.data *= block_mask(N, K, 0.4)
    linear.to(gpu.device)
    for options, choice, forms in (
        ({"format": "index"}, (ANY_M, 0), ("bitmap",)),
        ({"cost_model": FixedModel(4, 0, ANY_M, 1)}, (4, 0, ANY_M, 2), ("bitmap", "dense")),
    ):
        module = SparseLinear.from_dense(linear, backend=gpu.backend, **options)
        assert (module.choice, module.forms()) == (choice, forms)
        for x in inputs(gpu):
            torch.testing.assert_close(module(x), linear(x), rtol=1e-4, atol=1e-4)


def test_the_dense_form_is_what_x_will_be(gpu: Gpu) -> None:
    for dtype, bias, expected in (
        ("float16", torch.float16, torch.float16), ("float16", torch.float32, torch.float32),
        ("int8", torch.float16, torch.int8), ("float32", torch.bfloat16, torch.float32),
    ):  # fmt: skip
        module = SparseLinear.from_dense(pruned(gpu).to(bias), dtype=dtype, backend=gpu.backend, format="dense")
        assert module._dense is not None
        assert (module._dense.dtype, tuple(module._dense.shape)) == (expected, (N, K))


def test_a_damaged_state_raises(gpu: Gpu) -> None:
    module = make(gpu, format="index")
    before = tensors(module)
    with pytest.raises(RuntimeError, match=r"the bitmap keeps .* but there are"):
        module.load_state_dict({**before, "weight_values": before["weight_values"][1:]})
    assert_same(tensors(module), before)
    module.weight_values = module.weight_values[1:]
    for grad in (False, True):
        with pytest.raises(ValueError, match="the bitmap keeps"), torch.set_grad_enabled(grad):
            module(inputs(gpu)[0])


def test_float16_on_the_cpu() -> None:
    """Made there to be moved: the reference computes it, and the report says so."""
    linear = nn.Linear(K, N)
    linear.weight.data *= block_mask(N, K, 0.7)
    module = SparseLinear.from_dense(linear, dtype="float16")
    assert module.extra_repr().endswith("backend=reference")
    torch.testing.assert_close(module(torch.ones(2, K)), linear(torch.ones(2, K)), rtol=0.01, atol=0.01)
    assert torch.equal(copy.deepcopy(module).half().to_dense(), linear.weight.half())
    report = sparsify_(nn.Sequential(linear), "float16")
    assert [(layer.action, layer.reason) for layer in report.layers] == [
        ("swapped", "float16 is for GPUs; on the CPU bfloat16 is fast, this runs by the reference")
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_graph_capture(gpu: Gpu) -> None:
    for format in ("bitmap", "index", "dense"):
        module, x = make(gpu, format=format), inputs(gpu)[1]
        with torch.no_grad():
            expected = module(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = module(x)
            graph.replay()
            assert torch.equal(y, expected)


# ---- the choice -----------------------------------------------------------------------------------------------------


def big(gpu: Gpu, sparsity: float, block: int = 64, n: int = 1024, dtype: str = "bfloat16") -> SparseLinear:
    mask = two_of_four(n, n, 1.0) if gpu.backend == "cuda" else block_mask(n, n, sparsity, (block, block))
    linear = nn.Linear(n, n, dtype=torch.bfloat16)
    return SparseLinear.from_dense(linear.to(gpu.device), mask.to(gpu.device), dtype=dtype, backend=gpu.backend)


def test_auto_goes_by_estimates_and_says_so(gpu: Gpu) -> None:
    module = big(gpu, 0.9)
    assert "index" in module.forms()
    explanation = module.explain((1, 512), measure=True)
    said = str(explanation)
    if not torch.cuda.is_available():
        assert [t.measured for t in explanation.tokens] == [None, None]
        assert "the data sheet of A100: estimated, not measured" in said
        assert "estimated 1" in said or "estimated 2" in said or "estimated 0" in said
    assert explanation.shape == target_of(module).shape(module)


def test_estimates_choose_sensibly() -> None:
    """bitmap for one token, blocks for many where most are gone, dense where little is; on every known GPU."""
    for rates in RATES.values():
        model = CostModel(estimated_fits(rates), threads=1, measured=frozenset(), machine={"gpu": "x"})
        for dtype in ("bfloat16", "float16", "int8", "float32"):
            cells = 4096 * 4096

            def shape(sparsity: float, structure: str, dtype: str = dtype, cells: int = cells) -> GpuShape:
                kept = round(cells * (1 - sparsity))
                return GpuShape(4096, 4096, kept, dtype, 0, 0, 0, dtype, structure, kept if structure else 0)

            def form(m: int, shape: GpuShape, model: CostModel = model) -> str:
                return cost_model.form_at(model.choose(shape), m)

            assert form(2048, shape(0.5, "")) == "dense"
            if dtype == "float32":
                assert form(1, shape(0.9, "")) == "bitmap"
            assert form(2048, shape(0.05, "block64")) == "dense"
            assert form(2048, shape(0.95, "block64")) == "index"
            assert form(4096, shape(0.9, "")) == "dense", "there is no index form"


def test_a_model_of_another_machine_is_refused(gpu: Gpu) -> None:
    with pytest.raises(ValueError, match=r"it is of a CPU, the layer is not on one"):
        make(gpu, cost_model=flat(bitmap=1e-6, index=1e-6, dense=1e-6))
    with pytest.raises(ValueError, match="float16"):
        cost_model.calibrate_cost_model("float16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device=cuda.*no GPU"):
            cost_model.default_cost_model("cuda")
    assert type(target_on("cpu")) is type(target_on(None)) is CpuTarget


# ---- sparsify_ ------------------------------------------------------------------------------------------------------


def test_sparsify(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by the GPU's model: sparse where it pays, dense as it was where not."""
    monkeypatch.setattr(cost_gpu, "_CALL", 0.0)  # of so small a layer it would be all
    torch.manual_seed(1)
    worth, little = nn.Linear(256, 256), nn.Linear(256, 256)
    worth.weight.data *= structured(gpu, 256, 256, 64, 0.9)
    little.weight.data *= torch.rand(256, 256) > 0.1
    model = nn.Sequential(worth, nn.GELU(), little).to(gpu.device, torch.bfloat16)
    x = torch.randn(2, 256).to(gpu.device, torch.bfloat16)
    expected = model(x)
    estimates = cost_target.GpuTarget(torch.device(gpu.device), (gpu.backend,)).builtin()
    report = sparsify_(model, "bfloat16", backend=gpu.backend, tokens=(1, 4096), cost_model=estimates)
    assert isinstance(model[0], SparseLinear)
    assert "index" in model[0].forms() or gpu.backend == "cuda"
    assert report.layers[0].times  # type: ignore[attr-defined]
    torch.testing.assert_close(model(x).float(), expected.float(), rtol=0.05, atol=0.05)
    assert "speed-up" in str(report)


def test_auto_names_the_backends_that_there_are(gpu: Gpu) -> None:
    from pycompress.ops.sparse_linear_gpu import gpu_backends as available

    here = torch.empty(0, device=gpu.device)
    assert gpu.backend in available(here, "auto")
    assert available(here, gpu.backend) == (gpu.backend,)
    assert available(here, "native") == ()
    assert gpu_backends.capability(here) >= 80
