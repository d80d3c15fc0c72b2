"""prune_: which weights go, that the number is exact, and that a call that raises changes nothing."""

import copy
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import pycompress
from pycompress import prune_
from pycompress.nn import Int8Linear, MaskedLinear
from pycompress.pruning import masked_layers
from pycompress.pruning.choose import select_masks
from pycompress.pruning.patterns import Pattern
from pycompress.pruning.report import report_of
from pycompress.pruning.swap import find_layers, set_masks, swap_in


def mlp(*sizes, dtype=torch.float32):
    sizes = sizes or (20, 32, 12)
    layers = [m for k, n in itertools.pairwise(sizes) for m in (nn.Linear(k, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def weights(model):
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def masks(model):
    return {name: layer.mask for name, layer in masked_layers(model).items()}


def reason(report, name):
    return next(layer.reason for layer in report.left if layer.name == name)


def mean_square(output, batch):
    return output.float().square().mean()


def assert_unchanged(model, snapshot, types):
    assert [type(m) for m in model.modules()] == types
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in snapshot.items())


# --- magnitude ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.8, 1])
def test_the_smallest_go_and_the_model_computes_with_zeros(dtype, sparsity):
    model = mlp(dtype=dtype)
    before = weights(model)
    report = prune_(model, sparsity)
    for name, layer in masked_layers(model).items():
        gone = before[name].float().abs()[~layer.mask]
        kept = before[name].float().abs()[layer.mask]
        assert gone.numel() == round(sparsity * layer.mask.numel())
        assert not gone.numel() or not kept.numel() or gone.max() <= kept.min()
        assert torch.equal(layer.weight, torch.where(layer.mask, before[name], 0))
    assert report.sparsity == pytest.approx(sparsity, abs=1e-3)
    x = torch.randn(3, 20, dtype=dtype)
    expected = F.linear(x, model[0].weight, model[0].bias)
    assert torch.equal(model[0](x), expected)


def test_default_sparsity_is_080():
    model = mlp()
    assert prune_(model).sparsity == pytest.approx(0.8, abs=1e-3)
    assert prune_(mlp(), pattern="2:4").sparsity == 0.5
    assert prune_(mlp(), 0.75, pattern="1:4").sparsity == 0.75


def test_parameters_stay_so_that_the_optimizer_goes_on():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(16, 20)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    before = list(model.parameters())
    prune_(model, 0.6)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    expected = masks(model)
    moved = model[0].weight.detach().clone()
    for _ in range(3):
        step()
    model(x)
    for name, layer in masked_layers(model).items():
        assert (layer.weight[~expected[name]] == 0).all()
    assert (model[0].weight != moved).any()


def test_ties_are_exact():
    model = nn.Sequential(nn.Linear(10, 10))
    nn.init.constant_(model[0].weight, 0.5)
    prune_(model, 0.37)
    assert (~model[0].mask).flatten().nonzero().flatten().tolist() == list(range(37))


@pytest.mark.parametrize("pattern", ["4x1", "1x4", "4x4", "16x16", "row", "column"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_blocks_go_by_their_norm(pattern, sparsity):
    model = nn.Sequential(nn.Linear(37, 33))
    before = model[0].weight.detach().double()
    report = prune_(model, sparsity, pattern=pattern)
    parsed = Pattern.parse(pattern)
    norms = parsed.unit_scores(before.square())
    units = parsed.unit_scores(model[0].mask.double())
    pruned = units == 0
    assert torch.equal(units[~pruned], parsed.weights((33, 37))[~pruned])  # whole units
    assert int(pruned.sum()) == round(sparsity * norms.numel())
    assert norms[pruned].max() <= norms[~pruned].min()
    (row,) = report.pruned
    assert (row.pruned_units, row.units) == (int(pruned.sum()), norms.numel())
    assert row.kept == int(model[0].mask.sum())
    assert row.total == 37 * 33
    assert row.unit_sparsity == int(pruned.sum()) / norms.numel()


def test_n_of_m():
    model = mlp(22, 16)
    report = prune_(model, pattern="2:4")
    groups = F.pad(model[0].mask, (0, 2)).view(16, 6, 4).sum(2)
    assert (groups == 2).all()
    assert report.pruned[0].unit_sparsity == 1
    for scope in ("layer", "global"):
        model = mlp()
        prune_(model, pattern="1:4", scope=scope)
        assert all((mask.view(-1, 4).sum(1) == 1).all() for mask in masks(model).values())


@pytest.mark.parametrize("pattern", ["unstructured", "2x2", "row"])
def test_threshold(pattern):
    model = mlp()
    with torch.no_grad():
        model[0].weight[:2] = 0.07  # exactly at the threshold: stays
    before = weights(model)
    prune_(model, pattern=pattern, threshold=0.07)
    parsed = Pattern.parse(pattern)
    for name, mask in masks(model).items():
        size = parsed.weights(mask.shape)
        rms = (parsed.unit_scores(before[name].double().square()) / size).sqrt().float()
        assert torch.equal(mask, parsed.spread(rms >= 0.07, mask.shape))
    assert model[0].mask[:2].all()
    prune_(model, threshold=0)
    assert all(mask.all() for mask in masks(model).values())
    prune_(model, threshold=1e9)
    assert not any(mask.any() for mask in masks(model).values())


# --- scope, floors and ceilings ---


def test_global_ranks_all_weights_together():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(10)
    before = weights(model)
    report = prune_(model, 0.5, scope="global")
    everything = torch.cat([w.abs().flatten() for w in before.values()])
    keep = torch.cat([mask.flatten() for mask in masks(model).values()])
    assert int((~keep).sum()) == round(0.5 * keep.numel())
    assert everything[~keep].max() <= everything[keep].min()
    assert report.sparsity == 0.5
    assert report.pruned[0].sparsity > 0.6 > 0.2 > report.pruned[1].sparsity


def test_global_floors_and_ceilings():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(10)
    report = prune_(model, 0.5, scope="global", min_sparsity=0.2, max_sparsity={"0": 0.6})
    assert report.pruned[0].sparsity == pytest.approx(0.6, abs=1e-3)
    assert report.sparsity == 0.5
    before = {name: layer.weight.detach().abs() for name, layer in masked_layers(model).items()}
    for name, mask in masks(model).items():
        assert before[name][~mask].sum() == 0
    report = prune_(mlp(), 0.5, scope="global", min_sparsity={"2": 0.9}, max_sparsity=1.0)
    assert report.pruned[1].sparsity == pytest.approx(0.9, abs=2e-3)
    assert report.pruned[1].sparsity >= 0.9


def test_layer_scope_clamps_each_layer():
    report = prune_(mlp(), 0.5, min_sparsity={"2": 0.75}, max_sparsity={"0": 0.25})
    assert [layer.sparsity for layer in report.pruned] == [0.25, 0.75]
    report = prune_(mlp(), threshold=1e9, max_sparsity={"*": 0.25})
    assert [layer.sparsity for layer in report.pruned] == [0.25, 0.25]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    sparsity=st.floats(0, 1),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    seed=st.integers(0, 100),
    pattern=st.sampled_from(["unstructured", "2x2", "row"]),
)
def test_global_choice_is_the_cheapest_within_the_limits(sizes, sparsity, low, high, seed, pattern):
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randint(0, 9, shape, generator=generator).float() for i, shape in enumerate(sizes)}
    parsed = Pattern.parse("unstructured" if pattern == "2x2" and min(min(s) for s in sizes) < 2 else pattern)
    units = {name: parsed.unit_scores(s).double() for name, s in scores.items()}
    count = round(sparsity * sum(u.numel() for u in units.values()))
    low, high = min(low, high), max(low, high)
    most = {name: math.floor(high * u.numel() + 1e-9) for name, u in units.items()}
    least = {name: min(math.ceil(low * u.numel() - 1e-9), most[name]) for name, u in units.items()}

    def choose():
        return select_masks(scores, parsed, sparsity, scope="global", min_sparsity=low, max_sparsity=high)

    if not sum(least.values()) <= count <= sum(most.values()):
        with pytest.raises(ValueError, match="widen them or change the sparsity"):
            choose()
        return
    pruned = {name: parsed.unit_scores(mask.double()) == 0 for name, mask in choose().items()}
    assert sum(int(p.sum()) for p in pruned.values()) == count
    assert all(least[name] <= int(p.sum()) <= most[name] for name, p in pruned.items())
    # Greedy is optimal here: the cheapest of each layer up to its floor, then the cheapest below the ceilings.
    ordered = {name: sorted(u.tolist()) for name, u in units.items()}
    cost = sum(sum(ordered[name][: least[name]]) for name in units)
    rest = sorted(value for name in units for value in ordered[name][least[name] : most[name]])
    cost += sum(rest[: count - sum(least.values())])
    assert sum(float(units[name][p].sum()) for name, p in pruned.items()) == pytest.approx(cost)


def test_limits_of_n_of_m_are_fractions_of_weights():
    model = mlp()
    report = prune_(model, pattern="2:4", max_sparsity={"0": 0.25}, min_sparsity=0.1)
    first, second = report.pruned
    assert first.sparsity == 0.25  # half of the groups are cut down to 2, the other half are whole
    assert (first.pruned_units, first.units) == (80, 160)
    assert second.sparsity == 0.5
    assert set(model[0].mask.view(-1, 4).sum(1).tolist()) == {2, 4}


def test_limits_that_cannot_be():
    for kwargs, message in (
        ({"min_sparsity": 0.9}, r"prunes 512 of 1024 units, but .* allow 922 to 1024"),
        ({"max_sparsity": 0.1}, r"allow 0 to 102"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_(mlp(), 0.5, scope="global", **kwargs)
    for kwargs, message in (
        ({"min_sparsity": 0.9, "max_sparsity": 0.1}, r"layer '0' has min_sparsity=0.9 above max_sparsity=0.1"),
        ({"min_sparsity": 2}, "min_sparsity=2; expected a number"),
        ({"max_sparsity": {"0": math.nan}}, r"max_sparsity\['0'\]=nan"),
        ({"max_sparsity": {"first": 0.5}}, r"max_sparsity\['first'\] is of no layer"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_(mlp(), 0.5, **kwargs)


# --- methods ---


def test_random_is_seeded_and_leaves_the_global_generator_alone():
    model = mlp()
    state = torch.get_rng_state()
    first = copy.deepcopy(model)
    prune_(first, 0.5, method="random", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    second, third = copy.deepcopy(model), copy.deepcopy(model)
    prune_(second, 0.5, method="random", seed=3)
    prune_(third, 0.5, method="random", seed=4)
    for name, mask in masks(first).items():
        assert torch.equal(mask, masks(second)[name])
        assert not torch.equal(mask, masks(third)[name])
        assert int((~mask).sum()) == round(0.5 * mask.numel())


def test_random_again_revives_nothing():
    model = mlp()
    prune_(model, 0.5, method="random")
    before = {name: mask.clone() for name, mask in masks(model).items()}
    prune_(model, 0.7, method="random", seed=1)
    for name, mask in masks(model).items():
        assert (mask <= before[name]).all()


def test_taylor_and_movement_are_their_formulas():
    model, batches = mlp(), [torch.randn(4, 20), torch.randn(6, 20)]
    signed = {name: torch.zeros_like(w) for name, w in weights(model).items()}
    absolute = copy.deepcopy(signed)
    for batch in batches:
        names = [f"{name}.weight" for name in signed]
        parameters = [model.get_parameter(name) for name in names]
        gradients = torch.autograd.grad(mean_square(model(batch), batch), parameters)
        for name, parameter, gradient in zip(signed, parameters, gradients, strict=True):
            signed[name] -= parameter.detach() * gradient
            absolute[name] += (parameter.detach() * gradient).abs()
    for method, scores in (("movement", signed), ("taylor", absolute)):
        for pattern in ("unstructured", "4x1"):
            pruned = copy.deepcopy(model)
            prune_(pruned, 0.5, pattern=pattern, method=method, batches=iter(batches), loss_fn=mean_square)
            for name, mask in masks(pruned).items():
                assert torch.equal(mask, Pattern.parse(pattern).mask_from_scores(scores[name], 0.5))


def test_movement_again_revives_nothing():
    model, batches = mlp(), [torch.randn(8, 20)]
    kwargs = {"method": "movement", "batches": batches, "loss_fn": mean_square}
    prune_(model, 0.5, **kwargs)
    before = {name: mask.clone() for name, mask in masks(model).items()}
    prune_(model, 0.7, **kwargs)
    for name, mask in masks(model).items():
        assert (mask <= before[name]).all()


def test_wanda_is_its_formula():
    model, batches = mlp(), [torch.randn(4, 20) * torch.rand(20), torch.randn(2, 3, 20)]
    inputs = {"0": torch.cat([b.reshape(-1, 20) for b in batches])}
    inputs["2"] = model[1](model[0](inputs["0"])).detach()
    for scope, pattern in (("layer", "unstructured"), ("layer", "4x1"), ("layer", "2:4"), ("global", "unstructured")):
        pruned = copy.deepcopy(model)
        prune_(pruned, None if pattern == "2:4" else 0.5, pattern=pattern, method="wanda", batches=batches, scope=scope)
        scores = {
            name: w.abs() * inputs[name].double().square().sum(0).sqrt().float() for name, w in weights(model).items()
        }
        if scope == "global":
            everything = torch.cat([s.flatten() for s in scores.values()])
            keep = torch.cat([mask.flatten() for mask in masks(pruned).values()])
            assert everything[~keep].max() <= everything[keep].min()
            continue
        for name, mask in masks(pruned).items():
            if pattern == "unstructured":  # among the weights of each output, as the paper has it
                assert ((~mask).sum(1) == mask.shape[1] // 2).all()
                for row, kept in zip(scores[name], mask, strict=True):
                    assert row[~kept].max() <= row[kept].min()
            else:
                squares = scores[name].double().square() if pattern == "4x1" else scores[name]
                assert torch.equal(mask, Pattern.parse(pattern).mask_from_scores(squares, 0.5))


class Noisy(nn.Module):
    """Uses random numbers in eval, batch norm, dropout, a frozen layer, and one that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.second, self.unused = nn.Linear(16, 8), nn.Linear(8, 8)
        self.second.weight.requires_grad_(False)
        self.norm.eval()

    def forward(self, x):
        return self.second(self.drop(self.norm(self.first(x)))) + torch.rand(())


@pytest.mark.parametrize("method", ["taylor", "movement", "wanda"])
@pytest.mark.parametrize("failing", [False, True])
def test_calibration_restores_everything(method, failing):
    model = Noisy()
    model.first.weight.grad = torch.full_like(model.first.weight, 7)
    training = [m.training for m in model.modules()]
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    snapshot, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    batches = [torch.randn(4, 20, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    if failing:
        batches.append(torch.full((2, 20), math.nan))
    kwargs = {} if method == "wanda" else {"loss_fn": mean_square}
    if failing:
        with pytest.raises(ValueError, match=r"prune_: the (input of layer 'first'|loss)"):
            prune_(model, 0.5, method=method, batches=batches, **kwargs)
        assert_unchanged(model, snapshot, types)
    else:
        report = prune_(model, 0.5, method=method, batches=batches, **kwargs)
        assert [layer.name for layer in report.pruned] == ["first", "second"]
        assert reason(report, "unused") in ("was not reached by the batches", "the loss does not depend on it")
        assert type(model.unused) is nn.Linear
        for key in ("norm.running_mean", "norm.num_batches_tracked"):
            assert torch.equal(model.state_dict()[key], snapshot[key])
    assert [m.training for m in model.modules()] == training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires
    assert (model.first.weight.grad == 7).all()
    assert all(p.grad is None for name, p in model.named_parameters() if name != "first.weight")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_under_no_grad_and_inference_mode():
    batches = [torch.randn(4, 20)]
    for context in (torch.no_grad, torch.inference_mode):
        model = mlp()
        with context():
            prune_(model, 0.5, method="taylor", batches=batches, loss_fn=mean_square)
        model(batches[0]).sum().backward()
        assert (model[0].weight.grad[~model[0].mask] == 0).all()


def test_batches_as_tuples_dicts_and_the_loss_of_the_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x, scale=1.0, labels=None):
            logits = self.fc(x) * scale
            return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}

    x, labels = torch.randn(5, 6), torch.randint(0, 4, (5,))
    model = Model()
    prune_(model, 0.5, method="taylor", batches=[{"x": x, "labels": labels}, (x, 2.0, labels)])
    assert model.fc.sparsity == 0.5
    with pytest.raises(ValueError, match=r"the model returned no loss .*pass loss_fn"):
        prune_(Model(), 0.5, method="taylor", batches=[x])
    with pytest.raises(ValueError, match=r"the loss is \(5, 4\); expected a tensor with one value"):
        prune_(Model(), 0.5, method="taylor", batches=[x], loss_fn=lambda output, batch: output["logits"])
    with pytest.raises(ValueError, match="does not depend on the layers"):
        prune_(Model(), 0.5, method="taylor", batches=[x], loss_fn=lambda output, batch: torch.zeros(()))


def test_a_function_as_method():
    seen = []

    def column_index(name, module):
        seen.append((name, type(module)))
        return torch.arange(float(module.in_features)).expand(module.out_features, -1)

    model = mlp()
    report = prune_(model, 0.5, method=column_index)
    assert seen == [("0", nn.Linear), ("2", nn.Linear)]
    assert report.method == "column_index"
    assert torch.equal(model[0].mask, torch.arange(20).ge(10).expand(32, 20))
    for bad, message in (
        (lambda n, m: torch.ones(2, 2), r"scores \(2, 2\) for layer '0'; expected .* \(32, 20\)"),
        (lambda n, m: None, "scores of layer '0' are NoneType"),
        (lambda n, m: m.weight * math.nan, "layer '0' hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_(mlp(), 0.5, method=bad)


@pytest.mark.parametrize("pattern", ["unstructured", "2x2", "row", "column"])
def test_zeros_takes_the_mask_that_is_there(pattern):
    model = mlp()
    with torch.no_grad():
        model[0].weight[4:8, :10] = 0
        model[0].weight[0, 0] = -0.0
        model[0].weight[9] = 0
        model[0].weight[:, 5] = 0
    before = weights(model)
    prune_(model, method="zeros", pattern=pattern)
    parsed = Pattern.parse(pattern)
    units = parsed.unit_scores((before["0"] != 0).float()) > 0
    assert torch.equal(model[0].mask, parsed.spread(units, (32, 20)))
    assert 0 < model[0].sparsity < 0.5
    assert model[2].sparsity == 0
    assert torch.equal(weights(model)["0"], before["0"])


def test_zeros_restores_what_a_file_without_metadata_lost():
    model = mlp()
    prune_(model, 0.7)
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = mlp()
    fresh.load_state_dict(plain)
    prune_(fresh, method="zeros")
    assert all(torch.equal(a, b) for a, b in zip(masks(fresh).values(), masks(model).values(), strict=True))
    with pytest.raises(ValueError, match=r"layer '0' is not 2:4: \d+ of its groups of 4 inputs"):
        prune_(mlp(), method="zeros", pattern="2:4")
    ready = mlp()
    prune_(ready, pattern="2:4")
    prune_(ready, method="zeros", pattern="2:4")
    assert ready[0].sparsity == 0.5


# --- layers ---


def test_what_is_left_and_why():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.skipped, self.filtered = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
            self.other.weight = self.tied.weight
            self.hooked, self.int8 = nn.Linear(8, 8), Int8Linear(8, 8)
            self.hooked.register_forward_hook(lambda *args: None)
            self.attention = nn.MultiheadAttention(8, 2)
            self.empty = nn.Linear(0, 8)

    model = Model()
    report = prune_(model, 0.5, skip="skipped", filter_fn=lambda name, module: name != "filtered")
    assert [layer.name for layer in report.pruned] == ["fc"]
    assert reason(report, "skipped") == "skip='skipped'"
    assert reason(report, "filtered") == "filter_fn said no"
    assert reason(report, "tied") == "its weight is tied to other.weight"
    assert "hook" in reason(report, "hooked")
    assert "int8" in reason(report, "int8")
    assert "MultiheadAttention" in reason(report, "attention.out_proj")
    assert "MultiheadAttention" in reason(report, "attention.in_proj_weight")
    assert "empty" in reason(report, "empty")
    assert type(model.fc) is MaskedLinear
    assert type(model.tied) is nn.Linear


def test_one_module_under_two_names_and_marks_on_it():
    shared = nn.Linear(8, 8)
    shared.is_residual = True
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}).eval()
    report = prune_(model, 0.5)
    assert model["a"] is model["b"]["c"]
    assert model["a"].is_residual
    assert not model["a"].training
    assert report.pruned[0].aliases == ("b.c",)


def test_pruning_again_sets_a_new_mask_on_the_same_layer():
    model = mlp()
    prune_(model, 0.5, gradient="dense")
    layer = model[0]
    report = prune_(model, 0.25)
    assert model[0] is layer
    assert layer.gradient == "dense"
    assert layer.sparsity == 0.25
    assert len(report.pruned) == 2
    prune_(model, 0.5, gradient="masked")
    assert layer.gradient == "masked"
    assert (layer.weight[~layer.mask] == 0).all()


def test_conv1d_is_turned():
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(12, 20))
    before = model[0].weight.detach().clone()
    x = torch.randn(3, 20)
    report = prune_(model, 0.5, method="taylor", batches=[x], loss_fn=mean_square)
    assert type(model[0]) is MaskedLinear
    assert report.pruned[0].shape == (12, 20)
    assert "Conv1D" in report.pruned[0].reason
    torch.testing.assert_close(model(x), F.linear(x, before.t() * model[0].mask, model[0].bias))


def test_transformer_encoder_layer_without_the_fused_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    prune_(model, 0.5, gradient="dense")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = model(x)
    expected = model(x)  # with gradients the fused kernel is out of the question
    torch.testing.assert_close(fast, expected)


# --- heads ---


def bert(heads=4):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=heads, num_hidden_layers=2, intermediate_size=48, vocab_size=50
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_heads(scope):
    model = bert()
    with torch.no_grad():
        for name in ("query", "key", "value"):
            model.encoder.layer[0].attention.self.get_submodule(name).weight[8:16] *= 1e-3
        model.encoder.layer[0].attention.output.dense.weight[:, 8:16] *= 1e-3
    report = prune_(model, 0.25, pattern="head", scope=scope)
    assert len(report.pruned) == 8
    found = masks(model)
    total = 0
    for index in (0, 1):
        at = f"encoder.layer.{index}.attention"
        kept = found[f"{at}.self.query"].any(1).view(4, 8)
        assert (kept.all(1) == kept.any(1)).all()  # whole heads
        total += int((~kept.any(1)).sum())
        for name in ("query", "key", "value"):
            assert torch.equal(found[f"{at}.self.{name}"], kept.flatten()[:, None].expand(32, 32))
        assert torch.equal(found[f"{at}.output.dense"], kept.flatten()[None].expand(32, 32))
    assert total == 2
    assert not found["encoder.layer.0.attention.self.query"][8:16].any()
    assert "no projection of an attention" in reason(report, "encoder.layer.0.output.dense")
    assert sum(layer.pruned_units for layer in report.pruned) == 8
    assert all(layer.units == 4 for layer in report.pruned)


def test_pruned_heads_say_nothing():
    model = bert()
    ids = torch.randint(0, 50, (2, 7))
    prune_(model, 1.0, pattern="head")
    attention = model.encoder.layer[0].attention
    hidden = model.embeddings(ids)
    out = attention.output.dense(attention.self(hidden)[0])
    assert torch.equal(out, attention.output.dense.bias.expand_as(out))


def test_heads_of_a_partly_skipped_attention_stay_whole():
    model = bert()
    report = prune_(model, 0.5, pattern="head", skip="encoder.layer.0.attention.self.key")
    assert len(report.pruned) == 4
    for name in ("self.query", "self.value", "output.dense"):
        left = reason(report, f"encoder.layer.0.attention.{name}")
        assert left == (
            "its heads go through encoder.layer.0.attention.self.key too, "
            "which is left: skip='encoder.layer.0.attention.self.key'"
        )
    with pytest.raises(ValueError, match="pattern 'head' found no attention"):
        prune_(mlp(), 0.5, pattern="head")


def test_heads_of_an_attention_that_no_batch_reaches_stay():
    model = bert()

    def first_layer_only(output, batch):
        return output.hidden_states[1].square().mean()

    batches = [{"input_ids": torch.randint(0, 50, (2, 7)), "output_hidden_states": True}]
    report = prune_(model, 0.5, pattern="head", method="taylor", batches=batches, loss_fn=first_layer_only)
    assert [layer.name.split(".")[2] for layer in report.pruned] == ["0"] * 4
    assert reason(report, "encoder.layer.1.attention.self.value") == "the loss does not depend on it"
    with pytest.raises(ValueError, match="nothing to prune"):
        prune_(
            bert(), 0.5, pattern="head", method="taylor", batches=batches,
            loss_fn=lambda output, batch: output.hidden_states[0].square().mean(),
        )  # fmt: skip


def test_heads_with_calibration():
    model = bert()
    batches = [{"input_ids": torch.randint(0, 50, (2, 7))}]
    for method, kwargs in (("wanda", {}), ("taylor", {"loss_fn": lambda output, batch: output[0].square().mean()})):
        report = prune_(copy.deepcopy(model), 0.5, pattern="head", method=method, batches=batches, **kwargs)
        assert report.sparsity == 0.5


# --- errors, all or nothing ---


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sparsity": 1.5}, ValueError, r"prune_: sparsity=1.5; expected a number from 0"),
        ({"sparsity": -0.1}, ValueError, "sparsity=-0.1"),
        ({"sparsity": math.nan}, ValueError, "sparsity=nan"),
        ({"sparsity": "half"}, ValueError, "sparsity='half'"),
        ({"sparsity": True}, ValueError, "sparsity=True"),
        ({"pattern": "diagonal"}, ValueError, "unknown pattern 'diagonal'"),
        ({"pattern": 4}, TypeError, "pattern is a int"),
        ({"pattern": "16x16"}, ValueError, r"layer '2': pattern '16x16' needs 16 outputs \(dimension 0"),
        ({"pattern": "2:4", "sparsity": 0.6}, ValueError, "which prunes 0.5; leave it out"),
        ({"method": "magnitudes"}, ValueError, "unknown method 'magnitudes'"),
        ({"scope": "model"}, ValueError, "unknown scope 'model'"),
        ({"gradient": "sparse"}, ValueError, "unknown gradient 'sparse'"),
        ({"method": "taylor"}, ValueError, "method='taylor' needs batches"),
        ({"batches": [1]}, ValueError, "method='magnitude' takes no batches"),
        ({"method": "wanda", "batches": torch.ones(2, 20)}, TypeError, r"batches is one Tensor; .*\[batch\]"),
        ({"method": "wanda", "batches": []}, ValueError, "batches is empty"),
        ({"method": "wanda", "batches": [3]}, TypeError, "prune_: a batch is a int"),
        ({"method": "wanda", "batches": [torch.ones(2, 20)], "loss_fn": len}, ValueError, "takes no loss_fn"),
        ({"threshold": 0.1, "sparsity": 0.5}, ValueError, "both sparsity=0.5 and threshold=0.1"),
        ({"threshold": -1.0}, ValueError, "threshold=-1.0; expected a number from 0"),
        ({"threshold": math.nan}, ValueError, "threshold=nan"),
        ({"threshold": 0.1, "pattern": "2:4"}, ValueError, "threshold is for method='magnitude'"),
        ({"threshold": 0.1, "method": "random"}, ValueError, "threshold is for method='magnitude'"),
        ({"method": "zeros", "sparsity": 0.5}, ValueError, "leave sparsity=0.5 out"),
        ({"method": "zeros", "pattern": "head"}, ValueError, "'zeros' with pattern 'head'"),
        ({"skip": "nowhere"}, ValueError, "skip='nowhere' matches no module"),
    ],
)
def test_bad_arguments_change_nothing(kwargs, error, match):
    model = mlp()
    snapshot, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(error, match=match):
        prune_(model, **kwargs)
    assert_unchanged(model, snapshot, types)


@pytest.mark.parametrize("method", ["magnitude", "random", "zeros"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_name_their_layer(method, value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    with pytest.raises(ValueError, match=r"layer '2': its weight holds NaN or Inf.*skip='2'"):
        prune_(model, method=method)
    assert type(model[0]) is nn.Linear
    prune_(model, skip="2")


def test_a_root_that_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="the model is itself a Linear"):
        prune_(nn.Linear(8, 8))
    with pytest.raises(TypeError, match="expected a torch"):
        prune_([nn.Linear(8, 8)])


def test_failure_half_way_changes_nothing(monkeypatch):
    model = mlp(20, 32, 32, 12)
    prune_(model, 0.5, skip=["0", "4"])
    snapshot, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    mask = model[2].mask.clone()
    monkeypatch.setattr(sys.modules["pycompress.pruning.swap"], "apply_edits", lambda edits: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_(model, 0.9)
    assert_unchanged(model, snapshot, types)
    assert torch.equal(model[2].mask, mask)


def test_masks_of_another_shape_change_nothing():
    model = mlp()
    found = find_layers(model, Pattern.parse("unstructured"), op="prune_")
    made = swap_in(found, {})
    assert list(made) == ["0", "2"]
    assert all(layer.mask.all() for layer in made.values())
    good = {name: torch.zeros_like(layer.mask) for name, layer in made.items()}
    with pytest.raises(ValueError, match=r"layer '2': mask is \(2, 2\)"):
        set_masks(made, {**good, "2": torch.ones(2, 2, dtype=torch.bool)})
    assert all(layer.mask.all() for layer in made.values())
    set_masks(made, good)
    assert not any(layer.weight.any() for layer in made.values())


# --- report ---


def test_report():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), "head": nn.Linear(8, 4)})
    report = prune_(model, 0.5, skip="head")
    text = str(report)
    assert "layers.*  3      8x8    pruned  unstructured  0.5       96/192  96    192" in text
    assert "skip='head'" in text
    assert text.splitlines()[-1] == report.summary()
    assert report.summary() == (
        "prune_ pattern=unstructured method=magnitude scope=layer: 3 pruned, 1 left as they were; sparsity 0.5, 96 of "
        "192 weights kept"
    )
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "skip='head'" in console.export_text()
    again = report_of(model)
    assert again.sparsity == report.sparsity
    assert [layer.name for layer in again.layers] == ["layers.0", "layers.1", "layers.2"]


def test_nothing_to_prune_is_an_empty_report():
    report = prune_(nn.Sequential(nn.ReLU()))
    assert report.layers == []
    assert report.sparsity == 0
    assert "0 pruned" in str(report)
    assert prune_(nn.Sequential(nn.ReLU()), scope="global").layers == []


def test_exported_names():
    assert pycompress.prune_ is prune_
    assert pycompress.PruneReport is pycompress.pruning.PruneReport
