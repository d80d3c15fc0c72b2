"""What the tests of prune_ share."""

import itertools

import torch
from torch import nn

from pycompress.pruning import masked_layers


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
