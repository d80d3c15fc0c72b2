"""sparsify_: what it swaps, what it leaves dense or alone and why, and that the model computes the same afterwards.

A cost model that was made up decides, so that nothing here depends on the machine.
"""

import copy
import io
import pickle
import re

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pycompress
from pycompress.cost_core import DTYPES, FORMS, CostModel, Fit, Shape
from pycompress.nn import Int8Linear, MaskedLinear, SparseLinear
from pycompress.sparsify import sparsify_

transformers = pytest.importorskip("transformers")


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


# --- what is swapped ---


class Half(nn.Module):
    """A parametrization with zeros in its result."""

    def forward(self, weight):
        return torch.where(weight > 0, weight, 0)


def _hook_pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.75)
    return layer


def _pruned_twice(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def _bias_pruned(layer):
    prune.l1_unstructured(layer, "bias", 0.5)
    return _hook_pruned(layer)


def _parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Half())
    return layer


KINDS = {
    "zeros": zeroed,
    "masked": masked,
    "masked, dense gradient": lambda layer: masked(layer, gradient="dense"),
    "hooks": _hook_pruned,
    "hooks twice": _pruned_twice,
    "hooks, bias too": _bias_pruned,
    "removed hooks": lambda layer: prune.remove(_hook_pruned(layer), "weight"),
    "parametrized": _parametrized,
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
    model = nn.Sequential(_bias_pruned(nn.Linear(24, 40)))
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
    model = nn.Sequential(_hook_pruned(nn.Linear(8, 8)), zeroed(nn.Linear(8, 8)), _parametrized(nn.Linear(8, 8)))
    model[0].register_forward_hook(lambda *a: None)
    model[1].register_forward_pre_hook(lambda *a: None)
    parametrize.register_parametrization(model[2], "bias", Half())
    report = sparsify_(model, cost_model=SPARSE)
    assert [layer.reason for layer in report.left] == ["has forward hooks", "has forward pre hooks", "is parametrized"]


def test_a_tied_parametrized_weight_stays():
    model = nn.ModuleDict({"a": _parametrized(nn.Linear(8, 8)), "b": nn.Embedding(8, 8)})
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


# --- activations ---


@pytest.mark.parametrize("make", [zeroed, masked, _hook_pruned, _parametrized])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_activations_are_folded_in(make, dtype):
    model = nn.Sequential(make(nn.Linear(24, 40)), nn.GELU(), make(nn.Linear(40, 8)), nn.ReLU()).eval()
    x = torch.randn(20, 24)
    expected = output(model, x)
    report = sparsify_(model, dtype, cost_model=SPARSE)
    assert [type(m) for m in model] == [SparseLinear, nn.Identity, SparseLinear, nn.Identity]
    assert [layer.activation for layer in report.fused] == ["gelu", "relu"]
    assert_close(output(model, x), expected, dtype)
    unfused = nn.Sequential(make(nn.Linear(24, 40)), nn.GELU())
    assert not sparsify_(unfused, dtype, cost_model=SPARSE, fuse=False).fused
    assert isinstance(unfused[1], nn.GELU)


def test_only_int8_folds_into_a_dense_layer():
    model = nn.Sequential(masked(nn.Linear(24, 40)), nn.GELU())
    assert not sparsify_(model, cost_model=DENSE).fused
    assert [type(m) for m in model] == [nn.Linear, nn.GELU]
    model = nn.Sequential(masked(nn.Linear(24, 40)), nn.GELU())
    report = sparsify_(model, "int8", cost_model=DENSE)
    assert [layer.activation for layer in report.fused] == ["gelu"]
    assert [type(m) for m in model] == [Int8Linear, nn.Identity]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("pad", [False, True])
def test_transformer_encoder(pad):
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    for part in model.layers:
        zeroed(part.linear1)
        zeroed(part.linear2)
    x = torch.randn(3, 9, 32)
    lengths = torch.tensor([9, 4, 6])[:, None]
    kwargs = {"src_key_padding_mask": torch.arange(9)[None] >= lengths} if pad else {}
    valid = torch.arange(9)[None] < lengths if pad else ...
    with torch.no_grad():
        expected = model(x, **kwargs)[valid]
        report = sparsify_(model, cost_model=SPARSE)
        actual = model(x, **kwargs)[valid]
    assert len(report.swapped) == 4
    assert [layer.activation for layer in report.fused] == ["gelu"] * 2
    assert_close(actual, expected)
    assert any("MultiheadAttention" in layer.reason for layer in report.left)


def test_hugging_face():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)).eval()
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            zeroed(module)
    ids = torch.randint(0, 90, (2, 17))
    expected = output(model, ids)
    report = sparsify_(model, cost_model=SPARSE)
    assert len(report.swapped) == 12
    assert [layer.activation for layer in report.fused] == ["gelu"] * 2
    assert row(report, "pooler.dense").reason == "its weight has no zeros"
    assert_close(output(model, ids), expected)


