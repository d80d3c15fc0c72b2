"""from_pretrained and save_pretrained of compressed Hugging Face models."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pycompress
from pycompress import hf_support
from pycompress.nn import MaskedLinear
from pycompress.structure import describe
from tests.hf_models import make, run, same, transformers

hf = pytest.importorskip("pycompress.hf")
pytestmark = pytest.mark.usefixtures("one_thread")
AutoModel = transformers.AutoModel
AutoBert = transformers.AutoModelForSequenceClassification


def _kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _reloaded(model: Any, folder: Path, **kwargs: Any) -> Any:
    """The model, saved and loaded again; every tensor found its place."""
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return loaded


# ---- a float checkpoint ---------------------------------------------------------------------------------------------


@pytest.fixture
def float_folder(tmp_path: Path) -> Path:
    make("bert")[0].save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_float_checkpoint_is_quantised_as_it_is_loaded(float_folder: Path, tmp_path: Path, mode: str) -> None:
    expected, inputs = make("bert")
    report = pycompress.quantize_(expected, mode, skip="classifier")
    config = hf.PyCompressConfig(mode, skip="classifier")
    model = AutoBert.from_pretrained(float_folder, quantization_config=config)
    assert _kinds(model) == _kinds(expected)
    assert same(run(model, inputs), run(expected, inputs))
    assert str(model.hf_quantizer.report) == str(report)
    assert same(run(_reloaded(model, tmp_path / "int8"), inputs), run(expected, inputs))


def test_a_config_json_may_ask_for_a_float_checkpoint_to_be_quantised(float_folder: Path) -> None:
    path = float_folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "pycompress", "mode": {"*": "weight_only", "classifier": "float"}}
    path.write_text(json.dumps(config))
    model = AutoBert.from_pretrained(float_folder)
    assert model.bert.pooler.dense.mode == "weight_only"
    assert type(model.classifier) is nn.Linear


def test_half_precision_checkpoints_are_quantised_too(float_folder: Path, tmp_path: Path) -> None:
    model = AutoBert.from_pretrained(float_folder, quantization_config=hf.PyCompressConfig(), dtype=torch.bfloat16)
    inputs = make("bert")[1]
    assert run(model, inputs)[0].dtype == torch.bfloat16
    again = _reloaded(model, tmp_path / "int8")
    assert again.dtype == torch.bfloat16
    assert same(run(again, inputs), run(model, inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "static"}, "needs batches to calibrate on"),
        ({"mode": {"*": "dynamic", "classifier": "static"}}, "needs batches to calibrate on"),
        ({"mode": "int3"}, "unknown mode 'int3'"),
        ({"mode": 8}, "mode is a int"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
        ({"layers": "linears"}, "'linears'"),
        ({"group_size": 0}, "group_size"),
        ({"bits": 4}, "does not know bits"),
        ({"version": 2}, "version 2; this pycompress reads version 1: update pycompress"),
        ({"structure": [1]}, "config.json is damaged"),
        ({"structure": {}, "lengths": {"a": -1}}, "config.json is damaged"),
    ],
)
def test_a_bad_config_is_told_before_anything_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        hf.PyCompressConfig(**arguments)


def test_the_config_is_the_same_after_json() -> None:
    config = hf.PyCompressConfig({"*": "int4", "lm_head": "float"}, layers=("linear", "embedding"), skip=["a"])
    again = hf.PyCompressConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert repr(again) == repr(config)
    assert "lm_head" in repr(config)


# ---- a compressed one -----------------------------------------------------------------------------------------------


def _pruned(model: nn.Module) -> None:
    pycompress.prune_(model, 0.5)


def _regrowing(model: nn.Module) -> None:
    """What the mask hides is kept, and has to be saved with it."""
    pycompress.prune_(model, 0.5, gradient="dense")


def _sparse(model: nn.Module) -> None:
    _pruned(model)
    pycompress.sparsify_(model, dtype="int8")


def _shrunk(model: nn.Module) -> None:
    pycompress.prune_(model, 0.5, pattern="row", skip=["*.query", "*.key", "*.value"])
    pycompress.shrink_(model)


def _factorized(model: nn.Module) -> None:
    pycompress.factorize_(model, rank=4)


def _trained_for_int8(model: nn.Module) -> None:
    pycompress.prepare_qat_(model)


@pytest.mark.parametrize(
    "compress", [pycompress.quantize_, _pruned, _regrowing, _sparse, _shrunk, _factorized, _trained_for_int8]
)
def test_a_compressed_model_comes_back_to_the_bit(compress: Any, tmp_path: Path) -> None:
    model, inputs = make("bert")
    compress(model)
    loaded = _reloaded(model, tmp_path)
    assert _kinds(loaded) == _kinds(model)
    assert describe(loaded)["layers"] == describe(model)["layers"]
    assert same(run(loaded, inputs), run(model, inputs))
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            other = loaded.get_submodule(name)
            assert (other.mask is None and module.mask is None) or torch.equal(other.mask, module.mask)
            assert torch.equal(other.weight, module.weight)
            assert other.weight.requires_grad


def test_what_was_compressed_after_loading_is_saved_as_it_is_now(tmp_path: Path) -> None:
    model, inputs = make("bert")
    pycompress.quantize_(model, skip="*.query")
    model = _reloaded(model, tmp_path / "once")
    assert pycompress.quantize_(model, "weight_only").swapped
    again = _reloaded(model, tmp_path / "twice")
    assert again.bert.encoder.layer[0].attention.self.query.mode == "weight_only"
    assert same(run(again, inputs), run(model, inputs))


def test_a_part_that_was_compressed_by_itself_is_saved_in_the_whole(tmp_path: Path) -> None:
    model, inputs = make("bert")
    pycompress.quantize_(model.bert.encoder)
    copied = copy.deepcopy(model)
    pycompress.quantize_(copied, "weight_only")
    for each in (model, copied):
        assert same(run(_reloaded(each, tmp_path / str(id(each))), inputs), run(each, inputs))


def test_a_model_that_is_float_again_is_saved_as_such(tmp_path: Path) -> None:
    model, inputs = make("bert")
    pycompress.quantize_(model, skip="bert")
    model = _reloaded(model, tmp_path / "int8")
    model.classifier = model.classifier.to_float()
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert same(run(AutoBert.from_pretrained(tmp_path / "float"), inputs), run(model, inputs))


def test_saving_leaves_the_model_and_its_config_as_they_are(tmp_path: Path) -> None:
    model, _ = make("bert")
    pycompress.quantize_(model)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    assert hf.quantization_config(model) == json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert hf.quantization_config(make("bert")[0]) is None


def test_shards_and_the_pruned_state_that_a_trainer_passes(tmp_path: Path) -> None:
    model, inputs = make("bert")
    pycompress.prune_(model, 0.5)
    model.save_pretrained(tmp_path, state_dict=model.state_dict(), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, info = AutoBert.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(run(loaded, inputs), run(model, inputs))
    model.save_pretrained(tmp_path / "by_position", True, model.state_dict())
    assert same(run(AutoBert.from_pretrained(tmp_path / "by_position"), inputs), run(model, inputs))


def test_load_finds_the_class_that_was_saved(tmp_path: Path) -> None:
    model, inputs = make("bert")
    pycompress.quantize_(model)
    model.save_pretrained(tmp_path)
    loaded = hf.load(tmp_path)
    assert type(loaded) is type(model)
    assert same(run(loaded, inputs), run(model, inputs))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"BertForSequenceClassification"', '"Trainer"', 1))
    with pytest.raises(ValueError, match="names the class 'Trainer', which is none of transformers"):
        hf.load(tmp_path)


def test_base_model_and_heads_load_from_each_other(tmp_path: Path) -> None:
    model, inputs = make("bert")
    pycompress.quantize_(model)
    model.save_pretrained(tmp_path / "head")
    expected = run(model.bert, inputs)
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert _kinds(base) == _kinds(model.bert)
    assert same(run(base, inputs), expected)
    other = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "head")
    assert type(other.cls.predictions.transform.dense) is nn.Linear
    assert same(run(other.bert, inputs)[:1], expected[:1])
    base.save_pretrained(tmp_path / "base")
    head, info = AutoBert.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    assert type(head.classifier) is nn.Linear
    assert same(run(head.bert, inputs), expected)


def test_an_encoder_loads_from_the_whole(tmp_path: Path) -> None:
    model, inputs = make("t5")
    pycompress.quantize_(model)
    model.save_pretrained(tmp_path)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path)
    assert _kinds(encoder.encoder) == _kinds(model.encoder)
    inputs.pop("decoder_input_ids")
    assert same(run(encoder, inputs), run(model.encoder, inputs))


def test_a_head_that_was_untied_and_compressed_stays_by_itself(tmp_path: Path) -> None:
    model, inputs = make("gpt2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    report = pycompress.quantize_(model)
    assert "lm_head" in [row.name for row in report.layers if row.action == "swapped"]
    assert same(run(_reloaded(model, tmp_path), inputs), run(model, inputs))


class _Largest(TorchDispatchMode):
    """The most values of a float tensor with memory that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.is_floating_point():
                self.values = max(self.values, tensor.numel())
        return result


