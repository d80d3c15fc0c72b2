"""``Int8Embedding`` and ``Int8EmbeddingBag``: conversion, state, moving about, compile and export."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.nn import Int8Embedding, Int8EmbeddingBag
from pycompress.ops.int8_embedding_eager import TablePlan
from tests.held_bytes import held_bytes
from tests.test_int8_linear import assert_same, saved

Table = Int8Embedding | Int8EmbeddingBag
IDS = torch.tensor([[3, 0, 49], [7, 7, 1]])


def make(v: int = 50, d: int = 24, **options: Any) -> Int8Embedding:
    return Int8Embedding.from_float(nn.Embedding(v, d, padding_idx=3), **options)


def make_bag(mode: str = "sum", **options: Any) -> Int8EmbeddingBag:
    return Int8EmbeddingBag.from_float(nn.EmbeddingBag(50, 24, mode=mode, padding_idx=3), **options)


MAKERS: dict[str, Callable[[], Table]] = {"rows": make, "bag": make_bag}


# ---- from float and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_from_float(dtype: torch.dtype) -> None:
    layer = nn.Embedding(50, 24, padding_idx=-1, dtype=dtype).eval()
    module = Int8Embedding.from_float(layer)
    q, scale = ops.quantize_weight(layer.weight)
    assert torch.equal(module.int8_weight, q)
    assert torch.equal(module.weight_scale, scale)
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx, module.dtype) == (50, 24, 49, dtype)
    assert not module.training
    y = module(IDS)
    assert y.dtype == dtype
    assert torch.equal(y, (q.float() * scale[:, None]).to(dtype)[IDS])
    assert (y.float() - layer(IDS).float()).abs().max() <= layer.weight.abs().max().float() / 127
    assert (y[1, 2] != 0).any()
    assert (module(torch.tensor(49)) == 0).all()  # the padding row of nn.Embedding, exactly


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_bag_from_float(mode: str, last: bool) -> None:
    layer = nn.EmbeddingBag(50, 24, mode=mode, padding_idx=3, include_last_offset=last, sparse=mode != "max")
    module = Int8EmbeddingBag.from_float(layer)
    exact = module.to_float()
    offsets = torch.tensor([0, 2, 2, 6] if last else [0, 2, 2])
    flat = IDS.reshape(-1)
    torch.testing.assert_close(module(flat, offsets), exact(flat, offsets), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module(IDS), exact(IDS), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module(IDS), layer(IDS), rtol=0, atol=0.1)
    if mode == "sum":
        weights = torch.randn(6, requires_grad=True)
        y = module(flat, offsets, per_sample_weights=weights)
        torch.testing.assert_close(y, exact(flat, offsets, weights), rtol=1e-5, atol=1e-5)
        assert torch.autograd.grad(y.sum(), weights)[0].abs().sum() > 0
        assert not module(flat, offsets, weights.detach()).requires_grad


def test_to_float() -> None:
    module = make().eval()
    layer = module.to_float()
    assert type(layer) is nn.Embedding
    assert layer.padding_idx == 3
    assert not layer.training
    assert torch.equal(layer.weight, module.int8_weight.float() * module.weight_scale[:, None])
    assert torch.equal(layer(IDS), module(IDS))
    assert torch.equal(Int8Embedding.from_float(layer).int8_weight, module.int8_weight)


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def bad(value: float) -> nn.Embedding:
    layer = nn.Embedding(5, 4)
    layer.weight.data[2, 1] = value
    return layer


ERRORS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (lambda: nn.Embedding(5, 4, max_norm=1.0), "max_norm=1.0 changes the rows"),
    "own forward": (lambda: Scaled(5, 4), "Scaled has a forward of its own"),
    "not an embedding": (lambda: nn.Linear(5, 4), "expected an nn.Embedding, got Linear"),
    "a bag": (lambda: nn.EmbeddingBag(5, 4), "expected an nn.Embedding, got EmbeddingBag"),
    "NaN": (lambda: bad(float("nan")), "row 2 of the weight holds NaN or Inf"),
    "meta": (lambda: nn.Embedding(5, 4, device="meta"), "meta device"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_conversion_errors(case: str) -> None:
    source, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        Int8Embedding.from_float(source())


def test_construction_errors() -> None:
    for message, call in (
        ("padding_idx=5, expected None or -5 to 4", lambda: Int8Embedding(5, 4, 5)),
        ("dtype=torch.float64", lambda: Int8Embedding(5, 4, dtype=torch.float64)),
        ("backend='gpu'", lambda: Int8Embedding.from_float(nn.Embedding(5, 4), backend="gpu")),
        ("mode='min'", lambda: Int8EmbeddingBag(5, 4, "min")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert Int8Embedding(5, 4, -1).padding_idx == 4


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_call_errors(backend: str) -> None:
    module = make(backend=backend)
    with pytest.raises(IndexError, match=r"index 50 \(at position 1\) is out of range for a table of V=50 rows"):
        module(torch.tensor([0, 50]))
    with pytest.raises(ValueError, match=r"the indices are torch\.float32"):
        module(torch.ones(2))
    with pytest.raises(ValueError, match="is on meta but weight is on cpu"):
        module(IDS.to("meta"))
    module(IDS)  # an error leaves nothing behind


def test_extra_repr() -> None:
    native = f"backend=native:{ops.embedding_kernel_name()}"
    assert make().extra_repr() == f"50, 24, padding_idx=3, dtype=float32, {native}"
    assert make_bag("max").half().extra_repr() == f"50, 24, padding_idx=3, mode=max, dtype=float16, {native}"
    assert make(backend="reference").extra_repr().endswith("backend=reference")
    assert make(backend="native").to("meta").extra_repr().endswith("backend=native (cannot run on meta)")


# ---- what models read of an embedding ---------------------------------------------------------------------------


def test_weight_is_what_a_float_embedding_has() -> None:
    """Some Hugging Face models read an embedding's weight instead of calling it, and its dtype, device and shape."""
    module = make().half()
    assert module.weight.dtype == torch.float16
    assert module.weight.shape == (50, 24)
    assert module.weight.device.type == "cpu"
    assert torch.equal(module.weight[IDS], module(IDS))
    assert module.to("meta").weight.device.type == "meta"
    for name in ("padding_idx", "num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq"):
        assert getattr(module, name) == getattr(nn.Embedding(50, 24, 3), name)


