"""What a model weighs and how fast it is: the figures that every stage of a run records.

sizes: weights, zeros and bytes. latency: a model beside the one it came from, in turns, so that a slow moment of the
machine falls on both. machine_peaks: what the machine can do at most. The layers one by one: ``measure_layers.py``.
Nothing here changes a model: hooks are removed and training flags put back, whatever happens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pycompress import ops
from pycompress.bench.timing import Runner, quantile, time_round_robin
from pycompress.calibration import feed
from pycompress.nn import Int4Linear, Int8Conv2d, Int8Embedding, Int8EmbeddingBag, Int8Linear, SparseLinear
from pycompress.nn.float_linear import is_conv1d
from pycompress.report import model_bytes
from pycompress.selection import memory_key

# ---- sizes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """parameters: numbers that the model computes with, tied ones once; a pruned or int8 weight counts as N x K.

    nonzero: those of them that are not 0. sparsity: the share of zeros in the weights of the linear layers alone,
    0 for a model without any. memory_bytes: as `report.model_bytes`.
    """

    parameters: int
    nonzero: int
    sparsity: float
    memory_bytes: int


def sizes(model: nn.Module) -> Sizes:
    """Of a model with any of the package's layers in it, or of one layer."""
    parameters = nonzero = weights = kept = 0
    seen: set[tuple[object, ...]] = set()
    for module in model.modules():
        linear = is_linear(module)
        for key, total, found in _counts(module, seen):
            parameters, nonzero = parameters + total, nonzero + found
            if linear and key.startswith("weight"):
                weights, kept = weights + total, kept + found
    sparsity = 1 - kept / weights if weights else 0.0
    return Sizes(parameters, nonzero, sparsity, model_bytes(model))


def is_linear(module: nn.Module) -> bool:
    """Whether this is one linear layer, of torch, transformers or ours, in whatever form it holds its weight."""
    if isinstance(module, (nn.Linear, Int4Linear, Int8Linear, SparseLinear)):
        return True
    return is_conv1d(module) and isinstance(getattr(module, "weight", None), Tensor)


def _counts(module: nn.Module, seen: set[tuple[object, ...]]) -> Iterator[tuple[str, int, int]]:
    """(name, numbers, those that are not 0) of each parameter that the module itself holds, and is not in `seen`."""
    if isinstance(module, SparseLinear):
        yield "weight", module.in_features * module.out_features, _nonzero(module.weight_values)
    elif isinstance(module, Int4Linear):
        yield "weight", module.in_features * module.out_features, _nonzero(_dense(module))
    elif isinstance(module, (Int8Conv2d, Int8Linear)):
        yield "weight", (weight := module.weight).numel(), _nonzero(weight)
    elif isinstance(module, (Int8Embedding, Int8EmbeddingBag)):
        yield "weight", module.int8_weight.numel(), _nonzero(module.int8_weight)
    for key, tensor in module._parameters.items():
        if tensor is None or nn.parameter.is_lazy(tensor) or (where := memory_key(tensor)) in seen:
            continue
        seen.add(where)
        # MaskedLinear's mask, or that of torch.nn.utils.prune: behind either there may be other values.
        mask = getattr(module, {"weight": "mask", "weight_orig": "weight_mask"}.get(key, ""), None)
        mask = mask if isinstance(mask, Tensor) and mask.shape == tensor.shape else None
        yield key, tensor.numel(), _nonzero(tensor, mask)


def _dense(module: Int4Linear) -> Tensor:
    return ops.dequantize_weight_int4(
        module.weight,
        module.weight_scale,
        module.weight_zero_point,
        in_features=module.in_features,
        format=module.format,
        group_size=module.group_size,
    )


def _nonzero(tensor: Tensor, mask: Tensor | None = None) -> int:
    tensor = tensor.detach()
    if tensor.is_meta:
        return tensor.numel()  # no values to look at
    return int(torch.count_nonzero(tensor if mask is None else tensor * (mask != 0)))


# ---- latency --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quartiles:
    p25: float
    p50: float
    p75: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quartiles:
        ordered = sorted(values)
        return cls(*(quantile(ordered, q) for q in (0.25, 0.5, 0.75)))


