"""How long a step of the loss takes in the distillation demo, against the torch composition of the same loss."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.bench.distill_loss_providers import Options, composition
from pycompress.bench.timing import Runner, time_round_robin
from pycompress.nn import DistillationLoss

from .distill_digits import ALPHA, BATCH, CLASSES, TEMPERATURE, one_thread, student_model

BIG = (256, 30522)  # tokens of BERT's vocabulary
QUICK_BIG = (64, 30522)
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class StepTime:
    """Median milliseconds of a forward and backward, fp32; with `whole` that of the digits student's training step."""

    tokens: int
    classes: int
    whole: bool
    threads: int
    torch_ms: float
    pycompress_ms: float
    rounds: int

    @property
    def name(self) -> str:
        what = "training step of the student" if self.whole else f"loss, {self.tokens} × {self.classes:,} logits"
        return f"{what} ({self.threads} thread{'s' * (self.threads > 1)})"

    @property
    def speedup(self) -> float:
        return self.torch_ms / self.pycompress_ms


def losses() -> dict[str, Loss]:
    return {
        "torch": composition(Options(TEMPERATURE, ALPHA)),
        "pycompress": DistillationLoss(TEMPERATURE, ALPHA),
    }


def loss_step(loss: Loss, tokens: int, classes: int) -> Callable[[], None]:
    """Returns a call that computes the loss and its gradient with respect to the student's logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(tokens, classes, generator=generator) for _ in range(2))
    labels = torch.randint(classes, (tokens,), generator=generator)
    student.requires_grad_()

    def run() -> None:
        student.grad = None
        loss(student, teacher, labels).backward()

    return run


def training_step(loss: Loss) -> Callable[[], None]:
    """Returns a call that trains the digits student by one batch: forward, loss, backward, optimizer."""
    generator = torch.Generator().manual_seed(0)
    images, teacher = torch.rand(BATCH, 64, generator=generator), torch.randn(BATCH, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    model = student_model()
    optimizer = torch.optim.AdamW(model.parameters())

    def run() -> None:
        optimizer.zero_grad()
        loss(model(images), teacher, labels).backward()
        optimizer.step()

    return run


def measure(quick: bool, say: Callable[[str], None], tick: Callable[[], None]) -> list[StepTime]:
    """tick: called after each of the three measurements."""
    cases = [(BATCH, CLASSES, True), (BATCH, CLASSES, False), (*(QUICK_BIG if quick else BIG), False)]
    found = []
    for tokens, classes, whole in cases:
        say(f"timing {tokens} × {classes}")
        runners = {
            name: Runner(training_step(loss) if whole else loss_step(loss, tokens, classes), pool="torch")
            for name, loss in losses().items()
        }
        with one_thread() if classes == CLASSES else nullcontext():  # as the digits were trained
            timing = time_round_robin(runners, seconds=0.2 if quick else 3.0, probe=lambda: None)
            threads = torch.get_num_threads()
        ms = {name: 1e3 * stats.p50 for name, stats in timing.stats.items()}
        found.append(StepTime(tokens, classes, whole, threads, ms["torch"], ms["pycompress"], len(timing.probes)))
        tick()
    return found
