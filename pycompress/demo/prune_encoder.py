"""MiniLM pruned by magnitude, as it is, without retraining: bytes, latency, and how far its embeddings moved.

Every pruned model is compared in time with the dense model of the same weights, fp32 with fp32 and int8 with int8.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.progress import Progress
from torch import nn

import pycompress
from pycompress.nn import SparseLinear

from . import QUICK_SHAPES, SHAPES, measure, sentences
from .encoder import Encoder

DENSE = "dense"
PATTERNS = ("unstructured", "4x4")
WEIGHTS = {"fp32": "float32", "int8": "int8"}  # by the name in the tables: what sparsify_ calls it


@dataclass(frozen=True)
class Plan:
    sparsities: tuple[float, ...]
    shapes: tuple[measure.Shape, ...]
    rounds: int
    sentences: int


WHOLE = Plan((0.5, 0.7, 0.8, 0.9), SHAPES, rounds=5, sentences=200)
QUICK = Plan((0.8, 0.9), QUICK_SHAPES, rounds=3, sentences=64)


@dataclass
class EncoderVariant:
    """linear_bytes: of the layers that are pruned, in the file. sparse_layers: how many run sparse at some batch."""

    weights: str
    pattern: str
    sparsity: float
    disk_bytes: int
    linear_bytes: int
    sparse_layers: int
    accuracy: measure.Accuracy
    latency: dict[str, measure.Latency] = field(default_factory=dict)  # keyed "8x128"; fp32 is the base of the dense

    @property
    def is_dense(self) -> bool:
        return self.pattern == DENSE

    @property
    def name(self) -> str:
        return variant_name(self.weights, self.pattern, self.sparsity)


@dataclass
class EncoderResult:
    sentences: int
    layers: int  # linear layers, all of them pruned
    padding: dict[str, float]  # keyed as latency: share of the batch's tokens that are padding
    variants: list[EncoderVariant]

    @property
    def shapes(self) -> list[str]:
        return list(self.padding)

    def of(self, weights: str, pattern: str) -> list[EncoderVariant]:
        """Those of one kind, by sparsity."""
        return [v for v in self.variants if (v.weights, v.pattern) == (weights, pattern)]

    def dense(self, weights: str) -> EncoderVariant:
        return self.of(weights, DENSE)[0]


def variant_name(weights: str, pattern: str, sparsity: float) -> str:
    return f"{DENSE} {weights}" if pattern == DENSE else f"{sparsity:.0%} {pattern} {weights}".replace("%", " %")


def variants(model: nn.Module, sparsities: tuple[float, ...]) -> Iterator[tuple[str, str, float, nn.Module]]:
    """Yields (weights, pattern, sparsity, model): the dense ones first. `model` is left as it is."""
    yield "fp32", DENSE, 0.0, model
    int8 = copied(model)
    pycompress.quantize_(int8)
    yield "int8", DENSE, 0.0, int8
    for sparsity in sparsities:
        for pattern in PATTERNS:
            pruned = copied(model)
            pycompress.prune_(pruned, sparsity, pattern=pattern)
            for weights, dtype in WEIGHTS.items():
                sparse = copied(pruned)
                pycompress.sparsify_(sparse, dtype)
                yield weights, pattern, sparsity, sparse


def copied(model: nn.Module) -> nn.Module:
    """A deep copy that shares the embeddings: they are half of MiniLM, and no variant changes them."""
    shared = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return copy.deepcopy(model, shared)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def state_bytes(model: nn.Module, layers: list[str]) -> int:
    """Bytes of these layers in the model's state_dict."""
    inside = tuple(f"{name}." for name in layers)
    state = model.state_dict()
    return sum(t.numel() * t.element_size() for name, t in state.items() if name.startswith(inside))


def run(progress: Progress, plan: Plan) -> EncoderResult:
    """Raises RuntimeError when the model or the sentences are not installed."""
    count = 2 + len(plan.sparsities) * len(PATTERNS) * len(WEIGHTS)
    task = progress.add_task("loading all-MiniLM-L6-v2", total=count + len(plan.shapes) * plan.rounds)
    encoder = Encoder()
    texts = sentences.load(plan.sentences)
    layers = linear_names(encoder.model)
    result = EncoderResult(len(texts), len(layers), {}, [])
    models, expected = {}, None
    for weights, pattern, sparsity, model in variants(encoder.model, plan.sparsities):
        name = variant_name(weights, pattern, sparsity)
        progress.update(task, description=f"embedding {len(texts)} sentences: {name}")
        models[name] = model
        embeddings = encoder.embed(model, texts)
        expected = embeddings if expected is None else expected
        moved = measure.accuracy(expected, embeddings)
        sparse = sum(isinstance(m, SparseLinear) for m in model.modules())
        size, layer_size = measure.disk_bytes(model), state_bytes(model, layers)
        result.variants.append(EncoderVariant(weights, pattern, sparsity, size, layer_size, sparse, moved))
        progress.advance(task)
    for at, (batch, length) in enumerate(plan.shapes):
        shape = f"{batch}x{length}"
        progress.update(task, description=f"timing {len(models)} models at {batch} × {length}")
        inputs = encoder.tokenize(encoder.passages(texts, batch, length), length)
        result.padding[shape] = 1 - inputs["attention_mask"].double().mean().item()
        times = measure.round_times(models, inputs, plan.rounds, lambda: progress.advance(task))
        progress.update(task, completed=count + (at + 1) * plan.rounds)
        add_latencies(result, shape, times)
    progress.update(task, visible=False)
    return result


def add_latencies(result: EncoderResult, shape: str, times: Mapping[str, list[float]]) -> None:
    """times: seconds by round, of each variant. A sparse one is compared with the dense one of the same weights."""
    for v in result.variants:
        base = result.dense("fp32" if v.is_dense else v.weights)
        v.latency[shape] = measure.compared(times[v.name], times[base.name])
