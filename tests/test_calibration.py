"""calibrate: the ranges against those computed directly from the inputs; the model is left as it was."""

import json
import math
from collections import UserDict

import pytest
import torch
from torch import nn

import pycompress
from pycompress.calibration import Calibration, _Histogram, _quantisation_error
from pycompress.nn import Int8Linear
from pycompress.ops import affine_qparams

K = 16


def model_of(*more):
    return nn.Sequential(nn.Linear(K, 32), nn.ReLU(), nn.Linear(32, K), *more)


def batches(n=4, scale=1.0):
    generator = torch.Generator().manual_seed(7)
    return [scale * (i + 1) * torch.randn(6, K, generator=generator) for i in range(n)]


def calibrate(model, data, *args, **kwargs):
    return pycompress.calibrate(model, data, *args, progress=False, **kwargs)


def test_minmax_is_exact():
    model, data = model_of(), batches()
    found = calibrate(model, data)
    x = torch.cat(data)
    hidden = model[:2](x)
    assert found["0"] == (x.min().item(), x.max().item())
    assert found["2"] == pytest.approx((hidden.min().item(), hidden.max().item()), rel=1e-6)
    assert list(found) == ["0", "2"]
    assert found.method == "minmax"


@pytest.mark.parametrize("scales", [[1.0], [0.01, 1.0, 30.0], [30.0, 0.01], [5.0, 5.0, 5.0]])
@pytest.mark.parametrize("shift", [0.0, 3.0, -100.0])
def test_histogram_counts_everything_within_one_bin(scales, shift):
    histogram, parts = _Histogram(), []
    for i, scale in enumerate(scales):
        x = scale * torch.randn(20_000, generator=torch.Generator().manual_seed(i)) + shift
        histogram.update(x, x.min().item(), x.max().item())
        parts.append(x.double())
    values = torch.cat(parts)
    assert histogram.bins.sum() == values.numel()
    bin_width = histogram.width / histogram.bins.numel()
    assert histogram.width <= 2.02 * (values.max() - values.min()), "at least half of the bins cover data"
    for q in (0.0001, 0.01, 0.3, 0.5, 0.9, 0.9999):
        exact = values.sort().values[min(int(q * values.numel()), values.numel() - 1)].item()
        neighbours = values.sort().values[max(int(q * values.numel()) - 1, 0)].item()
        assert min(exact, neighbours) - 1.01 * bin_width <= histogram.quantile(q)
        assert histogram.quantile(q) <= max(exact, neighbours) + 1.01 * bin_width
    edges = histogram.edges()
    counts = torch.histogram(values, edges).hist
    assert (counts - histogram.bins).abs().sum() <= 1e-3 * values.numel(), "only fp32 rounding at the edges"


def test_histogram_of_a_constant():
    for value in (0.0, 5.0, -3.0, 1e-30, 1e30):
        histogram = _Histogram()
        histogram.update(torch.full((9,), value), value, value)
        assert histogram.bins.sum() == 9
        assert histogram.quantile(0.5) == pytest.approx(value)


def test_percentile_clips_both_tails():
    x = torch.randn(500, K, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[1, 1] = 60.0, -40.0
    found = calibrate(model_of(), [x], "percentile", percentile=99.0)
    lo, hi = torch.quantile(x.flatten(), torch.tensor([0.01, 0.99])).tolist()
    width = 2 * 100 / 4096
    assert found["0"] == pytest.approx((lo, hi), abs=width)
    everything = calibrate(model_of(), [x], "percentile", percentile=100)
    assert everything["0"] == (-40.0, 60.0)


def _error(values, lo, hi):
    scale, zero_point = affine_qparams(lo, hi)
    q = ((values / scale).round() + zero_point).clamp(0, 255)
    return ((q - zero_point) * scale - values).square().sum().item()


@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "relu", "outlier"])
def test_mse_is_near_the_best_range(kind):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, K, generator=generator)
    if kind == "laplace":
        x = x.sign() * -torch.rand(x.shape, generator=generator).log()
    elif kind == "uniform":
        x = torch.rand(x.shape, generator=generator) * 2 - 0.5
    elif kind == "relu":
        x = x.relu()
    elif kind == "outlier":
        x[5, 5] = 30.0
    lo, hi = calibrate(model_of(), [x], "mse")["0"]
    values = x.double().flatten()
    low, high = values.min().item(), values.max().item()
    assert low - 1e-6 <= lo <= hi <= high + 1e-6
    reached = _error(values, lo, hi)
    assert reached <= 1.001 * _error(values, low, high), "never worse than minmax"
    fractions = torch.linspace(0.05, 1, 20).tolist()
    best = min(_error(values, low * a, high * b) for a in fractions for b in fractions)
    assert reached <= 1.03 * best


