"""quantize_: what it swaps, all or nothing, and its report."""

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn

import pycompress
from pycompress import convert
from pycompress.nn import Int8Linear
from tests.convert_helpers import assert_exact, encoder, output, reason, two_layers

transformers = pytest.importorskip("transformers")


# --- what is swapped ---


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_close_to_float(mode, dtype):
    model = two_layers().to(dtype)
    x = torch.randn(5, 24, dtype=dtype)
    expected = output(model, x)
    report = pycompress.quantize_(model, mode)
    assert [type(m) for m in model] == [Int8Linear, nn.Tanh, Int8Linear]
    assert [layer.name for layer in report.swapped] == ["0", "2"]
    actual = output(model, x)
    assert actual.dtype == dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < 0.03


def test_weight_only_is_exact():
    assert_exact(two_layers(), torch.randn(7, 24), min_swapped=2)


def test_skip_by_name_pattern_and_predicate():
    def fresh():
        return nn.ModuleDict({"head": nn.Linear(8, 8), "body": two_layers(), "header": nn.Linear(8, 8)})

    def swapped(**kwargs):
        return [layer.name for layer in pycompress.quantize_(fresh(), **kwargs).swapped]

    assert swapped(skip="head") == ["body.0", "body.2", "header"]
    assert swapped(skip=["body"]) == ["head", "header"]
    assert swapped(skip=("head*", "body.2")) == ["body.0"]
    assert swapped(skip="*.0") == ["head", "body.2", "header"]
    assert swapped(filter_fn=lambda name, module: module.in_features == 40) == ["body.2"]
    report = pycompress.quantize_(fresh(), skip="head", filter_fn=lambda name, module: name != "body.0")
    assert reason(report, "head") == "skip='head'"
    assert reason(report, "body.0") == "filter_fn said no"


