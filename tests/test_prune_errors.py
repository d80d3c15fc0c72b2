"""prune_: a call that raises changes nothing."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from pycompress import prune_
from pycompress.pruning.patterns import Pattern
from pycompress.pruning.swap import find_layers, set_masks, swap_in
from tests.prune_helpers import assert_unchanged, mlp

# --- errors, all or nothing ---


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sparsity": 1.5}, ValueError, r"prune_: sparsity=1.5; expected a number from 0"),
        ({"sparsity": -0.1}, ValueError, "sparsity=-0.1"),
        ({"sparsity": math.nan}, ValueError, "sparsity=nan"),
        ({"sparsity": "half"}, ValueError, "sparsity='half'"),
        ({"sparsity": True}, ValueError, "sparsity=True"),
        ({"pattern": "diagonal"}, ValueError, "prune_: unknown pattern 'diagonal'"),
        ({"pattern": 4}, TypeError, "prune_: pattern is a int"),
        ({"pattern": "16x16"}, ValueError, r"prune_: layer '2': pattern '16x16' needs 16 outputs \(dimension 0"),
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
