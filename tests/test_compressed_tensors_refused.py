"""What compressed-tensors cannot hold, and checkpoints that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import pycompress
from pycompress.compressed_tensors import CompressedTensorsError, export_compressed_tensors, import_compressed_tensors
from pycompress.nn import Int4Linear, Int8Linear, SparseLinear
from tests.compressed_tensors_helpers import net, pruned, tensors_of, with_layers

# ---- export ---------------------------------------------------------------------------------------------------------


def fused() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    pycompress.quantize_(model)
    return model


def smoothed() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    pycompress.smooth_(model, [torch.randn(4, 8)], where="anywhere")
    return model


def prepared() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    pycompress.prepare_qat_(model)
    return model


def low_rank() -> nn.Module:
    return nn.Sequential(pycompress.nn.LowRankLinear.from_linear(nn.Linear(16, 16), 2))


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(8, 16))
    pycompress.quantize_(model)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (fused, r"layer '0' has relu fused into it.*fuse=False"),
    "smooth": (smoothed, r"layer '\d' is scaled by smooth_"),
    "prepared": (prepared, r"layer '0' is a FakeQuantLinear.*quantize_"),
    "low rank": (low_rank, r"layer '0' is a LowRankLinear"),
    "conv1d": (conv1d, r"layer '0' took the place of transformers' Conv1D"),
    "nf4": (lambda: with_layers(Int4Linear.from_float, "nf4", group_size=32), r"layer '0' is of the format nf4"),
    "short group": (lambda: with_layers(Int4Linear.from_float, group_size=40), r"64 inputs in groups of 40"),
    "a layer alone": (lambda: Int8Linear.from_float(nn.Linear(4, 4)), r"export nn.Sequential\(model\)"),
    "convolution": (lambda: nn.Sequential(pycompress.nn.Int8Conv2d(3, 4, 1)), r"layer '0' is a Int8Conv2d"),
    "attention": (lambda: nn.Sequential(pycompress.nn.Int8MultiheadAttention(8, 2)), r"layer '0' is a Int8Multihead"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_format_cannot_hold_is_refused_by_name(what: str, tmp_path: Path) -> None:
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_16_bits_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer '0': its scales are not exact in torch.bfloat16.*Nothing was written"):
        export_compressed_tensors(with_layers(Int8Linear.from_float), tmp_path, scale_dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown sparse='csr'; expected one of bitmask, dense"):
        export_compressed_tensors(net(), tmp_path, sparse="csr")
    with pytest.raises(ValueError, match=r"scale_dtype=torch.int8"):
        export_compressed_tensors(net(), tmp_path, scale_dtype=torch.int8)
    with pytest.raises(TypeError, match="model is a dict"):
        export_compressed_tensors({}, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a dict"):
        import_compressed_tensors(tmp_path, {})  # type: ignore[arg-type]


# ---- import ---------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def weights(**changes: Any) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"]["weights"].update(changes)


def inputs(**changes: Any) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"]["input_activations"].update(changes)


def tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Change:
    def apply(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = new

    return apply


def top(**changes: Any) -> Change:
    return lambda config, tensors: config.update(changes)


def target(pattern: str) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"].update(targets=[pattern])


INT8 = {
    "fp8": (weights(type="float"), "of type float"),
    "asymmetric": (weights(symmetric=False), "asymmetric weights"),
    "group": (weights(strategy="group", group_size=32), "by group"),
    "block": (weights(strategy="block"), "by block"),
    "bits": (weights(num_bits=6), "6-bit"),
    "no group size": (weights(strategy="group", group_size=-3), "group_size=-3"),
    "inputs of 4 bits": (inputs(num_bits=4), "activations of 4 bits"),
    "inputs by group": (inputs(strategy="group"), "by group"),
    "affine tokens": (inputs(symmetric=False), "symmetric=False"),
    "outputs": (lambda c, t: c["config_groups"]["group_0"].update(output_activations={"num_bits": 8}), "outputs"),
    "format": (lambda c, t: c["config_groups"]["group_0"].update(format="marlin-24"), "'marlin-24'"),
    "preset": (top(config_groups={"NVFP4": ["Linear"]}), "no scheme that pycompress has"),
    "group is a number": (top(config_groups={"group_0": 3}), "expected a JSON object"),
    "groups are a list": (top(config_groups=[1]), "expected a JSON object"),
    "targets": (lambda c, t: c["config_groups"]["group_0"].update(targets="Linear"), "expected a list of names"),
    "ignore": (top(ignore=[3]), "expected a list of names"),
    "cache": (top(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "rotations": (top(transform_config={"config_groups": {}}), "transform_config"),
    "status": (top(quantization_status="frozen"), "'frozen'"),
    "method": (top(quant_method="gptq"), "'gptq'"),
    "sparsity": (top(sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
    "pattern": (target("re:("), "is not used"),
    "slow pattern": (target("re:(a+)+b"), "repeats a group"),
    "starry pattern": (target("re:.*.*.*.*.*x"), "repetitions"),
    "long pattern": (target("re:" + "a" * 501), "longer than 500"),
    "nothing matches": (target("re:nothing"), r"there is a tensor '0.weight_scale'|expected torch.float32"),
    "no scale": (tensor("0.weight_scale", lambda t: None), "layer '0': its weight_scale is missing"),
    "scale of another shape": (tensor("0.weight_scale", lambda t: t[:3].clone()), r"\(3, 1\); expected"),
    "scale of integers": (tensor("0.weight_scale", lambda t: t.int()), "torch.int32"),
    "NaN": (tensor("0.weight_scale", lambda t: t.fill_(torch.nan)), "layer '0'.*NaN"),
    "weight of floats": (tensor("0.weight", lambda t: t.float()), "torch.float32"),
    "weight of another shape": (tensor("0.weight", lambda t: t[:, :7].clone()), r"\(96, 7\)"),
    "zero point": (lambda c, t: t.update({"0.weight_zero_point": torch.ones(96, 1, dtype=torch.int8)}), "is not 0"),
    "g_idx": (lambda c, t: t.update({"0.weight_g_idx": torch.arange(64)}), "'weight_g_idx'"),
    "an extra tensor": (lambda c, t: t.update({"7.weight": torch.ones(2)}), "'7.weight' that the model has no place"),
    "a missing tensor": (tensor("3.bias", lambda t: None), "no tensor for 3.bias"),
    "a missing bias": (tensor("0.bias", lambda t: None), "without a bias"),
    "a norm of another size": (tensor("3.bias", lambda t: t[:3].clone()), "3.bias is"),
    "a layer is missing": (lambda c, t: [t.pop(k) for k in list(t) if k.startswith("0.")], "layer '0': there are no"),
}


def checked(
    model: nn.Module, change: Change, message: str, folder: Path, error: type[Exception] = CompressedTensorsError
) -> None:
    """The checkpoint of `model`, changed, is refused with this message and changes nothing."""
    export_compressed_tensors(model, folder)
    settings, tensors = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    change(settings["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    fresh = net()
    before = deepcopy(fresh)
    with pytest.raises(error, match=message) as raised:
        import_compressed_tensors(folder, fresh)
    assert "The model is unchanged" in str(raised.value)
    assert str(fresh) == str(before)
    for name, value in before.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])


@pytest.mark.parametrize("what", INT8)
def test_an_int8_checkpoint_that_lies(what: str, tmp_path: Path) -> None:
    change, message = INT8[what]
    checked(with_layers(Int8Linear.from_float), change, message, tmp_path)


STATIC = {
    "no scale": (tensor("0.input_scale", lambda t: None), "input_scale is missing"),
    "negative scale": (tensor("0.input_scale", lambda t: -t), "no scale"),
    "zero point too large": (tensor("0.input_zero_point", lambda t: t.int() + 300), "expected -128 to 127"),
    "zero point of floats": (tensor("0.input_zero_point", lambda t: t.float()), "torch.float32"),
    "symmetric with a zero point": (inputs(symmetric=True), "input_zero_point is not 0"),
}


@pytest.mark.parametrize("what", STATIC)
def test_a_static_checkpoint_that_lies(what: str, tmp_path: Path) -> None:
    change, message = STATIC[what]
    checked(with_layers(Int8Linear.from_float, "static", input_range=(-1.0, 3.0)), change, message, tmp_path)


INT4 = {
    "shape": (tensor("0.weight_shape", lambda t: t + 1), r"weight_shape says \[97, 65\]"),
    "huge shape": (tensor("0.weight_shape", lambda t: t * 10**12), "weight_shape says"),
    "shape of floats": (tensor("0.weight_shape", lambda t: t.float()), "torch.float32"),
    "packed too short": (tensor("0.weight_packed", lambda t: t[:, :-1].clone()), r"\(96, 7\)"),
    "packed as bytes": (tensor("0.weight_packed", lambda t: t.view(torch.uint8)), "torch.uint8"),
    "zero points too short": (tensor("0.weight_zero_point", lambda t: t[:-1].clone()), r"\(11, 4\)"),
    "no zero points": (tensor("0.weight_zero_point", lambda t: None), "weight_zero_point is missing"),
    "another group size": (weights(group_size=32), r"expected torch.float32 .* \(96, 2\)"),
    "a group size that does not divide": (weights(group_size=40), "no multiple"),
    "activations": (
        lambda c, t: c["config_groups"]["group_0"].update(
            input_activations={"num_bits": 8, "strategy": "token", "dynamic": True}
        ),
        "4-bit ones in pack-quantized with float activations",
    ),
}


@pytest.mark.parametrize("what", INT4)
def test_an_int4_checkpoint_that_lies(what: str, tmp_path: Path) -> None:
    change, message = INT4[what]
    checked(with_layers(Int4Linear.from_float, group_size=16, symmetric=False), change, message, tmp_path)


BITMASK = {
    "shape": (tensor("0.shape", lambda t: t * 1000), r"its shape says \[96000, 64000\]"),
    "bitmask": (tensor("0.bitmask", lambda t: t[:, :-1].clone()), r"\(96, 7\)"),
    "too few values": (tensor("0.compressed", lambda t: t[:-1].clone()), "disagree"),
    "too many values": (tensor("0.compressed", lambda t: torch.ones(96 * 64 + 1)), "at most 6144"),
    "values of integers": (tensor("0.compressed", lambda t: t.int()), "torch.int32"),
    "row offsets": (tensor("0.row_offsets", lambda t: t + 10**9), "disagree"),
    "no row offsets": (tensor("0.row_offsets", lambda t: None), "row_offsets is missing"),
    "bits": (tensor("0.bitmask", lambda t: t ^ 1), "disagree"),
}


@pytest.mark.parametrize("what", BITMASK)
def test_a_bitmask_checkpoint_that_lies(what: str, tmp_path: Path) -> None:
    change, message = BITMASK[what]
    model = pruned(net())
    for key in ("0", "2"):
        setattr(model, key, SparseLinear.from_dense(model.get_submodule(key), format="bitmap"))
    checked(model, change, message, tmp_path)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_folders_that_are_incomplete_or_lie(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        import_compressed_tensors(tmp_path / "none", net())
    export_compressed_tensors(with_layers(Int8Linear.from_float), tmp_path)
    config, whole = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, data = config.read_text(), whole.read_bytes()
    for bad, message in (("{", "no JSON"), ("[1]", "no JSON object"), ("{}", "no quantization_config")):
        config.write_text(bad)
        with pytest.raises(CompressedTensorsError, match=message):
            import_compressed_tensors(tmp_path, net())
    config.write_text(text)
    whole.write_bytes(data[:-1])
    with pytest.raises(CompressedTensorsError, match="damaged, cut off"):
        import_compressed_tensors(tmp_path, net())
    whole.unlink()
    index = tmp_path / "model.safetensors.index.json"
    for bad, message in (
        ({"weight_map": {"a": "../secret.safetensors"}}, "expected a safetensors file beside it"),
        ({"weight_map": [1]}, "no weight_map"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps(bad))
        with pytest.raises(CompressedTensorsError, match=message):
            import_compressed_tensors(tmp_path, net())


def test_a_checkpoint_of_pycompress_is_not_overwritten(tmp_path: Path) -> None:
    pycompress.save_pretrained(net(), tmp_path)
    with pytest.raises(ValueError, match="holds a checkpoint that save_pretrained wrote"):
        export_compressed_tensors(net(), tmp_path)


def test_a_model_that_is_compressed_already_is_refused(tmp_path: Path) -> None:
    model = with_layers(Int8Linear.from_float)
    export_compressed_tensors(model, tmp_path)
    with pytest.raises(CompressedTensorsError, match="layer '0'"):
        import_compressed_tensors(tmp_path, with_layers(Int8Linear.from_float))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(
    ("weights", "input_activations", "output_activations", "targets", "format", "num_bits", "strategy", "group_size",
     "symmetric", "dynamic", "type", "config_groups", "ignore", "sparsity_config", "quant_method", "group_0")
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(path=st.lists(_KEYS, min_size=1, max_size=4), value=_JSON)
def test_any_config_is_read_or_refused_clearly(path: list[str], value: Any, tmp_path_factory) -> None:
    folder = tmp_path_factory.getbasetemp() / "any config"
    if not folder.exists():
        export_compressed_tensors(with_layers(Int8Linear.from_float), folder)
        (folder / "config.json").rename(folder / "sound.json")
    settings_ = json.loads((folder / "sound.json").read_text())
    at = settings_["quantization_config"]
    if path[0] in ("weights", "input_activations"):
        at = at["config_groups"]["group_0"]
    for key in path[:-1]:
        at = at[key] if isinstance(at.get(key), dict) else at
    at[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(settings_))
    with suppress(CompressedTensorsError):
        import_compressed_tensors(folder, net())