def test_skip_that_matches_nothing_names_the_closest():
    model = nn.ModuleDict({"decoder": nn.ModuleDict({"lm_head": nn.Linear(8, 8), "project": nn.Linear(8, 8)})})
    with pytest.raises(ValueError, match=r"skip='lm_head' matches no module.*'decoder\.lm_head'"):
        pycompress.quantize_(model, skip=["lm_head"])
    with pytest.raises(ValueError, match=r"decoder\.project'"):
        pycompress.quantize_(model, skip="decoder.projct")
    with pytest.raises(TypeError, match="skip holds 3"):
        pycompress.quantize_(model, skip=[3])
    assert isinstance(model["decoder"]["lm_head"], nn.Linear)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"mode": "int8"}, ValueError, "unknown mode 'int8'; expected one of dynamic"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"mode": "static"}, ValueError, r"pycompress\.calibrate"),
        ({"calibration": {"0": (0.0, 1.0)}}, ValueError, "calibration is for mode='static'"),
        ({"mode": "static", "calibration": 3}, TypeError, "calibration is a int"),
        ({"mode": "static", "calibration": {"other": (0.0, 1.0)}}, ValueError, "calibrate this very model"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    model = two_layers()
    before = list(model)
    with pytest.raises(error, match=match):
        pycompress.quantize_(model, **kwargs)
    assert list(model) == before


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_root_must_be_a_container():
    with pytest.raises(ValueError, match=r"needs a parent.*from_float"):
        pycompress.quantize_(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="model is a Tensor"):
        pycompress.quantize_(torch.ones(3))
    with pytest.raises(ValueError, match="ScriptModule"):
        pycompress.quantize_(torch.jit.script(two_layers()))


def test_same_module_under_several_names_stays_shared():
    model = nn.Module()
    model.a = model.b = nn.Linear(8, 8)
    model.part = nn.Sequential(model.a)
    report = pycompress.quantize_(model)
    assert isinstance(model.a, Int8Linear)
    assert model.a is model.b is model.part[0]
    (row,) = report.swapped
    assert (row.name, row.aliases) == ("a", ("b", "part.0"))


def test_second_call_leaves_int8_alone():
    model = two_layers()
    pycompress.quantize_(model, skip="2")
    first = model[0]
    report = pycompress.quantize_(model, "weight_only")
    assert model[0] is first
    assert reason(report, "0") == "already int8 (dynamic)"
    assert model[2].mode == "weight_only"


# --- all or nothing, and what is carried over ---


def snapshot(model):
    return [(name, id(module), dict(module._modules)) for name, module in model.named_modules()]


def test_failure_half_way_changes_nothing(monkeypatch):
    model = encoder(layers=2)
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    original, calls = Int8Linear.from_float, []

    def failing(linear, *args, **kwargs):
        calls.append(linear)
        if len(calls) == 3:
            raise MemoryError("no memory")
        return original(linear, *args, **kwargs)

    monkeypatch.setattr(Int8Linear, "from_float", failing)
    with pytest.raises(RuntimeError, match=r"layer 'layers\.1\.linear1': no memory.*skip='layers\.1\.linear1'"):
        pycompress.quantize_(model)
    assert snapshot(model) == before
    assert model.use_nested_tensor
    assert model.layers[0].activation is nn.functional.gelu
    assert model.layers[0].activation_relu_or_gelu == 2
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = two_layers()
    model[2].weight.data[1, 3] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer '2'.*skip='2'"):
        pycompress.quantize_(model)
    assert snapshot(model) == before
    assert len(pycompress.quantize_(model, skip="2").swapped) == 1


def test_interrupted_edits_are_undone():
    class Interrupted(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if value == 2:
                raise KeyboardInterrupt

    first, second = {"a": 1}, Interrupted(b=1)
    with pytest.raises(KeyboardInterrupt):
        convert.apply_edits([convert.Edit(first, "a", 2), convert.Edit(second, "b", 2)])
    assert (first, second) == ({"a": 1}, {"b": 1})


def test_flags_and_marks_are_carried_over():
    model = two_layers()
    model.eval()
    model[2].train()
    model[0].bias.requires_grad_(False)
    model[0].is_residual = True
    pycompress.quantize_(model)
    assert [m.training for m in model] == [False, False, True]
    assert not model[0].bias.requires_grad
    assert model[2].bias.requires_grad
    assert model[0].is_residual is True


def test_checkpoint_of_a_swapped_model(tmp_path):
    model = encoder().eval()
    fresh = copy.deepcopy(model)
    pycompress.quantize_(model)
    torch.save(model.state_dict(), tmp_path / "int8.pt")
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    pycompress.quantize_(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "int8.pt", weights_only=True), strict=True)
    x = torch.randn(2, 5, 32)
    assert torch.equal(output(fresh, x), output(model, x))


# --- static ---


def test_static_leaves_what_calibration_did_not_reach():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    report = pycompress.quantize_(model, "static", calibration={"used": (-1.0, 1.0)})
    assert isinstance(model["used"], Int8Linear)
    assert isinstance(model["idle"], nn.Linear)
    assert reason(report, "idle") == "was not reached in calibration"


# --- the report ---


def test_report():
    model = encoder(layers=3)
    report = pycompress.quantize_(model)
    text = str(report)
    assert text.count("layers.*.linear1") == 1, "layers that differ by a number share a row"
    assert "6 swapped, 6 left as they were, 3 with an activation folded in" in text
    assert len(report.layers) == 12
    held = sum(m.memory_bytes() for m in model.modules() if isinstance(m, Int8Linear))
    kept = sum(p.numel() * 4 for n, p in model.named_parameters() if "linear" not in n)
    assert report.bytes_after == held + kept
    assert sum(layer.bytes_after for layer in report.swapped) == held
    assert report.bytes_before == sum(p.numel() * 4 for p in encoder(layers=3).parameters())
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert "layers.*.linear2" in console.file.getvalue()


def test_memory():
    model = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    report = pycompress.quantize_(model)
    int8 = sum(n * (k + 8) for n, k in (layer.shape for layer in report.swapped))
    assert report.bytes_after <= 1.01 * int8
    assert report.bytes_before == 4 * (2 * 768 * 3072 + 3072 + 768)


def test_report_of_nothing():
    report = pycompress.quantize_(nn.Sequential(nn.ReLU()))
    assert not report.layers
    assert "0 swapped" in str(report)