# --- all or nothing ---


def snapshot(model):
    return [(name, id(module), dict(module._modules)) for name, module in model.named_modules()]


def test_failure_half_way_changes_nothing(monkeypatch):
    model = nn.Sequential(two_layers(masked), nn.ReLU(), two_layers(_hook_pruned))
    before, state = snapshot(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original, calls = SparseLinear.from_dense, []

    def failing(linear, *args, **kwargs):
        calls.append(linear)
        if len(calls) == 4:
            raise MemoryError("no memory")
        return original(linear, *args, **kwargs)

    monkeypatch.setattr(SparseLinear, "from_dense", failing)
    with pytest.raises(RuntimeError, match=r"sparsify_: layer '2\.2': no memory.*skip='2\.2'"):
        sparsify_(model, cost_model=SPARSE)
    assert snapshot(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_weights_that_are_not_finite(value, dtype):
    model = two_layers()
    model[2].weight.data[1, 3] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"sparsify_: layer '2'.*unchanged.*skip='2'"):
        sparsify_(model, dtype, cost_model=SPARSE)
    assert snapshot(model) == before
    assert len(sparsify_(model, dtype, cost_model=SPARSE, skip="2").swapped) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fully_pruned_layer(dtype):
    model = nn.Sequential(zeroed(nn.Linear(24, 40), 2.0))
    x = torch.randn(20, 24)
    expected = output(model, x)
    report = sparsify_(model, dtype, cost_model=SPARSE)
    assert report.layers[0].sparsity == 1.0
    torch.testing.assert_close(output(model, x), expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"dtype": "fp32"}, ValueError, "unknown dtype 'fp32'; expected one of float32"),
        ({"format": "csr"}, ValueError, "unknown format 'csr'; expected one of auto"),
        ({"format": "dense"}, ValueError, "would make nothing sparse"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"tokens": ()}, ValueError, "at least one integer"),
        ({"tokens": (0,)}, ValueError, "at least one integer"),
        ({"min_sparsity": 1.5}, ValueError, "min_sparsity=1.5"),
        ({"min_sparsity": float("nan")}, ValueError, "min_sparsity=nan"),
        ({"skip": "head"}, ValueError, "skip='head' matches no module"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    model = two_layers()
    before = list(model)
    with pytest.raises(error, match=match):
        sparsify_(model, cost_model=SPARSE, **kwargs)
    assert list(model) == before


def test_root_must_be_a_container():
    with pytest.raises(ValueError, match=r"sparsify_: the model is itself a MaskedLinear.*SparseLinear\.from_dense"):
        sparsify_(MaskedLinear(4, 4))
    with pytest.raises(TypeError, match="model is a Tensor"):
        sparsify_(torch.ones(3))


# --- the report ---


def test_report():
    model = nn.Sequential(*(nn.Sequential(zeroed(nn.Linear(64, 64)), nn.ReLU()) for _ in range(3)), nn.Linear(64, 8))
    report = sparsify_(model, cost_model=SPARSE)
    text = str(report)
    assert "*.*  " in text, "layers that differ by a number share a row"
    assert "3 swapped, 0 faster dense, 1 left as they were, 3 with an activation folded in" in text
    assert "1: 9 -> 1, 8: 9 -> 1" in text
    assert len(report.rows()) == 2
    assert re.fullmatch(r"0\.7\d+\.\.0\.7\d+", report.rows()[0][3])
    held = sum(module.memory_bytes() for module in model.modules() if isinstance(module, SparseLinear))
    assert report.bytes_after == held + 4 * (64 * 8 + 8)
    assert report.bytes_before == 4 * (3 * 64 * 65 + 65 * 8)
    assert sum(layer.bytes_after for layer in report.swapped) == held
    console = Console(file=io.StringIO(), width=250)
    console.print(report)
    assert "us dense -> now" in console.file.getvalue()


def test_report_of_nothing():
    report = sparsify_(nn.Sequential(nn.ReLU()))
    assert not report.layers
    assert "0 swapped" in str(report)
