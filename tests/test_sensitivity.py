"""sensitivity: the errors are those of the model with one layer quantised, and what is chosen is what was measured."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pycompress
from pycompress import sensitivity_measure
from pycompress.nn import Int8Linear
from pycompress.report import model_bytes
from pycompress.sensitivity import SensitivityReport, TargetNotReachedError, sensitivity
from pycompress.sensitivity_measure import main_output, rows_of

X = [torch.randn(6, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]


class Net(nn.Module):
    """Four layers, one of which (`b`) sees two channels far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 5)
        self.unused = nn.Linear(16, 16)
        self.register_buffer("size", torch.ones(16))
        self.size[3] = self.size[9] = 100.0
        with torch.no_grad():
            self.b.weight.div_(self.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c(self.b(self.a(x).relu() * self.size).relu()).relu())


def measured(model: nn.Module, **kwargs) -> SensitivityReport:
    return sensitivity(model, X, progress=False, **kwargs)


def error_of(model: nn.Module, int8: nn.Module) -> tuple[float, float]:
    """1 - mean cosine over the samples, and relative L2, worked out here."""
    with torch.no_grad():
        before, after = (torch.cat([m(x) for x in X]).double() for m in (model, int8))
    cosine = F.cosine_similarity(before, after, dim=1).mean()
    return float(1 - cosine), float((after - before).norm() / before.norm())


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only", "int4", "nf4"])
def test_the_error_is_that_of_the_model_with_this_layer_alone(mode):
    model = Net().eval()
    report = measured(model, modes=[mode])
    assert [row.name for row in report.layers] == ["a", "b", "c", "head"] + ["unused"] * (mode != "static")
    for row in report.layers:
        int8 = copy.deepcopy(model)
        ranges = pycompress.calibrate(model, X, progress=False) if mode == "static" else None
        swap = pycompress.quantize_(int8, mode, filter_fn=lambda name, _, row=row: name == row.name, calibration=ranges)
        assert [layer.name for layer in swap.swapped] == [row.name]
        assert (row.errors[mode].cosine, row.errors[mode].l2) == pytest.approx(error_of(model, int8), abs=1e-6)
        assert row.bytes_after[mode] == int8.get_submodule(row.name).memory_bytes()
        assert row.bytes_before == model_bytes(model.get_submodule(row.name))
    if mode == "dynamic":
        assert report.by_error[0].name == "b"
        assert report.by_error[-1].name == "unused"
        assert report.by_error[-1].error("dynamic") == 0.0


def test_the_model_is_not_changed():
    model = Net().train()
    model.a.eval()
    text, state = str(model), {key: value.clone() for key, value in model.state_dict().items()}
    modules, random = dict(model.named_modules()), torch.get_rng_state()
    report = measured(model)
    report.choose(0.9)
    assert str(model) == text
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not model.a.training
    assert torch.equal(torch.get_rng_state(), random)


def test_an_exception_puts_the_layer_back(monkeypatch):
    model = Net()
    text, calls = str(model), 0

    def raises(self, x):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return F.linear(x, self.weight.float() * self.weight_scale[:, None], self.bias)

    monkeypatch.setattr(Int8Linear, "forward", raises)
    with pytest.raises(KeyboardInterrupt):
        measured(model)
    assert str(model) == text
    assert calls == 3


def test_each_batch_runs_once_in_float():
    """And once for every layer and mode; a generator will do."""

    class Counting(Net):
        calls = 0

        def forward(self, x):
            Counting.calls += type(x) is torch.Tensor  # not when it is traced
            return super().forward(x)

    sensitivity(Counting(), (x for x in X), modes="dynamic", progress=False)
    assert Counting.calls == len(X) * (1 + 5)


# --- which rows are compared ---


def test_rows_are_tokens_samples_or_the_whole():
    tokens = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(rows_of(tokens, {"attention_mask": mask}), tokens[mask == 1].double())
    assert rows_of(tokens, {"attention_mask": mask[:, :2]}).shape == (6, 4)  # of other tokens
    assert rows_of(tokens, tokens).shape == (6, 4)
    assert rows_of(torch.randn(2, 3), {"attention_mask": mask}).shape == (2, 3)
    assert rows_of(torch.randn(2, 3, 4, 5), tokens).shape == (2, 60)
    assert rows_of(torch.randn(7, 1), tokens).shape == (1, 7)  # the cosine of single numbers says nothing
    assert rows_of(torch.randn(7), tokens).shape == (1, 7)


