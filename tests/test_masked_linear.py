"""MaskedLinear: zeros stay zero whatever trains it.

The truth is nn.Linear with the weight multiplied by the mask, gradient included.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pycompress.nn import MaskedLinear
from pycompress.nn.masked_linear import check_mask
from tests.masked_linear_helpers import K, N, pair, random_mask

# --- what it computes ---


@pytest.mark.parametrize("gradient", ["masked", "dense"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_gradients_are_those_of_the_masked_weight(gradient, training, dtype):
    layer, dense, mask = pair(gradient, dtype)
    layer.train(training)
    x = torch.randn(3, 5, K, dtype=dtype, requires_grad=True)
    y = layer(x)
    weight = torch.where(mask, dense, 0).requires_grad_()
    bias, x2 = layer.bias.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    expected = F.linear(x2, weight, bias)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    assert torch.equal(x.grad, x2.grad)
    assert torch.equal(layer.bias.grad, bias.grad)
    full = weight.grad
    assert torch.equal(layer.weight.grad, full if gradient == "dense" else torch.where(mask, full, 0))
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_gradient_at_pruned_positions_is_zero_even_where_it_is_nan():
    layer, _, mask = pair()
    layer(torch.full((2, K), float("nan"))).sum().backward()
    assert layer.weight.grad[mask].isnan().all()
    assert (layer.weight.grad[~mask] == 0).all()


def test_gradcheck():
    layer, _, _ = pair(dtype=torch.float64)
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_parameters_are_the_same_objects_as_before():
    linear = nn.Linear(K, N).eval()
    linear.bias.requires_grad_(False)
    layer = MaskedLinear.from_linear(linear, random_mask())
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.weight.is_leaf
    assert not layer.training
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in layer.named_buffers()] == ["mask"]


def test_making_one_spends_no_random_number():
    linear = nn.Linear(K, N)
    state = torch.get_rng_state()
    MaskedLinear.from_linear(linear, random_mask())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_to_linear(gradient):
    layer, dense, mask = pair(gradient)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, torch.where(mask, dense, 0))
    x = torch.randn(3, K)
    assert torch.equal(linear(x), layer(x))
    with torch.no_grad():
        linear.weight.fill_(7)
        linear.bias.fill_(7)
    assert not (layer.weight == 7).any()
    assert not (layer.bias == 7).any()


def test_without_bias_and_from_a_masked_linear():
    layer = MaskedLinear.from_linear(nn.Linear(K, N, bias=False), random_mask())
    assert layer.bias is None
    again = MaskedLinear.from_linear(layer, gradient="dense")
    assert torch.equal(again.mask, layer.mask)
    assert again.mask is not layer.mask
    assert layer.to_linear().bias is None


def test_conv1d():
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D(N, K)
    nn.init.normal_(conv.bias)
    x = torch.randn(3, K)
    before = conv.weight.detach().clone()
    layer = MaskedLinear.from_linear(conv)
    torch.testing.assert_close(layer(x), conv(x))
    layer.set_mask(random_mask())
    assert torch.equal(conv.weight, before)
    torch.testing.assert_close(layer(x), F.linear(x, before.t() * layer.mask, conv.bias))


# --- training ---


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_exactly_zero_in_training(kind):
    layer, _, mask = pair()
    optimizer = OPTIMIZERS[kind](layer.parameters())
    before = layer.weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        (layer(torch.randn(8, K)) - 1).square().mean().backward()
        optimizer.step()
        assert (layer.weight[~mask] == 0).all()
    assert (layer.weight[mask] != before[mask]).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_momentum_from_before_pruning_revives_nothing(kind):
    linear = nn.Linear(K, N)
    optimizer = OPTIMIZERS[kind](linear.parameters())

    def step(module):
        optimizer.zero_grad()
        (module(torch.randn(8, K)) - 1).square().mean().backward()
        optimizer.step()

    for _ in range(5):
        step(linear)
    mask = random_mask()
    layer = MaskedLinear.from_linear(linear, mask)
    for _ in range(5):
        step(layer)
        x = torch.randn(3, K)
        weight = torch.where(mask, layer.weight.detach(), 0)
        assert torch.equal(layer(x), F.linear(x, weight, layer.bias))  # seen or not, the momentum's write is undone
        assert (layer.weight[~mask] == 0).all()
        step(layer)
        assert (layer.state_dict()["weight"][~mask] == 0).all()


def test_an_optimizer_that_writes_past_autograd_revives_nothing():
    layer, _, mask = pair()
    x = torch.randn(3, K)
    for _ in range(3):
        layer(x)
        layer.weight.data.add_(1.0)  # as optimizers of before torch 1.5 do; no version tells
        assert torch.equal(layer(x), F.linear(x, torch.where(mask, layer.weight.detach(), 0), layer.bias))
        assert (layer.weight[~mask] == 0).all()
        layer.weight.data.add_(1.0)
        layer.eval()
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, torch.where(mask, layer.weight, 0), layer.bias))
        layer.train()


def test_dense_gradient_keeps_what_is_behind_the_mask():
    layer, dense, mask = pair("dense")
    assert torch.equal(layer.weight, dense)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(8, K)).square().mean().backward()
    optimizer.step()
    assert (layer.weight != dense).all()
    layer.set_mask(torch.ones_like(mask))
    assert torch.equal(layer(torch.eye(K)) - layer.bias, (layer.weight.t() + layer.bias) - layer.bias)


def test_regrown_weights_start_from_zero():
    layer, dense, mask = pair()
    layer.set_mask(torch.ones_like(mask))
    assert torch.equal(layer.weight, torch.where(mask, dense, 0))
    assert layer.sparsity == 0


def test_two_forwards_and_one_backward():
    layer, _, _ = pair()
    first = layer(torch.randn(3, K))
    layer.state_dict()
    (first.sum() + layer(torch.randn(3, K)).sum()).backward()
    assert layer.weight.grad is not None


def test_frozen_weight_gets_no_gradient():
    layer, _, _ = pair()
    layer.weight.requires_grad_(False)
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, K))


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_autocast(gradient):
    layer, dense, mask = pair(gradient)
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = F.linear(x, torch.where(mask, dense, 0), layer.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert (layer.weight.grad[~mask] == 0).all() == (gradient == "masked")


def test_functional_call_and_per_sample_gradients():
    for gradient in ("masked", "dense"):
        layer, dense, mask = pair(gradient)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        parameters["weight"] = dense.clone()

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        x = torch.randn(4, K)
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)["weight"]
        assert gradients.shape == (4, N, K)
        one = torch.func.grad(loss)(parameters, x[0])["weight"]
        torch.testing.assert_close(gradients[0], one)
        assert (one[~mask] == 0).all() == (gradient == "masked")
        assert torch.equal(parameters["weight"], dense)  # not ours: not written to


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_transforms(gradient):
    layer, dense, mask = pair(gradient)
    weight = torch.where(mask, dense, 0)
    x = torch.randn(3, K)
    y = layer(x)
    g = torch.randn(5, 3, N)
    batched = torch.autograd.grad(y, layer.weight, g, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched[2], torch.autograd.grad(y, layer.weight, g[2])[0])
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(torch.func.vmap(jacobian(layer))(x), weight.expand(3, N, K))
    hessian = torch.func.hessian(lambda x: layer(x).square().sum() / 2)(x[0])
    torch.testing.assert_close(hessian, weight.t() @ weight)


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_jit_trace(gradient):
    layer, _, _ = pair(gradient)
    x = torch.randn(3, K)
    for training in (True, False):
        layer.train(training)
        with torch.set_grad_enabled(training), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and in use
            assert torch.equal(torch.jit.trace(layer, (x,))(x), layer(x))


# --- arguments ---


def test_bad_masks():
    layer, _, mask = pair()
    weight = layer.weight.detach().clone()
    cases = [
        (mask[:, :-1], r"mask is \(10, 23\); expected \(outputs, inputs\) = \(10, 24\)"),
        (mask.t(), r"mask is \(24, 10\)"),
        (mask.float(), r"mask is torch.float32; expected torch.bool"),
        (mask.tolist(), "mask is a list"),
        (torch.ones(N, K, dtype=torch.bool, device="meta"), "mask is on meta"),
        (None, "mask is a NoneType"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=f"MaskedLinear.set_mask: {message}"):
            layer.set_mask(bad)
        assert torch.equal(layer.mask, mask)
        assert torch.equal(layer.weight, weight)
    check_mask(mask, layer.mask, "op")


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown gradient 'sparse'"):
        MaskedLinear(K, N, gradient="sparse")
    with pytest.raises(ValueError, match=r"expected an nn\.Linear with a weight"):
        MaskedLinear.from_linear(nn.ReLU())
    with pytest.raises(ValueError, match="got Conv2d"):
        MaskedLinear.from_linear(nn.Conv2d(3, 3, 3))
    linear = nn.Linear(K, N)
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match="mask is"):
        MaskedLinear.from_linear(linear, random_mask(3))
    assert torch.equal(linear.weight, before)


def test_repr():
    layer, _, mask = pair("dense")
    sparsity = 1 - mask.float().mean().item()
    assert repr(layer) == (
        f"MaskedLinear(in_features=24, out_features=10, bias=True, sparsity={sparsity:.4g}, gradient=dense)"
    )