@dataclass(frozen=True)
class Latency:
    """before, after: seconds of a call of the baseline and of the model. speedup: their ratio, round by round."""

    before: Quartiles
    after: Quartiles
    speedup: Quartiles
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def latency(baseline: nn.Module, model: nn.Module, inputs: Any, rounds: int = 15) -> Latency:
    """Time both models on the same inputs, in eval mode without gradients; each has its turns in every round.

    inputs: a batch of model inputs as `calibrate` takes them, on the models' device. On a GPU a call is timed until its
    work is done.
    """
    if rounds < 1:
        raise ValueError(f"latency: rounds={rounds}; expected at least 1")
    with in_eval_mode(baseline, model):
        runners = {"before": Runner(_call(baseline, inputs), "torch"), "after": Runner(_call(model, inputs), "torch")}
        by_round = time_round_robin(runners, rounds=rounds, probe=lambda: None).by_round
    before, after = by_round["before"], by_round["after"]
    ratios = [b / max(a, 1e-12) for b, a in zip(before, after, strict=True)]
    return Latency(Quartiles.of(before), Quartiles.of(after), Quartiles.of(ratios), rounds)


def latencies(
    baseline: nn.Module, model: nn.Module, sample: Any, batch_sizes: Iterable[int], rounds: int = 15
) -> dict[str, Latency]:
    """`latency` at each batch size, by its number as text; the batches are made from `sample`. None for rounds=0."""
    if rounds == 0:
        return {}
    return {str(size): latency(baseline, model, batch_of(sample, size), rounds) for size in batch_sizes}


def _call(model: nn.Module, inputs: Any) -> Callable[[], object]:
    device = device_of(model)
    if device.type != "cuda":
        return lambda: feed(model, inputs, "latency")

    def run() -> None:
        feed(model, inputs, "latency")
        torch.cuda.synchronize(device)

    return run


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, as the models are used; every module's own training flag is put back.

    Not torch.inference_mode: what a model caches in there could not be trained with afterwards.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: the device of its first parameter or buffer."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


# ---- batches --------------------------------------------------------------------------------------------------


def batch_of(sample: Any, size: int) -> Any:
    """A batch of `size` samples, made from the sample batch by repeating its samples and cutting off what is too much.

    sample: model inputs as `calibrate` takes them: a tensor, or a tuple, list or mapping with tensors in it. The first
    tensor's first dimension counts the samples. Other tensors with as many rows are repeated alike; all else, such as
    position ids of one row for every sample, stays as it is.

    Raises:
        ValueError: size below 1, or no tensor with a sample in it.
    """
    if size < 1:
        raise ValueError(f"batch_of: size={size}; expected at least 1")
    first = next((tensor for tensor in _tensors(sample) if tensor.dim() > 0), None)
    if first is None or first.shape[0] == 0:
        found = f"a {type(sample).__name__} without a tensor" if first is None else f"shape {tuple(first.shape)}"
        raise ValueError(f"batch_of: the sample batch is {found}; expected tensors with the samples along dimension 0")
    return _resized(sample, first.shape[0], size)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, (tuple, list)):
        yield from chain.from_iterable(map(_tensors, value))


def _resized(value: Any, samples: int, size: int) -> Any:
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] != samples:
            return value
        return value[torch.arange(size, device=value.device) % samples]
    if isinstance(value, Mapping):
        return {key: _resized(item, samples, size) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_resized(item, samples, size) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


# ---- the machine ----------------------------------------------------------------------------------------------


def machine_peaks(device: torch.device | str = "cpu", seconds: float = 0.2) -> dict[str, Any]:
    """What the device can do at most, JSON-ready, on as many threads as torch uses; about a second.

    {"device", "threads", "int8_gops", "fp32_gflops", "bf16_gflops", "read_gbps"}, None where there is no such peak.
    seconds: for each loop on the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda":
        from pycompress.bench.gpu_meter import Meter

        meter = Meter.of(device)
        gpu = meter.peaks()
        return {
            "device": meter.name, "threads": None, "int8_gops": gpu.int8_gops, "fp32_gflops": None,
            "bf16_gflops": gpu.bf16_gflops, "read_gbps": gpu.read_gbps,
        }  # fmt: skip
    from pycompress import info, peaks

    cpu = peaks.measure(seconds=seconds)
    return {
        "device": info.cpu_name(), "threads": cpu.threads, "int8_gops": cpu.int8_gops, "fp32_gflops": cpu.fp32_gflops,
        "bf16_gflops": cpu.bf16_gflops, "read_gbps": cpu.read_gbps,
    }  # fmt: skip