def test_masked_tokens_do_not_count():
    torch.manual_seed(5)
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 50, (3, 8))
    mask = (torch.arange(8) < torch.tensor([[8], [5], [2]])).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    padded = sensitivity(model, [batch], modes="dynamic", progress=False).layers
    rows = [{"input_ids": ids[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]} for i, n in enumerate((8, 5, 2))]
    alone = sensitivity(model, rows, modes="dynamic", progress=False).layers
    for one, other in zip(padded, alone, strict=True):
        assert one.errors["dynamic"].l2 == pytest.approx(other.errors["dynamic"].l2, rel=1e-3, abs=1e-6), one.name
    assert [row.name for row in padded if row.error("dynamic") == 0] == ["pooler.dense"]  # the hidden state is compared

    pooled = sensitivity(model, rows, modes="dynamic", progress=False, output_fn=lambda out, batch: out.pooler_output)
    assert next(row for row in pooled.layers if row.name == "pooler.dense").error("dynamic") > 0


def test_main_output():
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    assert main_output(x, x) is x
    assert main_output((x, y), x) is x
    assert main_output({"last_hidden_state": y, "logits": x}, x) is x
    assert main_output({"loss": torch.tensor(1.0), "other": x}, x) is x
    for output in ("text", {}, (), {"a": 1}, torch.ones(2, dtype=torch.int64)):
        with pytest.raises(TypeError, match="pass output_fn"):
            main_output(output, x)


# --- choosing ---


@pytest.mark.parametrize("target", [0.9, 0.999, 0.99995, 0.999999])
def test_what_is_chosen_is_what_quantize_makes(target):
    model = Net().eval()
    choice = measured(model).choose(target)
    assert choice.cosine >= target
    int8 = copy.deepcopy(model)
    pycompress.quantize_(int8, choice)
    assert 1 - error_of(model, int8)[0] == pytest.approx(choice.cosine, abs=1e-7)
    linears = [m for m in int8.modules() if isinstance(m, (nn.Linear, Int8Linear))]
    before = sum(model_bytes(m) for m in model.modules() if isinstance(m, nn.Linear))
    assert choice.share == pytest.approx(sum(model_bytes(m) for m in linears) / before)
    assert f"mean cosine {choice.cosine:.6f}" in choice.summary()


def test_the_most_sensitive_layer_goes_first_and_no_more_than_needed():
    model = Net().eval()
    report = measured(model)
    plain = copy.deepcopy(model)
    pycompress.quantize_(plain)
    reached = 1 - error_of(model, plain)[0]
    assert set(report.choose(reached - 1e-6).values()) == {"dynamic", "float"}  # "*" is float
    choice = report.choose(reached + 0.2 * (1 - reached))
    assert {name: mode for name, mode in choice.items() if mode != "dynamic"} == {"*": "float", "b": "weight_only"}
    choice = report.choose(reached + 0.2 * (1 - reached), gentler=["float"])
    assert {name: mode for name, mode in choice.items() if mode != "dynamic"} == {"*": "float", "b": "float"}


def test_skipped_layers_stay_float_and_count():
    model = Net().eval()
    choice = measured(model, skip=["unused", "head"]).choose(0.5)
    int8 = copy.deepcopy(model)
    pycompress.quantize_(int8, choice)
    assert isinstance(int8.head, nn.Linear)
    assert isinstance(int8.unused, nn.Linear)
    assert choice.share > measured(model).choose(0.5).share


def test_out_of_reach():
    report = measured(Net().eval())
    with pytest.raises(
        TargetNotReachedError, match=r"mean cosine of 1 .* at most 0.2 .* mode dynamic take 0\.\d+"
    ) as caught:
        report.choose(1, max_bytes=0.2)
    assert set(caught.value.best.values()) == {"float", "dynamic"}
    share = report.choose(0.5).share
    with pytest.raises(TargetNotReachedError, match=r"at best: .* weight_only") as caught:
        report.choose(1 - 1e-12, max_bytes=share + 0.001)  # no room for the large layers
    assert caught.value.best.share <= share + 0.001
    assert caught.value.best["b"] == "weight_only"
    assert "float" not in [caught.value.best[name] for name in "abc"]
    assert caught.value.best.cosine > report.choose(0.5).cosine
    with pytest.raises(TargetNotReachedError):
        report.choose(0.999999, gentler=[])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"target": 0}, "target=0; expected a mean cosine"),
        ({"target": 1.5}, r"target=1\.5"),
        ({"target": 0.9, "max_bytes": 0}, "max_bytes=0; expected a share"),
        ({"target": 0.9, "gentler": ["int2"]}, "gentler holds 'int2'; expected some of dynamic, weight_only, float$"),
        ({"target": 0.9, "gentler": "static"}, r"gentler holds 'static'.*modes=\('dynamic', 'weight_only', 'static'\)"),
    ],
)
def test_bad_choices(kwargs, match):
    with pytest.raises(ValueError, match=match):
        measured(Net()).choose(**kwargs)


