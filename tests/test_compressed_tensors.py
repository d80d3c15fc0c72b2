"""export_compressed_tensors and import_compressed_tensors: bits kept both ways, and as the library has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pycompress
from pycompress.compressed_tensors import export_compressed_tensors, import_compressed_tensors
from pycompress.compressed_tensors.formats import pack_zero_points, unpack_zero_points
from pycompress.nn import Int4Linear, Int8Linear, MaskedLinear, SparseLinear
from tests.compressed_tensors_helpers import (
    assert_same_state,
    config_of,
    library_scheme,
    library_tensors,
    library_weight,
    local,
    net,
    our_weight,
    pruned,
    tensors_of,
    with_layers,
)

RANGE = (-1.5, 3.0)
QUANTISED = {
    "dynamic": lambda: with_layers(Int8Linear.from_float, "dynamic"),
    "static": lambda: with_layers(Int8Linear.from_float, "static", input_range=RANGE),
    "static symmetric": lambda: with_layers(Int8Linear.from_float, "static", input_range=(-128.0, 127.0)),
    "weight_only": lambda: with_layers(Int8Linear.from_float, "weight_only"),
    "int4 groups": lambda: with_layers(Int4Linear.from_float, group_size=32),
    "int4 channels": lambda: with_layers(Int4Linear.from_float, group_size=-1),
    "int4 asymmetric": lambda: with_layers(Int4Linear.from_float, group_size=16, symmetric=False),
    "int4 asymmetric channels": lambda: with_layers(Int4Linear.from_float, group_size=-1, symmetric=False),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_there_and_back_is_the_same_model_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = QUANTISED[kind]()
    export_compressed_tensors(model, tmp_path)
    loaded = import_compressed_tensors(tmp_path, net())
    assert_same_state(model, loaded)
    x = torch.randn(5, 64)
    assert torch.equal(model(x), loaded(x))
    again = tmp_path / "again"
    export_compressed_tensors(loaded, again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert (again / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_library_reads_what_we_write(kind: str, tmp_path: Path) -> None:
    model = QUANTISED[kind]()
    export_compressed_tensors(model, tmp_path)
    for layer in ("0", "2"):
        assert torch.equal(library_weight(tmp_path, layer), our_weight(model.get_submodule(layer)))


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_library_writes_what_we_write(kind: str, tmp_path: Path) -> None:
    export_compressed_tensors(QUANTISED[kind](), tmp_path)
    for layer in ("0", "2"):
        ours, theirs = local(tensors_of(tmp_path), layer), library_tensors(tmp_path, layer)
        assert set(ours) == set(theirs)
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype, key
            assert torch.equal(tensor, theirs[key]), key


def test_a_static_zero_point_is_shifted_by_128(tmp_path: Path) -> None:
    model = QUANTISED["static"]()
    export_compressed_tensors(model, tmp_path)
    ours = model[0].input_zero_point.item()
    zero_point = tensors_of(tmp_path)["0.input_zero_point"]
    assert zero_point.dtype == torch.int8
    assert zero_point.item() == ours - 128
    x = torch.linspace(-1.5, 3.0, 64)
    scheme = library_scheme(tmp_path, "0").input_activations
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    theirs = fake_quantize(x, tensors_of(tmp_path)["0.input_scale"], zero_point, scheme)
    scale = model[0].input_scale
    q = (x / scale + ours).round().clamp(0, 255)
    torch.testing.assert_close(theirs, (q - ours) * scale, rtol=0, atol=0)


def test_mixed_schemes_name_their_layers(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    pycompress.quantize_(model, {"0": "dynamic", "1": "weight_only", "2": "float", "3": "int4"}, group_size=16)
    report = export_compressed_tensors(model, tmp_path)
    config = config_of(tmp_path)
    assert config["format"] == "mixed-precision"
    assert [group["targets"] for group in config["config_groups"].values()] == [["0"], ["1"], ["3"]]
    assert config["ignore"] == ["2"]
    assert len(report.layers) == 3
    assert "W4A16 pack-quantized, group_size=16" in str(report)
    loaded = import_compressed_tensors(tmp_path, nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))))
    assert_same_state(model, loaded)
    for layer in ("0", "1", "3"):
        assert torch.equal(library_weight(tmp_path, layer), our_weight(model.get_submodule(layer)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_pruned_layer_there_and_back(dtype: str, tmp_path: Path) -> None:
    model = pruned(net())
    for key in ("0", "2"):
        setattr(model, key, SparseLinear.from_dense(model.get_submodule(key), dtype=dtype, format="bitmap"))
    export_compressed_tensors(model, tmp_path)
    assert config_of(tmp_path)["sparsity_config"]["targets"] == ["0", "2"]
    assert config_of(tmp_path)["sparsity_config"]["global_sparsity"] == pytest.approx(0.7, abs=0.05)
    loaded = import_compressed_tensors(tmp_path, net())
    assert_same_state(model, loaded)
    torch.testing.assert_close(model(torch.ones(2, 64)), loaded(torch.ones(2, 64)))


def test_bitmasks_that_version_0_11_wrote() -> None:
    # Its writer of the format was taken out of the library after version 0.14. Its reader gives these sums.
    folder = Path(__file__).parent / "data" / "compressed_tensors_0_11"
    model = nn.Sequential(nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 5), nn.LayerNorm(5))
    loaded = import_compressed_tensors(folder, model)
    first, second, norm = loaded[0], loaded[2], loaded[3]
    assert isinstance(first, SparseLinear)
    assert (first.dtype, second.dtype) == ("float32", "bfloat16")
    for layer, expected in ((first, -238.75), (second, 137.0)):
        dense = layer.to_dense().double()
        assert (dense.flatten() * torch.arange(dense.numel())).sum() == expected
    assert norm.weight.tolist() == [1.0, 0.0, 2.0, 0.0, 0.5]
    assert first.bias.tolist() == [i / 8 for i in range(9)]


def test_a_written_bitmask_is_that_of_version_0_11(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "data" / "compressed_tensors_0_11"
    model = nn.Sequential(nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 5), nn.LayerNorm(5))
    export_compressed_tensors(import_compressed_tensors(folder, model), tmp_path)
    ours, theirs = tensors_of(tmp_path), tensors_of(folder)
    for name in (name for name in theirs if not name.startswith("3.")):
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def test_a_pruned_layer_with_its_zeros_is_read_by_todays_library(tmp_path: Path) -> None:
    model = pruned(net())
    for key in ("0", "2"):
        setattr(model, key, SparseLinear.from_dense(model.get_submodule(key), dtype="int8", format="bitmap"))
    export_compressed_tensors(model, tmp_path, sparse="dense")
    assert config_of(tmp_path)["sparsity_config"] == {}
    for layer in ("0", "2"):
        assert torch.equal(library_weight(tmp_path, layer), our_weight(model.get_submodule(layer)))
    loaded = import_compressed_tensors(tmp_path, net())
    assert isinstance(loaded[0], Int8Linear)
    torch.testing.assert_close(loaded(torch.ones(2, 64)), model(torch.ones(2, 64)))


def test_a_masked_layer_may_be_trained_on(tmp_path: Path) -> None:
    model = net()
    pycompress.prune_(model, 0.6)
    export_compressed_tensors(model, tmp_path)
    loaded = import_compressed_tensors(tmp_path, net(), masked=True)
    for one, other in zip(model, loaded, strict=True):
        if isinstance(one, MaskedLinear):
            assert isinstance(other, MaskedLinear)
            assert torch.equal(one.mask, other.mask)
            assert torch.equal(torch.where(one.mask, one.weight, 0.0), other.weight)
    loaded(torch.randn(2, 64)).sum().backward()
    assert loaded[0].weight.grad is not None
    run = import_compressed_tensors(tmp_path, net())
    assert isinstance(run[0], SparseLinear)
    torch.testing.assert_close(run(torch.ones(2, 64)), loaded(torch.ones(2, 64)))


@pytest.mark.parametrize("kind", ["dynamic", "weight_only", "int4 groups"])
def test_scales_of_16_bits_are_exact_and_come_back(kind: str, tmp_path: Path) -> None:
    model = QUANTISED[kind]()
    for key in ("0", "2"):
        layer = model.get_submodule(key)
        state = layer.state_dict()
        state["weight_scale"] = state["weight_scale"].bfloat16().float()
        layer.load_state_dict(state)
    export_compressed_tensors(model, tmp_path, scale_dtype=torch.bfloat16)
    assert tensors_of(tmp_path)["0.weight_scale"].dtype == torch.bfloat16
    loaded = import_compressed_tensors(tmp_path, net())
    assert_same_state(model, loaded)
    again = tmp_path / "again"
    export_compressed_tensors(loaded, again, scale_dtype=torch.bfloat16)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_model_on_the_meta_device_and_tied_weights(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"table": nn.Embedding(40, 16), "fc": nn.Linear(16, 16), "head": nn.Linear(16, 40)})
        model["head"].weight = model["table"].weight
        return model

    model = tied()
    pycompress.quantize_(model, "weight_only")
    assert isinstance(model["head"], nn.Linear)
    export_compressed_tensors(model, tmp_path)
    assert "head.weight" not in tensors_of(tmp_path)
    with torch.device("meta"):
        fresh = tied()
    fresh["head"].weight = fresh["table"].weight
    loaded = import_compressed_tensors(tmp_path, fresh)
    assert loaded["head"].weight is loaded["table"].weight
    assert_same_state(model, loaded)


def test_frozen_parameters_and_flags_stay_the_models(tmp_path: Path) -> None:
    export_compressed_tensors(QUANTISED["dynamic"](), tmp_path)
    model = net().eval()
    model[3].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    loaded = import_compressed_tensors(tmp_path, model)
    assert loaded is model
    assert not loaded[0].training
    assert not loaded[3].weight.requires_grad
    assert loaded[3].bias.requires_grad
    assert not loaded[0].bias.requires_grad
    assert loaded[2].bias.requires_grad


@settings(deadline=None, max_examples=50)
@given(n=st.integers(0, 70), groups=st.integers(0, 9), seed=st.integers(0, 99))
def test_zero_points_are_packed_as_the_library_packs_them(n: int, groups: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(seed)
    zero_point = torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
    packed = pack_zero_points(zero_point)
    assert torch.equal(unpack_zero_points(packed, n), zero_point)
    if n and groups:
        theirs = pack_to_int32((zero_point.to(torch.int16) - 8).to(torch.int8), 4, packed_dim=0)
        assert torch.equal(packed, theirs)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), k=st.integers(1, 70), symmetric=st.booleans(), bits=st.sampled_from((4, 8)))
def test_any_shape_there_and_back(n: int, k: int, symmetric: bool, bits: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("any")
    linear = nn.Linear(k, n)
    made = Int4Linear.from_float(linear, group_size=-1, symmetric=symmetric)
    layer = made if bits == 4 else Int8Linear.from_float(linear, "weight_only")
    model = nn.Sequential(layer)
    export_compressed_tensors(model, folder)
    assert torch.equal(library_weight(folder, "0"), our_weight(layer))
    assert_same_state(model, import_compressed_tensors(folder, nn.Sequential(nn.Linear(k, n))))
