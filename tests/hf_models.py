"""Tiny models with random weights, one of each family: of Hugging Face, and of plain torch.

`make(name)` gives the model in eval mode and the inputs it takes; `run` its floating-point outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 99
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
Inputs = dict[str, Tensor]


def _tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def _text() -> Inputs:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": _tokens(), "attention_mask": mask}


def _prompt() -> Inputs:
    return {"input_ids": _tokens()}


def _pair() -> Inputs:
    return {**_text(), "decoder_input_ids": _tokens(2, 5)}


def _image() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _sound() -> Inputs:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": _tokens(2, 5)}


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_TEXT))


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(**_TEXT, **_ENDS)
    return transformers.RobertaForMaskedLM(config)  # its head is tied to the embedding


def _distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    )
    return transformers.DistilBertForSequenceClassification(config)


def _mobilebert() -> nn.Module:
    config = transformers.MobileBertConfig(
        **_TEXT, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16, num_feedforward_networks=1
    )
    return transformers.MobileBertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_ENDS
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**_TEXT, **_ENDS, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def _tied_llama() -> nn.Module:
    config = transformers.LlamaConfig(**_TEXT, **_ENDS, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_TEXT, **_ENDS, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def _qwen_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **_TEXT, **_ENDS, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=2, **_ENDS
    )
    return transformers.T5ForConditionalGeneration(config)


def _gated_t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, **_ENDS,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    rest = {key: value for key, value in _TEXT.items() if key not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**rest, image_size=16, patch_size=8))


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=24, decoder_start_token_id=2, suppress_tokens=None, begin_suppress_tokens=None, **_ENDS,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


HUGGING_FACE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "bert": (_bert, _text),
    "roberta": (_roberta, _text),
    "distilbert": (_distilbert, _text),
    "mobilebert": (_mobilebert, _text),
    "gpt2": (_gpt2, _prompt),
    "llama": (_llama, _prompt),
    "tied_llama": (_tied_llama, _prompt),
    "mixtral": (_mixtral, _prompt),
    "qwen_moe": (_qwen_moe, _prompt),
    "t5": (_t5, _pair),
    "gated_t5": (_gated_t5, _pair),
    "vit": (_vit, _image),
    "whisper": (_whisper, _sound),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """The model of this name in eval mode, the same for the same seed, and its inputs."""
    build, inputs = HUGGING_FACE[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
        for parameter in model.parameters():  # biases that are not 0, norms that are not 1
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return model, inputs()


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every floating-point tensor of what the model returns, caches aside."""
    with torch.no_grad():
        output = model(**inputs)
    return [tensor for tensor in _tensors(output) if tensor.is_floating_point()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
