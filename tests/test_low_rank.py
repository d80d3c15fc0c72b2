"""factorize_: the optimum by its definition, how far it goes, what is refused or left.

The truth is numpy's singular value decomposition in float64; of a weight of rank r the product is the weight itself.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import pycompress
from pycompress.low_rank import factorize_
from pycompress.nn import MaskedLinear
from pycompress.nn.low_rank_linear import largest_rank
from tests.prune_helpers import assert_unchanged, mlp, reason


def correlated(tokens, width, seed=0):
    """Inputs whose channels depend on each other and differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -1, width, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) * scales @ mix


def of_rank(rank, n, k, dtype=torch.float64):
    return (torch.randn(n, rank, dtype=torch.float64) @ torch.randn(rank, k, dtype=torch.float64) / k).to(dtype)


def with_weight(weight, bias=True):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    return linear


def product(layer):
    return layer.up.weight.detach().double() @ layer.down.weight.detach().double()


def kept_as_it_was(model):
    snapshot = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    return lambda: assert_unchanged(model, snapshot, types)


# --- the optimum ---


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_plain_svd_is_the_nearest_weight(rank):
    torch.manual_seed(rank)
    linear = nn.Linear(24, 16, dtype=torch.float64)
    weight = linear.weight.detach().clone()
    model = nn.Sequential(linear)
    report = factorize_(model, rank=rank)
    tail = np.linalg.svd(weight.numpy(), compute_uv=False)[rank:]
    assert torch.linalg.matrix_norm(weight - product(model[0])).item() == pytest.approx(np.sqrt((tail**2).sum()))
    expected = np.sqrt((tail**2).sum()) / torch.linalg.matrix_norm(weight).item()
    assert report.layers[0].error == pytest.approx(expected)
    assert report.error_of == "weight"


@pytest.mark.parametrize("rank", [2, 6])
def test_with_inputs_it_is_the_nearest_output(rank):
    torch.manual_seed(rank)
    linear, x = nn.Linear(20, 28, dtype=torch.float64), correlated(500, 20)
    weight = linear.weight.detach().clone()
    model, plain = nn.Sequential(linear), nn.Sequential(copy.deepcopy(linear))
    report = factorize_(model, rank=rank, batches=x.split(100), progress=False)
    factorize_(plain, rank=rank, progress=False)

    def error(layer):
        return torch.linalg.matrix_norm(x @ (weight - product(layer)).T).item()

    # Of all x W'^T with W' of this rank the nearest to x W^T is its own truncated SVD (Eckart and Young).
    tail = np.linalg.svd((x @ weight.T).numpy(), compute_uv=False)[rank:]
    assert error(model[0]) == pytest.approx(np.sqrt((tail**2).sum()), rel=1e-6)
    assert error(model[0]) < 0.9 * error(plain[0])
    assert report.layers[0].error == pytest.approx(error(model[0]) / torch.linalg.matrix_norm(x @ weight.T).item())


def test_white_inputs_give_the_plain_svd():
    linear = nn.Linear(16, 24, dtype=torch.float64)
    white = torch.linalg.qr(torch.randn(64, 16, dtype=torch.float64))[0]
    with_inputs, plain = nn.Sequential(linear), nn.Sequential(copy.deepcopy(linear))
    factorize_(with_inputs, rank=4, batches=[white], progress=False)
    factorize_(plain, rank=4, progress=False)
    torch.testing.assert_close(product(with_inputs[0]), product(plain[0]))


