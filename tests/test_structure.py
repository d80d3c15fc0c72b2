"""describe and rebuild_: the structure of a compressed model as JSON, and a fresh model that has it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import pycompress
from pycompress.fuse import identity
from pycompress.nn import Int8Linear, LowRankLinear, MaskedLinear
from pycompress.structure import StructureError, describe, rebuild_
from pycompress.structure_kinds import OURS_BY_NAME
from tests.model_file_models import CASES, compressed, encoder, fresh, mlp, shrink


def _shape(model: nn.Module) -> list[tuple[str, type, bool]]:
    return [(name, type(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_a_fresh_model_gets_the_structure(name: str, device: str) -> None:
    model, _ = compressed(name)
    description = json.loads(json.dumps(describe(model)))
    new = fresh(name, device)
    rebuild_(new, description)
    assert _shape(new) == _shape(model)
    for old, rebuilt in zip(model.modules(), new.modules(), strict=True):
        if type(old).__name__ in OURS_BY_NAME:
            words = [layer.extra_repr().split(", bias")[0].split(", backend")[0] for layer in (old, rebuilt)]
            assert words[0] == words[1]
    again = describe(new)
    for entry in (*description["layers"].values(), *again["layers"].values()):
        entry.pop("choice", None)  # of a weight, which is not there yet
    assert again == description


@pytest.mark.parametrize("name", CASES)
def test_what_has_the_structure_keeps_it(name: str) -> None:
    """As after an interruption: the stages before it need not be undone."""
    model, _ = compressed(name)
    before = _shape(model)
    rebuild_(model, describe(model))
    assert _shape(model) == before


def test_every_kind_is_tried_here() -> None:
    found = {entry["kind"] for name in CASES for entry in describe(compressed(name)[0])["layers"].values()}
    assert found == set(OURS_BY_NAME)


def test_a_float_model_is_described_by_its_flags_alone() -> None:
    model = mlp().eval()
    model[2].train()
    assert describe(model) == {
        "class": "Sequential",
        "layers": {},
        "aliases": {},
        "attributes": {},
        "training": False,
        "training_differs": ["2"],
    }


def test_attributes_that_conversions_set_come_back() -> None:
    model = encoder()
    pycompress.quantize_(model)
    new = encoder()
    rebuild_(new, describe(model))
    assert new.use_nested_tensor is False
    for layer in new.layers:
        assert layer.activation is identity
        assert layer.activation_relu_or_gelu == 0
        assert layer.linear1.activation == "relu"


def test_hugging_face_attention_knows_its_heads_again() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    pycompress.prune_(model, 0.5, pattern="head")
    pycompress.shrink_(model)
    new = transformers.BertModel(config).eval()
    rebuild_(new, describe(model))
    heads = [module.num_attention_heads for module in new.modules() if hasattr(module, "num_attention_heads")]
    assert heads == [m.num_attention_heads for m in model.modules() if hasattr(m, "num_attention_heads")]
    assert min(heads) < 4
    new.load_state_dict(model.state_dict(), assign=True)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(new(ids).last_hidden_state, model(ids).last_hidden_state)


def test_layers_inside_a_new_layer() -> None:
    model, _ = compressed("low rank")
    new = mlp()
    rebuild_(new, describe(model))
    assert isinstance(new[2], LowRankLinear)
    assert isinstance(new[2].down, Int8Linear)
    assert new[2].rank == 4


def test_a_scaled_layer_tells_its_sizes_again() -> None:
    """Its sizes are attributes of the pair, which a LowRankLinear asks its part for."""
    model, _ = compressed("shrunk, low rank, scaled")
    assert {entry["kind"] for entry in describe(model)["layers"].values()} >= {"Sequential", "LowRankLinear"}
    rebuilt = fresh("shrunk, low rank, scaled", "cpu")
    rebuild_(rebuilt, describe(model))
    assert str(rebuilt)
    down = model[0].down
    assert isinstance(down, nn.Sequential)
    assert (rebuilt[0].down.in_features, rebuilt[0].down.out_features) == (down.in_features, down.out_features)


def test_marks_of_the_fresh_layer_are_kept() -> None:
    model = mlp()
    pycompress.prune_(model, 0.5)
    new = mlp()
    new[0].is_residual = True
    rebuild_(new, describe(model))
    assert isinstance(new[0], MaskedLinear)
    assert new[0].is_residual is True


def test_a_layer_shrunk_twice_knows_its_first_size() -> None:
    model = mlp()
    shrink(model, torch.empty(0))
    assert model[2].out_features == 32
    shrink(model, torch.empty(0))
    assert model[2].out_features < 32
    entry = describe(model)["layers"]["2"]
    assert entry["original"] == [48, 48]
    rebuild_(new := mlp(), describe(model))
    assert new[2].weight.shape == model[2].weight.shape


def test_the_model_itself_cannot_be_replaced() -> None:
    description = describe(Int8Linear(4, 4))
    with pytest.raises(StructureError, match="the model itself is to become a Int8Linear"):
        rebuild_(nn.Linear(4, 4), description)


def test_no_module_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="describe: model is a list"):
        describe([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rebuild_: model is a str"):
        rebuild_("x", {})  # type: ignore[arg-type]
    with pytest.raises(StructureError, match="the description is a list"):
        rebuild_(mlp(), [])  # type: ignore[arg-type]


_DESCRIPTIONS = {name: describe(compressed(name)[0]) for name in ("shrunk int8", "encoder shrunk", "low rank")}
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(sorted(OURS_BY_NAME)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.data())
def test_any_description_fits_or_is_refused_and_changes_nothing(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(_DESCRIPTIONS)))
    description = copy.deepcopy(_DESCRIPTIONS[name])
    *path, last = data.draw(st.sampled_from(_places(description)[1:]))
    at: Any = description
    for key in path:
        at = at[key]
    if data.draw(st.booleans()):
        at[last] = data.draw(_JSON)
    else:
        del at[last]
    model = fresh(name, "cpu")
    before = list(model.named_modules()), [dict(m.__dict__) for m in model.modules() if m.training]
    said = ""
    try:
        rebuild_(model, description)
    except StructureError as error:
        said = str(error)
    if said:
        assert said.startswith("rebuild_: ")
        assert (list(model.named_modules()), [dict(m.__dict__) for m in model.modules() if m.training]) == before
