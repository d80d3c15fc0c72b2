"""Models with pruned layers, and cost models that were made up, for the tests of sparsify_."""

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from pycompress.cost_core import DTYPES, FORMS, CostModel, Fit, Shape
from pycompress.nn import MaskedLinear


def constant(**seconds):
    """A cost model in which a form takes so long, whatever the layer; a number or {M: seconds}."""
    fits = {}
    for form in FORMS:
        value = seconds.get(form, 9e-6)
        table = value if isinstance(value, dict) else {1: value, 10**6: value}
        for dtype in DTYPES:
            width = len(Shape.random(8, 8, 0.5, dtype).counts(form)) - 1
            fits[dtype, form] = Fit(tuple(table), tuple((t, *[0.0] * width) for t in table.values()))
    return CostModel(fits, threads=1, measured=frozenset(DTYPES))


SPARSE = constant(index=1e-6)
DENSE = constant(dense=1e-6)


def mask_of(layer, sparsity=0.75):
    return torch.rand(layer.out_features, layer.in_features) >= sparsity


def zeroed(layer, sparsity=0.75):
    with torch.no_grad():
        layer.weight *= mask_of(layer, sparsity)
    return layer


def masked(layer, sparsity=0.75, gradient="masked"):
    return MaskedLinear.from_linear(layer, mask_of(layer, sparsity), gradient)


def two_layers(make=zeroed):
    return nn.Sequential(make(nn.Linear(24, 40)), nn.Tanh(), make(nn.Linear(40, 8)))


def output(model, *args):
    with torch.no_grad():
        y = model(*args)
    return y if isinstance(y, torch.Tensor) else y[0]


def row(report, name):
    return next(layer for layer in report.layers if layer.name == name)


TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2, "int8": 3e-2}


def assert_close(actual, expected, dtype="float32"):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[dtype], error


class Half(nn.Module):
    """A parametrization with zeros in its result."""

    def forward(self, weight):
        return torch.where(weight > 0, weight, 0)


def hook_pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.75)
    return layer


def pruned_twice(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def bias_pruned(layer):
    prune.l1_unstructured(layer, "bias", 0.5)
    return hook_pruned(layer)


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Half())
    return layer