# --- the report ---


def test_table():
    report = measured(Net())
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert "1 - cosine, dynamic" in lines[0]
    assert "rel. L2, weight_only" in lines[0]
    assert lines[2].startswith("b ")
    assert lines[-1].startswith(
        "sensitivity: 5 layers, each quantised alone; the worst in mode dynamic is b, 1 - cosine "
    )
    assert report.__rich__().row_count == 5


def test_json(tmp_path):
    model = Net().eval()
    report = measured(model, skip="head")
    report.save(tmp_path / "sensitivity.json")
    again = SensitivityReport.load(tmp_path / "sensitivity.json")
    assert again == report
    assert str(again) == str(report)
    with pytest.raises(ValueError, match=r"read from JSON; pass model=\.\.\. and batches"):
        again.choose(0.99)
    assert again.choose(0.999, model=model, batches=X) == report.choose(0.999)
    with pytest.raises(ValueError, match=r"the model has no layer 'a'"):
        again.choose(0.999, model=nn.Sequential(nn.Linear(16, 16)), batches=X)


def damaged(**changes) -> str:
    content = json.loads(measured(Net()).to_json())
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "no JSON", "[]", "{}", "[" * 100_000, damaged(version=2), damaged(format="x"), damaged(modes=["int2"]),
        damaged(layers=[]), damaged(layers=[{}]), damaged(layers=7), damaged(other_bytes="many"), damaged(modes=None),
        damaged(modes=["static"]),
    ],
)  # fmt: skip
def test_damaged_json(text):
    with pytest.raises(ValueError, match="SensitivityReport: "):
        SensitivityReport.from_json(text)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = measured(Net())
    for name in ("all.png", "few.svg"):
        report.plot(tmp_path / name, most=5 if name == "all.png" else 2)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert b"2 of 5 layers" in (tmp_path / "few.svg").read_bytes() or (tmp_path / "few.svg").stat().st_size > 1000


# --- errors ---


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"modes": ["int2"]}, ValueError, "sensitivity: unknown mode 'int2'"),
        ({"modes": []}, ValueError, "expected one or more"),
        ({"modes": ["dynamic", "dynamic"]}, ValueError, "each once"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu'"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": X[0]}, TypeError, "batches is one Tensor"),
        ({"batches": [X[0] * torch.nan]}, ValueError, "the float model's output has NaN or Inf"),
        ({"batches": [X[0][:0]]}, ValueError, "is empty; nothing can be compared"),
        ({"skip": "*"}, ValueError, "nothing to measure"),
        ({"skip": "heat"}, ValueError, "skip='heat' matches no module.*'head'"),
        ({"calibration": {"a": (0.0, 1.0)}}, ValueError, "calibration is for mode 'static'"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    model = Net()
    text = str(model)
    with pytest.raises(error, match=match):
        sensitivity(model, **{"batches": X, "progress": False, **kwargs})
    assert str(model) == text


def test_a_layer_that_cannot_be_quantised_is_named(monkeypatch):
    model = Net()
    with torch.no_grad():
        model.unused.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"sensitivity: layer 'unused': .* skip='unused'"):
        measured(model)


def test_an_output_that_is_not_finite_when_quantised_is_the_worst_error(monkeypatch):
    def infinite(layer, *args):
        new = Int8Linear.from_float(layer.module)
        if layer.name == "c":
            new.weight_scale.fill_(torch.inf)
        return new

    monkeypatch.setattr(sensitivity_measure, "new_layer", infinite)
    report = measured(Net(), modes="dynamic")
    assert report.by_error[0].name == "c"
    assert report.by_error[0].error("dynamic") == float("inf")
    assert SensitivityReport.from_json(report.to_json()) == report


def test_the_mask_of_an_encoder_is_not_that_of_the_tokens_that_are_decoded() -> None:
    output = torch.randn(2, 3, 4)
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]), "decoder_input_ids": torch.ones(2, 3).long()}
    assert rows_of(output, batch).shape == (6, 4)
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert rows_of(output, batch).shape == (5, 4)
