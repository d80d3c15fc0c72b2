"""shrink_: smaller layers, equal outputs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pycompress.nn import MaskedLinear
from pycompress.pruning.shrink import shrink_
from tests.shrink_helpers import mask_in, mlp, prune_columns, prune_rows, shrink_equal


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.PReLU(), nn.Softplus()],
    ids=lambda a: type(a).__name__,
)
def test_units_without_weights_pass_on_their_constant(activation: nn.Module, dtype: torch.dtype) -> None:
    model = mlp(activation, dtype=dtype)
    prune_rows(model[0], [0, 3, 4])
    prune_columns(model[2], [4, 5])
    report = shrink_equal(model, torch.randn(6, 7, dtype=dtype))
    assert (model[0].out_features, model[2].in_features) == (8, 8)
    assert model[0].weight.shape == (8, 7)
    assert model[2].weight.shape == (5, 8)
    assert [(row.before, row.after, row.action) for row in report.places] == [(12, 8, "shrunk")]


def test_without_biases_a_constant_gets_a_bias_where_there_is_one() -> None:
    model = mlp(nn.Sigmoid(), bias=False)
    prune_rows(model[0], [1])
    shrink_equal(model, torch.randn(6, 7).double())
    assert model[0].bias is None
    assert model[2].bias is not None
    relu = mlp(nn.ReLU(), bias=False)
    prune_rows(relu[0], [1])
    shrink_equal(relu, torch.randn(6, 7).double())
    assert relu[2].bias is None
    assert relu[2].in_features == 11


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_masked_layers(gradient: str) -> None:
    model = mlp(nn.GELU(), nn.Dropout(0.5))
    mask_in(model, "0", rows=[2, 7], gradient=gradient)
    mask_in(model, "3", columns=[7, 8], gradient=gradient)
    report = shrink_equal(model, torch.randn(6, 7).double())
    assert type(model[0]) is type(model[3]) is nn.Linear
    assert model[0].out_features == 9
    assert len(report.shrunk) == 1


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_a_mask_with_work_left_stays(gradient: str) -> None:
    model = mlp(nn.ReLU())
    mask = torch.rand(12, 7) < 0.5
    mask[4], mask[5] = False, True
    linear = model[0]
    model[0] = MaskedLinear.from_linear(linear, mask, gradient)
    model[0].tag = "mine"
    x = torch.randn(6, 7).double()
    shrink_equal(model, x)
    keep = mask.any(1)
    assert isinstance(model[0], MaskedLinear)
    assert model[0].gradient == gradient
    assert model[0].tag == "mine"
    assert torch.equal(model[0].mask, mask[keep])
    assert torch.equal(model[0].weight, linear.weight[keep])  # latent values too
    assert model[0].weight.requires_grad


def test_a_chain_shrinks_until_nothing_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
    ).double()
    prune_columns(model[6], [0])  # so unit 0 of layer 4 goes,
    with torch.no_grad():
        model[4].weight[1:, 3] = 0  # which alone reads unit 3 of layer 2,
        model[2].weight[:3, 5], model[2].weight[4:, 5] = 0, 0  # which alone reads unit 5 of layer 0
        model[0].weight[1] = 0  # a constant,
        model[2].weight[6, :1], model[2].weight[6, 2:] = 0, 0  # and unit 6 of layer 2 reads nothing else
    report = shrink_equal(model, torch.randn(9, 6).double())
    assert [model[i].out_features for i in (0, 2, 4)] == [6, 6, 7]
    assert [row.name for row in report.shrunk] == ["0", "2", "4"]


def test_one_unit_stays() -> None:
    model = mlp(nn.GELU())
    mask_in(model, "0", rows=list(range(12)))
    shrink_equal(model, torch.randn(6, 7).double())
    assert model[0].weight.shape == (1, 7)
    again = shrink_(model)
    assert not again.shrunk


def test_nothing_to_do_changes_nothing() -> None:
    model = mlp(nn.ReLU())
    modules = list(model)
    report = shrink_(model)
    assert list(model) == modules
    assert not report.shrunk
    assert report.bytes_after == report.bytes_before


@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    sparsity=st.sampled_from([0.3, 0.7, 0.9]),
    activation=st.sampled_from([nn.ReLU, nn.Sigmoid, nn.GELU]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_masks(widths: list[int], sparsity: float, activation: type[nn.Module], bias: bool, seed: int) -> None:
    """Chains of any widths with masks of any holes: equal outputs, and no unit is left that could go but the last."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for k, n in itertools.pairwise([3, *widths]):
        linear = nn.Linear(k, n, bias).double()
        mask = (torch.rand(n, k) > sparsity) & (torch.rand(n, 1) > sparsity / 2)
        model.append(MaskedLinear.from_linear(linear, mask)).append(activation())
    shrink_equal(model, torch.randn(5, 3).double())
    linears = [module for module in model if isinstance(module, nn.Linear)]
    for first, second in itertools.pairwise(linears):
        assert first.out_features == second.in_features
        if first.out_features > 1:
            assert (first.weight != 0).any(1).all()
            assert (second.weight != 0).any(0).all()
    assert not shrink_(model).shrunk


