"""MaskedLinear: zeros stay zero whatever trains it, and its state is that of nn.Linear.

The truth is nn.Linear with the weight multiplied by the mask, gradient included.
"""

import copy
import io
import os
import pickle
import tempfile
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import multiprocessing, nn

from pycompress.nn import MaskedLinear, masked_linear
from pycompress.nn.masked_linear import check_mask

K, N = 24, 10


def random_mask(n=N, k=K, seed=1):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) > 0.6


def pair(gradient="masked", dtype=torch.float32):
    """A MaskedLinear, and its float weight times mask and bias."""
    linear = nn.Linear(K, N).to(dtype)
    mask = random_mask()
    dense = linear.weight.detach().clone()
    return MaskedLinear.from_linear(linear, mask, gradient), dense, mask


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


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


# --- folding ---


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_eval_folds_once_and_notices_every_change(gradient, monkeypatch):
    layer, _, _ = pair(gradient)
    layer.eval()
    x = torch.randn(3, K)
    folds = []
    for name in ("zeroed", "zero_"):
        inner = getattr(masked_linear, name)
        monkeypatch.setattr(masked_linear, name, lambda *args, inner=inner: folds.append(1) or inner(*args))

    def check(expected_folds):
        folds.clear()
        with torch.no_grad():
            for _ in range(3):
                expected = F.linear(x, torch.where(layer.mask, layer.weight, 0), layer.bias)
                assert torch.equal(layer(x), expected)
        assert len(folds) == expected_folds

    layer._fold = None
    check(1)
    check(0)
    with torch.no_grad():
        layer.weight.add_(1)
    check(1)
    layer.weight.data = torch.randn(N, K)
    check(1)
    layer.weight = nn.Parameter(torch.randn(N, K))
    check(1)
    layer.mask[0] = ~layer.mask[0]
    check(1)
    layer.mask = random_mask(seed=5)
    check(1)
    layer.load_state_dict(nn.Linear(K, N).state_dict())
    check(1)


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_made_in_inference_mode(gradient):
    with torch.inference_mode():
        layer, dense, mask = pair(gradient)
        layer.eval()
        x = torch.randn(3, K)
        for _ in range(2):
            assert torch.equal(layer(x), F.linear(x, torch.where(mask, dense, 0), layer.bias))
        layer.set_mask(~mask)
        assert layer(x).shape == (3, N)
    with torch.no_grad():
        layer(x)
        assert (layer.state_dict()["weight"][mask] == 0).all()


def test_training_drops_the_folded_copy():
    layer, _, _ = pair("dense")
    with torch.no_grad():
        layer.eval()(torch.randn(1, K))
    assert layer._folded is not None
    layer.train()
    assert layer._folded is None


# --- state ---


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_state_has_the_keys_of_linear_and_loads_strictly_both_ways(gradient):
    layer, dense, mask = pair(gradient)
    state = saved(layer)
    assert list(state) == ["weight", "bias"]
    linear = nn.Linear(K, N)
    linear.load_state_dict(state, strict=True)
    assert torch.equal(linear.weight, torch.where(mask, dense, 0))

    checkpoint = nn.Linear(K, N).state_dict()
    layer.load_state_dict(checkpoint, strict=True)
    assert torch.equal(layer.mask, mask)
    x = torch.randn(3, K)
    expected = F.linear(x, torch.where(mask, checkpoint["weight"], 0), checkpoint["bias"])
    assert torch.equal(layer(x), expected)
    behind = checkpoint["weight"] if gradient == "dense" else 0
    assert torch.equal(layer.weight, torch.where(mask, checkpoint["weight"], behind))