@pytest.mark.parametrize("compressed", [True, False])
def test_float_weights_are_never_in_memory(compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # all in this thread, where it is seen
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    if compressed:
        pycompress.quantize_(model)
    model.save_pretrained(tmp_path)
    with _Largest() as largest:
        AutoModel.from_pretrained(tmp_path)
    assert (largest.values < 1024) == compressed  # 32 x 32 and 512 x 32 are weights


def test_a_compressed_model_moves_and_casts(tmp_path: Path) -> None:
    model, inputs = make("bert")
    pycompress.quantize_(model)
    model = _reloaded(model, tmp_path)
    for cast, dtype in ((model.half, torch.float16), (model.float, torch.float32), (model.bfloat16, torch.bfloat16)):
        assert run(cast(), inputs)[0].dtype == dtype
    assert run(model.to(torch.float32), inputs)[0].dtype == torch.float32
    assert model.get_memory_footprint() < make("bert")[0].get_memory_footprint()
    assert model.num_parameters() > 0
    loaded = AutoBert.from_pretrained(tmp_path, device_map="cpu", dtype=torch.bfloat16)
    assert run(loaded, inputs)[0].dtype == torch.bfloat16


# ---- registration ---------------------------------------------------------------------------------------------------


def test_pycompress_imports_no_transformers_and_compressing_a_model_of_it_registers() -> None:
    code = (
        "import sys, torch, pycompress\n"
        "pycompress.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4)))\n"
        "print('transformers' in sys.modules)\n"
        "from transformers.models.bert.modeling_bert import BertConfig, BertPooler\n"
        "print('pycompress.hf' in sys.modules)\n"
        "pycompress.quantize_(BertPooler(BertConfig(hidden_size=8)))\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "print('pycompress' in known, 'transformers.trainer' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["False", "False", "True", "False"]


def test_without_the_import_transformers_warns_that_it_does_not_know_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.quantizers import auto

    model, _ = make("bert")
    pycompress.quantize_(model)
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "pycompress")
    AutoBert.from_pretrained(tmp_path)
    assert "Unknown quantization type, got pycompress" in caplog.text


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, r"not installed; pip install 'pycompress\[hf\]'"),
        ("4.49.0", "4.49.0 is installed and 4.50 or newer is needed; pip install 'transformers>=4.50'"),
        ("4.50.3", ""),
        ("5.0.0rc1", ""),
        ("10.1", ""),
    ],
)
def test_the_version_of_transformers_is_checked(
    version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(hf_support.metadata, "version", found)
    assert re.search(reason, hf_support.why_not()) if reason else hf_support.why_not() == ""
