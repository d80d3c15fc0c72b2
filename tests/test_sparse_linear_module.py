"""``SparseLinear``: conversion, state, forms, memory. What torch does with it is in test_sparse_linear_torch.py."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from pycompress import _native, ops
from pycompress.nn import MaskedLinear, SparseLinear
from tests.sparse_oracle import X_DTYPES, block_mask
from tests.test_int8_linear import FUNCTIONS, assert_same, saved

K, N = 97, 40
DTYPES = ("float32", "bfloat16", "int8")  # what the native kernels take; float16: test_sparse_linear_gpu.py


def pruned(k: int = K, n: int = N, bias: bool = True, sparsity: float = 0.7, **options: Any) -> nn.Linear:
    """A layer with exact zeros."""
    linear = nn.Linear(k, n, bias, **options)
    linear.weight.data *= block_mask(n, k, sparsity)
    return linear


def make(dtype: str = "float32", k: int = K, n: int = N, bias: bool = True, **options: Any) -> SparseLinear:
    return SparseLinear.from_dense(pruned(k, n, bias), dtype=dtype, **options)


def bias_of(module: SparseLinear) -> nn.Parameter:
    assert module.bias is not None
    return module.bias


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every value that the module's results depend on."""
    return {name: t.clone() for name, t in module.state_dict().items()}


def loaded(module: SparseLinear, state: dict[str, Any], **options: Any) -> SparseLinear:
    module.load_state_dict(state, **options)
    return module


def like(module: SparseLinear, **options: Any) -> SparseLinear:
    """An empty module of the same kind."""
    options = {"dtype": module.dtype, "format": module.format, "activation": module.activation} | options
    return SparseLinear(module.in_features, module.out_features, module.bias is not None, **options)


def bits(tensor: Tensor) -> np.ndarray:
    """For comparing bit by bit, signs of zeros included."""
    return tensor.detach().contiguous().view(torch.uint8).numpy()


# ---- from dense and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_from_dense(activation: str, dtype: str) -> None:
    for of_linear in X_DTYPES:
        linear = pruned(dtype=of_linear).eval()
        before = tensors(linear)
        module = SparseLinear.from_dense(linear, dtype=dtype, activation=activation)
        assert module.nnz == linear.weight.count_nonzero()
        assert module.sparsity == pytest.approx(1 - module.nnz / (N * K))
        assert torch.equal(module.mask, linear.weight != 0)
        assert torch.equal(bias_of(module), linear.bias)
        assert bias_of(module).dtype == of_linear
        assert not module.training
        assert module.bias is not linear.bias
        assert_same(tensors(linear), before)
        for m in (1, 7, 70):
            x = torch.randn(m, K).to(of_linear)
            with torch.no_grad():
                y = FUNCTIONS[activation](F.linear(x.float(), linear.weight.float(), linear.bias.float()))
                torch.testing.assert_close(module(x).float(), y, rtol=0.03, atol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_to_dense_is_bit_equal(dtype: str) -> None:
    """Negative zeros, denormals and extremes that are kept stay; what is pruned is +0.0."""
    linear, mask = nn.Linear(K, N), block_mask(N, K, 0.5)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 1e-45])
    linear.weight.data[:7, 0] = special
    mask[:7, 0] = True
    module = SparseLinear.from_dense(linear, mask, dtype=dtype)
    expected = torch.where(mask, linear.weight, 0.0).to(ops.SPARSE_DTYPES[dtype])
    assert module.to_dense().dtype == expected.dtype
    np.testing.assert_array_equal(bits(module.to_dense()), bits(expected))
    assert torch.equal(module.mask, mask)
    assert module.nnz == mask.sum()  # kept zeros are kept
    assert torch.equal(like(module).to_dense(), torch.zeros(N, K, dtype=expected.dtype))


def test_to_dense_of_int8() -> None:
    linear = pruned()
    q, scale = ops.quantize_weight(linear.weight)
    module = SparseLinear.from_dense(linear, dtype="int8")
    np.testing.assert_array_equal(bits(module.to_dense()), bits(q.float() * scale[:, None]))
    assert torch.equal(module.weight_values, q[linear.weight != 0])
    assert torch.equal(module.get_buffer("weight_scale"), scale)


