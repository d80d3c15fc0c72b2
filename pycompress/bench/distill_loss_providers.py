"""Who computes a distillation loss on a CPU: one row of PROVIDERS each.

loss(options) -> f(student_logits, teacher_logits, labels) -> scalar
linear(options) -> f(student_hidden, student_weight, teacher_hidden, teacher_weight, labels) -> scalar
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress.bench.provider import BaseProvider

LossFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Options:
    """Of the loss, as DistillationLoss takes them. Without a hard term (alpha = 0) there are no labels."""

    temperature: float = 2.0
    alpha: float = 0.5
    divergence: str = "forward_kl"
    beta: float = 0.5

    def __str__(self) -> str:
        beta = f" beta={self.beta:g}" if self.divergence == "jsd" else ""
        return f"{self.divergence}{beta} temperature={self.temperature:g} alpha={self.alpha:g}"


MAIN = Options()


@dataclass(frozen=True)
class Provider(BaseProvider):
    """One way to compute the losses.

    loss, linear: see above; None where it has none, and `why_not` says why there is no loss of logits.
    compiles: its first call with new shapes compiles for seconds.
    """

    name: str
    backend: str
    loss: Callable[[Options], LossFn] | None
    linear: Callable[[Options], LossFn]
    requires: tuple[str, ...] = ("torch",)
    compiles: bool = False
    why_not: str = ""


def composition(options: Options) -> LossFn:
    """The loss as one writes it in torch. Half-precision logits are widened, as autocast does.

    The mean of kl_div is over all tokens, that of cross_entropy over those not ignored: equal here, where no
    label is ignored. Masking would only make it slower.
    """
    tau, alpha, beta = options.temperature, options.alpha, options.beta

    def soft(s: Tensor, t: Tensor) -> Tensor:
        if tau != 1:
            s, t = s / tau, t / tau
        log_q = F.log_softmax(s, -1)
        if options.divergence == "forward_kl":
            return F.kl_div(log_q, F.softmax(t, -1), reduction="batchmean")
        log_p = F.log_softmax(t, -1)
        if options.divergence == "reverse_kl":
            return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        of_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
        return beta * of_p + (1 - beta) * F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)

    def run(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        if student.dtype in (torch.bfloat16, torch.float16):
            student, teacher = student.float(), teacher.float()
        value = (1 - alpha) * tau**2 * soft(student, teacher)
        return value if labels is None else alpha * F.cross_entropy(student, labels, ignore_index=-100) + value

    return run


def linear_composition(options: Options) -> LossFn:
    of_logits = composition(options)

    def run(h: Tensor, weight: Tensor, teacher_h: Tensor, teacher_weight: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            teacher = teacher_h @ teacher_weight.t()
        return of_logits(h @ weight.t(), teacher, labels)

    return run


def _compiled(make: Callable[[Options], LossFn]) -> Callable[[Options], LossFn]:
    def build(options: Options) -> LossFn:
        compiled: LossFn = torch.compile(make(options), fullgraph=True, dynamic=False)
        return compiled

    return build


def _pycompress(options: Options) -> LossFn:
    from pycompress.nn import DistillationLoss

    return DistillationLoss(**_arguments(options))


def _pycompress_linear(options: Options) -> LossFn:
    from pycompress.nn import LinearDistillationLoss

    return LinearDistillationLoss(**_arguments(options))


def _arguments(options: Options) -> dict[str, Any]:
    return asdict(options) | {"backend": "native"}


def liger_linear(options: Options) -> LossFn:
    """Its generalised JSD is forward KL at beta 0 and reverse KL at 1, and knows no τ² of the soft term."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(options.divergence, options.beta)
    soft = (1 - options.alpha) * options.temperature**2
    loss: LossFn = LigerFusedLinearJSDLoss(options.alpha, soft, beta=beta, temperature=options.temperature)
    return loss


PROVIDERS: tuple[Provider, ...] = (
    Provider("pycompress", "native", _pycompress, _pycompress_linear, requires=("pycompress",)),
    Provider("torch-eager", "eager", composition, linear_composition),
    Provider("torch-compile", "inductor", _compiled(composition), _compiled(linear_composition), compiles=True),
    Provider(
        "liger-kernel",
        "inductor",
        None,
        liger_linear,
        requires=("liger_kernel",),
        compiles=True,
        why_not="its losses of logits (LigerKLDIVLoss, LigerJSD, LigerFusedLinearJSD) are Triton kernels for GPUs",
    ),
)
