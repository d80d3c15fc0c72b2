"""smooth_: what cannot take a factor in says why and stays, and whatever raises leaves the model as it was."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from pycompress import smooth
from pycompress.nn import Int8Linear
from pycompress.smooth import smooth_
from tests.smooth_helpers import TOKENS, Block, outputs, reasons


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        h = self.norm(x)
        return h + self.fc(h)


class InTraining(Residual):
    def forward(self, x):
        h = self.norm(x)
        if self.training:
            self.penalty = torch.sum(h)
        return self.fc(h)


class Returned(Residual):
    def forward(self, x):
        h = self.norm(x)
        return self.fc(h), h


class TwoInputs(Residual):
    def forward(self, x):
        return self.fc(self.norm(x)) + self.fc(x)


class Turned(Residual):
    """The tokens of what the norm made are mixed: 16 tokens, so that the shapes would fit."""

    def forward(self, x):
        return self.fc(self.norm(x).transpose(1, 2).contiguous())


class OnePlus(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape) * (1 + self.weight) + self.bias


def hooked():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    return model


def tied():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16))
    model[2].weight = model[0].weight
    return model


def shared_with_a_subclass():
    class Heads(Residual):
        def __init__(self):
            super().__init__()
            self.other = type("MyLinear", (nn.Linear,), {})(16, 4)

        def forward(self, x):
            h = self.norm(x)
            return torch.cat((self.fc(h), self.other(h)), -1)

    return Heads()


def already_int8():
    class Heads(Residual):
        def __init__(self):
            super().__init__()
            self.other = Int8Linear.from_float(nn.Linear(16, 4))

        def forward(self, x):
            h = self.norm(x)
            return torch.cat((self.fc(h), self.other(h)), -1)

    return Heads()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Residual, "norm is also read by add in the model"),
        (InTraining, "norm may also be read by sum in InTraining.forward"),
        (Returned, "norm is also read by the caller of the model: it is returned"),
        (TwoInputs, "norm is not all that fc reads"),
        (Turned, "no norm or linear layer makes what it reads"),
        (hooked, "0 stays as it is: has forward hooks"),
        (tied, "0 stays as it is: its weight is tied to 2.weight"),
        (shared_with_a_subclass, "norm is also read by other, which is left: is a MyLinear, a subclass"),
        (already_int8, "norm is also read by other, which is left: already int8 (dynamic)"),
        (lambda: nn.Sequential(OnePlus(16), nn.Linear(16, 8)), "0 stays as it is: its output does not"),
        (lambda: nn.Sequential(nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 8)), "no norm or linear"),
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8)), "no norm or linear layer makes"),
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)), "no norm or linear layer makes"),
    ],
)
def test_why_nothing_takes_the_factors_in(make, reason):
    model = make().eval()
    x = torch.randn(2, 16, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs(model, [x])
    report = smooth_(model, [x], progress=False)
    name = "fc" if hasattr(model, "fc") else report.layers[-1].name
    assert reasons(report)[name].startswith(reason), report
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    scaled = smooth_(model, [x], where="anywhere", progress=False)
    assert name in [row.name for row in scaled.scaled]
    for actual, wanted in zip(outputs(model, [x]), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_a_parametrized_layer_is_left():
    model = nn.Sequential(nn.LayerNorm(16), parametrizations.weight_norm(nn.Linear(16, 16)))
    assert reasons(smooth_(model, TOKENS, where="anywhere", progress=False)) == {"1": "is parametrized"}


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"alpha": 1.5}, ValueError, r"smooth_: alpha=1.5; expected a number from 0 to 1"),
        ({"alpha": "0.5"}, ValueError, r"alpha='0.5'"),
        ({"where": "norm"}, ValueError, r"unknown where 'norm'; expected one of fold, anywhere"),
        ({"batches": torch.ones(2, 16)}, TypeError, r"batches is one Tensor"),
        ({"batches": []}, ValueError, r"batches is empty"),
        ({"batches": [torch.full((2, 16), torch.nan)]}, ValueError, r"input of layer 'q' has NaN or Inf"),
        ({"skip": "fc9"}, ValueError, r"skip='fc9' matches no module"),
    ],
)
def test_bad_arguments_change_nothing(kwargs, error, match):
    model = Block()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments: Mapping = {"batches": TOKENS, "progress": False, **kwargs}
    with pytest.raises(error, match=match):
        smooth_(model, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("where", ["fold", "anywhere"])
def test_a_model_whose_output_moves_is_put_back(where):
    class Fickle(Block):
        calls = 0

        def forward(self, x):
            Fickle.calls += 1
            return super().forward(x) + Fickle.calls

    model = Fickle()
    before, text = {key: value.clone() for key, value in model.state_dict().items()}, str(model)
    with pytest.raises(RuntimeError, match=r"moved .* not deterministic in eval mode\. The model is unchanged"):
        smooth_(model, TOKENS, where=where, progress=False)
    assert str(model) == text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_interrupted_half_way_changes_nothing(monkeypatch):
    model = Block()
    before, text = {key: value.clone() for key, value in model.state_dict().items()}, str(model)

    def interrupted(edits):
        edits[0].target[edits[0].key] = edits[0].value
        raise KeyboardInterrupt

    monkeypatch.setattr(smooth, "apply_edits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smooth_(model, TOKENS, where="anywhere", progress=False)
    assert str(model) == text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_that_are_not_finite():
    model = Block()
    with torch.no_grad():
        model.fc1.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer '(fc1|fc2)'.*NaN or Inf"):
        smooth_(model, TOKENS, progress=False)
