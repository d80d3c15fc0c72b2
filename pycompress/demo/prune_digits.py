"""The pruning demo's training: a classifier of scikit-learn's 1797 real digits, pruned to 90 % at once and gradually.

The classifier is a wide multilayer perceptron, trained dense first. It is then pruned by magnitude, in two ways:

- at once, and left as it is;
- gradually (Zhu & Gupta 2017: the sparsity rises steeply, then ever more slowly) while it goes on training on the
  labels, with and without the dense classifier as its teacher, and for a while after the last zero is chosen.

The latter is converted, as fp32 and as int8, and the result's size, time and accuracy are measured.

The test images are one split, the same for every seed, and a run chooses nothing by them. Width, steps, rates,
temperature and alpha were settled while writing this on a fifth of the training images, held out; the test images were
looked at only afterwards. A seed draws the start and the batches.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional

import pycompress
from pycompress.nn import DistillationLoss
from pycompress.pruning import PruningSchedule, masked_layers

from . import distill_digits, measure
from .distill_digits import BatchLoss, Digits, accuracy, fit, one_thread
from .prune_encoder import DENSE, PATTERNS, WEIGHTS, variant_name

TEST_SPLIT = 7  # distill_digits.load's seed
WIDTH = 768
SPARSITY = 0.9
ONE_SHOT = (0.5, 0.7, 0.8, 0.9, 0.95)
DENSE_RATE, PRUNING_RATE = 1e-3, 3e-3
PRUNING_SHARE, EVERY = 0.6, 10  # of the steps: until then the sparsity rises, every so many
TEMPERATURE, ALPHA = 2.0, 0.5
BATCHES = (1, 128)
ARMS = ("labels", "labels + teacher")
CHOSEN = ARMS[1]  # which is converted


@dataclass(frozen=True)
class Plan:
    seeds: int
    dense_steps: int
    steps: int
    rounds: int


WHOLE = Plan(seeds=4, dense_steps=300, steps=400, rounds=15)
QUICK = Plan(seeds=2, dense_steps=100, steps=100, rounds=5)


@dataclass
class FinalModel:
    """A classifier as it would be deployed. accuracy: test accuracy in %, one a seed; the rest is of the last seed."""

    weights: str
    pattern: str
    sparsity: float
    accuracy: list[float] = field(default_factory=list)
    disk_bytes: int = 0
    latency: dict[int, measure.Latency] = field(default_factory=dict)  # by batch; against the dense fp32 model

    @property
    def name(self) -> str:
        return variant_name(self.weights, self.pattern, self.sparsity)


@dataclass
class PruneDigitsResult:
    """Test accuracies in %, one a seed. one_shot: by pattern, then by sparsity; gradual: by pattern, then by arm."""

    train_images: int
    test_images: int
    dense_steps: int
    steps: int
    parameters: int
    dense: list[float] = field(default_factory=list)
    one_shot: dict[str, dict[float, list[float]]] = field(default_factory=dict)
    gradual: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)  # by pattern: the share of zeros
    final: dict[str, FinalModel] = field(default_factory=dict)  # by name, dense fp32 first

    @property
    def seeds(self) -> int:
        return len(self.dense)


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, distill_digits.CLASSES)
    )


def train_dense(digits: Digits, steps: int, seed: int, tick: Callable[[], None]) -> nn.Module:
    torch.manual_seed(seed)
    labels = digits.train_labels

    def loss(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, labels[places])

    return fit(model(), digits.train_images, loss, steps, DENSE_RATE, seed, tick)


def arm_loss(arm: str, digits: Digits, teacher: nn.Module) -> BatchLoss:
    labels = digits.train_labels
    if arm == "labels":
        return lambda logits, places: functional.cross_entropy(logits, labels[places])
    with torch.no_grad():
        answers = teacher(digits.train_images)
    distillation = DistillationLoss(TEMPERATURE, ALPHA)
    return lambda logits, places: distillation(logits, answers[places], labels[places])


def prune_gradually(
    dense: nn.Module, pattern: str, loss: BatchLoss, digits: Digits, steps: int, seed: int, tick: Callable[[], None]
) -> nn.Module:
    """A copy of the dense model, pruned to SPARSITY in the first PRUNING_SHARE of the steps and trained in all."""
    pruned = copy.deepcopy(dense)

    def after_step(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        end = round(PRUNING_SHARE * steps)
        return PruningSchedule(pruned, optimizer, sparsity=SPARSITY, end=end, every=EVERY, pattern=pattern).step

    return fit(pruned, digits.train_images, loss, steps, PRUNING_RATE, seed, tick, after_step)


def sparsity_of(model: nn.Module) -> float:
    """The share of pruned weights in all masked layers."""
    masks = [layer.mask for layer in masked_layers(model).values()]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def final_models(dense: nn.Module, pruned: dict[str, nn.Module]) -> Iterator[tuple[FinalModel, nn.Module]]:
    """Yields the dense model, the dense int8 one, and the pruned ones (by pattern) converted."""
    yield FinalModel("fp32", DENSE, 0.0), dense
    int8 = copy.deepcopy(dense)
    pycompress.quantize_(int8)
    yield FinalModel("int8", DENSE, 0.0), int8
    for pattern, masked in pruned.items():
        for weights, dtype in WEIGHTS.items():
            sparse = copy.deepcopy(masked)
            pycompress.sparsify_(sparse, dtype)
            yield FinalModel(weights, pattern, SPARSITY), sparse


def run_seed(
    result: PruneDigitsResult, digits: Digits, seed: int, say: Callable[[str], None], tick: Callable[[], None]
) -> dict[str, nn.Module]:
    """Trains and prunes, adds the test accuracies to the result, and returns the final models by name."""

    def tested(model: nn.Module) -> float:
        return accuracy(model, digits.test_images, digits.test_labels)

    chosen = {}
    with one_thread():
        say(f"seed {seed + 1}: dense")
        dense = train_dense(digits, result.dense_steps, seed, tick)
        result.dense.append(tested(dense))
        for pattern in PATTERNS:
            for sparsity in ONE_SHOT:
                pruned = copy.deepcopy(dense)
                pycompress.prune_(pruned, sparsity, pattern=pattern)
                result.one_shot.setdefault(pattern, {}).setdefault(sparsity, []).append(tested(pruned))
            for arm in ARMS:
                say(f"seed {seed + 1}: {pattern}, {arm}")
                loss = arm_loss(arm, digits, dense)
                pruned = prune_gradually(dense, pattern, loss, digits, result.steps, seed, tick)
                result.gradual.setdefault(pattern, {}).setdefault(arm, []).append(tested(pruned))
                if arm == CHOSEN:
                    chosen[pattern] = pruned
                    result.reached[pattern] = sparsity_of(pruned)
    models = {}
    # Converted with the threads it will run with: they decide what is worth being sparse.
    for final, converted in final_models(dense, chosen):
        kept = result.final.setdefault(final.name, final)
        kept.accuracy.append(tested(converted))
        kept.disk_bytes = measure.disk_bytes(converted)
        models[final.name] = converted
    return models


def run(progress: Progress, seeds: int | None, plan: Plan) -> PruneDigitsResult:
    """seeds: how many instead of the plan's."""
    seeds = seeds or plan.seeds
    training = seeds * (plan.dense_steps + len(PATTERNS) * len(ARMS) * plan.steps)
    task = progress.add_task("loading the digits", total=training)

    def say(what: str) -> None:
        progress.update(task, description=f"digits, {what}")

    def tick() -> None:
        progress.advance(task)

    digits = distill_digits.load(TEST_SPLIT)
    result = PruneDigitsResult(
        len(digits.train_images), len(digits.test_images), plan.dense_steps, plan.steps,
        distill_digits.parameters(model()),
    )  # fmt: skip
    models: dict[str, nn.Module] = {}
    for seed in range(seeds):
        models = run_seed(result, digits, seed, say, tick)
    progress.update(task, completed=0, total=len(BATCHES) * plan.rounds)
    for batch in BATCHES:
        say(f"timing {batch} images")
        timed = measure.latency(models, {"input": digits.test_images[:batch]}, plan.rounds, tick)
        for name, final in result.final.items():
            final.latency[batch] = timed[name]
    progress.update(task, visible=False)
    return result