def test_inputs_that_miss_directions_keep_the_weight_there():
    """Calibration that never saw a channel must not make the layer forget it where the rank has room."""
    weight = of_rank(3, 16, 24)
    model = nn.Sequential(with_weight(weight))
    x = torch.zeros(40, 24, dtype=torch.float64)
    x[:, :4] = torch.randn(40, 4, dtype=torch.float64)
    factorize_(model, rank=3, batches=[x], progress=False)
    torch.testing.assert_close(product(model[0]), weight, rtol=1e-6, atol=1e-8)
    factorize_(again := nn.Sequential(with_weight(weight)), rank=3, batches=[torch.zeros_like(x)], progress=False)
    torch.testing.assert_close(product(again[0]), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_exact_where_the_weight_has_that_rank(dtype, bias):
    torch.manual_seed(0)
    linear = with_weight(of_rank(2, 12, 20).to(dtype), bias)
    if dtype in (torch.float64, torch.float32):
        linear.weight.data.copy_(of_rank(2, 12, 20))  # a rounded one has full rank
    else:
        linear.weight.data.copy_(torch.ones(12, 1) @ torch.arange(20.0)[None] / 16)  # rank 1, exact in 16 bits
    model = nn.Sequential(copy.deepcopy(linear))
    report = factorize_(model, energy=1.0 if dtype == torch.float64 else 0.9999999)
    layer = model[0]
    assert layer.rank == (2 if linear.weight.dtype in (torch.float64, torch.float32) else 1)
    x = torch.randn(5, 20, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(layer(x), linear(x), rtol=tolerance, atol=tolerance)
    assert report.layers[0].error < tolerance
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert (layer.up.bias is not None) == bias
    if bias:
        assert torch.equal(layer.up.bias, linear.bias)
    assert layer.down.bias is None


def test_the_singular_values_are_shared_between_the_factors():
    model = nn.Sequential(nn.Linear(32, 48))
    factorize_(model, rank=8)
    torch.testing.assert_close(model[0].down.weight.norm(dim=1), model[0].up.weight.norm(dim=0))


def test_all_zero_weight():
    model = nn.Sequential(with_weight(torch.zeros(8, 8)), nn.Linear(8, 8))
    report = factorize_(model, energy=0.2, skip="1")
    assert (model[0].rank, report.layers[0].error) == (1, 0.0)
    assert torch.equal(model[0](torch.ones(8)), model[0].up.bias)


# --- how far ---


def test_energy_takes_the_smallest_rank():
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    values = torch.zeros(40, dtype=torch.float64)
    values[:4] = torch.tensor([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1 of 25
    weight = q * values @ torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    for energy, rank in ((0.1, 1), (0.63, 1), (0.65, 2), (0.79, 2), (0.81, 3), (0.95, 3), (0.97, 4), (1.0, 4)):
        model = nn.Sequential(with_weight(weight))
        factorize_(model, energy=energy)
        assert model[0].rank == rank, energy


def test_ratio_is_an_upper_bound():
    model = mlp(40, 64, 48)
    report = factorize_(model, ratio=0.5)
    assert [layer.rank for layer in report.factorized] == [12, 13]  # 0.5 * 2560 / 104, 0.5 * 3072 / 112
    for layer in report.factorized:
        n, k = layer.shape
        assert layer.parameters_after == layer.rank * (n + k) <= 0.5 * n * k < (layer.rank + 1) * (n + k)
        assert layer.parameters_before == n * k
    assert sum(layer.parameters_after for layer in report.layers) == sum(
        p.numel() for p in model.parameters() if p.dim() == 2
    )


def test_rank_by_name_and_pattern():
    model = nn.Sequential(mlp(20, 24, 24, 16), nn.Linear(16, 20))
    report = factorize_(model, rank={"0.*": 3, "0.2": 5})
    ranks = {layer.name: layer.rank for layer in report.factorized}
    assert ranks == {"0.0": 3, "0.2": 5, "0.4": 3}
    assert reason(report, "1") == "rank names neither it nor a module above it"
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize(("n", "k"), [(8, 8), (3, 50), (50, 3), (7, 13), (2, 2), (1, 9), (384, 1536)])
def test_largest_rank(n, k):
    rank = largest_rank(k, n)
    assert rank * (n + k) < n * k <= (rank + 1) * (n + k)


def test_a_rank_that_does_not_shrink_is_left_with_the_largest_that_does():
    model = mlp(8, 32, 8)
    unchanged = kept_as_it_was(model)
    with pytest.raises(ValueError, match=r"0: rank 7, .*280 weights where 32x8 takes 256.*rank that shrinks it is 6"):
        factorize_(model, rank=7)
    unchanged()
    wide = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32))
    report = factorize_(wide, rank=7)
    assert "the largest rank that shrinks it is 6" in reason(report, "0")
    assert wide[1].rank == 7
    assert "no rank shrinks it" in reason(factorize_(nn.Sequential(nn.Linear(9, 1), nn.Linear(9, 9)), rank=2), "0")


def test_a_rank_that_does_not_shrink_raises_where_the_layer_was_named():
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 32))
    unchanged = kept_as_it_was(model)
    with pytest.raises(ValueError, match=r"layer '0': rank 7.*largest rank that shrinks it is 6.*unchanged"):
        factorize_(model, rank={"*": 4, "0": 7})
    unchanged()
    assert "shrinks it is 6" in reason(factorize_(model, rank={"*": 7}), "0")


