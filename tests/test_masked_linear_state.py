"""MaskedLinear: the folded mask, a state that is nn.Linear's, copies, compilers and processes."""

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
from tests.masked_linear_helpers import K, N, bits, pair, random_mask, saved

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
def test_eval_sees_what_was_written_past_autograd(gradient):
    layer, dense, mask = pair(gradient)
    x = torch.randn(3, K)
    with torch.no_grad():
        layer.eval()(x)
        layer.weight.data.copy_(2 * dense + 1)
        assert torch.equal(layer.eval()(x), F.linear(x, torch.where(mask, 2 * dense + 1, 0), layer.bias))


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
