"""sparsify_: what it swaps, what it leaves dense or alone and why, and that the model computes the same afterwards.

A cost model that was made up decides, so that nothing here depends on the machine.
"""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pycompress
from pycompress.cost_core import DTYPES
from pycompress.nn import Int8Linear, MaskedLinear, SparseLinear
from pycompress.sparsify import sparsify_
from tests.sparsify_models import (
    DENSE,
    SPARSE,
    Half,
    assert_close,
    bias_pruned,
    constant,
    hook_pruned,
    mask_of,
    masked,
    output,
    parametrized,
    pruned_twice,
    row,
    two_layers,
    zeroed,
)

transformers = pytest.importorskip("transformers")


# --- what is swapped ---


KINDS = {
    "zeros": zeroed,
    "masked": masked,
    "masked, dense gradient": lambda layer: masked(layer, gradient="dense"),
    "hooks": hook_pruned,
    "hooks twice": pruned_twice,
    "hooks, bias too": bias_pruned,
    "removed hooks": lambda layer: prune.remove(hook_pruned(layer), "weight"),
    "parametrized": parametrized,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_layers_are_swapped(kind, dtype):
    model = two_layers(KINDS[kind]).eval()
    x = torch.randn(20, 24)
    expected = output(model, x)
    report = sparsify_(model, dtype, cost_model=SPARSE)
    assert [type(m) for m in model] == [SparseLinear, nn.Tanh, SparseLinear]
    assert [layer.name for layer in report.swapped] == ["0", "2"]
    assert [m.dtype for m in (model[0], model[2])] == [dtype] * 2
    assert all(0.3 < layer.sparsity < 0.9 and layer.choice == "index" for layer in report.swapped)
    assert_close(output(model, x), expected, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_layers_that_would_be_slower_are_dense(kind, dtype):
    model = two_layers(KINDS[kind]).eval()
    before, x = list(model), torch.randn(20, 24)
    expected = output(model, x)
    report = sparsify_(model, dtype, cost_model=DENSE)
    assert not report.swapped
    assert [layer.action for layer in report.dense] == ["int8 dense" if dtype == "int8" else "dense"] * 2
    kind_of_dense = Int8Linear if dtype == "int8" else nn.Linear
    assert isinstance(model[0], kind_of_dense)
    assert isinstance(model[2], kind_of_dense)
    assert row(report, "0").reason == "sparse would take 9.00x as long at best (M=1)"
    assert row(report, "0").times == tuple((m, pytest.approx(1e-6), pytest.approx(1e-6)) for m in (1, 8, 32, 128, 512))
    if dtype == "float32":
        assert (model[0] is before[0]) == (kind in ("zeros", "removed hooks"))
        assert type(model[0]) is nn.Linear
        assert not model[0]._forward_pre_hooks
        assert torch.count_nonzero(model[0].weight) < 0.7 * model[0].weight.numel()
    assert_close(output(model, x), expected, dtype)


@pytest.mark.parametrize("gradient", ["masked", "dense"])
def test_a_kept_zero_stays_kept(gradient):
    layer = MaskedLinear.from_linear(nn.Linear(8, 4), mask_of(nn.Linear(8, 4), 0.5), gradient)
    with torch.no_grad():
        layer.weight[0] = 0.0
    kept = int(layer.mask.sum())
    model = nn.Sequential(layer)
    sparsify_(model, cost_model=SPARSE)
    assert model[0].nnz == kept


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_conv1d(bias, pruned):
    layer = transformers.pytorch_utils.Conv1D(40, 24)
    if pruned:
        prune.l1_unstructured(layer, "weight", 0.75)
    else:
        layer.weight.data *= torch.rand(24, 40) >= 0.75
    for model_cost, kind in ((SPARSE, SparseLinear), (DENSE, nn.Module)):
        model = nn.Sequential(copy.deepcopy(layer) if not pruned else pickle.loads(pickle.dumps(layer)))
        x = torch.randn(20, 24)
        expected = output(model, x)
        report = sparsify_(model, cost_model=model_cost)
        assert isinstance(model[0], kind)
        assert report.layers[0].shape == (40, 24)
        assert_close(output(model, x), expected)


def test_the_weight_of_hooks_is_the_newest():
    """torch.nn.utils.prune computes `weight` before each forward; an optimizer step since then counts."""
    model = nn.Sequential(bias_pruned(nn.Linear(24, 40)))
    model(torch.randn(2, 24))
    with torch.no_grad():
        model[0].weight_orig.mul_(3.0)
        model[0].bias_orig.add_(1.0)
    expected_weight = model[0].weight_orig * model[0].weight_mask
    expected_bias = model[0].bias_orig * model[0].bias_mask
    sparsify_(model, cost_model=SPARSE)
    assert torch.equal(model[0].to_dense(), expected_weight)
    assert torch.equal(model[0].bias, expected_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_less_precision(dtype):
    model = two_layers().to(dtype)
    x = torch.randn(20, 24, dtype=dtype)
    expected = output(model, x)
    sparsify_(model, cost_model=SPARSE)
    assert model[0].weight_values.dtype == torch.float32
    actual = output(model, x)
    assert actual.dtype == dtype
    assert_close(actual, expected, "bfloat16")


def test_same_module_under_several_names_stays_shared():
    model = nn.Module()
    model.a = model.b = zeroed(nn.Linear(8, 8))
    model.part = nn.Sequential(model.a)
    report = sparsify_(model, cost_model=SPARSE)
    assert isinstance(model.a, SparseLinear)
    assert model.a is model.b is model.part[0]
    assert (report.swapped[0].name, report.swapped[0].aliases) == ("a", ("b", "part.0"))


def test_flags_and_marks_are_carried_over():
    model = two_layers(masked)
    model.eval()
    model[2].train()
    model[0].bias.requires_grad_(False)
    model[0].is_residual = True
    sparsify_(model, cost_model=SPARSE)
    assert [m.training for m in model] == [False, False, True]
    assert not model[0].bias.requires_grad
    assert model[2].bias.requires_grad
    assert model[0].is_residual is True


def test_copies_and_checkpoints(tmp_path):
    model = two_layers().eval()
    fresh = copy.deepcopy(model)
    sparsify_(model, cost_model=SPARSE)
    x = torch.randn(20, 24)
    expected = output(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(output(other, x), expected)
    torch.save(model.state_dict(), tmp_path / "sparse.pt")
    sparsify_(fresh, cost_model=SPARSE)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    fresh.load_state_dict(torch.load(tmp_path / "sparse.pt", weights_only=True), strict=True)
    assert torch.equal(output(fresh, x), expected)


# --- formats, tokens ---


def test_a_layer_that_is_faster_for_some_tokens_is_sparse():
    mixed = constant(bitmap={1: 1e-6, 8: 3e-6, 10**6: 1.0}, dense=2e-6, index=9e-6)
    model = nn.Sequential(zeroed(nn.Linear(24, 40)))
    report = sparsify_(model, cost_model=mixed)
    (layer,) = report.swapped
    assert re.fullmatch(r"bitmap to \d, dense", layer.choice)
    assert "holds the dense weight too" in layer.reason
    assert layer.times[0] == (1, pytest.approx(2e-6), pytest.approx(1e-6))
    assert layer.times[-1] == (512, pytest.approx(2e-6), pytest.approx(2e-6))
    model = nn.Sequential(zeroed(nn.Linear(24, 40)))
    assert sparsify_(model, cost_model=mixed, tokens=(128, 512)).dense
    model = nn.Sequential(zeroed(nn.Linear(24, 40)))
    sparsify_(model, cost_model=mixed, tokens=(1,))
    assert model[0].forms() == ("bitmap",)


@pytest.mark.parametrize("form", ["bitmap", "index"])
def test_a_named_format_makes_every_layer_sparse(form):
    model = two_layers()
    report = sparsify_(model, format=form, cost_model=DENSE)
    assert len(report.swapped) == 2
    assert [layer.choice for layer in report.swapped] == [form] * 2
    assert model[0].format == form


def test_the_reference_backend_asks_no_cost_model():
    model = two_layers()
    x = torch.randn(3, 24)
    expected = output(model, x)
    report = sparsify_(model, backend="reference", cost_model=DENSE)
    assert len(report.swapped) == 2
    assert report.swapped[0].times == ()
    assert_close(output(model, x), expected)


# --- what is left ---


def test_skip_and_predicate():
    model = two_layers()
    report = sparsify_(model, cost_model=SPARSE, skip="0", filter_fn=lambda name, module: name != "2")
    assert [(layer.name, layer.reason) for layer in report.left] == [("0", "skip='0'"), ("2", "filter_fn said no")]


def test_layers_without_zeros():
    orthogonal = parametrizations.orthogonal(nn.Linear(40, 9))
    model = nn.Sequential(nn.Linear(24, 40), zeroed(nn.Linear(40, 40), 0.02), orthogonal)
    before = list(model)
    report = sparsify_(model, cost_model=SPARSE)
    assert list(model) == before
    assert row(report, "0").reason == row(report, "2").reason == "its weight has no zeros"
    assert re.fullmatch(r"only [12]\.\d\d% of its weight is zero; min_sparsity is 5\.00%", row(report, "1").reason)
    assert len(sparsify_(model, cost_model=SPARSE, min_sparsity=0.0).swapped) == 1


def test_a_parametrization_is_looked_at_without_changing_it():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(24, 40))).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert row(sparsify_(model, cost_model=SPARSE), "0").reason == "its weight has no zeros"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_other_hooks_and_parametrizations_stay():
    model = nn.Sequential(hook_pruned(nn.Linear(8, 8)), zeroed(nn.Linear(8, 8)), parametrized(nn.Linear(8, 8)))
    model[0].register_forward_hook(lambda *a: None)
    model[1].register_forward_pre_hook(lambda *a: None)
    parametrize.register_parametrization(model[2], "bias", Half())
    report = sparsify_(model, cost_model=SPARSE)
    assert [layer.reason for layer in report.left] == ["has forward hooks", "has forward pre hooks", "is parametrized"]


def test_a_tied_parametrized_weight_stays():
    model = nn.ModuleDict({"a": parametrized(nn.Linear(8, 8)), "b": nn.Embedding(8, 8)})
    model["b"].weight = model["a"].parametrizations.weight.original
    report = sparsify_(model, cost_model=SPARSE)
    assert row(report, "a").reason == "its parametrizations.weight.original is tied to b.weight"


def test_second_call_leaves_what_is_converted():
    model = two_layers()
    sparsify_(model, cost_model=SPARSE, skip="2")
    pycompress.quantize_(model)
    first, second = model[0], model[2]
    report = sparsify_(model, cost_model=SPARSE)
    assert [layer.reason for layer in report.left] == ["already sparse (float32)", "already int8 (dynamic)"]
    assert (model[0], model[2]) == (first, second)
    assert report.bytes_before == report.bytes_after


def test_quantize_leaves_sparse_and_masked_layers():
    model = nn.Sequential(zeroed(nn.Linear(8, 8)), masked(nn.Linear(8, 8)), nn.Linear(8, 8))
    sparsify_(model, cost_model=SPARSE, skip="1")
    report = pycompress.quantize_(model)
    assert [type(m) for m in model] == [SparseLinear, MaskedLinear, Int8Linear]
    reasons = [layer.reason for layer in report.left]
    assert reasons[0] == "already sparse (float32)"
    assert reasons[1] == "is a MaskedLinear; sparsify_ makes it sparse, its to_linear() dense"
    held = model[0].memory_bytes() + model[2].memory_bytes()
    assert report.bytes_after == held + 4 * (64 + 8) + 64  # the mask of 64 bytes
