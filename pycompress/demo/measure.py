"""What the demo measures of each variant of the model: bytes, latency, and how far its embeddings moved."""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pycompress.report import model_bytes

Shape = tuple[int, int]  # batch, length
_SECONDS, _LEAST_ROUNDS = 20.0, 3  # of timing a shape


@dataclass(frozen=True)
class Accuracy:
    """Against the fp32 embeddings of the same sentences, in their order."""

    cosine: list[float]
    neighbour_agreement: float  # share of the sentences whose nearest other sentence is the same one

    @property
    def mean(self) -> float:
        return statistics.fmean(self.cosine)

    @property
    def worst(self) -> float:
        return min(self.cosine)


@dataclass(frozen=True)
class Latency:
    milliseconds: float  # median over the rounds
    speedup: float  # median over the rounds of the base's time over this one's, in the same round; fp32 is the base
    rounds: int


def memory_bytes(model: nn.Module) -> int:
    """Returns the bytes of everything the model holds; torch's int8 layers hide theirs in a packed object."""
    packed = [m for m in model.modules() if isinstance(m, torch.ao.nn.quantized.Linear)]
    hidden = [t for m in packed for t in m._weight_bias() if t is not None]
    return model_bytes(model) + sum(t.numel() * t.element_size() for t in hidden)


def disk_bytes(model: nn.Module) -> int:
    """Returns the size of the file that `torch.save(model.state_dict())` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(model.state_dict(), path)
        return path.stat().st_size


def accuracy(expected: Tensor, actual: Tensor) -> Accuracy:
    """expected, actual: (sentences, width) at unit length."""

    agree = neighbours_kept(expected, actual, 1)
    return Accuracy(cosine=(expected * actual).sum(1).clamp(max=1.0).tolist(), neighbour_agreement=agree)


def neighbours_kept(expected: Tensor, actual: Tensor, count: int) -> float:
    """The share of each sentence's `count` nearest others that are still among them, in any order."""

    def nearest(rows: Tensor) -> Tensor:
        return (rows @ rows.T).fill_diagonal_(-torch.inf).topk(count, dim=1).indices

    return (nearest(expected).unsqueeze(2) == nearest(actual).unsqueeze(1)).any(2).double().mean().item()


def latency(
    variants: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], rounds: int, tick: Callable[[], None]
) -> dict[str, Latency]:
    """Times every variant; the first one is the one that the others are compared with. See `round_times`."""
    times = round_times(variants, inputs, rounds, tick)
    base = times[next(iter(times))]
    return {name: compared(taken, base) for name, taken in times.items()}


@torch.inference_mode()
def round_times(
    variants: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], rounds: int, tick: Callable[[], None]
) -> dict[str, list[float]]:
    """Times every variant on the same inputs, in turn within each round, so that a slow moment of the machine
    falls on all of them. Returns each one's seconds, a value a round.

    tick: called after each of the `rounds` rounds, or of those that there was time for on a busy machine.
    """
    names = list(variants)
    calls = {name: _calls_per_slice(variants[name], inputs) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + _SECONDS
    for index in range(rounds):
        if index >= _LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        turn = index % len(names)  # who goes first changes from round to round
        for name in names[turn:] + names[:turn]:
            times[name].append(_median_call(variants[name], inputs, calls[name]))
        tick()
    return times


def compared(taken: list[float], base: list[float]) -> Latency:
    """taken, base: seconds by round, of one variant and of the one it is compared with."""
    return Latency(
        milliseconds=statistics.median(taken) * 1e3,
        speedup=statistics.median(b / t for b, t in zip(base, taken, strict=True)),
        rounds=len(taken),
    )


def _median_call(model: nn.Module, inputs: Mapping[str, Tensor], calls: int) -> float:
    return statistics.median(_one_call(model, inputs) for _ in range(calls))


def _one_call(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    start = time.perf_counter()
    model(**inputs)
    return time.perf_counter() - start


def _calls_per_slice(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Returns how many calls fill about 60 ms, after warming up."""
    warm = min(_one_call(model, inputs) for _ in range(3))
    return max(1, min(25, round(0.06 / warm)))