def test_error_of_a_histogram_is_that_of_its_values():
    values, counts = torch.tensor([-1.0, 0.4, 2.0]).double(), torch.tensor([2.0, 1.0, 3.0]).double()
    expected = _error(values.repeat_interleave(counts.long()), -0.5, 1.0)
    assert _quantisation_error(values, counts, -0.5, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_static_model_is_close_to_float(method):
    model, data = model_of(), batches(8)
    expected = model(torch.cat(data))
    calibration = calibrate(model, data, method)
    report = pycompress.quantize_(model, "static", calibration=calibration)
    assert [layer.activation for layer in report.swapped] == ["relu", ""]
    assert model[0].mode == "static"
    actual = model(torch.cat(data))
    assert (actual - expected).norm() / expected.norm() < 0.03
    scale, zero_point = affine_qparams(*calibration["0"])
    assert model[0].input_scale.item() == pytest.approx(scale)
    assert model[0].input_zero_point.item() == zero_point


class Switch(nn.Module):
    """Two inputs, one optional; `idle` is never called."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x, y=None):
        return self.a(x) + (0 if y is None else self.b(input=y))


def test_kinds_of_batches():
    x, y = torch.full((2, K), 2.0), torch.full((2, K), -3.0)
    for batch in ((x, y), [x, y], {"x": x, "y": y}, UserDict(x=x, y=y)):
        found = calibrate(Switch(), [batch])
        assert dict(found) == {"a": (2.0, 2.0), "b": (-3.0, -3.0)}
    assert dict(calibrate(Switch(), (batch for batch in [x]))) == {"a": (2.0, 2.0)}
    model = Switch()
    report = pycompress.quantize_(model, "static", calibration=found)
    assert [layer.name for layer in report.left] == ["idle"]
    assert isinstance(model.b, Int8Linear)


def test_same_selection_as_quantize():
    model = model_of(nn.Linear(K, K))
    found = calibrate(model, batches(), skip="0", filter_fn=lambda name, module: name != "3")
    assert list(found) == ["2"]
    with pytest.raises(ValueError, match="skip='9' matches no module"):
        calibrate(model, batches(), skip="9")


def test_transformer_encoder_is_observed_in_eval_with_padding():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 9, 32)
    mask = torch.arange(9)[None] >= torch.tensor([9, 4, 6])[:, None]
    found = calibrate(model, [{"src": x, "src_key_padding_mask": mask}])
    assert list(found) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        expected = model(x)
        pycompress.quantize_(model, "static", calibration=found)
        assert (model(x) - expected).norm() / expected.norm() < 0.05


def test_modes_are_restored_and_hooks_removed():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    for last, error in ((nn.Dropout(), None), (Fails(), RuntimeError)):
        model = model_of(nn.Dropout(0.5), last)
        model[3].eval()
        flags = [m.training for m in model.modules()]
        if error is None:
            assert calibrate(model, batches()) == calibrate(model, batches()), "dropout is off"
        else:
            with pytest.raises(error, match="broken"):
                calibrate(model, batches())
        assert [m.training for m in model.modules()] == flags
        assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf")])
def test_batches_that_are_not_finite(value, word):
    data = batches()
    data[2][1, 1] = value
    model = model_of()
    with pytest.raises(ValueError, match=f"input of layer '0' has {word}"):
        calibrate(model, data)
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: calibrate(m, []), ValueError, "batches is empty"),
        (
            lambda m: calibrate(m, batches(), "max"),
            ValueError,
            "unknown method 'max'; expected one of minmax",
        ),
        (lambda m: calibrate(m, batches(), "percentile", percentile=12), ValueError, "percentile=12"),
        (lambda m: calibrate(m, batches(), "percentile", percentile=math.nan), ValueError, "percentile=nan"),
        (lambda m: calibrate(m, batches()[0]), TypeError, r"batches is one Tensor.*\[batch\]"),
        (lambda m: calibrate(m, {"x": batches()[0]}), TypeError, "batches is one dict"),
        (lambda m: calibrate(m, 3), TypeError, "batches is a int"),
        (lambda m: calibrate(m, [3]), TypeError, "a batch is a int"),
        (lambda m: calibrate(m[0], batches()), ValueError, "needs a parent"),
        (lambda m: calibrate(nn.Sequential(nn.ReLU()), batches()), ValueError, "nothing to calibrate"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(model_of())


def test_empty_tensors_are_passed_over():
    assert dict(calibrate(Switch(), [torch.zeros(0, K), torch.ones(1, K)])) == {"a": (1.0, 1.0)}
    assert dict(calibrate(Switch(), [torch.zeros(0, K)])) == {}


def test_low_precision_inputs():
    model = model_of().bfloat16()
    for method in ("minmax", "percentile", "mse"):
        assert len(calibrate(model, [b.bfloat16() for b in batches()], method)) == 2


def test_save_and_load(tmp_path):
    found = calibrate(model_of(), batches(), "mse")
    found.save(tmp_path / "ranges.json")
    loaded = Calibration.load(tmp_path / "ranges.json")
    assert dict(loaded) == dict(found)
    assert loaded.method == "mse"
    assert "2 layers" in repr(loaded)
    assert "0: [" in repr(loaded)


GOOD = {"format": "pycompress.calibration", "version": 1, "method": "minmax", "ranges": {"a": [0.0, 1.0]}}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "other"}, "no 'pycompress.calibration' file"),
        ({"version": 2}, "version is 2"),
        ({"method": "max"}, "lacks its ranges or method"),
        ({"ranges": [1]}, "lacks its ranges or method"),
        ({"ranges": {"a": [1.0]}}, r"layer 'a' has range \[1.0\]"),
        ({"ranges": {"a": [1.0, "2"]}}, "expected numbers"),
        ({"ranges": {"a": [2.0, 1.0]}}, "min 2.0 above max 1.0"),
        ({"ranges": {"a": [0.0, math.inf]}}, "expected numbers"),
    ],
)
def test_damaged_files(change, match, tmp_path):
    assert Calibration.from_json(json.dumps(GOOD))["a"] == (0.0, 1.0)
    with pytest.raises(ValueError, match=match):
        Calibration.from_json(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match="not JSON"):
        Calibration.from_json("{")
    with pytest.raises(ValueError, match=r"no 'pycompress\.calibration' file"):
        Calibration.from_json("[]")


def test_progress_bar_goes_to_stderr(capsys):
    pycompress.calibrate(model_of(), batches())
    assert capsys.readouterr().out == ""
