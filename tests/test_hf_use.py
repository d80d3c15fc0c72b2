"""Compressed Hugging Face models in use: generation, half precision, training, gradient checkpointing, resizing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycompress
from pycompress.nn import Int8Linear, MaskedLinear
from tests.hf_models import Inputs, make, run, transformers

pytest.importorskip("pycompress.hf")
pytestmark = pytest.mark.usefixtures("one_thread")


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


@pytest.mark.parametrize("mode", ["dynamic", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "tied_llama", "mixtral", "t5", "whisper"])
def test_generation_goes_on_after_loading(name: str, mode: str, tmp_path: Path) -> None:
    model: Any
    model, inputs = make(name)
    pycompress.quantize_(model, mode, layers="all")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    inputs.pop("decoder_input_ids", None)
    inputs.setdefault("attention_mask", torch.ones_like(inputs.get("input_ids", torch.ones(2, 1)), dtype=torch.long))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    tokens = model.generate(**inputs, **options)
    assert tokens.shape[1] >= 6
    assert torch.equal(loaded.generate(**inputs, **options), tokens)
    # With a cache and without one each token is computed alike: a scale belongs to its own token.
    uncached = model.generate(**inputs, **options, use_cache=False)
    assert (uncached == tokens).float().mean() > 0.8


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5", "vit", "whisper"])
def test_half_precision(name: str) -> None:
    model, inputs = make(name)
    expected = run(model, inputs)
    pycompress.quantize_(model, layers="all")
    for cast, dtype in ((model.half, torch.float16), (lambda: model.to(torch.bfloat16), torch.bfloat16)):
        outputs = run(cast(), _cast(inputs, dtype))
        assert {output.dtype for output in outputs} == {dtype}
        for output, wanted in zip(outputs, expected, strict=True):
            assert float((output.float() - wanted).norm() / wanted.norm()) < 0.06


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "t5", "whisper"])
def test_models_quantised_in_half_precision(name: str) -> None:
    model, inputs = make(name)
    model.to(torch.bfloat16)
    expected = run(model, _cast(inputs, torch.bfloat16))
    pycompress.quantize_(model, layers="all")
    for output, wanted in zip(run(model, _cast(inputs, torch.bfloat16)), expected, strict=True):
        assert output.dtype == torch.bfloat16
        assert float((output.float() - wanted.float()).norm() / wanted.float().norm()) < 0.06


def _gradients(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**inputs)
    (output[0] if isinstance(output, tuple) else output.logits).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _checkpoint(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "whisper"])
def test_gradient_checkpointing_of_a_pruned_model_changes_nothing(name: str) -> None:
    model: Any
    model, inputs = make(name)
    pycompress.prune_(model, 0.5)
    expected = _gradients(model, inputs)
    _checkpoint(model)
    found = _gradients(model, inputs)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key])
    masked = {key: module for key, module in model.named_modules() if isinstance(module, MaskedLinear)}
    assert masked
    for key, module in masked.items():
        assert not found[f"{key}.weight"][~module.mask].any()


@pytest.mark.parametrize("mode", ["dynamic", "int4"])
def test_gradients_flow_through_compressed_layers(mode: str) -> None:
    model: Any
    model, inputs = make("llama")
    expected = _gradients(model, inputs)["model.embed_tokens.weight"]
    pycompress.quantize_(model, mode)
    plain = _gradients(model, inputs)
    _checkpoint(model)
    found = _gradients(model, inputs)["model.embed_tokens.weight"]
    torch.testing.assert_close(found, plain["model.embed_tokens.weight"])
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9


def test_a_trainer_takes_a_pruned_model_that_was_loaded(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, inputs = make("bert")
    pycompress.prune_(model, 0.5)
    model.save_pretrained(tmp_path / "pruned")  # type: ignore[operator]
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "pruned")
    rows = [{"input_ids": ids, "labels": torch.tensor(row % 2)} for row, ids in enumerate(inputs["input_ids"])]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2
    )
    transformers.Trainer(loaded, arguments, train_dataset=rows).train()
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    before, after = (m.bert.encoder.layer[0].output.dense for m in (model, again))
    assert torch.equal(after.mask, before.mask)
    assert not torch.equal(after.weight, before.weight)
    assert not after.weight[~after.mask].any()


def test_sizes_that_transformers_counts() -> None:
    model: Any
    model, _ = make("llama")
    before, count = model.get_memory_footprint(), model.num_parameters()
    pycompress.quantize_(model, layers="all")
    assert model.get_memory_footprint() < 0.6 * before
    assert 0 < model.num_parameters() < count  # int8 weights are buffers
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")


def test_resizing_embeddings() -> None:
    model: Any
    model, inputs = make("gpt2")
    pycompress.quantize_(model)
    model.resize_token_embeddings(104)  # float and tied, as ever
    assert model.lm_head.weight is model.transformer.wte.weight
    assert run(model, inputs)[0].shape[-1] == 104
    model, _ = make("llama")
    pycompress.quantize_(model, layers="all")
    with pytest.raises(TypeError, match="Int8Embedding"):
        model.resize_token_embeddings(104)


def test_modules_that_look_at_the_dtype_of_a_weight() -> None:
    """T5 casts to the dtype of wo's weight, unless it is int8: what it casts to must stay a float."""
    model: Any
    model, inputs = make("t5")
    pycompress.quantize_(model)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, Int8Linear)
    seen: list[torch.dtype] = []
    hook = wo.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    run(model, inputs)
    hook.remove()
    assert seen
    assert set(seen) == {torch.float32}
    assert not isinstance(wo, nn.Linear)
