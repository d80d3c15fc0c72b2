"""prune_: the methods that score weights, and that calibrating leaves no trace."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pycompress import prune_
from pycompress.pruning.patterns import Pattern
from tests.prune_helpers import assert_unchanged, masks, mean_square, mlp, reason, weights

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