def test_energy_and_ratio_that_would_grow_a_layer_leave_it():
    model = nn.Sequential(nn.Linear(16, 16), with_weight(of_rank(1, 16, 16, torch.float32)))
    report = factorize_(model, energy=0.99)
    assert reason(report, "0").startswith("energy=0.99 needs rank ")
    assert model[1].rank == 1
    report = factorize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(64, 64)), ratio=0.1)
    assert reason(report, "0") == "ratio=0.1 leaves it no rank; rank 1 is 0.5 of its weights"


# --- what is taken and what is left ---


def test_conv1d_and_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    conv = model.transformer.h[0].mlp.c_fc
    conv.weight.data.copy_(of_rank(3, 16, 64, torch.float32))
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    report = factorize_(model, rank={"*.c_fc": 3})
    layer = model.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features, layer.rank) == (16, 64, 3)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert "tied" in reason(report, "lm_head")


def test_left_with_reasons():
    class Twice(nn.Linear):
        pass

    model = nn.Sequential(
        *(nn.Linear(32, 32) for _ in range(3)),
        MaskedLinear(32, 32),
        Twice(32, 32),
        nn.Linear(32, 32),
        nn.Linear(32, 32),
    )
    model[1].register_forward_hook(lambda *args: None)
    pycompress.quantize_(model, filter_fn=lambda name, module: name == "5")
    report = factorize_(model, rank=4, skip="6", filter_fn=lambda name, module: name != "2")
    assert [layer.name for layer in report.factorized] == ["0"]
    assert "would lose its zeros" in reason(report, "3")
    assert "hooks" in reason(report, "1")
    assert "subclass" in reason(report, "4")
    assert "int8" in reason(report, "5")
    assert (reason(report, "6"), reason(report, "2")) == ("skip='6'", "filter_fn said no")
    with pytest.raises(ValueError, match=r"0\.down: is a factor of a LowRankLinear already"):
        factorize_(model, rank=2, skip=["1", "2", "3", "4", "5", "6"])


def test_flags_marks_and_aliases_go_along():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(16, 16)})
    shared.is_residual = True
    shared.weight.requires_grad_(False)
    shared.eval()
    report = factorize_(model, rank=3)
    assert model["a"] is model["b"][0]
    assert report.factorized[0].aliases == ("b.0",)
    layer = model["a"]
    assert layer.is_residual
    assert not layer.training
    assert not layer.down.training
    assert model["c"].training
    grads = [layer.down.weight.requires_grad, layer.up.weight.requires_grad, layer.up.bias.requires_grad]
    assert grads == [False, False, True]
    assert all(p.requires_grad for p in model["c"].parameters())


