"""Checkpoints of Hugging Face models: built from the configuration in the folder, by nothing but transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pycompress
from pycompress.checkpoint import load_pretrained, read_pretrained_header, save_pretrained
from pycompress.model_description import FOLDER_FILE, ModelFileError, to_json
from pycompress.tensor_header import checksum
from tests.hf_models import HUGGING_FACE, make, run, same

transformers = pytest.importorskip("transformers", minversion="5.0")


def _ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(names.values())


@pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_the_model_again_from_its_configuration(name: str, compact: bool, tmp_path: Path) -> None:
    model: Any
    model, inputs = make(name)
    pycompress.quantize_(model, layers="all")
    save_pretrained(model, tmp_path, compact=compact, max_shard_size=20_000)
    new: Any = load_pretrained(tmp_path)
    assert type(new) is type(model)
    assert same(run(new, inputs), run(model, inputs))
    assert _ties(new) == _ties(model)
    assert new.config.to_dict() == model.config.to_dict()
    if model.can_generate():
        assert new.generation_config.to_dict() == model.generation_config.to_dict()
    tensors = [*new.parameters(), *new.buffers(), *(v for m in new.modules() for v in m.__dict__.values())]
    assert not any(t.is_meta for t in tensors if isinstance(t, torch.Tensor))
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is type(model.config)


def test_a_task_head_and_what_generation_does_come_back(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        id2label={0: "a", 1: "b", 2: "c"},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    pycompress.quantize_(model)
    save_pretrained(model, tmp_path / "bert")
    new = load_pretrained(tmp_path / "bert")
    assert isinstance(new, transformers.BertForSequenceClassification)
    assert new.config.id2label == {0: "a", 1: "b", 2: "c"}
    model, _ = make("gpt2")
    model.generation_config.max_new_tokens = 7
    save_pretrained(model, tmp_path / "gpt2")
    assert load_pretrained(tmp_path / "gpt2").generation_config.max_new_tokens == 7
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "gpt2").max_new_tokens == 7


def test_transformers_loads_the_folder_too(tmp_path: Path) -> None:
    import pycompress.hf

    model: Any
    model, inputs = make("bert")
    pycompress.quantize_(model)
    save_pretrained(model, tmp_path)
    new = type(model).from_pretrained(tmp_path)
    assert same(run(new, inputs), run(model, inputs))


# ---- what a configuration may say -----------------------------------------------------------------------------------


def _forged(folder: Path, **changes: Any) -> Path:
    model, _ = make("bert")
    save_pretrained(model, folder)
    header = json.loads((folder / FOLDER_FILE).read_text())
    built = header["description"]["transformers"]
    for key, value in changes.items():
        (built if key in built else built["config"])[key] = value
    header["sum"] = str(checksum(to_json(header["description"]).encode()))
    (folder / FOLDER_FILE).write_text(json.dumps(header))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": "BertForEverything"}, "'BertForEverything', which transformers .* does not have; update transf"),
        ({"class": "pipeline"}, "which transformers .* does not have"),
        ({"class": "AutoModel"}, "which transformers .* does not have"),
        ({"class": "__builtins__"}, "which transformers .* does not have"),
        ({"class": 3}, "is damaged: its model of transformers"),
        ({"config": []}, "is damaged: its model of transformers"),
        ({"num_hidden_layers": 900}, r"builds no \w+ .*more than \d+ parameters"),
        ({"num_hidden_layers": 10**6}, "has num_hidden_layers=1000000; expected at most 10"),
        ({"hidden_size": 10**12}, "has hidden_size=1000000000000; expected at most"),
        ({"num_labels": 2**30}, "has num_labels=1073741824; expected at most"),  # a dict of names, of 100 GB
        ({"backbone_config": {"depths": [1, 2**30]}}, "has depths=1073741824; expected at most"),
        ({"hidden_size": "many"}, r"builds no \w+"),
        ({"hidden_act": "eval"}, r"builds no \w+"),
        ({"num_hidden_layers": 1}, "has no layer|no place for"),
    ],
)
def test_a_configuration_that_lies(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        load_pretrained(_forged(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)


def test_what_leads_out_of_transformers_is_left_out(tmp_path: Path) -> None:
    """Code on the hub, its kernels, a quantiser: what a configuration may name, and no one follows."""
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    out = {
        "auto_map": {"AutoModel": "evil.Evil"}, "quantization_config": {"quant_method": "x"},
        "_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel",
    }  # fmt: skip
    model: Any = load_pretrained(_forged(tmp_path, **out))
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(model.config, "auto_map")
    assert not hasattr(model.config, "quantization_config")


def test_a_class_of_its_own_needs_the_model(tmp_path: Path) -> None:
    class Own(transformers.BertModel):
        pass

    model = Own(make("bert")[0].config)
    save_pretrained(model, tmp_path)
    assert read_pretrained_header(tmp_path)["transformers"] is None
    with pytest.raises(ModelFileError, match="build the model yourself and pass it"):
        load_pretrained(tmp_path)
    with torch.device("meta"):
        fresh = Own(model.config)
    load_pretrained(tmp_path, fresh)
    assert torch.equal(fresh.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)
