"""A head over a real vocabulary: MiniLM's 30 522 words through LinearDistillationLoss, against plain torch.

The teacher is all-MiniLM-L6-v2 reading English sentences: its last hidden states times its word embeddings. The student
has the hidden states after half of the layers, a learned projection, and a head that starts as the same embeddings. The
labels are the words read.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from pycompress.bench.memory import can_measure, in_subprocess, peak_extra_bytes
from pycompress.nn import LinearDistillationLoss

from . import sentences
from .encoder import Encoder

TOKENS, QUICK_TOKENS = 1024, 128
STEPS, QUICK_STEPS = 6, 2
TEMPERATURE, ALPHA = 2.0, 0.5
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class VocabularyRow:
    """One way to compute loss and gradients: median time of a step, and memory it takes beside its inputs."""

    name: str
    milliseconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class VocabularyResult:
    """rows: torch first. floor_bytes: the gradients, which everyone must hold. losses: of the student, step by step.

    loss_difference, gradient_difference: relative, ours against torch's; the gradients of hidden states and weight.
    """

    tokens: int
    hidden: int
    vocabulary: int
    rows: list[VocabularyRow]
    floor_bytes: int
    notes: list[str]
    loss_difference: float
    gradient_difference: float
    losses: list[float]


@dataclass(frozen=True)
class Words:
    """hidden states (T, H) of student and teacher, the embedding matrix (V, H), and the words (T,)."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    labels: Tensor


def run(progress: Progress, quick: bool) -> VocabularyResult:
    """Raises RuntimeError when the model or the sentences are not installed."""
    steps = QUICK_STEPS if quick else STEPS
    task = progress.add_task("reading sentences", total=3 + steps)
    words = read(QUICK_TOKENS if quick else TOKENS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.pt"
        torch.save(vars(words), path)
        for name in _STEPS:
            progress.update(task, description=f"a head over {len(words.weight):,} words: {name}")
            found = in_subprocess(
                f"{__name__}:measure",
                name=name,
                path=str(path),
                rounds=2 if quick else 5,
                threads=torch.get_num_threads(),
            )
            rows.append(VocabularyRow(name, found["milliseconds"], found["peak_bytes"]))
            progress.advance(task)
    progress.update(task, description="comparing gradients")
    loss, gradient = differences(words)
    progress.advance(task)
    losses = []
    for value in train(words, steps):
        losses.append(value)
        progress.update(task, advance=1, description=f"training over the vocabulary: loss {value:.2f}")
    progress.update(task, visible=False)
    floor = 4 * (words.student.numel() + words.weight.numel())
    notes = [] if can_measure() else ["peak memory is measured on Linux only"]
    tokens, hidden = words.student.shape
    return VocabularyResult(tokens, hidden, len(words.weight), rows, floor, notes, loss, gradient, losses)


@torch.no_grad()
def read(tokens: int) -> Words:
    """The first `tokens` real tokens of the sentences, special ones left out."""
    encoder = Encoder()
    model: Any = encoder.model
    student, teacher, labels = [], [], []
    found, texts = 0, sentences.load(None)
    for start in range(0, len(texts), 32):
        inputs = encoder.tokenize(texts[start : start + 32])
        states = model(**inputs, output_hidden_states=True).hidden_states
        ids = inputs["input_ids"]
        special = {encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id, encoder.tokenizer.pad_token_id}
        real = torch.tensor([[int(i) not in special for i in row] for row in ids])
        student.append(states[len(states) // 2][real])
        teacher.append(states[-1][real])
        labels.append(ids[real])
        found += int(real.sum())
        if found >= tokens:
            break
    weight = model.get_input_embeddings().weight
    hidden = [torch.cat(part)[:tokens].clone() for part in (student, teacher, labels)]
    return Words(hidden[0], hidden[1], weight.detach().clone(), hidden[2])


def _torch_loss(hidden: Tensor, weight: Tensor, words: Words) -> Tensor:
    """What one writes without a fused loss."""
    student = functional.linear(hidden, weight)
    with torch.no_grad():
        teacher = functional.linear(words.teacher, words.weight)
    hard = functional.cross_entropy(student, words.labels)
    soft = functional.kl_div(
        functional.log_softmax(student / TEMPERATURE, -1),
        functional.softmax(teacher / TEMPERATURE, -1),
        reduction="batchmean",
    )
    return ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft


def _our_loss(hidden: Tensor, weight: Tensor, words: Words) -> Tensor:
    loss = LinearDistillationLoss(temperature=TEMPERATURE, alpha=ALPHA)(
        hidden, weight, words.teacher, words.weight, words.labels
    )
    assert isinstance(loss, Tensor)
    return loss


_STEPS = {"torch": _torch_loss, "pycompress": _our_loss}


def _gradients(name: str, words: Words) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients to the student's hidden states and to its head."""
    hidden, weight = words.student.requires_grad_(), words.weight.detach().requires_grad_()
    loss = _STEPS[name](hidden, weight, words)
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), by_hidden, by_weight


def measure(name: str, path: str, rounds: int, threads: int) -> dict[str, float | int | None]:
    """Time and memory of one way, in a process of its own: what one leaves behind would count for the other."""
    torch.set_num_threads(threads)
    words = Words(**torch.load(path, weights_only=True))
    # What is loaded or started at the first call is not the step's memory. Few words: a gradient of the full size would
    # be kept for the next step, and not count in it.
    _gradients(name, Words(words.student[:8].clone(), words.teacher[:8], words.weight[:64], words.labels[:8] % 64))
    peak = peak_extra_bytes(lambda: _gradients(name, words)) if can_measure() else None
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        _gradients(name, words)
        times.append(time.perf_counter() - start)
    return {"milliseconds": 1e3 * median(times), "peak_bytes": peak}


def differences(words: Words) -> tuple[float, float]:
    """Of loss and gradients, relative to torch's."""
    few = Words(words.student[:128].clone(), words.teacher[:128], words.weight, words.labels[:128])
    theirs, ours = (_gradients(name, few) for name in _STEPS)
    loss, *gradients = [float((b - a).norm() / a.norm()) for a, b in zip(theirs, ours, strict=True)]
    return loss, max(gradients)


def train(words: Words, steps: int) -> list[float]:
    """The student's loss before each of some steps of Adam on its projection and head."""
    projection = nn.Linear(words.student.shape[1], words.weight.shape[1], bias=False)
    nn.init.eye_(projection.weight)
    weight = nn.Parameter(words.weight.clone())
    optimizer = torch.optim.Adam([*projection.parameters(), weight], LEARNING_RATE)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _our_loss(projection(words.student.detach()), weight, words)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