def test_layers_that_the_batches_never_reach_are_left():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    model = Two().train()
    state = torch.get_rng_state()
    report = factorize_(model, rank=4, batches=[torch.randn(9, 16)], progress=False)
    assert reason(report, "unused") == "was not reached by the batches"
    assert model.training
    assert not model.used.down._forward_pre_hooks
    assert torch.equal(torch.get_rng_state()[:8], state[:8])


def test_trainable_when_made_in_inference_mode():
    model = nn.Sequential(nn.Linear(16, 16))
    with torch.inference_mode():
        factorize_(model, rank=2, batches=[torch.randn(20, 16)], progress=False)
    model(torch.randn(3, 16)).sum().backward()
    assert model[0].down.weight.grad is not None


# --- refused, with nothing changed ---


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "pass exactly one of rank, energy and ratio"),
        ({"rank": 2, "ratio": 0.5}, "rank=2, ratio=0.5 given; pass exactly one"),
        ({"rank": 0}, "rank=0; expected an integer from 1 on"),
        ({"rank": True}, "rank=True; expected"),
        ({"rank": 2.0}, "rank=2.0; expected"),
        ({"rank": {}}, "rank is empty"),
        ({"rank": {"0": 0}}, "rank=0; expected"),
        ({"rank": {"fc": 2}}, "'fc', which fits no linear layer"),
        ({"rank": {"1": 2}}, "'1', which fits no linear layer"),
        ({"energy": 0}, "energy=0; expected 0 < energy <= 1"),
        ({"energy": float("nan")}, "energy=nan; expected"),
        ({"ratio": 1}, "ratio=1; expected 0 < ratio < 1"),
        ({"ratio": "half"}, "ratio='half'; expected"),
        ({"rank": 2, "skip": "fc"}, "skip='fc' matches no module"),
        ({"rank": 2, "batches": []}, "batches is empty"),
        ({"rank": 2, "batches": [torch.full((2, 20), torch.nan)]}, "input of layer '0' holds NaN or Inf"),
        ({"rank": 2, "skip": ["0", "2"]}, "nothing to factorize: 0: skip='0'; 2: skip='2'"),
        ({"rank": {"0": 2}, "skip": "0"}, "layer '0' cannot be factorized: skip='0'"),
    ],
)
def test_bad_arguments(kwargs, message):
    model = mlp()
    unchanged = kept_as_it_was(model)
    with pytest.raises(ValueError, match=r"^factorize_: ") as caught:
        factorize_(model, progress=False, **kwargs)
    assert message in str(caught.value)
    unchanged()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_types():
    with pytest.raises(TypeError, match="batches is one Tensor"):
        factorize_(mlp(), rank=2, batches=torch.randn(3, 20))
    with pytest.raises(TypeError, match="expected qualified names"):
        factorize_(mlp(), rank={3: 2})
    with pytest.raises(ValueError, match=r"use pycompress.nn.LowRankLinear.from_linear\(model, rank\)"):
        factorize_(nn.Linear(8, 8), rank=2)
    with pytest.raises(ValueError, match="has no linear layer"):
        factorize_(nn.Sequential(nn.ReLU()), rank=2)


def test_nan_weight_and_meta():
    model = mlp()
    model[2].weight.data[1, 2] = torch.inf
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"layer '2': its weight holds NaN or Inf.*skip='2'"):
        factorize_(model, rank=2)
    assert [type(m) for m in model.modules()] == types
    with pytest.raises(ValueError, match="nothing to factorize: 0: its weight is on the meta device"):
        factorize_(mlp().to("meta"), rank=2)


def test_a_failure_half_way_changes_nothing(monkeypatch):
    model = mlp()
    unchanged = kept_as_it_was(model)
    svd, calls = torch.linalg.svd, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    with pytest.raises(RuntimeError, match=r"layer '2': did not converge.*unchanged.*skip='2'"):
        factorize_(model, rank=2)
    unchanged()
