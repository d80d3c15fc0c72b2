"""What the tests of quantize_ share: the exact check, small models.

The exact check: a weight-only model must equal the float model whose weights were rounded to int8 and back.
"""

import copy

import torch
from torch import nn

import pycompress
from pycompress.ops import quantize_weight


def rounded(model, report):
    """A copy of the float model with the weights of the swapped layers rounded to int8 and back."""
    model = copy.deepcopy(model)
    for layer in report.swapped:
        linear = model.get_submodule(layer.name)
        transposed = not isinstance(linear, nn.Linear)
        weight = linear.weight.detach().t() if transposed else linear.weight.detach()
        q, scale = quantize_weight(weight.contiguous())
        dense = (q.float() * scale[:, None]).to(weight.dtype)
        linear.weight.data = dense.t().contiguous() if transposed else dense
    return model


def output(model, *args, **kwargs):
    with torch.no_grad():
        y = model(*args, **kwargs)
    return y if isinstance(y, torch.Tensor) else y[0]


def assert_exact(model, *args, min_swapped=1, valid=..., **kwargs):
    """Quantise a copy weight-only and compare it with the rounded float model; returns (copy, report)."""
    quantised = copy.deepcopy(model)
    report = pycompress.quantize_(quantised, "weight_only")
    assert len(report.swapped) >= min_swapped, report
    actual = output(quantised, *args, **kwargs)
    # torch's fast path takes every nn.GELU for the exact one and goes past an overridden _ff_block.
    torch.backends.mha.set_fastpath_enabled(False)
    expected = output(rounded(model, report), *args, **kwargs)
    torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(actual[valid], expected[valid], rtol=2e-4, atol=2e-5)
    return quantised, report


def reason(report, name):
    return next(layer.reason for layer in report.left if layer.name == name)


def two_layers():
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))


def encoder(activation="gelu", batch_first=True, norm_first=False, layers=2):
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.1, activation=activation, batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, layers)
