"""prune_: which weights go, that the number is exact, and which layers are taken."""

import math

import numpy
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
from tests.prune_helpers import masks, mean_square, mlp, reason, weights

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


def test_float64_weights_are_ranked_as_such():
    model = mlp(8, 8, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.copy_((1 + 1e-12 * torch.arange(64, 0, -1).double()).view(8, 8))
    assert prune_(model, 0.5).left == []
    assert torch.equal(model[0].mask.flatten(), torch.arange(64) < 32)
    assert model(torch.randn(2, 8).double()).dtype == torch.float64


def test_fractions_may_be_those_of_numpy():
    assert prune_(mlp(8, 8), numpy.float32(0.5)).sparsity == 0.5


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
