"""``SparseLinear`` where a kernel would read memory that is not there, or a caller hands in what does not belong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from pycompress import ops
from pycompress.nn import Int8Linear, SparseLinear
from pycompress.ops.sparse_linear_weight import index_info
from tests.test_sparse_linear_module import DTYPES, K, N, bias_of, make

KINDS = [(dtype, format) for dtype in DTYPES for format in ("bitmap", "index", "dense")]


@pytest.mark.parametrize(("dtype", "format"), KINDS)
def test_the_default_device_does_not_matter(dtype: str, format: str) -> None:
    """Forms lie where the state is, whatever ``with torch.device(...)`` says."""
    module, x = make(dtype, format=format), torch.randn(9, K)
    expected = module(x)
    with torch.device("meta"):
        twin = copy.deepcopy(module)
        assert ops.sparse_kernel_names(ops.SPARSE_DTYPES[dtype])
        assert torch.equal(twin.to_dense(), module.to_dense())
    assert not any(tensor.is_meta for tensor in twin.buffers())
    assert torch.equal(twin(x), expected)


def test_int8_linear_too() -> None:
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    with torch.device("meta"):
        module = copy.deepcopy(Int8Linear.from_float(linear))
        assert not module.weight.is_meta
    assert torch.equal(module(x), Int8Linear.from_float(linear)(x))


@pytest.mark.parametrize("kind", [SparseLinear, Int8Linear])
def test_made_of_fake_tensors(kind: type[nn.Module]) -> None:
    with FakeTensorMode():
        module = kind(K, N)
        assert module(torch.randn(3, K)).shape == (3, N)


def test_fakes_and_meta_tensors_are_refused_where_values_are_needed() -> None:
    module = make(format="index")
    for bitmap in (module.weight_bitmap.to("meta"), FakeTensorMode().from_tensor(module.weight_bitmap)):
        with pytest.raises(ValueError, match="meta or fake tensor"):
            ops.row_starts(bitmap, K)
    assert module._index is not None
    with pytest.raises(ValueError, match="meta or fake tensor"):
        index_info(module._index.to("meta"))


STATES: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "values on meta": (
        lambda state: state.update(weight_values=state["weight_values"].to("meta")),
        "weight_[*] are on cpu and meta; they belong together, on one device",
    ),
    "bitmap on meta": (
        lambda state: state.update(weight_bitmap=state["weight_bitmap"].to("meta")),
        "weight_[*] are on cpu and meta",
    ),
    "sparse values": (
        lambda state: state.update(weight_values=state["weight_values"].to_sparse()),
        r"weight_values is torch.float32 \(\d+,\) torch.sparse_coo, expected",
    ),
}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", STATES)
def test_checkpoints_of_no_values(name: str, assign: bool) -> None:
    damage, match = STATES[name]
    for format in ("bitmap", "index", "dense"):
        module, x = make(format=format), torch.randn(9, K)
        expected, state = module(x), dict(make().state_dict())
        damage(state)
        with pytest.raises(RuntimeError, match=match):
            module.load_state_dict(state, assign=assign)
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("format", ["bitmap", "index", "dense"])
def test_buffers_that_do_not_belong(format: str) -> None:
    module, x = make(format=format), torch.randn(9, K)
    expected, bitmap, values = module(x), module.weight_bitmap, module.weight_values
    for wrong in (values[:-1], values.to("meta"), values.double(), torch.cat([values, values])):
        module.weight_values = wrong
        with pytest.raises(ValueError, match="sparse_linear"):
            module(x)
    module.weight_values, module.weight_bitmap = values, bitmap.t().contiguous().t()
    with pytest.raises(ValueError, match="expected contiguous uint8"):
        module(x)
    module.weight_bitmap = bitmap
    assert torch.equal(module(x), expected)


def test_row_starts_of_another_weight() -> None:
    module, x = make(), torch.randn(2, K)
    with pytest.raises(ValueError, match="make it again with row_starts"):
        ops.sparse_linear(x, module.weight_bitmap, module.weight_values[:-1], row_start=module._row_start)


@pytest.mark.parametrize("kind", [SparseLinear, Int8Linear])
@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_gradients_of_nothing(kind: type[SparseLinear | Int8Linear], n: int, k: int) -> None:
    linear, x = nn.Linear(k, n), torch.randn(3, 5, k, requires_grad=True)
    module = kind.from_dense(linear) if issubclass(kind, SparseLinear) else kind.from_float(linear)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert module.bias is not None
    assert torch.equal(module.bias.grad, torch.full((n,), 15.0))  # type: ignore[arg-type]


def test_a_bias_of_hooks_is_the_newest() -> None:
    linear, x = nn.Linear(K, N), torch.randn(3, K)
    for name in ("weight", "bias"):
        prune.l1_unstructured(linear, name, 0.5)
    with torch.no_grad():
        linear.bias_orig.add_(1)
    module = SparseLinear.from_dense(linear)
    torch.testing.assert_close(module(x), linear(x))
    assert bias_of(module).requires_grad