class Branchy(nn.Module):
    """Forwards in which a hidden unit must not go."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.fc1, self.fc2, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.fc1(x))
        if self.how == "residual":
            return self.fc2(h) + h
        if self.how == "norm":
            return self.fc2(self.norm(h))
        if self.how == "softmax":
            return self.fc2(h.softmax(-1))
        if self.how == "twice":
            return self.fc2(h) + self.fc2(x)
        if self.how == "depends" and x.sum() > 0:
            return self.fc1(x)
        if self.how == "scaled":
            return self.fc2(h * torch.arange(6))
        if self.how == "returned":
            return self.fc2(h), h
        if self.how == "weight":
            return self.fc2(h) + self.fc2.weight.sum()
        return self.fc2(h)


@pytest.mark.parametrize("how", ["residual", "norm", "softmax", "twice", "depends", "scaled", "returned", "weight"])
def test_units_that_something_else_reads_stay(how: str) -> None:
    model = Branchy(how)
    prune_rows(model.fc1, [1, 2])
    report = shrink_(model)
    assert model.fc1.out_features == 6
    assert [(row.name, row.action, row.kind) for row in report.places] == [("fc1", "left", "outputs")]
    assert "2 are all zero and stay" in str(report)


def test_a_forward_of_ones_own_shrinks() -> None:
    model = nn.Sequential(Branchy(""), nn.LayerNorm(6)).double()
    prune_rows(model[0].fc1, [1, 2])
    shrink_equal(model, torch.randn(4, 6).double())
    assert model[0].fc1.out_features == 4


def _tie(model: nn.Sequential) -> None:
    model.append(nn.Linear(7, 12))
    model[3].weight = model[0].weight


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: m[0].register_forward_hook(lambda *a: None), "has hooks"),
        (lambda m: m[2].register_forward_pre_hook(lambda *a: None), "has hooks"),
        (_tie, "is tied to"),
        (lambda m: setattr(m, "alias", [m[0]]), "is also held in"),
        (lambda m: m[0].register_buffer("extra", torch.zeros(1)), "holds more than"),
        (lambda m: torch.nn.utils.prune.identity(m[0], "weight"), "hooks"),
    ],
    ids=["hook", "pre_hook", "tied", "alias", "buffer", "torch prune"],
)
def test_layers_that_something_depends_on_stay(spoil: Callable[[nn.Module], Any], reason: str) -> None:
    model = mlp(nn.ReLU())
    prune_rows(model[0], [1, 2])
    spoil(model)
    modules = list(model)
    report = shrink_(model)
    assert list(model) == modules
    assert any(reason in row.reason for row in report.left), str(report)


def test_an_activation_per_channel_is_none() -> None:
    model = mlp(nn.PReLU(12))
    prune_rows(model[0], [1, 2])
    shrink_(model)
    assert model[0].out_features == 12


def test_an_activation_with_a_hook_is_no_plain_function() -> None:
    model = mlp(nn.ReLU())
    prune_rows(model[0], [1, 2])
    model[1].register_forward_hook(lambda module, args, out: out.flip(-1))
    shrink_(model)
    assert model[0].out_features == 12


class Peeker(nn.Module):
    """Uses the layers of a child one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.ReLU(), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[0](x)
        return x.sum() + self.net[2](self.net[1](x))


def test_a_parent_that_reads_between_keeps_the_units() -> None:
    model = Peeker()
    prune_rows(model.net[0], [1])
    shrink_(model)
    assert model.net[0].out_features == 12


class Twofold(nn.Module):
    """Has a method beside forward that uses the first layer, or all of it."""

    def __init__(self, in_child: bool) -> None:
        super().__init__()
        first = nn.Linear(7, 12)
        self.first = nn.Sequential(first, nn.ReLU()) if in_child else first
        self.second, self.other = nn.Linear(12, 5), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Encoding(Twofold):
    def encode(self, x: Tensor) -> Tensor:
        return self.other(self.first(x))


class Naming(Twofold):
    def both(self) -> list[nn.Module]:
        return [self.first, self.second]

    def reset_first(self) -> None:
        self.get_submodule("first")


@pytest.mark.parametrize("in_child", [False, True])
@pytest.mark.parametrize(("kind", "width"), [(Encoding, 12), (Naming, 11)])
def test_a_method_that_uses_one_layer_by_itself_keeps_the_units(
    kind: type[Twofold], width: int, in_child: bool
) -> None:
    model = kind(in_child)
    first = model.first[0] if in_child else model.first
    prune_rows(first, [1])
    shrink_equal(model, torch.randn(6, 7))
    assert model.second.in_features == width
    if isinstance(model, Encoding):
        assert model.encode(torch.randn(6, 7)).shape == (6, 2)


def test_a_child_whose_layer_is_used_by_itself_keeps_the_units() -> None:
    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(7, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu()

        def raw(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = nn.Sequential(Child(), nn.Linear(12, 5))
    prune_rows(model[0].inner, [1])
    shrink_equal(model, torch.randn(6, 7))
    assert model[1].in_features == 12


def test_root_and_types() -> None:
    with pytest.raises(ValueError, match="itself a Linear"):
        shrink_(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        shrink_("model")  # type: ignore[arg-type]


def test_nothing_changes_when_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(mlp(nn.ReLU()), mlp(nn.ReLU()))
    for net in model:
        prune_rows(net[0], [1])
    state, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    calls = []

    def build(draft: Any) -> nn.Linear:
        calls.append(draft)
        raise RuntimeError("no memory")

    monkeypatch.setattr("pycompress.pruning.shrink_layers.Draft.build", build)
    with pytest.raises(RuntimeError, match="no memory"):
        shrink_(model)
    assert calls
    assert list(model.modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
