"""What the workflow costs over a hand-written loop with the same modules.

Both train a student with distillation, clipping and a pruning schedule: a classifier of the digits' size, a transformer
of MiniLM's size, and two small layers, whose difference is the price of a step in microseconds. "trainer" is the
training loop alone; "compress" is a whole prune stage of compress(), as its record says: trying the batch, the loop,
its history. They take turns with the loop by hand, some steps each, in an order shuffled anew, so that a slow moment of
the machine falls on all. Printed are medians of the wall and of the processor time of a step, and the median of the
ratios of neighbours.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycompress import compress
from pycompress.nn import DistillationLoss
from pycompress.pruning.schedule import PruningSchedule
from pycompress.recipe.sections import Distillation, Train
from pycompress.workflow.batches import EpochBatches
from pycompress.workflow.objective import Objective
from pycompress.workflow.trainer import Trainer

FOREVER = 10**6  # steps: nobody gets to the end
LR, CLIP, TAU, ALPHA, SPARSITY, EVERY = 1e-4, 1.0, 2.0, 0.5, 0.8, 10
Steps = Callable[[int], None]


@dataclass(frozen=True)
class Case:
    """steps: in one turn of each; stage: in one of compress()."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    steps: int
    stage: int


class Digits(nn.Module):
    """A transformer over the rows of an 8 x 8 image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(images)).mean(1))


class MiniLm(nn.Module):
    """6 layers of width 384 over token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30522, 384)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)).mean(1))


CASES = (
    Case(
        "two layers",
        lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 10)),
        lambda: (torch.randn(4, 16), torch.randint(10, (4,))),
        100,
        1000,
    ),
    Case("digits", Digits, lambda: (torch.randn(64, 8, 8), torch.randint(10, (64,))), 10, 200),
    Case("minilm", MiniLm, lambda: (torch.randint(30522, (8, 64)), torch.randint(10, (8,))), 1, 40),
)


def by_hand(case: Case, batches: list[tuple[Tensor, Tensor]]) -> Steps:
    torch.manual_seed(0)
    student = case.model()
    teacher = copy.deepcopy(student).eval()
    loss_fn = DistillationLoss(TAU, ALPHA)
    groups = [[p for p in student.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.01}, {"params": groups[1], "weight_decay": 0.0}], LR, fused=True
    )
    schedule = PruningSchedule(student, optimizer, sparsity=SPARSITY, end=FOREVER, every=EVERY)
    parameters = list(student.parameters())
    student.train()
    place = 0

    def run(steps: int) -> None:
        nonlocal place
        for _ in range(steps):
            inputs, labels = batches[place % len(batches)]
            with torch.no_grad():
                told = teacher(inputs)
            loss_fn(student(inputs), told, labels).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - place / FOREVER)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            place += 1

    return run


def by_trainer(case: Case, batches: list[tuple[Tensor, Tensor]]) -> Steps:
    torch.manual_seed(0)
    student = case.model()
    teacher = copy.deepcopy(student)
    objective = Objective.make(Distillation(tau=TAU, alpha=ALPHA), student, teacher, None, batches[0])
    train = Train(steps=FOREVER, lr=LR, weight_decay=0.01, clip_norm=CLIP)
    trainer = Trainer(
        student,
        train,
        objective,
        EpochBatches(batches, seed=0),
        make_schedule=lambda optimizer: PruningSchedule(
            student, optimizer, sparsity=SPARSITY, end=FOREVER, every=EVERY
        ),
    )

    def run(steps: int) -> None:
        last = trainer.step + steps
        trainer.run(lambda info: info.step < last)

    return run


def compare(case: Case, rounds: int) -> dict[str, tuple[float, float, float]]:
    """For wall and processor time: seconds of a step by hand, by the trainer, and the median ratio."""
    torch.manual_seed(0)
    batches = [case.batch() for _ in range(16)]
    runners = {"hand": by_hand(case, batches), "trainer": by_trainer(case, batches)}
    for run in runners.values():
        run(max(3, case.steps))
    found: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in runners} for clock in ("wall", "cpu")}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(runners), 2):
            wall, cpu = time.perf_counter(), time.process_time()
            runners[name](case.steps)
            found["cpu"][name].append((time.process_time() - cpu) / case.steps)
            found["wall"][name].append((time.perf_counter() - wall) / case.steps)
    result = {}
    for clock, samples in found.items():
        ratios = [b / a for a, b in zip(samples["hand"], samples["trainer"], strict=True)]
        medians = [statistics.median(samples[name]) for name in runners]
        result[clock] = (medians[0], medians[1], statistics.median(ratios))
    return result


def compare_compress(case: Case, rounds: int) -> tuple[float, float, float]:
    """Wall seconds of a step by hand, in a stage of compress(), and the median ratio."""
    torch.manual_seed(0)
    batches = [case.batch() for _ in range(16)]
    hand, model = by_hand(case, batches), case.model()
    train = {"steps": case.stage, "lr": LR, "weight_decay": 0.01, "clip_norm": CLIP}
    prune = {
        "sparsity": SPARSITY,
        "schedule": {"end": 1.0, "every": EVERY},
        "train": train,
        "distill": {"tau": TAU, "alpha": ALPHA},
    }
    recipe = {"stages": [{"prune": prune}], "measure": {"rounds": 0, "layers": False}}
    samples: list[tuple[float, float]] = []
    for _ in range(rounds):
        start = time.perf_counter()
        hand(case.stage)
        seconds = time.perf_counter() - start
        result = compress(model, recipe, train_batches=batches, progress=False)
        samples.append((seconds / case.stage, result.records[1].seconds / case.stage))
    medians = [statistics.median(column) for column in zip(*samples, strict=True)]
    return medians[0], medians[1], statistics.median(b / a for a, b in samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'case':11}{'what':9}{'clock':6}{'hand us':>12}{'us':>12}{'ratio':>8}")
    for case in CASES:
        if options.case is None or case.name in options.case:
            rounds = options.rounds if case.steps > 1 else max(4, options.rounds // 2)
            found = {("trainer", clock): row for clock, row in compare(case, rounds).items()}
            found["compress", "wall"] = compare_compress(case, max(3, rounds // 10))
            for (what, clock), (hand, other, ratio) in found.items():
                print(f"{case.name:11}{what:9}{clock:6}{1e6 * hand:12.1f}{1e6 * other:12.1f}{ratio:8.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