def test_to_dense_of_int8_has_positive_zeros_only() -> None:
    linear = nn.Linear(8, 4)
    linear.weight.data = torch.tensor([[1.0, -0.001, 0, 0, 0, 0, 0, -1.0]]).repeat(4, 1)
    dense = SparseLinear.from_dense(linear, dtype="int8").to_dense()
    assert not torch.signbit(dense[dense == 0]).any()


def hooked(mask: Tensor) -> nn.Module:
    return prune.custom_from_mask(nn.Linear(K, N), "weight", mask)


def parametrized(mask: Tensor) -> nn.Module:
    class Masked(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * mask

    linear = nn.Linear(K, N)
    parametrize.register_parametrization(linear, "weight", Masked())
    return linear


def masked(gradient: str) -> Callable[[Tensor], nn.Module]:
    return lambda mask: MaskedLinear.from_linear(nn.Linear(K, N), mask, gradient)


SOURCES: dict[str, Callable[[Tensor], nn.Module]] = {
    "prune hooks": hooked,
    "parametrization": parametrized,
    "MaskedLinear": masked("masked"),
    "MaskedLinear dense": masked("dense"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_of_masks(source: str) -> None:
    mask, x = block_mask(N, K, 0.6), torch.randn(5, K)
    linear = SOURCES[source](mask)
    if source == "prune hooks":
        linear.weight_orig.data.mul_(2)  # type: ignore[operator, union-attr]  # linear.weight does not know yet
    state = tensors(linear)
    module = SparseLinear.from_dense(linear)
    assert torch.equal(module.mask, mask)
    torch.testing.assert_close(module(x), linear(x), rtol=1e-5, atol=1e-5)
    assert_same(tensors(linear), state)
    given = block_mask(N, K, 0.5)
    again = SparseLinear.from_dense(linear, given)
    assert torch.equal(again.mask, given)
    torch.testing.assert_close(again.to_dense(), module.to_dense() * given)


def test_conv1d() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, mask, x = conv1d(N, K), block_mask(N, K, 0.5), torch.randn(5, K)
    nn.init.normal_(layer.bias)
    layer.weight.data *= mask.t()
    for module in (SparseLinear.from_dense(layer), SparseLinear.from_dense(layer, mask)):
        assert (module.in_features, module.out_features) == (K, N)
        torch.testing.assert_close(module(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 3, K), (2, 0, K), (2, 3, 4, K)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...], backend: str) -> None:
    module, x = make(backend=backend, format="bitmap"), torch.randn(shape)
    with torch.no_grad():
        y = module(x)
        assert y.shape == (*shape[:-1], N)
        torch.testing.assert_close(y, module(x.reshape(-1, K)).reshape(y.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("format", ops.FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 0), (1, 1), (9, 3)])
def test_smallest_and_empty_layers(k: int, n: int, dtype: str, format: str) -> None:
    linear = nn.Linear(k, n)
    for mask in (torch.ones(n, k, dtype=torch.bool), torch.zeros(n, k, dtype=torch.bool)):
        module = SparseLinear.from_dense(linear, mask, dtype=dtype, format=format)
        assert 0 <= module.sparsity <= 1
        assert str(module)
        for m in (0, 1, 20):
            y = module(torch.randn(m, k))
            assert y.shape == (m, n)
            if not mask.any():
                assert torch.equal(y, bias_of(module).expand(m, n))
        assert_same(tensors(loaded(like(module), module.state_dict())), tensors(module))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_to_float(activation: str, bias: bool) -> None:
    module = make(bias=bias, activation=activation).eval()
    back = module.to_float()
    linear = back[0] if isinstance(back, nn.Sequential) else back
    assert type(linear) is nn.Linear
    assert not linear.training
    assert (linear.bias is None) == (not bias)
    assert (back is linear) == (activation == "none")
    assert torch.equal(linear.weight, module.to_dense())
    x = torch.randn(5, K)
    torch.testing.assert_close(module(x), back(x), rtol=1e-5, atol=1e-5)
    assert_same(tensors(SparseLinear.from_dense(linear)), tensors(module))


def bad_weight(value: float) -> nn.Linear:
    linear = pruned(8, 4)
    linear.weight.data[2, 3] = value
    return linear


EIGHT = torch.ones(4, 8, dtype=torch.bool)
CONVERSION_ERRORS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "NaN": (lambda: bad_weight(float("nan")), {}, "row 2 of the weight holds NaN or Inf"),
    "Inf": (lambda: bad_weight(float("inf")), {"dtype": "int8"}, "row 2 of the weight holds NaN or Inf"),
    "too large": (lambda: bad_weight(3.4e38), {"dtype": "bfloat16"}, "too large for bfloat16"),
    "meta": (lambda: nn.Linear(8, 4, device="meta"), {}, "meta device"),
    "dtype": (lambda: nn.Linear(8, 4), {"dtype": "int4"}, "dtype='int4', expected one of float32"),
    "format": (lambda: nn.Linear(8, 4), {"format": "csr"}, "format='csr', expected one of auto"),
    "activation": (lambda: nn.Linear(8, 4), {"activation": "tanh"}, "activation='tanh', expected one of none"),
    "backend": (lambda: nn.Linear(8, 4), {"backend": "hip"}, "backend='hip', expected one of auto"),
    "mask shape": (lambda: nn.Linear(8, 4), {"mask": EIGHT.t()}, r"torch.bool \(8, 4\), expected torch.bool \(4, 8\)"),
    "mask dtype": (lambda: nn.Linear(8, 4), {"mask": EIGHT.float()}, r"mask is torch.float32 \(4, 8\)"),
    "not a linear": (lambda: nn.Conv2d(3, 4, 3), {}, "expected an nn.Linear, got Conv2d"),
    "no weight": (nn.ReLU, {}, "expected an nn.Linear, got ReLU"),
    "sparse already": (make, {}, "expected an nn.Linear, got SparseLinear"),
}


@pytest.mark.parametrize("case", CONVERSION_ERRORS)
def test_conversion_errors(case: str) -> None:
    source, options, message = CONVERSION_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_dense(source(), **options)


def test_a_pruned_nan_does_no_harm() -> None:
    linear, mask = bad_weight(float("nan")), EIGHT.clone()
    mask[2, 3] = False
    assert SparseLinear.from_dense(linear, mask)(torch.ones(1, 8)).isfinite().all()


def test_call_errors() -> None:
    module = make()
    for x, message in (
        (torch.randn(2, 90), "x has K=90 but weight has K=97"),
        (torch.randn(2, 98), "x has K=98 but weight has K=97"),  # as many bytes of bitmap
        (torch.randn(2, K).double(), "x has dtype torch.float64"),
        (torch.ones(2, K, dtype=torch.int64), "x has dtype torch.int64"),
        (torch.tensor(1.0), "x is a scalar"),
        (torch.randn(2, K, device="meta"), "x is on meta but bitmap is on cpu; move one"),
        (torch.randn(2, K).to_sparse(), "x is torch.sparse_coo, expected|x has .*sparse_coo.*, expected"),
    ):
        for grad in (True, False):
            with pytest.raises(ValueError, match=message), torch.set_grad_enabled(grad):
                module(x)
    module(torch.randn(2, K))  # an error leaves nothing behind


# ---- forms ------------------------------------------------------------------------------------------------------


class FixedModel:
    """A cost model that has made up its mind."""

    measured = frozenset({"float32"})

    def __init__(self, *choice: int) -> None:
        self.choice = choice
        self.asked: list[Any] = []

    def choose(self, shape: Any, tokens: Any = None) -> tuple[int, ...]:
        self.asked.append((shape, tokens))
        return self.choice


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_holds_what_was_chosen(dtype: str) -> None:
    for choice, held in (
        ((2**62, 0), ("bitmap",)),
        ((8, 0, 2**62, 1), ("bitmap", "index")),
        ((2**62, 1), ("bitmap", "index")),
        ((8, 0, 64, 1, 2**62, 2), ("bitmap", "index", "dense")),
    ):
        model = FixedModel(*choice)
        module = make(dtype, cost_model=model, tokens=(3, 80))
        assert module.choice == choice
        assert module.forms() == held
        assert model.asked[-1][1] == (3, 80)
        assert (model.asked[-1][0].n, model.asked[-1][0].k, model.asked[-1][0].nnz) == (N, K, module.nnz)
        dense = module.to_float()
        for m in (3, 30, 80):
            x = torch.randn(m, K)
            torch.testing.assert_close(module(x), dense(x), rtol=0.02, atol=0.05)
        assert copy.deepcopy(module).choice == choice
    assert module.memory_bytes() > make(dtype, format="bitmap").memory_bytes()


@pytest.mark.parametrize("format", ["bitmap", "index", "dense"])
def test_named_format_holds_only_that(format: str) -> None:
    module = make(format=format)
    assert module.forms() == tuple(dict.fromkeys(("bitmap", format)))
    assert f"format={format}, " in module.extra_repr()
    module.format = "bitmap"
    assert module.forms() == ("bitmap",)
    module.backend = "reference"
    assert module.forms() == ("bitmap",)
    assert module.extra_repr().endswith("backend=reference")
    for name in ("format", "backend", "activation"):
        with pytest.raises(ValueError, match=f"{name}='bogus', expected one of"):
            setattr(module, name, "bogus")
        assert getattr(module, name) != "bogus"


def test_choice_follows_the_number_of_threads() -> None:
    class ByThreads(FixedModel):
        def choose(self, shape: Any, tokens: Any = None) -> tuple[int, ...]:
            self.asked.append(shape)
            return (2**62, 1 if torch.get_num_threads() == 1 else 0)

    model, before = ByThreads(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        module, x = make(cost_model=model), torch.randn(3, K)
        module.requires_grad_(False)
        assert module.forms() == ("bitmap",)
        y = module(x)
        torch.set_num_threads(1)
        torch.testing.assert_close(module(x), y)
        assert module.choice == (2**62, 1)
        assert module.forms() == ("bitmap", "index")
        asked = len(model.asked)
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            torch.testing.assert_close(module(x), y)
        assert len(model.asked) == asked
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain(dtype: str) -> None:
    module = make(dtype)
    for measure in (False, True):
        text = str(module.explain((1, 16), measure))
        assert "dense" in text
        assert len([line for line in text.splitlines() if line.lstrip().startswith(("1 ", "16 "))]) == 2


def test_extra_repr(isa: str) -> None:
    text = make(format="bitmap").extra_repr()
    assert text.startswith(f"in_features={K}, out_features={N}, bias=True, dtype=float32, sparsity=0.")
    assert isa in make("int8", format="index").extra_repr()
    auto = make(cost_model=FixedModel(8, 0, 2**62, 1), activation="gelu").extra_repr()
    assert "format=auto(bitmap to 8, index), activation=gelu, backend=native:" in auto
    assert "backend=reference" in make().to("meta").extra_repr()


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.24), ("bfloat16", 0.14), ("int8", 0.09)])
def test_file_size(dtype: str, most: float) -> None:
    """nnz values and one bit a weight: at 80 % sparsity under 0.24 of a dense float32 file."""
    linear = nn.Linear(768, 768)
    linear.weight.data *= block_mask(768, 768, 0.8)
    sizes = []
    for module in (linear, SparseLinear.from_dense(linear, dtype=dtype)):
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        sizes.append(file.getbuffer().nbytes)
    assert sizes[1] <= most * sizes[0]
    module = SparseLinear.from_dense(linear, dtype=dtype, format="bitmap")
    assert module.memory_bytes() <= most * 4 * 768 * 768 + 20000


def test_kernels_survive_a_change_of_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        module, x = make(dtype, format="index"), torch.randn(70, K)
        state, pickled, expected = saved(module.state_dict()), pickle.dumps(module), module(x)
        for other in _native.available_isas():
            monkeypatch.setenv("PYCOMPRESS_ISA", other)
            for there in (loaded(like(module), state), pickle.loads(pickled), module, copy.deepcopy(module)):
                torch.testing.assert_close(there(x), expected, rtol=1e-4, atol=1e-4)
                there.requires_grad_(False)
                torch.testing.assert_close(there(x), expected, rtol=1e-4, atol=1e-4)
        monkeypatch.setenv("PYCOMPRESS_ISA", isa)
