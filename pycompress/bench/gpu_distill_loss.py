"""Distillation losses on a GPU against torch, torch.compile and liger-kernel.

`pycompress bench distill_loss --device cuda`. Logits are bfloat16. Cases are T x V, tokens and classes, or T x H x V:
LinearDistillationLoss with hidden states of width H.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress.bench.distill_loss_providers import (
    MAIN,
    LossFn,
    Options,
    composition,
    liger_linear,
    linear_composition,
)
from pycompress.bench.distill_loss_run import BOTH, FORWARD, Case, Data, call_both, make_data, truth
from pycompress.bench.gpu_meter import Meter
from pycompress.bench.gpu_run import Bound, GpuCase, GpuProvider, Work, command, parser

CELL_SECONDS = 0.3
# The vocabularies of BERT, Llama 2, Llama 3; a classifier of ImageNet.
CASES = (
    Case(512, 30522),
    Case(4096, 32000),
    Case(2048, 128256),
    Case(65536, 1000),
    Case(4096, 32000, options=Options(divergence="jsd")),
    Case(4096, 128256, hidden=2048),
)
QUICK_CASES = (Case(4096, 32000),)
TOLERANCE = {"bf16": 1e-2}


@dataclass(frozen=True)
class OnDevice:
    """A case, its tensors on the device, and the direction that is timed."""

    case: Case
    data: Data
    direction: str

    def work(self) -> Work:
        """Of logits: both read, the gradient written. Of hidden states: the products, which take longer."""
        case, both = self.case, self.direction == BOTH
        if case.hidden is not None:
            products = 4 if both else 2
            weights = 2 * case.vocab * case.hidden * (3 if both else 2)  # two read, one gradient written
            return Work(1e-9 * weights, 2e-9 * products * case.tokens * case.vocab * case.hidden, "bf16_gflops")
        return Work(1e-9 * 2 * (3 if both else 2) * case.tokens * case.vocab)


def make(case: Case, direction: str, device: torch.device) -> tuple[OnDevice, list[Tensor]]:
    data = make_data(case, "bf16")
    moved = tuple(None if a is None else a.to(device) for a in data.arguments)
    there = replace(data, arguments=moved)
    exact = truth(case, there)
    wanted = [exact.loss] if direction == FORWARD else [exact.loss, *exact.gradients]
    return OnDevice(case, there, direction), wanted


def _bound(loss: LossFn, on: OnDevice) -> Bound:
    data = on.data
    if on.direction == FORWARD:
        run = partial(loss, *data.arguments)
        return Bound(run, lambda: [run()], on.work())
    arguments = data.wanting_gradients()

    def outputs() -> list[Tensor]:
        value, gradients = call_both(loss, data, arguments)
        return [value, *gradients]

    return Bound(partial(call_both, loss, data, arguments), outputs, on.work())


# ---- providers ----


def _ours(backend: str, on: OnDevice) -> Bound:
    from pycompress.nn import DistillationLoss, LinearDistillationLoss

    kind = DistillationLoss if on.case.hidden is None else LinearDistillationLoss
    return _bound(kind(**asdict(on.case.options), backend=backend), on)


def _torch(compiled: bool, on: OnDevice) -> Bound:
    loss = (composition if on.case.hidden is None else linear_composition)(on.case.options)
    return _bound(torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss, on)


def _liger(on: OnDevice) -> Bound:
    return _bound(_liger_of_logits(on.case.options) if on.case.hidden is None else liger_linear(on.case.options), on)


def _beta(options: Options) -> float:
    """Its generalised JSD is forward KL at beta 0 and reverse KL at 1."""
    return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(options.divergence, options.beta)


def _liger_of_logits(options: Options) -> LossFn:
    """Its JSD wants logarithms of probabilities, which torch makes. Its cross-entropy overwrites what it is given."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerJSD

    divergence, cross_entropy = LigerJSD(beta=_beta(options)), LigerCrossEntropyLoss(ignore_index=-100)
    tau, alpha = options.temperature, options.alpha

    def run(student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        wide = student.float()
        soft = divergence(F.log_softmax(wide / tau, -1), F.log_softmax(teacher.float() / tau, -1))
        value: Tensor = (1 - alpha) * tau**2 * soft
        return value if labels is None else alpha * cross_entropy(wide, labels) + value

    return run


_BUILDS: tuple[tuple[str, str, Callable[[OnDevice], Bound], tuple[str, ...]], ...] = (
    ("pycompress-cuda", "cuda", partial(_ours, "cuda"), ("pycompress",)),
    ("pycompress-triton", "triton", partial(_ours, "triton"), ("pycompress",)),
    ("torch-eager", "eager", partial(_torch, False), ("torch",)),
    ("torch-compile", "inductor", partial(_torch, True), ("torch", "triton")),
    ("liger-kernel", "triton", _liger, ("liger_kernel", "triton")),
)
PROVIDERS = tuple(GpuProvider(name, backend, build, requires=needs) for name, backend, build, needs in _BUILDS)


def gpu_cases(found: Sequence[Case]) -> list[GpuCase]:
    def of(case: Case, direction: str) -> GpuCase:
        fields = {"M": case.tokens, "N": case.vocab, "K": case.hidden, "options": str(case.options)}
        return GpuCase(case.op, fields, partial(make, case, direction), PROVIDERS, TOLERANCE, direction)

    return [of(case, direction) for case in found for direction in (FORWARD, BOTH)]


def main(argv: Sequence[str] | None = None, meter: Meter | None = None) -> int:
    """Returns the exit status. meter: how to measure; None makes one for --device."""
    from pycompress.bench.distill_loss import OPTIONS, cases
    from pycompress.bench.options import names_of

    parsed_by = parser("distill_loss --device cuda", __doc__ or "", CELL_SECONDS)
    parsed_by.add_argument("--cases", type=cases, metavar="TxV,TxHxV,...", help="default: vocabularies up to 128256")
    parsed_by.add_argument(
        "--options", type=names_of(OPTIONS), metavar="NAME,...", help=f"with --cases; of {', '.join(OPTIONS)}"
    )
    options = parsed_by.parse_args(argv)
    if options.options and not options.cases:
        parsed_by.error("--options: expected --cases beside it")
    wanted = list(QUICK_CASES if options.quick else CASES)
    if options.cases:
        chosen = [OPTIONS[name] for name in options.options] if options.options else [MAIN]
        wanted = [replace(case, options=of_loss) for case in options.cases for of_loss in chosen]
    return command("distill_loss", options, parsed_by, gpu_cases(wanted), CELL_SECONDS, meter)