# ---- state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_state_dict_is_plain(kind: str) -> None:
    state = nn.Sequential(MAKERS[kind]()).state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "0.weight": (torch.int8, (50, 24)),
        "0.weight_scale": (torch.float32, (50,)),
    }


COPIES: dict[str, Callable[[Table], Table]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "share_memory": lambda m: copy.deepcopy(m).share_memory(),
    "float and back": lambda m: copy.deepcopy(m).half().to(torch.float32),
    "fresh": lambda m: loaded(fresh(m), m.state_dict()),
    "fresh meta, assign": lambda m: loaded(fresh(m, device="meta"), saved(m.state_dict()), assign=True),
    "to_empty": lambda m: loaded(copy.deepcopy(m).to("meta").to_empty(device="cpu"), m.state_dict()),
    "saved": lambda m: loaded(fresh(m), saved(m.state_dict())),
}


def fresh(module: Table, **options: Any) -> Table:
    if isinstance(module, Int8EmbeddingBag):
        return Int8EmbeddingBag(50, 24, module.mode, 3, **options)
    return Int8Embedding(50, 24, 3, **options)


def loaded(module: Table, state: dict[str, Any], **options: Any) -> Table:
    module.load_state_dict(state, **options)
    return module


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MAKERS)
def test_copies_are_equal_and_independent(kind: str, how: str) -> None:
    module = MAKERS[kind]()
    expected = module(IDS)
    other = COPIES[how](module)
    assert_same(dict(module.state_dict()), dict(other.state_dict()))
    assert torch.equal(other(IDS), expected)
    other.load_state_dict(MAKERS[kind]().state_dict())
    assert torch.equal(module(IDS), expected)
    assert not torch.equal(other(IDS), expected)