@pytest.mark.parametrize("gradient", ["masked", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask_survives_in_the_sign_of_the_zeros(gradient, dtype):
    layer, _, mask = pair(gradient, dtype)
    with torch.no_grad():  # kept zeros of both signs, and a pruned weight of -0.0
        kept = mask.nonzero()
        layer.weight[tuple(kept[0])] = 0.0
        layer.weight[tuple(kept[1])] = -0.0
        layer.weight[tuple((~mask).nonzero()[0])] = -0.0
    state = saved(layer)
    assert (bits(state["weight"])[~mask] == 0).all()
    assert torch.signbit(state["weight"][tuple(kept[0])])
    fresh = nn.Sequential(MaskedLinear(K, N, gradient=gradient, dtype=dtype))
    whole = nn.Sequential(layer)
    fresh.load_state_dict(saved(whole), strict=True)
    assert torch.equal(fresh[0].mask, mask)
    x = torch.randn(3, K, dtype=dtype)
    assert torch.equal(fresh(x), whole(x))
    # Back and forth once more, over another mask.
    fresh[0].set_mask(~mask)
    fresh.load_state_dict(saved(whole), strict=True)
    assert torch.equal(fresh[0].mask, mask)


def test_state_without_metadata_is_a_dense_checkpoint():
    layer, _, mask = pair()
    plain = dict(layer.state_dict())
    other = MaskedLinear(K, N)
    other.load_state_dict(plain)
    assert other.sparsity == 0
    other.set_mask(mask)
    other.load_state_dict(plain)
    assert torch.equal(other.mask, mask)


def test_state_shares_memory_as_that_of_linear_does():
    layer, _, mask = pair()
    average = layer.state_dict()
    assert average["weight"].data_ptr() == layer.weight.data_ptr()
    average["weight"].mul_(0.5)  # an average kept in the state_dict of a copy, as timm's
    layer.eval()
    assert (layer.weight[~mask] == 0).all()
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight


def test_fully_pruned_fully_kept_and_empty_layers():
    x = torch.randn(3, K)
    for mask in (torch.zeros(N, K, dtype=torch.bool), torch.ones(N, K, dtype=torch.bool)):
        layer, _, _ = pair()
        layer.set_mask(mask)
        assert layer.sparsity == 1 - float(mask[0, 0])
        other = MaskedLinear(K, N)
        other.load_state_dict(saved(layer))
        assert torch.equal(other.mask, mask)
        assert torch.equal(layer(x), F.linear(x, layer.weight * mask, layer.bias))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n, k in ((0, 4), (4, 0), (0, 0)):
            layer = MaskedLinear(k, n)
            layer.set_mask(torch.ones(n, k, dtype=torch.bool))
            assert layer.sparsity == 0
            assert layer(torch.randn(2, k)).shape == (2, n)


@pytest.mark.parametrize("gradient", ["masked", "dense"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(gradient, how):
    layer, _, mask = pair(gradient)
    x = torch.randn(3, K)
    with torch.no_grad():
        expected = layer.eval()(x)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other.mask, mask)
    assert torch.equal(other.weight, layer.weight)
    other.set_mask(~mask)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        assert torch.equal(other(x), F.linear(x, torch.where(mask, 0, other.weight), other.bias))


def test_moves_between_dtypes_and_devices_keep_the_mask():
    layer, _, mask = pair()
    for move in ("half", "double", "bfloat16", "float"):
        getattr(layer, move)()
        layer.type(layer.weight.dtype)  # of every tensor, bool ones included
        assert layer.mask.dtype == torch.bool
        assert torch.equal(layer.mask, mask)
        layer(torch.randn(2, K, dtype=layer.weight.dtype))
    layer.to_empty(device="cpu")
    assert torch.equal(layer.mask, mask)
    layer.share_memory()
    assert layer.mask.is_shared()
    meta = MaskedLinear(K, N, device="meta")
    assert "sparsity" not in repr(meta)
    meta.to_empty(device="cpu")
    assert meta.mask.all()


def test_meta_then_assign():
    layer, _, mask = pair()
    for state, expected in ((saved(layer), mask), (dict(nn.Linear(K, N).state_dict()), torch.ones_like(mask))):
        other = MaskedLinear(K, N, device="meta")
        other.load_state_dict(state, assign=True)
        assert torch.equal(other.mask, expected)
        assert (other.weight[~expected] == 0).all()
        other(torch.randn(2, K))


def test_a_state_of_another_shape_changes_nothing():
    layer, dense, mask = pair()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(MaskedLinear(K + 1, N).state_dict())
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, torch.where(mask, dense, 0))
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": torch.zeros(N)})
    layer.load_state_dict({"bias": torch.zeros(N)}, strict=False)
    assert torch.equal(layer.mask, mask)


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


# --- compilers and processes ---


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_compile_fullgraph(gradient):
    layer, dense, mask = pair(gradient)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K)
    y = compiled(x)
    torch.testing.assert_close(y, F.linear(x, torch.where(mask, dense, 0), layer.bias))
    y.sum().backward()
    ungated = x.sum(0).expand(N, K)
    torch.testing.assert_close(layer.weight.grad, ungated if gradient == "dense" else torch.where(mask, ungated, 0))
    layer.set_mask(~mask)  # an input of the graph, not a constant in it
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_export():
    layer, _, _ = pair()
    x = torch.randn(3, K)
    program = torch.export.export(nn.Sequential(layer).eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def _ddp_worker(rank, file, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(
        MaskedLinear.from_linear(nn.Linear(K, N), random_mask()),
        nn.ReLU(),
        MaskedLinear.from_linear(nn.Linear(N, N), random_mask(N, N), "dense"),
    )
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    torch.manual_seed(rank)
    for step in range(4):
        optimizer.zero_grad()
        # Two forwards of one backward: the buffers are broadcast before each.
        (wrapped(torch.randn(8, K)) - wrapped(torch.randn(8, K)) - 1).square().mean().backward()
        optimizer.step()
        if step == 1:
            model[0].set_mask(random_mask(seed=7))
    # state_dict: after the last step the momentum of what the second mask pruned still waits for the next forward.
    weights = [model[i].state_dict()["weight"].clone() for i in (0, 2)]
    torch.save((weights, [model[0].mask, model[2].mask]), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel():
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "store")
        multiprocessing.spawn(_ddp_worker, (file, folder), nprocs=2)
        (first, masks), (second, masks2) = (torch.load(f"{folder}/{rank}.pt") for rank in (0, 1))
    for weight, weight2, mask, mask2 in zip(first, second, masks, masks2, strict=True):
        assert torch.equal(weight, weight2)
        assert torch.equal(mask, mask2)
        assert (weight[~mask] == 0).all()
    assert torch.equal(masks[0], random_mask(seed=7))
