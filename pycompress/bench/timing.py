"""Times several implementations of one thing in turns, so that noise on a shared machine hits all alike.

A round gives every runner one short burst of calls, in an order shuffled anew; a few dozen rounds make the
samples. One runner timed to the end before the next would be compared at another hour of the machine's day.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, TypeVar

T = TypeVar("T")

BURST_SECONDS = 0.008
MAX_BURST = 200
MIN_ROUNDS, MAX_ROUNDS = 4, 40
# Below this a burst starts with one untimed call, to refill the caches that the predecessor emptied. A longer
# call refills them itself in a small part of its own time.
WARM_UP_BELOW_SECONDS = 0.02
# Thread pools spin for some milliseconds after their last job and would take a core from the next runtime.
POOL_GAP_SECONDS = 0.008


@dataclass(frozen=True)
class Runner:
    """One call to time. Runners that share a thread pool name the same `pool`."""

    run: Callable[[], object]
    pool: str


@dataclass(frozen=True)
class Stats:
    """Quantiles in seconds over all timed calls of one runner."""

    p20: float
    p50: float
    p80: float
    samples: int


@dataclass(frozen=True)
class Timing(Generic[T]):
    """`stats[name]` per runner, what `probe` returned in each round, and each runner's median call by round."""

    stats: dict[str, Stats]
    probes: list[T]
    by_round: dict[str, list[float]] = field(default_factory=dict)


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    if not ordered:
        raise ValueError("quantile: no samples; expected at least one")
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(samples: Sequence[float]) -> Stats:
    ordered = sorted(samples)
    p20, p50, p80 = (quantile(ordered, q) for q in (0.2, 0.5, 0.8))
    return Stats(p20, p50, p80, len(ordered))


def geomean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("geomean: no values; expected at least one")
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_round_robin(
    runners: Mapping[str, Runner],
    *,
    seconds: float = 0.0,
    rounds: int | None = None,
    probe: Callable[[], T],
    seed: int = 0,
    burst_seconds: float = BURST_SECONDS,
) -> Timing[T]:
    """Times the runners for about `seconds`, at least MIN_ROUNDS rounds; calls `probe` once in each round.

    rounds: exactly so many, however long they take.
    burst_seconds: how long a runner goes on in each round, at least one call.
    """
    cost = {name: min(_timed(r.run), _timed(r.run)) for name, r in runners.items()}
    burst = {name: max(1, min(MAX_BURST, math.ceil(burst_seconds / max(c, 1e-9)))) for name, c in cost.items()}
    probe_cost = _timed(probe)
    per_round = probe_cost + sum(c * (burst[n] + (c < WARM_UP_BELOW_SECONDS)) for n, c in cost.items())
    if rounds is None:
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / per_round)))

    samples: dict[str, list[list[float]]] = {name: [] for name in runners}
    probes: list[T] = []
    order = random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            probes.append(probe())
            pool = None
            for name in order.sample(list(runners), len(runners)):
                runner = runners[name]
                if runner.pool != pool:
                    time.sleep(POOL_GAP_SECONDS)
                    pool = runner.pool
                if cost[name] < WARM_UP_BELOW_SECONDS:
                    runner.run()
                samples[name].append([_timed(runner.run) for _ in range(burst[name])])
    finally:
        if collecting:
            gc.enable()
    stats = {name: summarise([call for burst in bursts for call in burst]) for name, bursts in samples.items()}
    return Timing(stats, probes, {name: [median(b) for b in bursts] for name, bursts in samples.items()})