def test_loading_errors_leave_the_layer_alone() -> None:
    module, other = make(), make()
    before, state = module(IDS), other.state_dict()
    for changed, message in (
        ({"weight": torch.randn(50, 24)}, "weight is torch.float32 .*a float checkpoint is loaded into the float"),
        ({"weight": state["weight"][:49]}, r"weight is torch.int8 \(49, 24\), expected torch.int8 \(50, 24\)"),
        ({"weight_scale": state["weight_scale"][:49]}, r"weight_scale is \(49,\)"),
        ({"weight_scale": state["weight_scale"].half()}, "weight_scale is torch.float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict({**state, **changed})
        assert torch.equal(module(IDS), before)
    for lacking in ("weight", "weight_scale"):
        rest = {name: t for name, t in state.items() if name != lacking}
        with pytest.raises(RuntimeError, match="they belong together"):
            module.load_state_dict(rest, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})
    assert torch.equal(module(IDS), before)


def test_a_transposed_state_is_laid_out_anew() -> None:
    module, state = make(), make().state_dict()
    state["weight"] = state["weight"].t().contiguous().t()
    for assign in (False, True):
        module.load_state_dict(state, assign=assign)
        assert torch.equal(module(IDS), (state["weight"].float() * state["weight_scale"][:, None])[IDS])


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float32),  # the kernels give no float64
    "to": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),  # torch casts integers too here
    "float": (lambda m: m.half().float(), torch.float32),
    "device only": (lambda m: m.half().to("cpu"), torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_results_follow_casts_and_the_table_does_not(kind: str, cast: str) -> None:
    function, dtype = CASTS[cast]
    module = MAKERS[kind]()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    module(IDS)
    function(module)
    assert_same(before, dict(module.state_dict()))
    assert module.dtype == module(IDS).dtype == dtype


def test_one_copy_of_the_table() -> None:
    module = make(3000, 384)
    for change in (lambda: module(IDS), lambda: module.load_state_dict(module.state_dict()), module.half):
        change()
        module(IDS)
        assert held_bytes(module, TablePlan) <= module.memory_bytes() <= 1.05 * 3000 * 384


def test_eager_sees_new_tensors() -> None:
    """The plan of a module is for its tensors in their memory, and is renewed where these change."""
    module = make()
    module(IDS)
    table = torch.full((50, 24), 2, dtype=torch.int8)
    module._weight.data = table
    assert torch.equal(module(IDS), (module.weight_scale * 2)[IDS][..., None].expand(2, 3, 24))
    module.weight_scale = torch.ones(50)
    assert (module(IDS) == 2).all()
    table.fill_(5)
    assert (module(IDS) == 5).all()
    module.backend = "reference"
    assert (module(IDS) == 5).all()


# ---- torch ------------------------------------------------------------------------------------------------------


def test_inside_a_trained_model() -> None:
    """Gradients pass by the table to what is behind it, and the table stays."""
    model = nn.Sequential(make(), nn.Linear(24, 2))
    before = model[0].int8_weight.clone()  # type: ignore[operator]
    model(IDS).sum().backward()
    assert model[1].weight.grad is not None
    assert [name for name, _ in model.named_parameters()] == ["1.weight", "1.bias"]
    assert torch.equal(model[0].int8_weight, before)  # type: ignore[arg-type]


def test_compile() -> None:
    torch._dynamo.reset()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.bag = make(), make_bag()

        def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
            return self.rows(ids).sum(0) + self.bag(ids, offsets, weights).sum(0)

    model = Both()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 9, 17):
        ids, offsets = torch.randint(0, 50, (count,)), torch.tensor([0, 1, 4])
        weights = torch.randn(count, requires_grad=True)
        assert torch.equal(compiled(ids, offsets, weights), model(ids, offsets, weights))
        sums = (f(ids, offsets, weights).square().sum() for f in (compiled, model))
        got, want = (torch.autograd.grad(total, weights)[0] for total in sums)
        torch.testing.assert_close(got, want)


def test_export() -> None:
    module = make().eval()
    program = torch.export.export(module, (IDS,), dynamic_shapes=({1: torch.export.Dim("n", min=2, max=99)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for n in (2, 3, 40):
        ids = torch.randint(0, 50, (2, n))
        assert torch.equal(again(ids), module(ids))
    assert module.half()(IDS).dtype == torch.float16


def test_autocast_leaves_the_dtype() -> None:
    """As nn.Embedding, whose results autocast leaves as they are."""
    module = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(IDS).dtype == nn.Embedding(50, 24)(IDS).dtype == torch.float32
