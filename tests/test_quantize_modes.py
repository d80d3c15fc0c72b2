"""quantize_ with a mode for each layer: which key of the mapping holds for a layer, and what the report says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pycompress
from pycompress.nn import Int8Linear

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def make() -> nn.Module:
    def block() -> nn.Module:
        return nn.ModuleDict({"fc1": nn.Linear(8, 12), "fc2": nn.Linear(12, 8)})

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(block() for _ in range(3))
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block["fc2"](block["fc1"](x).relu())
            return self.head(x)

    return Stack()


def modes_of(model: nn.Module) -> dict[str, str]:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Int8Linear))}
    return {name: m.mode if isinstance(m, Int8Linear) else "float" for name, m in linears.items()}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ({"*": "dynamic", "head": "float"}, {"head": "float"}),
        ({"head": "weight_only"}, {"head": "weight_only"}),  # without "*" the rest is dynamic
        ({"head": "weight_only", "*": "float"}, {"*": "float", "head": "weight_only"}),  # wherever "*" stands
        ({}, {}),
        ({"blocks.1": "float"}, {"blocks.1.fc1": "float", "blocks.1.fc2": "float"}),  # and all below it
        ({"*.fc2": "float", "blocks.0": "weight_only"}, {  # the later pattern counts
            "blocks.0.fc1": "weight_only", "blocks.0.fc2": "weight_only", "blocks.1.fc2": "float",
            "blocks.2.fc2": "float",
        }),
        ({"blocks.0.fc2": "dynamic", "*.fc2": "float"}, {  # but never before the layer's own name
            "blocks.1.fc2": "float", "blocks.2.fc2": "float",
        }),
    ],
)  # fmt: skip
def test_which_key_holds(mode, expected):
    model = make()
    rest = expected.pop("*", "dynamic")
    names = list(modes_of(model))
    report = pycompress.quantize_(model, mode)
    assert modes_of(model) == dict.fromkeys(names, rest) | expected
    told = {row.name: getattr(row, "mode", "float") for row in report.layers}
    assert told == modes_of(model)


def test_each_layer_is_what_its_mode_alone_makes_of_it():
    model = make()
    calibration = pycompress.calibrate(model, [X], progress=False)
    modes = {"*": "weight_only", "*.fc1": "static", "head": "dynamic"}
    mixed = copy.deepcopy(model)
    pycompress.quantize_(mixed, modes, calibration=calibration, fuse=False)
    for name in modes_of(model):
        mode = mixed.get_submodule(name).mode
        alone = copy.deepcopy(model)
        ranges = calibration if mode == "static" else None
        pycompress.quantize_(alone, mode, calibration=ranges, fuse=False)
        x = torch.randn(3, mixed.get_submodule(name).in_features)
        assert torch.equal(mixed.get_submodule(name)(x), alone.get_submodule(name)(x)), name


def test_report():
    report = pycompress.quantize_(make(), {"head": "float", "*.fc2": "weight_only"})
    text = str(report)
    assert "quantize_ mode=mixed: 6 swapped (3 dynamic, 3 weight_only), 1 left as they were" in text
    rows = {row[0]: row for row in report.rows()}
    at = report.header.index("mode")
    assert (rows["blocks.*.fc1"][at], rows["blocks.*.fc2"][at], rows["head"][at]) == ("dynamic", "weight_only", "")
    assert rows["head"][-1] == "mode={'head': 'float'}"
    assert pycompress.quantize_(make(), {"*": "weight_only"}).mode == "weight_only"


def test_a_layer_under_two_names_goes_by_either():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    pycompress.quantize_(model, {"b": "float"})
    assert model["a"] is model["b"] is shared
    assert isinstance(model["c"], Int8Linear)


def test_static_layers_that_calibration_did_not_reach_stay_float():
    model = make()
    ranges = {"head": (-1.0, 1.0)}
    report = pycompress.quantize_(
        model, {"*": "dynamic", "head": "static", "blocks.0.fc1": "static"}, calibration=ranges
    )
    assert modes_of(model)["head"] == "static"
    assert [(row.name, row.reason) for row in report.left] == [("blocks.0.fc1", "was not reached in calibration")]


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"mode": {"haed": "float"}}, ValueError, r"mode='haed' matches no module of the model; .*'head'"),
        ({"mode": {"head": "int2"}}, ValueError, r"unknown mode 'int2' for 'head'; expected one of .*float"),
        ({"mode": {"*": "none"}}, ValueError, r"unknown mode 'none' for '\*'"),
        ({"mode": {3: "float"}}, TypeError, r"mode holds 3; expected qualified names"),
        ({"mode": "float"}, ValueError, r"unknown mode 'float'; expected one of dynamic, static, .*, int4, nf4$"),
        ({"mode": ["dynamic"]}, TypeError, r"mode is a list; expected a str, or a mapping"),
        ({"mode": {"head": "static"}}, ValueError, r"mode='static' needs the range"),
        ({"mode": {"head": "float"}, "calibration": {"head": (0, 1)}}, ValueError, r"mode='dynamic' and 'float' would"),
        ({"mode": {"head": "static"}, "calibration": {"a": (0, 1)}}, ValueError, r"none of those to be swapped, as 'h"),
    ],
)
def test_bad_modes_change_nothing(kwargs, error, match):
    model = make()
    before = str(model)
    with pytest.raises(error, match=match):
        pycompress.quantize_(model, **kwargs)
    assert str(model) == before
