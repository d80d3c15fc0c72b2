"""Attention heads: which layers of a model make them, and which rows and columns belong to each.

Head h of an attention module with query, key, value (heads * head_size, K) and output (N, heads * head_size) is the
rows `h * head_size` to `(h + 1) * head_size` of the first three and the same columns of the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# Packages of transformers.models whose attention computes each head by itself, and whose forward takes the number of
# heads from the projections or from an attribute of the module. Models with a bias or a buffer per head, as MPNet's
# relative positions, are not among them.
_FAMILIES = frozenset(
    (
        *("bert", "bert_generation", "roberta", "roberta_prelayernorm", "xlm_roberta", "xlm_roberta_xl", "camembert"),
        *("electra", "ernie", "megatron_bert", "data2vec", "layoutlm", "splinter", "distilbert", "albert"),
    )
)
_PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_OUTPUTS = ("dense", "out_lin")  # in the same module, as DistilBERT and ALBERT have it


@dataclass(frozen=True)
class HeadLayers:
    """The four linear layers of one attention module, which `name` and `module` are."""

    name: str
    module: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    head_size: int

    @property
    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        return self.query, self.key, self.value, self.output

    @property
    def heads(self) -> int:
        return int(self.value.out_features) // self.head_size  # type: ignore[arg-type]


def attention_heads(model: nn.Module) -> list[HeadLayers]:
    """The attention modules of Hugging Face's BERT family in `model`, in its order."""
    return [found for name, module in model.named_modules() for found in _heads_of(name, module)]


def _heads_of(name: str, module: nn.Module) -> Iterator[HeadLayers]:
    # BertAttention holds BertSelfAttention as `self` and the output projection as `output.dense`.
    inner = module._modules.get("self", module)
    if inner is None or not _is_known(inner):
        return
    children = inner._modules
    projections = next((p for p in _PROJECTIONS if all(children.get(key) is not None for key in p)), None)
    if inner is module:
        output = next((children[key] for key in _OUTPUTS if children.get(key) is not None), None)
    else:
        after = module._modules.get("output")
        output = None if after is None else after._modules.get("dense")
    head_size = getattr(inner, "attention_head_size", None)
    if head_size is None and hasattr(inner, "n_heads"):  # DistilBERT before transformers 5
        head_size = inner.dim // inner.n_heads  # type: ignore[operator]
    if projections is None or output is None or not isinstance(head_size, int):
        return
    query, key, value = (inner.get_submodule(key) for key in projections)
    width = head_size * (int(value.out_features) // head_size)  # type: ignore[arg-type]
    sizes = (query.out_features, key.out_features, value.out_features, output.in_features)
    if width and all(size == width for size in sizes):
        inner_name = name if inner is module else f"{name}.self".lstrip(".")
        yield HeadLayers(inner_name, inner, query, key, value, output, head_size)


def _is_known(module: nn.Module) -> bool:
    package, _, rest = type(module).__module__.partition(".models.")
    return package == "transformers" and rest.partition(".")[0] in _FAMILIES
