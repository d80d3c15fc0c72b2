"""The distillation demo's training: small students of a bigger teacher on scikit-learn's 1797 real digits.

Each seed draws its own split: 30 % of the images are held out for the test, and the teacher, a small convolutional
network, learns from all the others with their labels. The students are one architecture from one start; what differs
is what they learn from:

- the labels of five images a class, as if labelling more were too dear;
- those same images and labels, and what the teacher says of them;
- every training image, as the teacher sees it, without a label;
- every label, with and without the teacher: the case that has little left to gain.

The number of steps, the batches and the learning rate are the same for all students, and a run chooses nothing by the
test accuracy. Temperature, alpha, the student's width and the steps were settled while writing this, after a few runs
on splits of the same images; those of 300 steps or more all ranked the arms alike.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycompress.nn import DistillationLoss

CLASSES, PER_CLASS, TEST_SHARE = 10, 5, 0.3
TEMPERATURE, ALPHA = 4.0, 0.5
BATCH = 64
# Of a batch's places: student's logits (batch, classes) and the images' places in the training set.
BatchLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to train the student. `few`: on PER_CLASS labelled images a class, not on all."""

    name: str
    few: bool
    labels: bool
    teacher: bool

    @property
    def loss(self) -> DistillationLoss | None:
        """None is plain cross-entropy."""
        return DistillationLoss(TEMPERATURE, ALPHA if self.labels else 0.0) if self.teacher else None


ARMS = (
    Arm("few labels", few=True, labels=True, teacher=False),
    Arm("few labels + teacher", few=True, labels=True, teacher=True),
    Arm("teacher, all images", few=False, labels=False, teacher=True),
    Arm("all labels", few=False, labels=True, teacher=False),
    Arm("all labels + teacher", few=False, labels=True, teacher=True),
)
# What distillation adds: pairs of arms, with and without the teacher, that cost equally many labels or fewer.
PAIRS = ((ARMS[1], ARMS[0]), (ARMS[2], ARMS[0]), (ARMS[4], ARMS[3]))


@dataclass(frozen=True)
class Digits:
    """images: (n, 64) fp32 in 0..1; labels: (n,) int64. `few` are places in the training set."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    few: Tensor


@dataclass
class DigitsResult:
    train_images: int
    test_images: int
    steps: int
    teacher_parameters: int
    student_parameters: int
    teacher: list[float] = field(default_factory=list)  # test accuracy in %, one a seed
    students: dict[str, list[float]] = field(default_factory=dict)  # by the arm's name

    @property
    def seeds(self) -> int:
        return len(self.teacher)


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small run no faster on two threads, and many times slower where another program wants a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def mean_std(values: list[float]) -> tuple[float, float]:
    """The mean and the standard deviation (of the sample; 0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def gains(result: DigitsResult) -> Iterator[tuple[str, list[float]]]:
    """Yields what distillation added, seed by seed, in points of accuracy, keyed "one arm over another"."""
    for taught, alone in PAIRS:
        pairs = zip(result.students[taught.name], result.students[alone.name], strict=True)
        yield f"{taught.name} over {alone.name}", [a - b for a, b in pairs]


def load(seed: int) -> Digits:
    """Splits the digits; in the test set and in `few` the classes are even, as far as their counts allow."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.data).float() / 16
    labels = torch.from_numpy(data.target).long()
    generator = torch.Generator().manual_seed(seed)
    test, train = [], []
    for label in range(CLASSES):
        places = (labels == label).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=generator)]
        held_out = round(TEST_SHARE * len(places))
        test.append(places[:held_out])
        train.append(places[held_out:])
    starts = [0, *torch.tensor([len(p) for p in train]).cumsum(0).tolist()[:-1]]
    few = torch.cat([torch.arange(start, start + PER_CLASS) for start in starts])
    in_train, in_test = torch.cat(train), torch.cat(test)
    return Digits(images[in_train], labels[in_train], images[in_test], labels[in_test], few)


def teacher_model() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(64, CLASSES),
    )


def student_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fit(
    model: nn.Module,
    images: Tensor,
    loss: BatchLoss,
    steps: int,
    rate: float,
    seed: int,
    tick: Callable[[], None],
    after_step: Callable[[torch.optim.Optimizer], Callable[[], object]] | None = None,
) -> nn.Module:
    """Trains in place with AdamW and a one-cycle rate, on batches drawn with replacement.

    after_step: given the optimizer, returns what is to be called after each of its steps.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    then = after_step(optimizer) if after_step else lambda: None
    model.train()
    for _ in range(steps):
        places = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model(images[places]), places).backward()
        optimizer.step()
        then()
        schedule.step()
        tick()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model(images).argmax(1) == labels).double().mean().item()


def batch_loss(arm: Arm, labels: Tensor, teacher_logits: Tensor) -> BatchLoss:
    distillation = arm.loss
    if distillation is None:
        return lambda logits, places: functional.cross_entropy(logits, labels[places])
    return lambda logits, places: distillation(logits, teacher_logits[places], labels[places] if arm.labels else None)


def run_seed(result: DigitsResult, seed: int, say: Callable[[str], None], tick: Callable[[], None]) -> None:
    """Trains the teacher and a student an arm, and adds their test accuracies to the result."""
    digits = load(seed)
    torch.manual_seed(seed)
    say(f"seed {seed + 1}: teacher")
    teacher = teacher_model()
    fit(
        teacher,
        digits.train_images,
        lambda logits, places: functional.cross_entropy(logits, digits.train_labels[places]),
        result.steps,
        3e-3,
        seed,
        tick,
    )
    result.teacher.append(accuracy(teacher, digits.test_images, digits.test_labels))
    with torch.no_grad():
        teacher_logits = teacher(digits.train_images)
    for arm in ARMS:
        say(f"seed {seed + 1}: {arm.name}")
        chosen = digits.few if arm.few else slice(None)
        loss = batch_loss(arm, digits.train_labels[chosen], teacher_logits[chosen])
        torch.manual_seed(seed)
        student = fit(student_model(), digits.train_images[chosen], loss, result.steps, 1e-2, seed, tick)
        result.students.setdefault(arm.name, []).append(accuracy(student, digits.test_images, digits.test_labels))


def train(seeds: int, steps: int, say: Callable[[str], None], tick: Callable[[], None]) -> DigitsResult:
    """tick: called after each of the `seeds * steps * (1 + len(ARMS))` steps; say: with what is being trained."""
    digits = load(0)
    result = DigitsResult(
        len(digits.train_images), len(digits.test_images), steps,
        parameters(teacher_model()), parameters(student_model()),
    )  # fmt: skip
    for seed in range(seeds):
        run_seed(result, seed, say, tick)
    return result
